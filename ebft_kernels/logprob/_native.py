"""Log-probabilities by tiles of the logits: products by PyTorch, the softmax by the compiled module, which reads a tile
once, from the cache."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import _native
from . import _tiled
from ._tiled import Tile


def _add(tile: Tile, largest: Tensor, total: Tensor, at_target: Tensor) -> None:
    _run("softmax_add", tile, largest, total, at_target)


def _differentiate(tile: Tile, largest: Tensor, log_total: Tensor, whole_upstream: Tensor, upstream: Tensor) -> None:
    _run("softmax_gradient", tile, largest, log_total, whole_upstream, upstream)


def _run(kernel: str, tile: Tile, *numbers: Tensor) -> None:
    _native.run(
        kernel,
        tile.data.device,
        _native.DTYPES[tile.data.dtype],
        (*tile.data.shape, tile.columns.start, len(tile.targets.ids)),
        tile.data.data_ptr(),
        tile.targets.ids.data_ptr(),
        tile.targets.offsets[tile.rows.start :].data_ptr(),
        tile.factor,
        tile.softcap,
        *(x.data_ptr() for x in numbers),
    )


def block_statistics(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of every ``size`` columns the largest logit and the sum of ``exp(logit - largest)``: what a draw from the softmax
    needs of all tokens but those near the drawn one. No gradient.

    Args:
        logits: [R, V] float64, float32, bfloat16 or float16, on the CPU.
        size: of a block; the last one has what is left.

    Returns:
        Two [R, ceil(V / size)], float32 (float64 for float64 logits). Where all of a block are -inf, the lowest finite
        number and 0; where one is NaN, the sum is.
    """
    logits, dtype = logits.contiguous(), torch.promote_types(logits.dtype, torch.float32)
    rows, vocabulary = logits.shape
    largest = logits.new_full((rows, -(-vocabulary // size)), torch.finfo(dtype).min, dtype=dtype)
    total = torch.zeros_like(largest)
    addresses = [x.data_ptr() for x in (logits, largest, total)]
    _native.run("softmax_blocks", logits.device, _native.DTYPES[logits.dtype], (rows, vocabulary, size), *addresses)
    return largest, total


forward = partial(_tiled.forward, _add)
backward = partial(_tiled.backward, _differentiate)
