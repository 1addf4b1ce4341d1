"""Device functions that the attention kernels share: who sees what, which keys a tile visits, and in which order.

A *tile* is BLOCK_M neighbouring (row, head) pairs of one key/value head: pair ``m`` is row ``m // R`` and head
``m % R`` of the R = H/Hkv query heads that share it. So one copy of the keys serves all of them, and a tile spans few
rows, whose visible keys differ little. A tile holds prompt rows or rollout rows, never both.

What a tile's rows see of the prompt is a range that all of them see, which is walked without a mask, and ragged edges.
Edges and the keys of the tile's own rollouts form one list of *edge keys*, walked with a mask:

    [ left edge | right edge | own rollouts ]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import version

LOG2E = 1.4426950408889634

# A log-sum-exp that weighs nothing. Not -inf: the difference of two of them must not be NaN.
NOTHING: tl.constexpr = tl.constexpr(-1e30)

# Whether Triton loads fewer numbers than a program has threads in the layout of the product that they meet.
SCATTERS: tl.constexpr = tl.constexpr(version() < (3, 7))


@triton.jit
def ordered_tile(index, prompt_tiles, rollout_tiles):
    """The tile to run as number ``index``, longest first: both lists backwards, interleaved in proportion."""
    total = (prompt_tiles + rollout_tiles).to(tl.int64)
    before = (index.to(tl.int64) * prompt_tiles // total).to(tl.int32)
    after = ((index.to(tl.int64) + 1) * prompt_tiles // total).to(tl.int32)
    is_rollout = after == before
    tile = tl.where(is_rollout, rollout_tiles - 1 - (index - before), prompt_tiles - 1 - before)
    return tile, is_rollout


@triton.jit
def query_tile(index, kv_head, rows, length, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile number ``index`` of a packed row: row and head of its pairs [BM], whether they exist, and are rollouts.

    Pairs beyond the last are copies of it, so that they change no bound of the tile.
    """
    tile, is_rollout = ordered_tile(index, tl.cdiv(length * R, BLOCK_M), tl.cdiv((rows - length) * R, BLOCK_M))
    pair = tl.where(is_rollout, length * R, 0) + tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    last = tl.minimum(pair, tl.where(is_rollout, rows, length) * R - 1)
    return last // R, kv_head * R + last % R, pair == last, is_rollout


@triton.jit
def same(index, count):
    """``index``, for a ``count`` that is never negative.

    What is computed from it once more after a loop is not the compiler's common subexpression with what came before
    the loop, and so needs no registers during the loop.
    """
    return index + tl.minimum(count, 0)


@triton.jit
def settled(x):
    """``x`` [X], loaded in a loop over products, as it is.

    Where Triton SCATTERS, each thread would copy up to X numbers, by an address of its own each, and registers run out:
    there they go through shared memory instead, whose barriers others need not pay for.
    """
    if SCATTERS:
        x = tl.gather(x, tl.arange(0, x.shape[0]), 0)
    return x


@triton.jit
def row_ranges(
    prefix_start,
    prefix_end,
    own_start,
    row,
    batch_row,
    length,
    horizon,
    window,
    WINDOW: tl.constexpr,
    FULL: tl.constexpr,
):
    """Keys ``[start, end)`` of the prompt and ``[own, own_end)`` of the own rollout that each row sees, each [X].

    ``batch_row`` is the number of rows before this batch entry. The own range of a prompt row is empty.
    """
    at = batch_row + row
    start = tl.load(prefix_start + at)  # [X]
    end = tl.load(prefix_end + at)  # [X]
    own = tl.load(own_start + at)  # [X]
    if FULL:
        own_end = own + tl.where(row < length, 0, horizon)
    else:
        own_end = row + 1
    if WINDOW:
        # The row's position, in tokens of the sequence that it continues, is end + row - own.
        start = tl.maximum(start, end + row - own - window + 1)
        own = tl.maximum(own, row - window + 1)
    return tl.minimum(start, end), end, own, own_end


