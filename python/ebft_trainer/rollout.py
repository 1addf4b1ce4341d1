"""Rollouts of all anchors at once: one pass over the prompt, then one short forward per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout
from ebft_kernels._checks import check_int, check_positive, check_tensor
from ebft_kernels.integrations.transformers import OutputHead, StridedCache, apply_head, base_model, evaluation_mode
from ebft_kernels.layout import check_layout
from ebft_kernels.logprob._draw import draw_impl, draw_tokens
from ebft_kernels.logprob._tiled import TILE_BYTES

from .decoding_graphs import StepGraphs, fingerprint, is_recordable

if TYPE_CHECKING:
    from .config import EBFTOptions
    from .replay import RecordedRollouts

# Logits held at once on a CPU: 64 MB in float32. Elsewhere TILE_BYTES: every tile of rows reads the whole weight again.
_CHUNK_NUMEL = 1 << 24
# Rows of logits begin at multiples of so many numbers where kernels load 16 bytes at a time.
_PITCH = 64


@torch.no_grad()
def sample_rollouts(
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_token_ids: Sequence[int] = (),
    vocabulary: int | None = None,
    generator: torch.Generator | None = None,
    recorded: RecordedRollouts | None = None,
    cuda_graphs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Draw ``n`` rollouts of ``G`` tokens at every anchor, each given the prompt before its anchor.

    The prompt runs once for all samples, then each of the G-1 decoding steps runs ``A * n`` rows against the cached
    keys and values; the head runs on the rows that are sampled from, once per anchor for the first token. The model is
    in eval mode meanwhile and afterwards as it was. Rollouts of anchors that are not valid are drawn too and mean
    nothing.

    Args:
        model: a transformers causal language model, wrapped or not.
        prompt: [B, P] int64.
        layout: of the packed rows, on the prompt's device.
        temperature: divides the logits; 0: the most likely token, always.
        top_p: draw from the smallest set of tokens that together have at least this probability; 1: from all.
        top_k: draw from this many most likely tokens (before ``top_p``, whose probabilities then are relative to them);
            0: all.
        eos_token_ids: tokens that end a rollout. What follows the first of them is filled with ``eos_token_ids[0]`` and
            has log-probability 0 (see :func:`before_end`).
        vocabulary: draw token ids below this alone, as if the head had no more rows; None: all.
        generator: of the uniform numbers, on any device; None: torch's default one on the model's device. The same
            state gives the same rollouts on the same machine.
        recorded: keeps what was computed, for :func:`ebft_trainer.scoring.policy_log_probs`; no rollout depends on it.
        cuda_graphs: record the decoding steps at the second call with this model and these sizes, and replay them at
            later ones: the same rollouts with one launch per step. Keys, values and logits stay in memory between the
            calls. What a model is switched to in Python in the meantime, other than autocast and the choice of its
            adapters, is not seen. A model that cannot be recorded is run as always; a line in the log says why. With
            ``recorded`` there are none.

    Returns:
        tokens [B, A, n, G] int64 and log_probs [B, A, n, G] float32 (float64 for a float64 model), of each token under
        the model at ``temperature`` (at 1 where that is 0), before ``top_k`` and ``top_p`` cut the distribution off:
        what a forward over the finished rollouts gives.

    Raises:
        ValueError: an option out of range, a shape or device that does not fit, a model that cannot be run strided.
        TypeError: another type or dtype.
    """
    _check_options(temperature, top_p, top_k)
    check_prompt(prompt, layout)
    sampler = Sampler(temperature, top_p, top_k, statistics=recorded is not None)
    uniform = _uniform_numbers(layout, generator)
    with evaluation_mode(model):
        # What is kept of a forward pass is kept by Python, which a graph does not run.
        plain = not cuda_graphs or recorded is not None or layout.horizon == 1
        if plain or not is_recordable(model, layout.device):
            decoder = _Decoder(layout, sampler, vocabulary, recorded)
            rollouts, scores = decoder.run(model, prompt, uniform)
        else:
            rollouts, scores = _run_recorded(model, prompt, layout, sampler, vocabulary, uniform)
    if not eos_token_ids:
        return rollouts, scores
    alive = before_end(rollouts, eos_token_ids)
    return rollouts.where(alive, eos_token_ids[0]), scores.where(alive, 0)


