"""Rollouts of all anchors at once: one pass over the prompt, then one short forward per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout, select_impl
from ebft_kernels._checks import check_int, check_positive, check_tensor
from ebft_kernels.integrations.transformers import OutputHead, StridedCache, apply_head, base_model, evaluation_mode
from ebft_kernels.layout import check_layout
from ebft_kernels.logprob._native import block_statistics

if TYPE_CHECKING:
    from .config import EBFTOptions
    from .replay import RecordedRollouts

# Logits held at once: 64 MB in float32.
_CHUNK_NUMEL = 1 << 24
# Probabilities per block of the two-level search: whole blocks are added up first, then one block token by token.
_BLOCK = 128


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
    cache = StridedCache(layout)
    sampler = _Sampler(temperature, top_p, top_k, generator)
    recording = None if recorded is None else recorded.forward
    tokens, log_probs, statistics = [], [], []

    def first(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:  # hidden [B, P, C]
        rows = layout.anchor_rows(hidden)  # [B, A, C]
        return sampler.draw_rows(rows, head, layout.samples)

    def later(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:  # hidden [B, A*n, C]
        return sampler.draw_rows(hidden, head, 1)

    with evaluation_mode(model):
        for step in range(layout.horizon):
            if step == 0:
                drawn = apply_head(
                    model, prompt, layout, first, cache=cache, vocabulary=vocabulary, recording=recording
                )
            else:
                last, at = tokens[-1].flatten(1), {"cache": cache, "step": step - 1}
                drawn = apply_head(model, last, layout, later, **at, vocabulary=vocabulary, recording=recording)
            for part, results in zip(drawn, (tokens, log_probs), strict=False):
                results.append(part.view(layout.batch_size, layout.num_anchors, layout.samples))
            statistics.append(drawn[2])
    rollouts, scores = torch.stack(tokens, 3), torch.stack(log_probs, 3)
    if recorded is not None:
        recorded.drawn(rollouts, scores, statistics)
    if not eos_token_ids:
        return rollouts, scores
    alive = before_end(rollouts, eos_token_ids)
    return rollouts.where(alive, eos_token_ids[0]), scores.where(alive, 0)


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


def before_end(rollouts: Tensor, eos_token_ids: Sequence[int]) -> Tensor:
    """[..., G] bool of rollouts [..., G]: the tokens up to the first of ``eos_token_ids``, that one included."""
    ends = torch.isin(rollouts, torch.tensor(eos_token_ids, device=rollouts.device))
    return ends.cumsum(-1) - ends.long() == 0


def check_prompt(prompt: object, layout: object) -> None:
    """Raise TypeError / ValueError unless ``layout`` is a StridedLayout and ``prompt`` [B, P] int64 fits it."""
    check_layout(layout)
    sizes = {"B": layout.batch_size, "P": layout.length}
    check_tensor("prompt", prompt, "B P", sizes, dtype=torch.int64, device=layout.device)


def rows_at_once(vocabulary: int) -> int:
    """Rows whose logits are held together."""
    return max(1, _CHUNK_NUMEL // vocabulary)


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


@dataclass
class _Sampler:
    """How tokens are drawn, and memory for logits: fresh pages in every step would cost as much as the softmax."""

    temperature: float
    top_p: float
    top_k: int
    generator: torch.Generator | None
    memory: Tensor | None = None  # [rows, V]

    def draw_rows(self, rows: Tensor, head: OutputHead, draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [..., C] -> ids and log-probabilities [R, draws] of tokens drawn from each of the R rows, and
        of each row's logits the largest and the logarithm of the sum of ``exp(logit - largest)``, [R, 2]."""
        rows = rows.flatten(0, -2)
        device = rows.device if self.generator is None else self.generator.device
        # All at once, so that the chunk size changes no rollout; float64, so that improbable tokens keep their
        # probability.
        uniform = torch.rand(rows.shape[0], draws, dtype=torch.float64, device=device, generator=self.generator)
        size = rows_at_once(head.weight.shape[0])
        parts = zip(rows.split(size), uniform.to(rows.device).split(size), strict=True)
        drawn = (self._draw(self._logits(part, head), numbers) for part, numbers in parts)
        return tuple(torch.cat(x) for x in zip(*drawn, strict=True))

    def _logits(self, rows: Tensor, head: OutputHead) -> Tensor:
        """[R, C] -> [R, V], over the temperature."""
        temperature = self.temperature or 1.0
        # In 16 bits a quotient is rounded once more, and may be too large for float16.
        if torch.is_autocast_enabled(rows.device.type) or head.weight.dtype == torch.float16:
            logits = head.logits(rows)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
        if self.memory is None or len(self.memory) < len(rows):
            self.memory = head.weight.new_empty(len(rows), head.weight.shape[0])
        return head.at_temperature(temperature).logits(rows, self.memory[: len(rows)])

    def _draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, log-probabilities [R, d] and statistics [R, 2] from logits [R, V], which may be overwritten, and uniform
        numbers [R, d]."""
        if draws_by_blocks(self, logits.device, logits.dtype):
            return draw_by_blocks(logits, uniform)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = logits.amax(-1, keepdim=True)
        if self.temperature == 0:
            log_probability = logits.log_softmax(-1)
            index = logits.argmax(-1, keepdim=True)
            scored = log_probability.gather(1, index)
            statistics = torch.cat([largest, -scored], 1)
            return index.expand_as(uniform), scored.expand_as(uniform), statistics
        probability = logits.sub_(largest).exp_()
        total = probability.sum(-1, keepdim=True)
        probability.div_(total)
        index = draw(probability, uniform, top_p=self.top_p, top_k=self.top_k)
        return index, probability.gather(1, index).log_(), torch.cat([largest, total.log_()], 1)


def draws_by_blocks(options: _Sampler | EBFTOptions, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether tokens are drawn from all of the softmax, and there is compiled code for such logits: in PyTorch all
    probabilities in place take less time, and less memory."""
    from_all = options.temperature > 0 and not options.top_k and options.top_p == 1
    return from_all and select_impl("linear_log_probs", device, dtype) == "native"


