"""Tokens drawn from logits by Triton kernels: statistics of blocks of tokens first, then one program for each row.

Masses are 64-bit integers: sums of them are the same in whatever order, so that a threshold that one pass finds is the
threshold that the next one meets, and a row's tokens depend on its logits and its uniform numbers alone.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import draw_tiles
from .._triton import launch, target_of

_LOWEST = tl.constexpr(-3.4028234663852886e38)
# Below the keys of all numbers, -inf too.
_NOTHING = tl.constexpr(-(1 << 31))
# 1 / temperature must stay a normal number: a subnormal one may be flushed to 0, and 0 * inf is NaN.
_SMALLEST_FACTOR = 1.1754943508222875e-38
# Low bits that are 0 in every number of the dtype as a float32: as many steps fewer in a search.
_ZERO_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def draw(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    block: int,
    statistics: bool,
) -> tuple[Tensor, ...]:
    """See :func:`._draw.draw_tokens`; ``block`` tokens have a largest logit and a sum of their own."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    (rows, columns), draws, device = logits.shape, uniform.shape[1], logits.device
    blocks = triton.cdiv(columns, block)
    largest, total = logits.new_empty(2, rows, blocks, dtype=torch.float32)
    ids = torch.empty(rows, draws, dtype=torch.int64, device=device)
    log_probs = logits.new_empty(rows, draws, dtype=torch.float32)
    factor = max(1 / (temperature or 1.0), _SMALLEST_FACTOR)
    target = target_of(device)
    tiles = draw_tiles(target, logits.element_size())
    stride = logits.stride(0)
    # Up to the next row, if there is memory, so that 16 bytes can be loaded at a time whatever the vocabulary.
    whole = (
        stride >= columns
        and logits.storage_offset() + rows * stride <= logits.untyped_storage().nbytes() // logits.element_size()
    )
    sizes = (columns, blocks, stride, stride if whole else columns)
    launch(
        draw_blocks_kernel,
        lambda x: (rows, triton.cdiv(blocks, x["GROUP"])),
        *(logits, largest, total, *sizes, factor),
        device=device,
        tiles=tiles,
        BLOCK=block,
    )
    of_row = (logits, largest, total, uniform.contiguous(), ids, log_probs)
    constants = {"PAD": triton.next_power_of_2(blocks), "BLOCK": block}
    if temperature == 0:
        top_p, top_k = 1.0, 1
    if top_p == 1 and not top_k:
        tiles = [tile._replace(sizes={}) for tile in tiles]
        launch(draw_kernel, lambda _: (rows,), *of_row, *sizes, draws, factor, device=device, tiles=tiles, **constants)
        return (ids, log_probs, *_softmax_statistics(largest, total, factor, statistics))
    launch(
        draw_cut_kernel,
        lambda _: (rows,),
        *of_row,
        torch.empty(rows, blocks, dtype=torch.int32, device=device),
        *sizes,
        draws,
        factor,
        min(top_k, columns),
        math.ceil(top_p * 2**53),
        device=device,
        tiles=draw_tiles(target, logits.element_size(), cut=True),
        TOP_K=top_k > 0,
        TOP_P=top_p < 1,
        ZERO_BITS=_ZERO_BITS[logits.dtype],
        **constants,
    )
    return (ids, log_probs, *_softmax_statistics(largest, total, factor, statistics))


def _softmax_statistics(largest: Tensor, total: Tensor, factor: float, wanted: bool) -> tuple[Tensor, ...]:
    if not wanted:
        return ()
    top = largest.amax(1, keepdim=True)
    mass = (largest - top).mul_(factor).exp_().mul_(total)
    return (torch.cat([top * factor, mass.sum(1, keepdim=True).log_()], 1),)


@triton.jit
def _number_or(x, other):
    """``x``, and ``other`` where it is NaN."""
    return tl.where(x == x, x, other)


@triton.jit
def _integers(mass, scale):
    """Masses as integers whose sum over a row is about 2^61."""
    return _number_or(mass * scale, 0.0).to(tl.int64)