@triton.jit
def plan_walk(start, end, BLOCK_N: tl.constexpr):
    """How a tile walks the prompt keys that its rows see.

    Returns the first key that any row sees, the first and the end of the unmasked keys (a multiple of BLOCK_N of them),
    and the number of other keys that any row sees.
    """
    first = tl.min(start, 0)
    shared = tl.max(start, 0)
    shared_end = shared + tl.maximum(tl.min(end, 0) - shared, 0) // BLOCK_N * BLOCK_N
    return first, shared, shared_end, shared - first + tl.max(end, 0) - shared_end


@triton.jit
def edge_keys(index, first, shared, shared_end, prefix_count, own_first, horizon, own_steps, EVERY_STEP: tl.constexpr):
    """The keys [X] at ``index`` of a tile's list of edge keys, of which ``prefix_count`` lie in the prompt.

    The own keys are all that follow ``own_first``, or without EVERY_STEP the first ``own_steps`` of each ``horizon``.
    """
    left = shared - first
    prefix = tl.where(index < left, first + index, shared_end + index - left)
    own = index - prefix_count
    if not EVERY_STEP:
        own = own // own_steps * horizon + own % own_steps
    return tl.where(index < prefix_count, prefix, own_first + own)


@triton.jit
def seen_keys(key, listed, start, end, own, own_end):
    """Which keys [Y], of those ``listed`` [Y], rows with these ranges [X] see: [X, Y]."""
    seen = (key[None, :] >= start[:, None]) & (key[None, :] < end[:, None])
    seen |= (key[None, :] >= own[:, None]) & (key[None, :] < own_end[:, None])
    return seen & listed[None, :]


