"""Log-probabilities by tiles of the logits: the products, and what is summed over tiles. What is done within a tile is
given: :mod:`._torch`, :mod:`._native` or :mod:`._triton`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Logits per tile, in bytes of their sums' dtype: a share of a CPU's last-level cache; on an accelerator few and large
# products, whose sums over the tiles are then few too.
CPU_TILE_BYTES = 16 << 20
TILE_BYTES = 512 << 20
# As many rows as this, and columns in turn, a multiple of so many: a block of the weight and of its gradient is then
# read and written once. Of an accelerator's memory the weight gradient in float32, which several tiles of rows would
# need, takes more than a tile.
CPU_ROWS, CPU_COLUMNS = 4096, 64
ROWS, COLUMNS = 32768, 128


class Targets(NamedTuple):
    """The T scored tokens in the order of their rows."""

    ids: Tensor  # [T] int64
    rows: Tensor  # [T] int64, ascending
    offsets: Tensor  # [R + 1] int64, where the targets of each row begin
    order: Tensor | None  # [T] int64, where each stands among those that were given; None: they have this order

    def sort(self, x: Tensor) -> Tensor:
        """Numbers [T] of the targets as they were given, in this order."""
        return x if self.order is None else x[self.order]

    def unsort(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.order is None else torch.empty_like(x).scatter_(0, self.order, x)


class Tile(NamedTuple):
    """Rows and columns of ``hidden W^T + bias``; the logits over the temperature are ``factor * data``, or where
    ``softcap`` is not 0, ``softcap * tanh(factor * data)``.

    The factor is left to what reads the data, in float32: it may be so small or large that in half precision nothing
    would be left of the products.
    """

    rows: slice
    columns: slice
    data: Tensor  # [M, N] in the dtype of hidden; rows begin at multiples of the pitch
    targets: Targets  # of all rows and columns
    factor: float
    softcap: float


#: Brings the largest logit so far and the sum of ``exp(logit - largest)``, each [M], and the targets' logits, [T], up
#: to date.
Add = Callable[[Tile, Tensor, Tensor, Tensor], None]
#: Overwrites ``data`` with the sum of ``upstream * (softmax - onehot(target))`` over the targets of each row, times
#: the slope of tanh, from the largest logit, the logarithm of the sum and the sum of upstream, each [M], and upstream
#: [T]: ``d logits / d data`` without the factor that it has in common.
Differentiate = Callable[[Tile, Tensor, Tensor, Tensor, Tensor], None]


def tile_shape(rows: int, vocabulary: int, itemsize: int, chunk_size: int | None, device_type: str) -> tuple[int, int]:
    """Rows and columns of a tile, of logits whose sums have ``itemsize`` bytes."""
    on_cpu = device_type == "cpu"
    most, unit, tile_bytes = (CPU_ROWS, CPU_COLUMNS, CPU_TILE_BYTES) if on_cpu else (ROWS, COLUMNS, TILE_BYTES)
    rows = max(1, min(most if chunk_size is None else chunk_size, rows))
    columns = tile_bytes // (rows * itemsize) // unit * unit
    return rows, min(max(unit, columns), vocabulary)


def forward(
    add: Add,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    chunk_size: int | None,
    *,
    pitch: int = 1,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T], and of the logits the largest and the logarithm of the sum of ``exp(logit - largest)``,
    [2, R], from hidden [R, C], weight [V, C], targets [T] and their rows [T]. The rows of a tile begin at multiples of
    ``pitch`` numbers.

    The two are not added up: the logits of likely tokens are near the largest, and their distance from it has digits
    that a log-sum-exp of its size has not.
    """
    _check_range("targets", "ids", targets, weight.shape[0])
    if rows is not None:
        _check_range("rows", "rows of hidden", rows, hidden.shape[0])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Not -inf: beside it a tile of nothing but -inf, such as a vocabulary's padding, would give NaN.
    statistics = hidden.new_zeros(2, hidden.shape[0], dtype=dtype)
    largest, total = statistics
    largest.fill_(torch.finfo(dtype).min)
    scored = _by_row(targets, rows, hidden.shape[0])
    at_target = statistics.new_empty(targets.shape)
    shape = tile_shape(hidden.shape[0], weight.shape[0], dtype.itemsize, chunk_size, hidden.device.type)
    for tile in _tiles(hidden, weight, scored, bias, temperature, softcap, scale, shape, pitch):
        add(tile, largest[tile.rows], total[tile.rows], at_target)
    total.log_()
    log_probs = at_target.sub_(largest[scored.rows]).sub_(total[scored.rows])
    return scored.unsort(log_probs), statistics