def draw_by_blocks(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens drawn from the softmax of each row, by inverting the cumulative distribution: first of blocks of tokens,
    then of the tokens of one block, the only ones whose probabilities are computed.

    Args:
        logits: [R, V] on the CPU.
        uniform: [R, d] float64 in [0, 1).

    Returns:
        Ids [R, d] int64, never of a token of probability 0, and their log-probabilities, float32 (float64 for float64
        logits); of each row the largest logit and the logarithm of the sum of ``exp(logit - largest)``, [R, 2].
    """
    vocabulary = logits.shape[1]
    largest, total = block_statistics(logits, _BLOCK)  # [R, V/128]
    of_all = largest.amax(1, keepdim=True)
    mass = (largest - of_all).exp_().mul_(total)
    block, uniform = _search(mass, uniform)  # [R, d]
    column = block[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)  # [R, d, 128]
    nearby = logits.gather(1, column.clamp_max(vocabulary - 1).flatten(1)).view(column.shape).to(mass.dtype)
    probability = (nearby - of_all[:, :, None]).exp_().where(column < vocabulary, 0)
    within, _ = _search(probability, uniform[:, :, None])
    log_total = mass.sum(1, keepdim=True).log_()
    log_probs = nearby.gather(2, within)[..., 0] - of_all - log_total
    ids = column.gather(2, within)[..., 0].clamp_max_(vocabulary - 1)
    return ids, log_probs, torch.cat([of_all, log_total], 1)


def draw(probability: Tensor, uniform: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Ids [R, d] drawn from the rows of ``probability`` [R, V] by inverting the cumulative distribution.

    Args:
        probability: [R, V], at least 0, each row with a sum near 1.
        uniform: [R, d] float64 in [0, 1).
        top_p, top_k: as for :func:`sample_rollouts`.

    Returns:
        [R, d] int64; never a token of probability 0.
    """
    vocabulary = probability.shape[1]
    if top_k:
        largest, ids = probability.topk(min(top_k, vocabulary))
        return ids.gather(1, _invert(_nucleus(largest, top_p), uniform))
    if top_p == 1:
        return _invert(probability, uniform)
    # A full sort is slow on a CPU and rarely needed; asking whether it is needed is slow everywhere else.
    return _draw_nucleus(probability, uniform, top_p, 64 if probability.device.type == "cpu" else vocabulary)


def _draw_nucleus(probability: Tensor, uniform: Tensor, top_p: float, size: int) -> Tensor:
    """As :func:`draw`, trying the ``size`` most likely tokens first."""
    whole = size * 8 > probability.shape[1]
    largest, ids = probability.sort(1, descending=True) if whole else probability.topk(size)
    index = ids.gather(1, _invert(_nucleus(largest, top_p, of_all=True), uniform))
    if not whole:
        short = largest.sum(1, dtype=torch.float64) < top_p
        if short.any():
            index[short] = _draw_nucleus(probability[short], uniform[short], top_p, 16 * size)
    return index


def _nucleus(largest: Tensor, top_p: float, *, of_all: bool = False) -> Tensor:
    """Descending probabilities [R, K]; 0 from where those before add up to ``top_p`` (of the sum of all K, or of 1)."""
    if top_p == 1:
        return largest
    cumulative = largest.cumsum(1, dtype=torch.float64)
    total = 1.0 if of_all else cumulative[:, -1:]
    before = cumulative - largest
    return largest.where(before < top_p * total, 0)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """Index [R, d] where the cumulative sum of ``mass`` [R, K], divided by its total, passes ``uniform`` [R, d]."""
    if mass.shape[1] <= 16 * _BLOCK:
        return _search(mass, uniform)[0]
    # A cumulative sum over the vocabulary costs more than the softmax; block sums are cheap.
    missing = -mass.shape[1] % _BLOCK
    blocks = nn.functional.pad(mass, (0, missing)) if missing else mass  # padding by nothing would copy
    blocks = blocks.unflatten(1, (-1, _BLOCK))  # [R, K/128, 128]
    block, uniform = _search(blocks.sum(2), uniform)
    rows = torch.arange(mass.shape[0], device=mass.device)[:, None]
    within, _ = _search(blocks[rows, block], uniform[..., None])
    return (block * _BLOCK + within[..., 0]).clamp_max_(mass.shape[1] - 1)  # NaN may lead to the padding


def _search(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index that ``uniform`` [..., d] falls on in ``mass`` [..., K], and how far into its mass, from 0 to 1."""
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:].contiguous()
    target = uniform * total
    index = torch.searchsorted(cumulative, target, right=True)
    # Rounding may put a target at the total: the last index with any mass, not the one after it.
    index = index.minimum(torch.searchsorted(cumulative, total)).clamp_max_(mass.shape[-1] - 1)
    own = mass.gather(-1, index).double()
    return index, (target - (cumulative.gather(-1, index) - own)).div_(own).clamp_(0, 1)
