"""Log-probabilities by tiles of the logits: products by PyTorch, one Triton kernel per tile and pass, which reads the
tile once and, on the way back, overwrites it with its gradient.

Rows begin at multiples of ``_PITCH`` numbers and kernels read up to the next row: 16 bytes at a time, whatever the size
of the vocabulary, and matrix products that may do the same.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from .._tiles import softmax_tiles
from .._triton import launch, target_of
from ..attention._triton_core import tanh
from . import _tiled
from ._tiled import Tile

_PITCH = 64
_LOWEST = tl.constexpr(-3.4028234663852886e38)


def _add(tile: Tile, largest: Tensor, total: Tensor, at_target: Tensor) -> None:
    _run(softmax_add_kernel, lambda _: (tile.data.shape[0],), tile, largest, total, at_target, tile.data.shape[1])


def _differentiate(tile: Tile, largest: Tensor, log_total: Tensor, whole_upstream: Tensor, upstream: Tensor) -> None:
    rows, columns = tile.data.shape
    numbers = largest, log_total, whole_upstream, upstream
    _run(softmax_gradient_kernel, lambda sizes: (rows, triton.cdiv(columns, sizes["BLOCK"])), tile, *numbers)


def _run(kernel, grid, tile: Tile, *numbers: Tensor | int) -> None:
    device = tile.data.device
    launch(
        kernel,
        grid,
        tile.data,
        tile.targets.ids,
        tile.targets.offsets,
        *numbers,
        tile.rows.start,
        tile.columns.start,
        tile.data.stride(0),
        tile.factor,
        tile.softcap,
        device=device,
        tiles=softmax_tiles(target_of(device), tile.data.element_size()),
        SOFTCAP=tile.softcap > 0,
    )


@triton.jit
def _bounded(x, factor, softcap, SOFTCAP: tl.constexpr):
    """Numbers of a tile as float32, or the tanh of their multiples; and what times these the logits are."""
    x = x.to(tl.float32)
    if SOFTCAP:
        x = tanh(x * factor)
        factor = softcap
    return x, factor


@triton.jit(do_not_specialize=["columns", "first_row", "first"])
def softmax_add_kernel(
    data,  # [M, stride]
    ids,  # [T]
    offsets,  # [R + 1]
    largest,  # [M]
    total,  # [M]
    at_target,  # [T]
    columns,
    first_row,
    first,
    stride,
    factor,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See ``_tiled.Add``; one program per row.

    Each lane has a largest logit and a sum of its own, with one exponential per logit: of the two that bring a sum up
    to date one is always 1.
    """
    row = tl.program_id(0).to(tl.int64)
    logits = data + row * stride
    top = tl.full([BLOCK], _LOWEST, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stride, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x, multiple = _bounded(tl.load(logits + column, column < stride, 0), factor, softcap, SOFTCAP)  # [BLOCK]
        x = tl.where(column < columns, x * multiple, float("-inf"))
        higher = x > top
        decay = tl.exp(tl.where(higher, top - x, x - top))
        sums = tl.where(higher, sums * decay + 1, sums + decay)
        top = tl.where(higher, x, top)
    before = tl.load(largest + row)
    most = tl.maximum(before, tl.max(top, 0))
    sums = tl.sum(sums * tl.exp(top - most), 0)
    tl.store(total + row, tl.load(total + row) * tl.exp(before - most) + sums)
    tl.store(largest + row, most)
    for k in range(tl.load(offsets + first_row + row), tl.load(offsets + first_row + row + 1)):
        column = tl.load(ids + k) - first
        inside = (column >= 0) & (column < columns)
        x, multiple = _bounded(tl.load(logits + column, inside, 0), factor, softcap, SOFTCAP)
        tl.store(at_target + k, x * multiple, inside)


@triton.jit(do_not_specialize=["first_row", "first"])
def softmax_gradient_kernel(
    data,  # [M, stride]
    ids,  # [T]
    offsets,  # [R + 1]
    largest,  # [M]
    log_total,  # [M]
    whole_upstream,  # [M]
    upstream,  # [T]
    first_row,
    first,
    stride,
    factor,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See ``_tiled.Differentiate``; one program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    numbers = data + row * stride + column
    x, multiple = _bounded(tl.load(numbers, column < stride, 0), factor, softcap, SOFTCAP)  # [BLOCK]
    grad = tl.exp((x * multiple - tl.load(largest + row)) - tl.load(log_total + row)) * tl.load(whole_upstream + row)
    for k in range(tl.load(offsets + first_row + row), tl.load(offsets + first_row + row + 1)):
        grad -= tl.where(first + column == tl.load(ids + k), tl.load(upstream + k), 0)
    if SOFTCAP:
        grad *= 1 - x * x
    tl.store(numbers, grad.to(data.dtype.element_ty), column < stride)


forward = partial(_tiled.forward, _add, pitch=_PITCH)
backward = partial(_tiled.backward, _differentiate, pitch=_PITCH)
