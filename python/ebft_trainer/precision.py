"""Whether the weights can hold the steps that are taken: a warning before training, a measurement in its first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

# Entries of a tensor that stand for all of it.
_SAMPLE = 4096

logger = logging.getLogger(__name__)


def check_dtypes(model: nn.Module, *, fp16: bool, masters: bool) -> None:
    """Warn of trained weights in 16 bits, which most steps of fine-tuning leave exactly as they were.

    A bfloat16 has 8 significant bits: a change below 1/512 of a weight, as a learning rate of 1e-6 gives, is rounded
    away.

    Args:
        model: that will be trained.
        fp16: training scales its gradients for float16.
        masters: the engine (DeepSpeed) keeps float32 copies that the optimizer changes.

    Raises:
        ValueError: float16 weights with ``fp16``: the gradient scaler takes float32 gradients only.
    """
    if masters:
        return
    sizes: dict[torch.dtype, int] = {}
    for x in model.parameters():
        if x.requires_grad:
            sizes[x.dtype] = sizes.get(x.dtype, 0) + x.numel()
    if fp16 and torch.float16 in sizes:
        raise ValueError("fp16: expected float32 weights to train, got float16; load them with dtype=torch.float32")
    narrow = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in sizes]
    if narrow:
        share = sum(sizes[dtype] for dtype in narrow) / sum(sizes.values())
        logger.warning(
            "%.0f %% of the weights that are trained are in %s, where most steps are too small to change them and are "
            "lost; load the model with dtype=torch.float32 and train with bf16=True (--dtype float32 --bf16), where "
            "products are in bfloat16 and weights are not",
            100 * share,
            " and ".join(str(dtype).removeprefix("torch.") for dtype in narrow),
        )


class _Sample(NamedTuple):
    parameter: Tensor
    before: Tensor  # [N]
    has_gradient: Tensor  # [N] bool


class WeightsMoved(TrainerCallback):
    """Measures the share of weights with a gradient that one optimizer step changes, from a sample of each tensor.

    A gradient below Adam's epsilon, for which it takes less than half a step, is none. That step is the first of a run
    that starts anew with at least half of the full learning rate, so that a warm-up is not what is measured. With
    weights that are spread over ranks each rank measures its own.
    """

    def __init__(self) -> None:
        self._wanted = False
        self._samples: list[_Sample] = []
        self._share: float | None = None

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_others: Any) -> None:
        """Measure unless a run is resumed."""
        self._wanted = state.global_step == 0

    def on_pre_optimizer_step(self, args: Any, _state: Any, _control: Any, **others: Any) -> None:
        """Keep a sample of the weights."""
        rate = max(group["lr"] for group in others["optimizer"].param_groups)
        if self._wanted and 0 < args.learning_rate <= 2 * rate:
            self._samples = list(_samples(others["model"].parameters(), args.adam_epsilon))

    def on_optimizer_step(self, _args: Any, _state: Any, _control: Any, **others: Any) -> None:
        """Compare."""
        samples, self._samples = self._samples, []
        if not samples or getattr(others["optimizer"], "step_was_skipped", False):
            return
        self._wanted = False
        # Each entry of a sample stands for as many of its tensor.
        scale = [x.parameter.numel() / len(x.before) for x in samples]
        moved = [((_sample(x.parameter) != x.before) & x.has_gradient).sum() for x in samples]
        counted = sum(n * x.has_gradient.sum().item() for n, x in zip(scale, samples, strict=True))
        if counted:
            self._share = sum(n * x.item() for n, x in zip(scale, moved, strict=True)) / counted

    def take(self) -> dict[str, float]:
        """``weights_moved``, once after it was measured; else nothing."""
        share, self._share = self._share, None
        return {} if share is None else {"weights_moved": share}


def _samples(parameters: Iterable[Tensor], least: float) -> Iterable[_Sample]:
    for x in parameters:
        if x.grad is not None and x.grad.numel():
            yield _Sample(x, _sample(x).clone(), _sample(x.grad).abs() > least)


def _sample(x: Tensor) -> Tensor:
    """Some entries [N] of what this rank has of ``x``, always the same."""
    flat = (x.detach().to_local() if isinstance(x, DTensor) else x.detach()).flatten()
    if len(flat) <= _SAMPLE:
        return flat
    # Drawn: entries at equal distances might all be of one column.
    index = torch.randint(len(flat), (_SAMPLE,), generator=torch.Generator().manual_seed(0))
    return flat[index.to(flat.device)]
