"""Whether a model gives the right numbers over packed rows: what is known of its class, then a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..layout import StridedLayout
from ._models import ModelFacts, attention_dropout, base_model, evaluation_mode
from ._output_head import OutputHead, in_place_of_head
from ._strided_attention import Selection

# Rollout tokens of the probe at the trained length, and tokens of one piece of its ordinary forwards.
_LONG_HORIZON, _PIECE = 3, 512
# Root-mean-square error of a row of logits, in standard deviations of all logits, that may be rounding. Measured on
# tiny random models: rounding gives below 1e-5 in float32 and about 0.02 in bfloat16; layers that ignore the layout
# between 5e-4 and 1, as a rule above 0.1.
_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}


#: Model -> what it was last seen to draw in train mode, but for modules that say so themselves.
seen_to_draw: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class ModelSupport(NamedTuple):
    """Whether a model can be run strided.

    Attributes:
        ok: it can.
        reason: why not; empty when it can.
        architecture: the config's ``model_type``.
    """

    ok: bool
    reason: str
    architecture: str

    def require(self) -> None:
        """Do nothing if the model can be run strided.

        Raises:
            ValueError: it cannot; the message names the architecture and the feature.
        """
        if not self.ok:
            raise ValueError(f"{self.architecture}: cannot be run strided: {self.reason}")


def static_reason(model: nn.Module, known: ModelFacts, training: bool) -> str:
    """What class and config have against strided attention; empty if nothing."""
    if known.obstacle:
        return known.obstacle
    if training and (dropout := attention_dropout(model)) is not None:
        name, value = dropout
        return f"attention dropout ({name}={value}), which the attention of packed rows does not have; set it to 0"
    return ""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradient, exact float32 products; modes, precision and random states are put back afterwards."""
    precision = torch.get_float32_matmul_precision()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluation_mode(model):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def probe_layout(device: torch.device) -> StridedLayout:
    """27 packed tokens: 9 of a prompt, three anchors with two rollouts of three tokens each."""
    return StridedLayout.strided(1, 9, context=2, stride=2, horizon=3, samples=2, device=device)


def probe_tokens(model: nn.Module, layout: StridedLayout) -> Tensor:
    """[1, S] fixed token ids without the special ones of the config."""
    base = base_model(model)
    weight = base.get_input_embeddings().weight
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor behind
    special: set[Any] = set()
    for name, value in base.config.to_dict().items():
        if name.endswith("token_id"):
            special.update(value if isinstance(value, list) else [value])
    drawn = torch.randint(vocabulary, (1024,), generator=torch.Generator().manual_seed(0)).tolist()
    ordinary = [token for token in drawn if token not in special] or drawn
    rows = [ordinary[i % len(ordinary)] for i in range(layout.packed_length)]
    return torch.tensor([rows], device=layout.device)