@dataclass
class _Decoder:
    """Draws the rollouts of a layout step by step, into memory of its own."""

    layout: StridedLayout
    sampler: Sampler
    vocabulary: int | None
    recorded: RecordedRollouts | None = None
    uniform: list[Tensor] = field(default_factory=list)
    log_probs: Tensor | None = None  # [G, B, A*n]

    def __post_init__(self) -> None:
        layout = self.layout
        self.cache = StridedCache(layout)
        self.statistics: list[Tensor] = []  # of each step [R, 2], with `recorded`
        size = (layout.horizon, layout.batch_size, layout.num_anchors * layout.samples)
        self.tokens = torch.empty(size, dtype=torch.int64, device=layout.device)

    def draw(self, model: nn.Module, prompt: Tensor | None, step: int) -> None:
        """The tokens of one step, from the prompt or from the tokens of the step before."""

        def function(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:  # [B, P, C] or [B, A*n, C]
            rows = hidden if step else self.layout.anchor_rows(hidden)  # [B, A, C]
            return self.sampler.draw_rows(rows, head, self.uniform[step])

        last, before = (self.tokens[step - 1], step - 1) if step else (prompt, None)
        recording = None if self.recorded is None else self.recorded.forward
        options = {"cache": self.cache, "step": before, "vocabulary": self.vocabulary, "recording": recording}
        ids, log_probs, *statistics = apply_head(model, last, self.layout, function, **options)
        if self.recorded is not None:
            self.statistics += statistics
        if self.log_probs is None:
            self.log_probs = torch.empty_like(self.tokens, dtype=log_probs.dtype)
        self.tokens[step] = ids.view_as(self.tokens[step])
        self.log_probs[step] = log_probs.view_as(self.tokens[step])

    def run(
        self, model: nn.Module, prompt: Tensor, uniform: list[Tensor], graphs: StepGraphs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities [B, A, n, G] for the uniform numbers of all steps."""
        if graphs is None or not self.uniform:
            self.uniform = uniform
        else:  # recorded steps read them where they were
            for place, numbers in zip(self.uniform, uniform, strict=True):
                place.copy_(numbers)
        self.draw(model, prompt, 0)
        steps = [partial(self.draw, model, None, step) for step in range(1, self.layout.horizon)]
        if graphs is not None:
            graphs.run(model, steps)
        else:
            for step in steps:
                step()
        sizes = (self.layout.num_anchors, self.layout.samples)
        drawn = (x.permute(1, 2, 0).unflatten(1, sizes) for x in (self.tokens, self.log_probs))
        rollouts, scores = (x.clone(memory_format=torch.contiguous_format) for x in drawn)
        if self.recorded is not None:
            self.recorded.drawn(rollouts, scores, self.statistics)
        return rollouts, scores


# Model -> what its recorded steps were recorded with, the decoder that has their memory, and they.
_recorded: WeakKeyDictionary[nn.Module, tuple[object, _Decoder | None, StepGraphs]] = WeakKeyDictionary()


def _run_recorded(
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    sampler: Sampler,
    vocabulary: int | None,
    uniform: list[Tensor],
) -> tuple[Tensor, Tensor]:
    key = (sampler.temperature, sampler.top_p, sampler.top_k, vocabulary, fingerprint(model, layout))
    known, decoder, graphs = _recorded.get(model, (None, None, None))
    if graphs is not None and graphs.refused:
        return _Decoder(layout, sampler, vocabulary).run(model, prompt, uniform)
    if known != key:
        decoder, graphs = _Decoder(layout._copy(), sampler, vocabulary), StepGraphs(layout.device)
    else:
        decoder.layout._refill(layout)
    _recorded[model] = key, decoder, graphs
    drawn = decoder.run(model, prompt, uniform, graphs)
    if graphs.refused:
        _recorded[model] = key, None, graphs
    return drawn


def end_tokens(model: nn.Module, eos_token_ids: Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a rollout: those given, or for None those of the model's generation config, or its config.

    Raises:
        ValueError: one that is given is not in the model's vocabulary.
        TypeError: ``model`` holds no transformers model.
    """
    base = base_model(model)
    if eos_token_ids is not None:
        vocabulary = base.config.get_text_config().vocab_size
        if max(eos_token_ids, default=0) >= vocabulary:
            raise ValueError(f"eos_token_ids: expected token ids below {vocabulary}, got {list(eos_token_ids)}")
        return tuple(eos_token_ids)
    for config in (getattr(base, "generation_config", None), base.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def is_end(tokens: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """[...] bool of tokens [...]: which are among ``eos_token_ids``, of which no tensor has to reach the device."""
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for token in eos_token_ids:
        ends |= tokens == token
    return ends


def before_end(rollouts: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """[..., G] bool of rollouts [..., G]: the tokens up to the first of ``eos_token_ids``, that one included."""
    ends = is_end(rollouts, eos_token_ids)
    return ends.cumsum(-1) - ends.long() == 0


def check_prompt(prompt: object, layout: object) -> None:
    """Raise TypeError / ValueError unless ``layout`` is a StridedLayout and ``prompt`` [B, P] int64 fits it."""
    check_layout(layout)
    sizes = {"B": layout.batch_size, "P": layout.length}
    check_tensor("prompt", prompt, "B P", sizes, dtype=torch.int64, device=layout.device)


def rows_at_once(vocabulary: int) -> int:
    """Rows whose logits are held together on a CPU."""
    return max(1, _CHUNK_NUMEL // vocabulary)


def tile_rows(rows: int, vocabulary: int, impl: str, itemsize: int, device_type: str) -> int:
    """Rows of logits with ``itemsize`` bytes each that are drawn from together, of ``rows``.

    On an accelerator as many as :data:`TILE_BYTES` hold, and no tile much smaller than the others: the weight is read
    once for each.
    """
    if device_type == "cpu":
        return rows_at_once(vocabulary)
    # In PyTorch there are sorted probabilities, their ids and two tensors of integers beside the logits.
    most = max(1, TILE_BYTES // (vocabulary * (itemsize if impl == "triton" else 32)))
    return -(-rows // max(-(-rows // most), 1)) or 1


def _check_options(temperature: float, top_p: float, top_k: int) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature}")
    if temperature:
        check_positive("temperature", temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0, at most 1, got {top_p}")
    check_int("top_k", top_k, minimum=0)


def _uniform_numbers(layout: StridedLayout, generator: torch.Generator | None) -> list[Tensor]:
    """For each step the float64 numbers that its tokens are drawn with: [B*A, n], then G-1 times [B*A*n, 1].

    float64, so that improbable tokens keep their probability. All before the first step: a generator on another device
    is waited for once, and how rows are cut into tiles changes no rollout.
    """
    anchors, samples = layout.batch_size * layout.num_anchors, layout.samples
    device = layout.device if generator is None else generator.device
    shapes = [(anchors, samples)] + [(anchors * samples, 1)] * (layout.horizon - 1)
    numbers = [torch.rand(x, dtype=torch.float64, device=device, generator=generator) for x in shapes]
    return [x.to(layout.device) for x in numbers]


@dataclass
class Sampler:
    """How tokens are drawn, and memory for logits: fresh pages in every step would cost as much as the softmax."""

    temperature: float
    top_p: float
    top_k: int
    statistics: bool = False
    memory: Tensor | None = None  # [rows, V]

    def draw_rows(self, rows: Tensor, head: OutputHead, uniform: Tensor) -> tuple[Tensor, ...]:
        """Hidden states [..., C] and uniform numbers [R, d] -> ids and log-probabilities [R, d], d for each row; with
        ``statistics`` of each row's logits the largest and the logarithm of the sum of ``exp(logit - largest)``,
        [R, 2]."""
        rows = rows.flatten(0, -2)
        weight, temperature, memory = head.weight, self.temperature, None
        impl = draws_by(self, rows.device, weight.dtype)
        size = tile_rows(len(rows), weight.shape[0], impl, weight.dtype.itemsize, rows.device.type)
        # In 16 bits a quotient is rounded once more, and may be too large for float16.
        if not torch.is_autocast_enabled(rows.device.type) and weight.dtype != torch.float16:
            head, temperature = head.at_temperature(temperature or 1.0), float(temperature > 0)
            memory = self._memory_for(size, weight, impl)
        parts = []
        for some, numbers in zip(rows.split(size), uniform.split(size), strict=True):
            logits = head.logits(some, None if memory is None else memory[: len(some)])
            options = {"temperature": temperature, "top_p": self.top_p, "top_k": self.top_k, "impl": impl}
            options["statistics"] = self.statistics
            parts.append(draw_tokens(logits, numbers, **options))
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))

    def _memory_for(self, rows: int, weight: Tensor, impl: str) -> Tensor:
        """[rows, V]"""
        if self.memory is None or len(self.memory) < rows:
            vocabulary, pitch = weight.shape[0], _PITCH if impl == "triton" else 1
            self.memory = weight.new_empty(rows, -(-vocabulary // pitch) * pitch)[:, :vocabulary]
        return self.memory[:rows]


def draws_by(options: Sampler | EBFTOptions, device: torch.device | str, dtype: torch.dtype) -> str:
    """Who draws tokens from such logits: see :func:`ebft_kernels.logprob._draw.draw_impl`."""
    cut = options.temperature == 0 or options.top_k > 0 or options.top_p < 1
    return draw_impl(device, dtype, cut=cut)