@triton.jit
def _target(uniform, total):
    """The integer in [0, total) that ``uniform`` falls on."""
    return tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def _search(mass, uniform):
    """Index that ``uniform`` falls on in the masses [K], and how far into its mass, from 0 to 1."""
    integers = _integers(mass, 2305843009213693952.0 / tl.sum(mass, 0))  # 2^61
    cumulative = tl.cumsum(integers, 0)
    target = _target(uniform, tl.sum(integers, 0))
    index = tl.sum((cumulative <= target).to(tl.int32), 0)
    here = tl.arange(0, mass.shape[0]) == index
    own = tl.sum(tl.where(here, integers, 0), 0)
    into = target - (tl.sum(tl.where(here, cumulative, 0), 0) - own)
    return index, into.to(tl.float64) / tl.maximum(own, 1).to(tl.float64)


@triton.jit
def _row_statistics(largest, total, blocks, factor, PAD: tl.constexpr):
    """Of all blocks [PAD] of a row the largest logit, the lowest finite number where there is none, and the sum of
    ``exp((logit - top) * factor)``; of the row the largest logit ``top`` and the sum."""
    block = tl.arange(0, PAD)
    sums = tl.load(total + block, block < blocks, 0.0)
    most = tl.load(largest + block, block < blocks, _LOWEST)
    top = tl.max(most, 0)
    # Not 0 * inf where a block has none but -inf.
    mass = tl.where(sums == 0, 0.0, sums * tl.exp((most - top) * factor))
    return most, top, mass, tl.sum(mass, 0)


