"""Log-probabilities by tiles of the logits, in PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import _tiled
from ._tiled import Tile


def _add(tile: Tile, largest: Tensor, total: Tensor, at_target: Tensor) -> None:
    logits, _ = _logits(tile, largest.dtype)
    some, index, inside = _targets(tile)
    at_target[some] = torch.where(inside, logits.view(-1)[index], at_target[some])
    before = largest.clone()
    torch.maximum(largest, logits.amax(1), out=largest)
    added = logits.sub_(largest[:, None]).exp_().sum(1)
    total.mul_(before.sub_(largest).exp_()).add_(added)


def _differentiate(tile: Tile, largest: Tensor, log_total: Tensor, whole_upstream: Tensor, upstream: Tensor) -> None:
    logits, slope = _logits(tile, largest.dtype, slope=True)
    some, index, inside = _targets(tile)
    logits.sub_(largest[:, None]).sub_(log_total[:, None]).exp_().mul_(whole_upstream[:, None])
    _tiled.add_at(logits.view(-1), index, upstream[some].where(inside, 0).neg_())
    if slope is not None:
        logits.mul_(slope)
    if logits is not tile.data:
        tile.data.copy_(logits)


def _logits(tile: Tile, dtype: torch.dtype, *, slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """The logits of a tile [M, N] over the temperature and, for ``slope``, the soft cap's derivative [M, N]; may be the
    tile's own memory."""
    logits = tile.data.to(dtype)
    if tile.factor != 1:
        logits.mul_(tile.factor)
    if not tile.softcap:
        return logits, None
    logits.tanh_()
    derivative = logits.square().neg_().add_(1) if slope else None
    return logits.mul_(tile.softcap), derivative


def _targets(tile: Tile) -> tuple[slice, Tensor, Tensor]:
    """Which of the targets [T] may be in a tile, [K] of them; where in it, flattened; and whether: else anywhere."""
    ids, rows, offsets, order = tile.targets
    if order is None:
        some = tile.rows
    elif offsets.device.type == "cpu":
        some = slice(*offsets[[tile.rows.start, tile.rows.stop]].tolist())
    else:  # how many targets a row has is known on the device alone
        some = slice(None)
    row, column = rows[some] - tile.rows.start, ids[some] - tile.columns.start
    height, width = tile.data.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # Spread, not clamped: summands of one number are added one by one.
    return some, row.remainder(height) * width + column.remainder(width), inside


forward = partial(_tiled.forward, _add)
backward = partial(_tiled.backward, _differentiate)