@triton.jit
def load_rows(base, offset, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows [X, PADDED] at ``offset`` [X], 0 beyond column SIZE."""
    column = tl.arange(0, PADDED)
    pointer = base + offset[:, None] + column[None, :]
    if SIZE == PADDED:
        rows = tl.load(pointer)  # [X, PADDED]
    else:
        rows = tl.load(pointer, mask=column[None, :] < SIZE, other=0.0)  # [X, PADDED]
    return rows


@triton.jit
def load_some_rows(base, offset, present, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Rows [X, PADDED] at ``offset`` [X], 0 where not ``present`` [X] and beyond column SIZE."""
    column = tl.arange(0, PADDED)
    mask = present[:, None] & (column[None, :] < SIZE)
    return tl.load(base + offset[:, None] + column[None, :], mask=mask, other=0.0)  # [X, PADDED]


@triton.jit
def store_rows(base, offset, present, rows, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Store ``rows`` [X, PADDED] at ``offset`` [X] where ``present`` [X], up to column SIZE."""
    column = tl.arange(0, PADDED)
    mask = present[:, None] & (column[None, :] < SIZE)
    tl.store(base + offset[:, None] + column[None, :], rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """tanh to float32 precision: the exponential form cancels near 0, where the series takes over."""
    size = tl.abs(x)
    decay = tl.exp2(size * -2.8853900817779268)
    square = x * x
    series = 62.0 / 2835.0 * square - 17.0 / 315.0
    series = (series * square + 2.0 / 15.0) * square - 1.0 / 3.0
    size = tl.where(size < 0.25, size + size * square * series, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0, -size, size)


@triton.jit
def raw_scores(a, b, inner, SOFTCAP: tl.constexpr):
    """<a, b> [X, Y] of a [X, D] and b [Y, D]; with a softcap the tanh of ``inner`` times that."""
    raw = tl.dot(a, tl.trans(b), input_precision="ieee")  # [X, Y]
    if SOFTCAP:
        raw = tanh(raw * inner)
    return raw


@triton.jit
def accumulate(acc, top, total, raw, v, factor):
    """One step of the online softmax over raw scores [X, Y] (-inf: unseen) and values [Y, DV].

    ``factor`` turns a raw score into a score in units of log 2; it is applied once more here so that subtracting the
    maximum is one fused multiply-add.
    """
    new_top = tl.maximum(top, tl.max(raw, 1) * factor)
    weight = tl.exp2(raw * factor - new_top[:, None])  # [X, Y]
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")  # [X, DV]
    return acc, new_top, total


@triton.jit
def attend_keys(
    q_tile,
    top,
    total,
    k,
    v,
    k_row,
    v_row,
    start,
    end,
    own,
    own_end,
    own_first,
    own_count,
    own_steps,
    horizon,
    inner,
    factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVERY_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Unnormalised output [BM, DV] of a tile, and the maximum and sum of its weights, begun with ``top``, ``total``."""
    first, shared, shared_end, prefix_count = plan_walk(start, end, BLOCK_N)
    acc = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    column = tl.arange(0, BLOCK_N)
    k_from = k + shared.to(tl.int64) * k_row
    v_from = v + shared.to(tl.int64) * v_row
    for _ in tl.range(shared, shared_end, BLOCK_N):
        k_tile = load_rows(k_from, column * k_row, D, PAD_D)  # [BN, D]
        raw = raw_scores(q_tile, k_tile, inner, SOFTCAP)  # [BM, BN]
        v_tile = load_rows(v_from, column * v_row, DV, PAD_DV)  # [BN, DV]
        acc, top, total = accumulate(acc, top, total, raw, v_tile, factor)
        k_from += BLOCK_N * k_row
        v_from += BLOCK_N * v_row
    for edge in tl.range(0, prefix_count + own_count, BLOCK_E):
        index = edge + tl.arange(0, BLOCK_E)
        key = edge_keys(
            index, first, shared, shared_end, prefix_count, own_first, horizon, own_steps, EVERY_STEP
        )  # [BE]
        listed = index < prefix_count + own_count
        k_tile = load_some_rows(k, key.to(tl.int64) * k_row, listed, D, PAD_D)  # [BE, D]
        raw = raw_scores(q_tile, k_tile, inner, SOFTCAP)  # [BM, BE]
        raw = tl.where(seen_keys(key, listed, start, end, own, own_end), raw, float("-inf"))
        v_tile = load_some_rows(v, key.to(tl.int64) * v_row, listed, DV, PAD_DV)  # [BE, DV]
        acc, top, total = accumulate(acc, top, total, raw, v_tile, factor)
    return acc, top, total


@triton.jit
def first_weights(sinks, head, SINKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Maximum and sum of the weights of no keys [BM]: the sink's, if there are sinks."""
    if SINKS:
        top = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], NOTHING, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    return top, total


@triton.jit
def normalize(acc, top, total):
    """Output [X, DV] and log-sum-exp [X] in units of log 2; 0 and NOTHING for rows that see nothing."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return acc / total[:, None], tl.where(some, top + tl.log2(total), NOTHING)


def ceil_div(a: int, b: int) -> int:
    """Round ``a / b`` up; ``triton.cdiv`` takes ten times as long on the host."""
    return -(-a // b)


def padded(size: int) -> int:
    """Columns of a tile for ``size`` used ones: a power of two that matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """``inner`` and ``factor``: score / log 2 = factor * raw, with raw = <q, k> or tanh(inner * <q, k>)."""
    return (1.0, scale * LOG2E) if softcap is None else (scale / softcap, softcap * LOG2E)


def readable(x: Tensor) -> Tensor:
    """``x`` with contiguous columns and rows so near that the offsets inside a tile fit into 32 bits."""
    strides = x.stride()
    return x if strides[3] == 1 and strides[2] < 2**23 else x.contiguous()


def constants(q: Tensor, v: Tensor, repeat: int, softcap: float | None, window: int | None) -> dict[str, object]:
    """Compile-time arguments that all attention kernels take."""
    size, value_size = q.shape[3], v.shape[3]
    return {
        "R": repeat,
        "D": size,
        "DV": value_size,
        "PAD_D": padded(size),
        "PAD_DV": padded(value_size),
        "SOFTCAP": softcap is not None,
        "WINDOW": window is not None,
    }


STATISTICS = torch.float32
