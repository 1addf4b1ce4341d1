"""Log-probabilities by tiles of the logits, in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import _tiled
from ._tiled import Tile


def _add(tile: Tile, largest: Tensor, total: Tensor, at_target: Tensor) -> None:
    logits, _ = _logits(tile, largest.dtype)
    index, inside = _target(tile)
    torch.where(inside, logits.gather(1, index[:, None])[:, 0], at_target, out=at_target)
    before = largest.clone()
    torch.maximum(largest, logits.amax(1), out=largest)
    added = logits.sub_(largest[:, None]).exp_().sum(1)
    total.mul_(before.sub_(largest).exp_()).add_(added)


def _differentiate(tile: Tile, largest: Tensor, log_total: Tensor, upstream: Tensor) -> None:
    logits, slope = _logits(tile, largest.dtype, slope=True)
    index, inside = _target(tile)
    logits.sub_(largest[:, None]).sub_(log_total[:, None]).exp_()
    logits.scatter_add_(1, index[:, None], inside[:, None].to(logits.dtype).neg_())
    if slope is not None:
        logits.mul_(slope)
    logits.mul_(upstream[:, None])
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


def _target(tile: Tile) -> tuple[Tensor, Tensor]:
    """Where the targets [M] are among the columns of a tile, and whether; elsewhere any column."""
    index, last = tile.targets - tile.columns.start, tile.data.shape[1] - 1
    inside = (index >= 0) & (index <= last)
    return index.clamp_(0, last), inside


forward = partial(_tiled.forward, _add)
backward = partial(_tiled.backward, _differentiate)