def backward(
    differentiate: Differentiate,
    grad: Tensor,
    statistics: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    needs: list[bool],
    temperature: float,
    softcap: float | None,
    scale: float,
    chunk_size: int | None,
    *,
    pitch: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias from ``grad`` [T]; an empty tensor for each that is not in ``needs``."""
    (num_rows, vocabulary), dtype = (hidden.shape[0], weight.shape[0]), statistics.dtype
    shape = tile_shape(num_rows, vocabulary, dtype.itemsize, chunk_size, hidden.device.type)
    row_tiles, column_tiles = -(-num_rows // shape[0]), -(-vocabulary // shape[1])
    grad_hidden = _sum_of_products(hidden, column_tiles, dtype, needed=needs[0])
    grad_weight = _sum_of_products(weight, row_tiles, dtype, needed=needs[1])
    grad_bias = statistics.new_zeros(vocabulary if needs[2] else 0)
    scored = _by_row(targets, rows, num_rows)
    upstream, factor = scored.sort(grad).contiguous(), -scale / temperature
    whole_upstream = upstream if rows is None else add_at(torch.zeros_like(statistics[0]), scored.rows, upstream)
    for tile in _tiles(hidden, weight, scored, bias, temperature, softcap, scale, shape, pitch):
        differentiate(tile, *statistics[:, tile.rows], whole_upstream[tile.rows], upstream)
        if needs[0]:
            _add_product(grad_hidden[tile.rows], tile.data, weight[tile.columns], factor, column_tiles)
        if needs[1]:
            _add_product(grad_weight[tile.columns], tile.data.mT, hidden[tile.rows], factor, row_tiles)
        if needs[2]:
            grad_bias[tile.columns].add_(tile.data.sum(0, dtype=dtype), alpha=factor)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, factor: float, *, out: Tensor) -> Tensor:
    """``factor * (hidden W^T + bias)``, written to ``out`` [M, N]."""
    start, beta = (out, 0) if bias is None else (bias, factor)
    return torch.addmm(start, hidden, weight.mT, beta=beta, alpha=factor, out=out)


def add_at(total: Tensor, index: Tensor, summands: Tensor) -> Tensor:
    """``total`` [N], to which ``summands`` [K] are added at ``index`` [K], always in the same order."""
    if total.device.type == "cpu":
        return total.index_add_(0, index, summands)
    return total.index_put_((index,), summands, accumulate=True)  # sorted; on a CPU by threads, in any order


def _sum_of_products(like: Tensor, summands: int, dtype: torch.dtype, *, needed: bool) -> Tensor:
    """Room of the shape of ``like`` for :func:`_add_product`; what has one summand only needs no wider sum."""
    if not needed:
        return like.new_empty(0)
    if summands == 1:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return like.new_zeros(like.shape, dtype=dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float, summands: int) -> None:
    if summands == 1:
        torch.addmm(total, a, b, beta=0, alpha=factor, out=total)
    elif total.dtype == a.dtype:
        total.addmm_(a, b, alpha=factor)
    else:
        total.add_(a @ b, alpha=factor)


def _check_range(name: str, what: str, index: Tensor, size: int) -> None:
    inside = ((index >= 0) & (index < size)).all()
    if index.device.type == "cuda":  # without waiting for the device
        torch._assert_async(inside, f"{name}: expected {what} from 0 to {size - 1}")
    elif not inside:
        wrong = index[(index < 0) | (index >= size)][0].item()
        raise ValueError(f"{name}: expected {what} from 0 to {size - 1}, got {wrong}")


def _by_row(targets: Tensor, rows: Tensor | None, num_rows: int) -> Targets:
    """Targets [T] of the rows [T], or one of each row."""
    ids, every = targets.long().contiguous(), torch.arange(num_rows + 1, device=targets.device)
    if rows is None:
        return Targets(ids, every[:-1], every, None)
    rows, order = rows.long().sort(stable=True)
    return Targets(ids[order], rows, torch.searchsorted(rows, every), order)


def _tiles(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    tile: tuple[int, int],
    pitch: int,
) -> Iterator[Tile]:
    """All tiles, of at most ``tile`` rows and columns, one after the other.

    They lie in the same memory: fresh pages for each would cost more than the softmax.
    """
    num_rows, vocabulary = hidden.shape[0], weight.shape[0]
    tile_rows, tile_columns = tile
    memory = hidden.new_empty(tile_rows * _round_up(tile_columns, pitch))
    factor = scale / (temperature if softcap is None else softcap)
    cap = 0.0 if softcap is None else softcap / temperature
    for row in range(0, num_rows, tile_rows):
        rows = slice(row, min(row + tile_rows, num_rows))
        for column in range(0, vocabulary, tile_columns):
            columns = slice(column, min(column + tile_columns, vocabulary))
            height, width = rows.stop - rows.start, columns.stop - columns.start
            stride = _round_up(width, pitch)
            data = memory[: height * stride].view(height, stride)[:, :width]
            multiply(hidden[rows], weight[columns], None if bias is None else bias[columns], 1.0, out=data)
            yield Tile(rows, columns, data, targets, factor, cap)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