def long_layout(length: int, device: torch.device) -> StridedLayout:
    """A prompt of ``length`` tokens (or a few, if that is less), an anchor in its middle and one at its end."""
    length = max(length, 2 * _LONG_HORIZON + 2)
    anchors = torch.tensor([[length // 2, length - _LONG_HORIZON]], device=device)
    return StridedLayout.from_anchors(anchors, length, horizon=_LONG_HORIZON, samples=1)


def plain_tail_logits(
    model: nn.Module, tokens: Tensor, layout: StridedLayout, known: ModelFacts, form: tuple[float, float | None]
) -> Tensor:
    """[1, A, 1, G, V]: the logits that predict each rollout token of a `long_layout`, from ordinary forwards.

    Over each prefix and rollout alone, piece by piece with transformers' own cache: no more scores than those of a
    piece are there at once, whatever the length and the attention.
    """
    base = base_model(model)
    prompt, rollouts = tokens[:, : layout.length], layout.rollouts(tokens)
    # Some versions of transformers ignore a soft cap under "sdpa"; a piece's scores are few.
    capped = any(getattr(config, "attn_logit_softcapping", None) for config in known.configs)
    fused = getattr(base, "_supports_sdpa", False) and not capped
    selection = Selection(known.configs, "sdpa" if fused else "eager")
    short = {"logits_to_keep": 1} if known.keeps_logits else {}
    found: list[Tensor] = []

    def keep(hidden: Tensor, head: OutputHead) -> None:
        found.append(head.logits(hidden[:, -layout.horizon :]))

    try:
        tails = []
        for index, anchor in enumerate(layout.anchors[0].tolist()):
            row = torch.cat([prompt[:, :anchor], rollouts[:, index, 0, :-1]], 1)
            # The last piece is a whole one: the tail lies in it.
            starts = [0, *range((row.shape[1] - 1) % _PIECE + 1, row.shape[1], _PIECE), row.shape[1]]
            cache = DynamicCache()
            with in_place_of_head(model, form, keep):
                for start, end in pairwise(starts):
                    model(input_ids=row[:, start:end], use_cache=True, **{known.cache_keyword: cache}, **short)
            tails.append(found[-1])
            found.clear()
    finally:
        selection.undo()
    return torch.stack(tails, 1)[:, :, None]


def plain_logits(model: nn.Module, tokens: Tensor, layout: StridedLayout, known: ModelFacts) -> Tensor:
    """[1, S, V] in packed order from ordinary eager forwards, one over the prompt and one for each anchor."""
    prompt, rollouts = tokens[:, : layout.length], layout.rollouts(tokens)
    selection = Selection(known.configs, "eager")
    try:
        parts = [model(input_ids=prompt, use_cache=False).logits]
        for index, anchor in enumerate(layout.anchors[0].tolist()):
            own = rollouts[0, index]  # [n, G]
            rows = torch.cat([prompt[:, :anchor].expand(layout.samples, -1), own], 1)
            logits = model(input_ids=rows, use_cache=False).logits[:, -layout.horizon :]
            parts.append(logits.flatten(0, 1)[None])
    finally:
        selection.undo()
    return torch.cat(parts, 1)


def drawn_in_train_mode(model: nn.Module, known: ModelFacts) -> str:
    """What makes a forward in train mode another one than in eval mode; empty if nothing does."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"dropout ({name}, p={module.p})"
    # Functions of torch.nn.functional, layers that are left out, noise on a router.
    layout = probe_layout(base_model(model).get_input_embeddings().weight.device)
    prompt = probe_tokens(model, layout)[:, : layout.length]
    logits = []
    selection = Selection(known.configs, "eager")
    try:
        with undisturbed(model):
            for mode in (False, True):
                model.train(mode)
                logits.append(model(input_ids=prompt, use_cache=False).logits)
    finally:
        selection.undo()
    found = ""
    if disagreement(*logits, layout.length // 2, "a forward in train mode"):
        kinds = ("drop", "jitter")
        options = known.config.to_dict().items()
        set_to = [f"{k}={v}" for k, v in options if isinstance(v, float) and v > 0 and any(kind in k for kind in kinds)]
        found = f"noise or dropout ({', '.join(set_to) or 'of a layer'})"
    seen_to_draw[base_model(model)] = found
    return found


def not_finite(model: nn.Module, plain: Tensor) -> str:
    """What to say about logits of ordinary forwards that are not all finite; empty if they are."""
    if plain.isfinite().all():
        return ""
    broken = [name for name, x in model.named_parameters() if x.is_floating_point() and not x.isfinite().all()]
    if not broken:
        return f"its logits are not finite for ordinary tokens, though its weights are: it overflows in {plain.dtype}"
    return f"its weights are not finite: NaN or infinity in {broken[0]} and {len(broken) - 1} other parameters"


def disagreement(logits: Tensor, plain: Tensor, prompt_rows: int, what: str) -> str:
    """What to say about logits [1, R, V] that are not the plain ones but for rounding; empty if they are.

    The first ``prompt_rows`` rows are of the prompt, the others of rollouts.
    """
    if logits.shape != plain.shape:
        return f"{what} gives logits of shape {list(logits.shape)} instead of {list(plain.shape)}"
    rounding = _ROUNDING[plain.dtype]
    logits, plain = logits.double(), plain.double()
    error = ((logits - plain).square().mean(-1)[0] / plain.var()).sqrt()  # [R]
    # The median in half precision, where rounding may send single rows of a mixture of experts to another expert.
    typical = Tensor.max if rounding < 0.01 else Tensor.median
    prompt, rollouts = (float(typical(part)) for part in (error[:prompt_rows], error[prompt_rows:]))
    # The prompt's rows know nothing of rollouts: their error tells how much this model's layers amplify rounding.
    if prompt <= 2 * rounding and rollouts <= max(rounding, 2 * prompt):
        return ""
    return (
        f"the logits of {what} differ from those of plain forwards by {max(prompt, rollouts):.2g} of their standard "
        f"deviation (rounding: about {rounding}), so some part of the model ignores the layout"
    )
