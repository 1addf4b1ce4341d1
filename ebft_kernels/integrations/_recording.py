"""What decoding computes, kept for the forward over the finished rollouts: the same layers over the same rows.

Decoding runs the prompt once and each step of the rollouts once, which are all rows that are scored, with the weights
that score them. So the differentiable forward need not compute them again. Where it *replays* a recording, every linear
layer and the attention give what they gave before, as functions whose gradient is the usual one, and what lies between
(norms, activations, rotary embeddings, sums) is computed from that. What autograd keeps is what it always keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._dispatch import autocast_inputs
from ..layout import StridedLayout, check_layout
from ._model_check import drawn_in_train_mode, seen_to_draw
from ._models import base_model, decoder_of, facts


class ForwardRecording:
    """What the linear layers and the attention of a model computed while rollouts were decoded, in packed order.

    Give it to the forwards of decoding and then to one over the packed rows, which takes what it replays out of it:

        recording = ForwardRecording(model, layout)
        cache = StridedCache(layout)
        ... strided_attention_context(model, layout, cache=cache, recording=recording)             the prompt
        ... strided_attention_context(model, layout, cache=cache, step=g, recording=recording)     g = 0 .. G-2
        if not recording.obstacle:
            with strided_attention_context(model, recording.layout, recording=recording) as kwargs:
                model(input_ids=recording.layout.pack(prompt, rollouts[..., :-1]), **kwargs)

    The vocabulary head is not part of it. In between, weights, adapters and autocast must stay as they are;
    :func:`replay_obstacle` tells what else stands in the way.

    Args:
        model: as for :func:`strided_attention_context`.
        layout: of the rollouts that are decoded.

    Attributes:
        layout: of the rows that are recorded: ``layout.without_last_step()``.
    """

    def __init__(self, model: nn.Module, layout: StridedLayout) -> None:
        check_layout(layout)
        self.layout = layout.without_last_step()
        self._sampled = layout
        self._decoder = decoder_of(base_model(model))
        self._linear = [module for module in self._decoder.modules() if type(module) is nn.Linear]
        self._kept: dict[nn.Module, list[Tensor]] = {}
        self._phases: dict[nn.Module, int] = {}
        self._obstacle = ""

    @property
    def obstacle(self) -> str:
        """Why it cannot be replayed; empty if it can. Found while recording: a layer that does not run once in every
        forward over all of its rows, as the experts of a mixture do not."""
        if not self._obstacle:
            for module, phases in self._phases.items():
                if phases <= self.layout.horizon:
                    return f"{self._name(module)} ran in {phases} of {self.layout.horizon + 1} forwards of decoding"
            if not self._kept:
                return "nothing is recorded"
        return self._obstacle

    def keep(self, module: nn.Module, step: int | None, *results: Tensor) -> None:
        """Keep what ``module`` gave for the rows of a step, or of the prompt: each [B, rows, ...]."""
        if self._obstacle:
            return
        layout = self.layout
        rows = layout.length if step is None else layout.num_anchors * layout.samples
        wrong = [x for x in results if x.ndim < 3 or x.shape[:2] != (layout.batch_size, rows)]
        phase = 0 if step is None else step + 1
        if wrong or self._phases.get(module, 0) != phase:
            shape = f"[{layout.batch_size}, {rows}, ...]"
            what = f"gives {list(wrong[0].shape)}, not {shape}" if wrong else "does not run once in each forward"
            self._obstacle = f"{self._name(module)} {what}"
            self._kept.clear()
            return
        if step is None:
            self._kept[module] = [x.new_empty(layout.batch_size, layout.packed_length, *x.shape[2:]) for x in results]
        for buffer, x in zip(self._kept[module], results, strict=True):
            (buffer[:, : layout.length] if step is None else layout.step_rows(buffer, step)).copy_(x.detach())
        self._phases[module] = phase + 1

    def take(self, module: nn.Module) -> list[Tensor]:
        """What ``module`` gave for all rows, each [B, S, ...]; it is not kept any longer."""
        if module not in self._kept:
            raise RuntimeError(
                f"{self._name(module)}: decoding ran it less often than the forward; compute that without a recording"
            )
        return self._kept.pop(module)

    @contextmanager
    def running(self, layout: StridedLayout, step: int | None, *, replay: bool) -> Iterator[None]:
        """For one forward: linear layers keep what they compute, or give what they computed before."""
        self._check(layout, step, replay)
        for module in self._linear:
            vars(module)["forward"] = partial(self._replay if replay else partial(self._record, step), module)
        try:
            yield
        finally:
            for module in self._linear:
                del vars(module)["forward"]
        if replay and self._kept:
            name = self._name(next(iter(self._kept)))
            raise RuntimeError(f"{name}: decoding ran it and the forward did not; compute it without a recording")

    def _check(self, layout: StridedLayout, step: int | None, replay: bool) -> None:
        expected = self.layout if replay else self._sampled
        if layout is not expected:
            raise ValueError(f"recording: expected one of this layout, {layout}; got one of {expected}")
        if step is not None and step >= self.layout.horizon:
            raise ValueError(
                f"step: expected less than {self.layout.horizon} with a recording, got {step}: the last token of a "
                "rollout is only ever a target"
            )
        if replay and (obstacle := self.obstacle):
            raise ValueError(f"recording: expected one that can be replayed: {obstacle}")

    def _record(self, step: int | None, module: nn.Linear, x: Tensor) -> Tensor:
        out = nn.Linear.forward(module, x)
        self.keep(module, step, out)
        return out

    def _replay(self, module: nn.Linear, x: Tensor) -> Tensor:
        # The casts of an autocast region are differentiated by themselves, as around F.linear.
        return _ComputedLinear.apply(*autocast_inputs(x, module.weight, module.bias), self.take(module))

    def _name(self, module: nn.Module) -> str:
        return next((name for name, x in self._decoder.named_modules() if x is module), type(module).__name__)


class _ComputedLinear(torch.autograd.Function):
    """``F.linear`` whose result is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, computed: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.has_bias = bias is not None
        return computed[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_x = None if weight is None else (rows @ weight).view(*grad.shape[:-1], -1)
        of_weight = None if x is None else rows.mT @ x.flatten(0, -2)
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def replay_obstacle(model: nn.Module) -> str:
    """Why a forward of ``model``, in the mode that it is in, is to be computed and not replayed; empty if it may be.

    It may be where every matrix product with a weight is an ordinary `nn.Linear`, and the forward is the same function
    in train mode as in eval mode, in which rollouts are decoded.

    Args:
        model: as for :func:`strided_attention_context`.

    Raises:
        TypeError: ``model`` holds no transformers model.
    """
    base = base_model(model)
    for name, module in decoder_of(base).named_modules():
        if reason := _unknown(module):
            return f"{name or type(module).__name__}: {reason}"
    if any(hasattr(x, "_orig_mod") or getattr(x, "_compiled_call_impl", None) is not None for x in model.modules()):
        return "the model is compiled"
    if not model.training:
        return ""
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return "gradient checkpointing keeps no activations"
    for name, module in base.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            return f"{name}: dropout in train mode (p={module.p})"
    drawn = seen_to_draw[base] if base in seen_to_draw else drawn_in_train_mode(base, facts(base))
    return drawn and f"{drawn} in train mode"


def _unknown(module: nn.Module) -> str:
    """What about a module, apart from those within it, is none of a recording's business; empty if nothing."""
    own = list(module.parameters(recurse=False))
    if any(isinstance(x, DTensor) or hasattr(x, "ds_id") for x in own):
        return "its weights are spread over ranks"
    if type(module) is nn.Linear:
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return "its forward is wrapped or hooked"
        return "" if module.weight.is_floating_point() else f"its weight is quantized ({module.weight.dtype})"
    if not isinstance(module, nn.Embedding) and any(x.ndim > 1 for x in own):
        return f"{type(module).__name__} multiplies with weights, and is no nn.Linear"
    return ""
