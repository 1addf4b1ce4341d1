"""How the tokens of a rollout, or of a window, become one feature: the table of poolings and its plain rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Pooling(NamedTuple):
    """What a pooling reads and what it leaves; everything but the arithmetic of kernels follows from it.

    Attributes:
        code: its number in ``csrc/core/pooling.h``.
        last_only: it reads K = 1 of the G tokens, the last one that counts; otherwise K = G.
        adds_up: the K tokens become one.
        own_axis: the K tokens stay apart, in an axis before F; otherwise they stand side by side within each layer.
    """

    code: int
    last_only: bool = False
    adds_up: bool = False
    own_axis: bool = False

    @property
    def side_by_side(self) -> bool:
        """Whether a feature has its K tokens side by side within each layer."""
        return not (self.last_only or self.adds_up or self.own_axis)

    def shape(self, steps: int, layers: int, channels: int) -> tuple[int, ...]:
        """Of the feature of one rollout, or window, of K = ``steps`` tokens: (F,), or (K, F) with an own axis."""
        kept = 1 if self.adds_up else steps
        return (kept, layers * channels) if self.own_axis else (layers * kept * channels,)


#: By the names that the public options take.
POOLINGS = {
    "last_token": Pooling(0, last_only=True),
    "mean": Pooling(1, adds_up=True),
    "concat": Pooling(2),
    "token": Pooling(3, own_axis=True),
}
#: Their order is that of their numbers in ``csrc/core/pooling.h``.
NORMALIZATIONS = ("joint", "per_layer", "none")
#: What a token's norm is at least, as in ``torch.nn.functional.normalize``.
SHORTEST_TOKEN = 1e-12


def combine(tokens: Tensor, counted: Tensor, pooling: str) -> Tensor:
    """Pool the features of all tokens.

    Args:
        tokens: [..., G, L, C], zero where a token does not count.
        counted: [..., G] bool, which do (broadcasts).
        pooling: a key of ``POOLINGS``.

    Returns:
        [..., F], or [..., G, F] for ``"token"``.
    """
    if pooling == "token":
        return tokens.flatten(-2)
    if pooling == "concat":
        return tokens.movedim(-2, -3).flatten(-3)  # layers outermost
    if pooling == "mean":
        return tokens.mean(-3).flatten(-2)
    last = last_counted(counted).expand(*tokens.shape[:-3], 1)[..., None, None]
    return tokens.gather(-3, last.expand(*tokens.shape[:-3], 1, *tokens.shape[-2:])).flatten(-3)


def last_counted(counted: Tensor) -> Tensor:
    """[..., G] bool -> [..., 1] int64, the last step that counts; 0 if none does: that token is zero, as all are."""
    steps = torch.arange(counted.shape[-1], device=counted.device)
    return torch.where(counted, steps, 0).amax(-1, keepdim=True)