@triton.jit(do_not_specialize=["columns", "blocks"])
def draw_blocks_kernel(
    logits,  # [R, stride]
    largest,  # [R, blocks]
    total,  # [R, blocks]
    columns,
    blocks,
    stride,
    width,
    factor,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of each block of columns the largest logit, the lowest finite number where all are -inf, and the sum of
    ``exp((logit - largest) * factor)``, NaN where one logit is; one program per row and ``GROUP`` blocks."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [GROUP, BLOCK]
    x = tl.load(logits + row * stride + column, column < width, 0).to(tl.float32)
    x = tl.where(column < columns, x, float("-inf"))
    top = tl.maximum(tl.max(_number_or(x, float("-inf")), 1), _LOWEST)
    sums = tl.sum(tl.exp((x - top[:, None]) * factor), 1)
    tl.store(largest + row * blocks + block, top, block < blocks)
    tl.store(total + row * blocks + block, sums, block < blocks)


@triton.jit(do_not_specialize=["columns", "blocks", "draws"])
def draw_kernel(
    logits,  # [R, stride]
    largest,  # [R, blocks]
    total,  # [R, blocks]
    uniform,  # [R, draws] float64
    ids,  # [R, draws]
    log_probs,  # [R, draws]
    columns,
    blocks,
    stride,
    width,
    draws,
    factor,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens of one row: the block that a uniform number falls on, then the token within it."""
    row = tl.program_id(0).to(tl.int64)
    most, top, mass, whole = _row_statistics(largest + row * blocks, total + row * blocks, blocks, factor, PAD)
    lane = tl.arange(0, BLOCK)
    for draw in range(draws):
        block, into = _search(mass, tl.load(uniform + row * draws + draw))
        block = tl.minimum(block, blocks - 1)
        column = block * BLOCK + lane  # [BLOCK]
        x = tl.load(logits + row * stride + column, column < width, 0).to(tl.float32)
        distance = tl.where(column < columns, (x - top) * factor, float("-inf"))
        within, beyond = _search(tl.exp(distance), into)
        within = tl.minimum(within, columns - 1 - block * BLOCK)
        tl.store(ids + row * draws + draw, (block * BLOCK + within).to(tl.int64))
        tl.store(log_probs + row * draws + draw, tl.sum(tl.where(lane == within, distance, 0.0), 0) - tl.log(whole))


@triton.jit
def _key(x, ZERO_BITS: tl.constexpr):
    """Integers in the order of float32 numbers; NaN counts as -inf, -0 as 0."""
    bits = tl.where(x == 0, 0.0, _number_or(x, float("-inf"))).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> ZERO_BITS


@triton.jit
def _load_group(logits, chosen, first, count, columns, width, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Logits [GROUP, BLOCK] of chosen blocks, their columns, and which of them there are: others may be anything."""
    place = first + tl.arange(0, GROUP)
    block = tl.load(chosen + place, place < count, 0)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = (place < count)[:, None]
    x = tl.load(logits + column, known & (column < width), 0).to(tl.float32)
    return x, column, known & (column < columns)


@triton.jit
def _at_least(
    logits,
    chosen,
    count,
    columns,
    width,
    key,
    top,
    factor,
    scale,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Mass and number of the tokens in the chosen blocks whose key is at least ``key``."""
    mass = tl.zeros([GROUP, BLOCK], tl.int64)
    number = tl.zeros([GROUP, BLOCK], tl.int32)
    for first in range(0, count, GROUP):
        x, _, there = _load_group(logits, chosen, first, count, columns, width, BLOCK, GROUP)
        some = there & (_key(x, ZERO_BITS) >= key)
        mass += tl.where(some, _integers(tl.exp((x - top) * factor), scale), 0)
        number += some.to(tl.int32)
    return tl.sum(tl.sum(mass, 1), 0), tl.sum(tl.sum(number, 1), 0).to(tl.int64)


@triton.jit
def _highest(
    logits,
    chosen,
    count,
    columns,
    width,
    low,
    high,
    wanted,
    top,
    factor,
    scale,
    BY_NUMBER: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The highest key from ``low`` to ``high`` such that what is at least that has ``wanted`` mass, or tokens; ``low``
    if none has. Then mass and number of what is above it, and the mass and number of the tokens at it."""
    while low < high:
        middle = low + (high - low + 1) // 2
        mass, number = _at_least(
            logits, chosen, count, columns, width, middle, top, factor, scale, ZERO_BITS, BLOCK, GROUP
        )
        if BY_NUMBER:
            enough = number >= wanted
        else:
            enough = mass >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    mass, number = _at_least(logits, chosen, count, columns, width, low, top, factor, scale, ZERO_BITS, BLOCK, GROUP)
    above, higher = _at_least(
        logits, chosen, count, columns, width, low + 1, top, factor, scale, ZERO_BITS, BLOCK, GROUP
    )
    equal = number - higher
    # All tokens at one key have the same mass: the quotient is exact.
    return low, above, higher, (mass - above) // tl.maximum(equal, 1), equal


@triton.jit
def _choose_blocks(keys, there, masses, chosen, wanted, highest, BY_NUMBER: tl.constexpr, PAD: tl.constexpr):
    """Blocks that may hold one of the tokens that :func:`_highest` looks for, from each block's largest logit: writes
    their numbers, gives how many they are and a key that none of the tokens looked for is below."""
    low = tl.full([], _NOTHING, tl.int64)
    high = highest
    while low < high:
        middle = low + (high - low + 1) // 2
        some = there & (keys >= middle)
        if BY_NUMBER:
            enough = tl.sum(some.to(tl.int64), 0) >= wanted
        else:
            enough = tl.sum(tl.where(some, masses, 0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    some = there & (keys >= low)
    tl.store(chosen + tl.cumsum(some.to(tl.int32), 0) - 1, tl.arange(0, PAD), some)
    tl.debug_barrier()  # other threads of the program read them
    return low, tl.sum(some.to(tl.int32), 0)


@triton.jit(do_not_specialize=["columns", "blocks", "draws", "top_k", "top_p"])
def draw_cut_kernel(
    logits,  # [R, stride]
    largest,  # [R, blocks]
    total,  # [R, blocks]
    uniform,  # [R, draws] float64
    ids,  # [R, draws]
    log_probs,  # [R, draws]
    chosen,  # [R, blocks]
    columns,
    blocks,
    stride,
    width,
    draws,
    factor,
    top_k,
    top_p,  # times 2^53
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tokens of one row, from the most likely down: thresholds are found by halving the range of the logits' bits, the
    k-th largest first, then the one with mass ``top_p`` above it, then those that the uniform numbers fall on."""
    row = tl.program_id(0).to(tl.int64)
    most, top, sums, whole = _row_statistics(largest + row * blocks, total + row * blocks, blocks, factor, PAD)
    logits += row * stride
    chosen += row * blocks
    scale = 2305843009213693952.0 / whole  # 2^61
    highest = _key(top, ZERO_BITS).to(tl.int64)
    block = tl.arange(0, PAD)
    there = block < blocks
    # Where all tokens of a block are -inf it has none at the finite number that stands for it.
    empty = tl.load(total + row * blocks + block, there, 0.0) == 0
    keys = tl.where(empty, _NOTHING, _key(most, ZERO_BITS)).to(tl.int64)
    part = (top_p.to(tl.float64) * 1.1102230246251565e-16).to(tl.float64)  # 2^-53
    if TOP_K:
        wanted = top_k.to(tl.int64)
    else:
        wanted = tl.ceil(part * 2305843009213693952.0).to(tl.int64)
    masses = _integers(tl.exp((most - top) * factor), scale)
    low, count = _choose_blocks(keys, there, masses, chosen, wanted, highest, TOP_K, PAD)
    if TOP_K:
        low, above, higher, each, equal = _highest(
            logits,
            chosen,
            count,
            columns,
            width,
            low,
            highest,
            wanted,
            top,
            factor,
            scale,
            True,
            ZERO_BITS,
            BLOCK,
            GROUP,
        )
        kept = above + tl.minimum(wanted - higher, equal) * each
        wanted = tl.ceil(part * kept.to(tl.float64)).to(tl.int64)
    if TOP_P:
        low, above, higher, each, equal = _highest(
            logits,
            chosen,
            count,
            columns,
            width,
            low,
            highest,
            wanted,
            top,
            factor,
            scale,
            False,
            ZERO_BITS,
            BLOCK,
            GROUP,
        )
        number = tl.minimum((wanted - above + each - 1) // tl.maximum(each, 1), equal)
        kept = above + number * each
    for draw in range(draws):
        target = _target(tl.load(uniform + row * draws + draw), kept)
        key, above, higher, each, equal = _highest(
            logits,
            chosen,
            count,
            columns,
            width,
            low,
            highest,
            target + 1,
            top,
            factor,
            scale,
            False,
            ZERO_BITS,
            BLOCK,
            GROUP,
        )
        rank = tl.minimum((target - above) // tl.maximum(each, 1), equal - 1)
        # The token that comes after `rank` others of the same logit.
        seen = tl.zeros([], tl.int64)
        found = tl.full([], -1, tl.int32)
        logit = tl.full([], float("-inf"), tl.float32)
        for first in range(0, count, GROUP):
            x, column, present = _load_group(logits, chosen, first, count, columns, width, BLOCK, GROUP)
            tie = (present & (_key(x, ZERO_BITS) == key)).to(tl.int32)  # [GROUP, BLOCK]
            in_block = tl.sum(tie, 1)
            before = seen + tl.cumsum(in_block, 0) - in_block
            hit = (tie == 1) & (before[:, None] + tl.cumsum(tie, 1) - 1 == rank)
            here = tl.max(tl.max(tl.where(hit, column, -1), 1), 0)
            logit = tl.where(here >= 0, tl.max(tl.max(tl.where(hit, x, float("-inf")), 1), 0), logit)
            found = tl.maximum(found, here)
            seen += tl.sum(in_block, 0)
        tl.store(ids + row * draws + draw, tl.maximum(found, 0).to(tl.int64))
        tl.store(log_probs + row * draws + draw, (logit - top) * factor - tl.log(whole))
