"""Log-probabilities by tiles of the logits, in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import _tiled
from ._tiled import Tile


def _add(tile: Tile, largest: Tensor, total: Tensor, at_target: Tensor) -> None:
    logits, _ = _logits(tile, largest.dtype)
    index, inside = _targets(tile)
    torch.where(inside, logits[index], at_target, out=at_target)
    before = largest.clone()
    torch.maximum(largest, logits.amax(1), out=largest)
    added = logits.sub_(largest[:, None]).exp_().sum(1)
    total.mul_(before.sub_(largest).exp_()).add_(added)


def _differentiate(tile: Tile, largest: Tensor, log_total: Tensor, whole_upstream: Tensor, upstream: Tensor) -> None:
    logits, slope = _logits(tile, largest.dtype, slope=True)
    index, inside = _targets(tile)
    logits.sub_(largest[:, None]).sub_(log_total[:, None]).exp_().mul_(whole_upstream[:, None])
    logits.index_put_(index, upstream.where(inside, 0).neg_(), accumulate=True)
    if slope is not None:
        logits.mul_(slope)
    if logits is not tile.data:
        tile.data.copy_(logits)


def _logits(tile: Tile, dtype: torch.dtype, *, slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """The logits of a tile [M, N] over the temperature and, for ``slope``, the soft cap's derivative [M, N]; may be the
    tile's own memory."""
    logits = tile.data.to(dtype)
    if not tile.softcap:
        return logits, None
    logits.tanh_()
    derivative = logits.square().neg_().add_(1) if slope else None
    return logits.mul_(tile.softcap), derivative


def _targets(tile: Tile) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the targets [T] are in a tile, and whether; those that are not, anywhere."""
    where = tile.targets.rows - tile.rows.start, tile.targets.ids - tile.columns.start
    last = [size - 1 for size in tile.data.shape]
    outside = [(index < 0) | (index > most) for index, most in zip(where, last, strict=True)]
    row, column = (index.clamp(0, most) for index, most in zip(where, last, strict=True))
    return (row, column), ~(outside[0] | outside[1])


forward = partial(_tiled.forward, _add)
backward = partial(_tiled.backward, _differentiate)
