"""Gradients of strided attention in Triton: a preparation, the queries' gradient, and that of keys and values.

Every gradient is gathered by the one program that stores it, so that nothing is added in an order that could change: a
tile of keys looks for the tiles of queries that see it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._tiles import attention_row_tiles, attention_tiles
from .._triton import launch, target_of
from ..layout import KeyRanges
from ._triton_core import (
    STATISTICS,
    ceil_div,
    constants,
    edge_keys,
    load_rows,
    load_some_rows,
    plan_walk,
    query_tile,
    raw_scores,
    readable,
    row_ranges,
    same,
    score_factors,
    seen_keys,
    settled,
    store_rows,
)

# Tiles of queries whose bounds a tile of keys looks at in one go.
SCAN: tl.constexpr = tl.constexpr(128)

# Larger than every index of a row.
FAR: tl.constexpr = tl.constexpr(2**30)


@triton.jit(do_not_specialize=["groups", "rows", "length", "horizon", "window"])
def strided_attention_prepare_kernel(
    grad,  # [B, H, S, DV]
    out,  # [B, H, S, DV]
    delta,  # [B, H, S] float32
    bounds,  # [B, tiles, 4] int32
    prefix_start,  # [B, S], as are the next two
    prefix_end,
    own_start,
    grad_batch,
    grad_head,
    grad_row,
    out_batch,
    out_head,
    out_row,
    groups,
    kv_heads,
    rows,
    length,
    horizon,
    window,
    R: tl.constexpr,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """<grad, out> of each row of a tile, and which prompt keys some and all rows of the tile see."""
    group = tl.program_id(0) % groups
    index = tl.program_id(0) // groups
    prompt_tiles = tl.cdiv(length * R, BLOCK_M)
    is_rollout = index >= prompt_tiles
    pair = tl.where(is_rollout, length * R + (index - prompt_tiles) * BLOCK_M, index * BLOCK_M)
    pair += tl.arange(0, BLOCK_M)  # [BM]
    last = tl.where(is_rollout, rows, length) * R - 1
    whole = tl.max(pair, 0) <= last
    present = pair <= last
    pair = tl.minimum(pair, last)
    row = pair // R
    head = (group % kv_heads) * R + pair % R
    batch = (group // kv_heads).to(tl.int64)
    offset = batch * grad_batch + head.to(tl.int64) * grad_head + row.to(tl.int64) * grad_row
    grad_tile = load_rows(grad, offset, DV, PAD_DV).to(tl.float32)  # [BM, DV]
    offset = batch * out_batch + head.to(tl.int64) * out_head + row.to(tl.int64) * out_row
    out_tile = load_rows(out, offset, DV, PAD_DV).to(tl.float32)  # [BM, DV]
    tl.store(delta + (batch * kv_heads * R + head) * rows + row, tl.sum(grad_tile * out_tile, 1), mask=present)
    if group % kv_heads == 0:
        start, end, _, _ = row_ranges(
            prefix_start, prefix_end, own_start, row, batch * rows, length, horizon, window, WINDOW, False
        )
        tiles = tl.num_programs(0) // groups
        bounds += (batch * tiles + index) * 4
        tl.store(bounds, tl.min(start, 0))
        tl.store(bounds + 1, tl.max(end, 0))
        tl.store(bounds + 2, tl.where(whole, tl.max(start, 0), FAR))
        tl.store(bounds + 3, tl.min(end, 0))


@triton.jit
def query_gradient(acc, q, grad, lse, delta, k, v, seen, inner, factor, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """Add what keys [Y, D] and values [Y, DV] give the gradient [X, D] of queries; ``seen`` [X, Y] counts if MASKED."""
    raw = raw_scores(q, k, inner, SOFTCAP)  # [X, Y]
    weight = tl.exp2(raw * factor - lse[:, None])
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    grad_weight = tl.dot(grad, tl.trans(v), input_precision="ieee")  # [X, Y]
    grad_score = weight * (grad_weight - delta[:, None])
    if SOFTCAP:
        grad_score *= 1.0 - raw * raw
    return tl.dot(grad_score.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["groups", "rows", "length", "horizon", "window"])
def strided_attention_dq_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, DV]
    grad,  # [B, H, S, DV]
    lse,  # [B, H, S]
    delta,  # [B, H, S]
    grad_q,  # [B, H, S, D]
    prefix_start,  # [B, S], as are the next two
    prefix_end,
    own_start,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    groups,
    kv_heads,
    rows,
    length,
    horizon,
    window,
    scale,
    inner,
    factor,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of one tile of queries: the walk of the forward kernel."""
    group = tl.program_id(0) % groups
    kv_head = group % kv_heads
    batch = (group // kv_heads).to(tl.int64)
    row, head, present, is_rollout = query_tile(tl.program_id(0) // groups, kv_head, rows, length, R, BLOCK_M)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    start, end, own, own_end = row_ranges(
        prefix_start, prefix_end, own_start, row, batch * rows, length, horizon, window, WINDOW, FULL
    )
    first, shared, shared_end, prefix_count = plan_walk(start, end, BLOCK_N)
    own_first = tl.min(own, 0)
    edge_count = prefix_count + tl.where(is_rollout, tl.max(own_end, 0) - own_first, 0)

    statistic = (batch * kv_heads * R + head) * rows + row
    row_lse = tl.load(lse + statistic) * 1.4426950408889634  # [BM]
    row_delta = tl.load(delta + statistic)  # [BM]
    q_tile = load_rows(q, batch * q_batch + head.to(tl.int64) * q_head + row.to(tl.int64) * q_row, D, PAD_D)  # [BM, D]
    grad_tile = load_rows(
        grad, batch * grad_batch + head.to(tl.int64) * grad_head + row.to(tl.int64) * grad_row, DV, PAD_DV
    )  # [BM, DV]
    acc = tl.zeros([BLOCK_M, PAD_D], tl.float32)
    column = tl.arange(0, BLOCK_N)
    k_from = k + shared.to(tl.int64) * k_row
    v_from = v + shared.to(tl.int64) * v_row
    for _ in tl.range(shared, shared_end, BLOCK_N):
        k_tile = load_rows(k_from, column * k_row, D, PAD_D)  # [BN, D]
        v_tile = load_rows(v_from, column * v_row, DV, PAD_DV)  # [BN, DV]
        acc = query_gradient(
            acc, q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, None, inner, factor, SOFTCAP, False
        )
        k_from += BLOCK_N * k_row
        v_from += BLOCK_N * v_row
    for edge in tl.range(0, edge_count, BLOCK_E):
        index = edge + tl.arange(0, BLOCK_E)
        key = edge_keys(index, first, shared, shared_end, prefix_count, own_first, horizon, horizon, True)  # [BE]
        listed = index < edge_count
        k_tile = load_some_rows(k, key.to(tl.int64) * k_row, listed, D, PAD_D)  # [BE, D]
        v_tile = load_some_rows(v, key.to(tl.int64) * v_row, listed, DV, PAD_DV)  # [BE, DV]
        seen = seen_keys(key, listed, start, end, own, own_end)  # [BM, BE]
        acc = query_gradient(
            acc, q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, seen, inner, factor, SOFTCAP, True
        )
    index = same(tl.program_id(0) // groups, edge_count)
    row, head, present, _ = query_tile(index, kv_head, rows, length, R, BLOCK_M)
    store_rows(grad_q, ((batch * kv_heads * R + head) * rows + row) * D, present, acc * scale, D, PAD_D)


@triton.jit
def seeing_tiles(bounds, tiles, first_key, last_key):
    """Which of a list of query tiles see the keys ``first_key .. last_key``.

    Returns the first tile that does and the end of those that do, and a range within these whose tiles see all of the
    keys, as seen by ``bounds`` [tiles, 4]: lowest and highest bound of what some rows see and of what all rows see.
    """
    first = tiles
    last_end = 0
    full = tiles
    full_end = tiles
    for block in tl.range(0, tiles, SCAN):
        tile = block + tl.arange(0, SCAN)
        known = tile < tiles
        low = tl.load(bounds + tile * 4, mask=known, other=FAR)  # [SCAN]
        high = tl.load(bounds + tile * 4 + 1, mask=known, other=0)
        all_low = tl.load(bounds + tile * 4 + 2, mask=known, other=FAR)
        all_high = tl.load(bounds + tile * 4 + 3, mask=known, other=0)
        some = (low <= last_key) & (high > first_key)
        every = (all_low <= first_key) & (all_high > last_key)
        first = tl.minimum(first, tl.min(tl.where(some, tile, FAR), 0))
        last_end = tl.maximum(last_end, tl.max(tl.where(some, tile + 1, 0), 0))
        full = tl.minimum(full, tl.min(tl.where(every, tile, FAR), 0))
        full_end = tl.minimum(full_end, tl.min(tl.where(every | (tile <= full), FAR, tile), 0))
    last_end = tl.maximum(last_end, first)
    full = tl.minimum(full, last_end)
    return first, last_end, full, tl.maximum(tl.minimum(full_end, last_end), full)


@triton.jit
def key_gradients(
    acc_k, acc_v, q, grad, lse, delta, k, v, seen, inner, factor, SOFTCAP: tl.constexpr, MASKED: tl.constexpr
):
    """Add what queries [X, D] give gradients of keys [Y, D] and values [Y, DV]; ``seen`` [Y, X] counts if MASKED."""
    raw = raw_scores(k, q, inner, SOFTCAP)  # [Y, X]
    weight = tl.exp2(raw * factor - lse[None, :])
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    acc_v = tl.dot(weight.to(grad.dtype), grad, acc_v, input_precision="ieee")  # [Y, DV]
    grad_weight = tl.dot(v, tl.trans(grad), input_precision="ieee")  # [Y, X]
    grad_score = weight * (grad_weight - delta[None, :])
    if SOFTCAP:
        grad_score *= 1.0 - raw * raw
    acc_k = tl.dot(grad_score.to(q.dtype), q, acc_k, input_precision="ieee")  # [Y, D]
    return acc_k, acc_v


@triton.jit(do_not_specialize=["groups", "rows", "length", "horizon", "window"])
def strided_attention_dkdv_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, DV]
    grad,  # [B, H, S, DV]
    lse,  # [B, H, S]
    delta,  # [B, H, S]
    bounds,  # [B, tiles, 4]
    grad_k,  # [B, Hkv, S, D]
    grad_v,  # [B, Hkv, S, DV]
    prefix_start,  # [B, S], as are the next two
    prefix_end,
    own_start,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    groups,
    kv_heads,
    rows,
    length,
    horizon,
    window,
    scale,
    inner,
    factor,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FULL: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of one tile of keys and values: prompt keys, or with OWN the rollouts' keys."""
    group = tl.program_id(0) % groups
    batch = (group // kv_heads).to(tl.int64)
    kv_head = group % kv_heads
    end_of_keys = tl.where(OWN, rows, length)
    first_key = tl.where(OWN, length, 0) + tl.program_id(0) // groups * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, end_of_keys) - 1
    key = first_key + tl.arange(0, BLOCK_N)  # [BN]
    key = tl.minimum(key, last_key)
    offset = batch * k_batch + kv_head.to(tl.int64) * k_head + key.to(tl.int64) * k_row
    k_tile = load_rows(k, offset, D, PAD_D)  # [BN, D]
    offset = batch * v_batch + kv_head.to(tl.int64) * v_head + key.to(tl.int64) * v_row
    v_tile = load_rows(v, offset, DV, PAD_DV)  # [BN, DV]
    acc_k = tl.zeros([BLOCK_N, PAD_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, PAD_DV], tl.float32)
    q += batch * q_batch
    grad += batch * grad_batch
    lse += batch * kv_heads * R * rows
    delta += batch * kv_heads * R * rows

    if OWN:
        first_row = length + (first_key - length) // horizon * horizon
        last_row = length + (last_key - length) // horizon * horizon + horizon - 1
        first_pair = (first_row if FULL else first_key) * R
        pairs_end = (last_row + 1) * R
        masked_tiles = tl.cdiv(pairs_end - first_pair, BLOCK_M)
    else:
        prompt_tiles = tl.cdiv(length * R, BLOCK_M)
        rollout_tiles = tl.cdiv((rows - length) * R, BLOCK_M)
        bounds += batch * (prompt_tiles + rollout_tiles) * 4
        first_p, end_p, full_p, full_end_p = seeing_tiles(bounds, prompt_tiles, first_key, last_key)
        first_r, end_r, full_r, full_end_r = seeing_tiles(bounds + prompt_tiles * 4, rollout_tiles, first_key, last_key)
        masked_p = end_p - first_p - (full_end_p - full_p)
        masked_tiles = masked_p + end_r - first_r - (full_end_r - full_r)
        for index in tl.range(0, full_end_p - full_p + full_end_r - full_r):
            from_prompt = index < full_end_p - full_p
            tile = tl.where(from_prompt, full_p + index, full_r + index - (full_end_p - full_p))
            pair = tl.where(from_prompt, 0, length * R) + tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
            head = (kv_head * R + pair % R).to(tl.int64)
            row = (pair // R).to(tl.int64)
            q_tile = load_rows(q, head * q_head + row * q_row, D, PAD_D)  # [BM, D]
            grad_tile = load_rows(grad, head * grad_head + row * grad_row, DV, PAD_DV)  # [BM, DV]
            row_lse = settled(tl.load(lse + head * rows + row)) * 1.4426950408889634  # [BM]
            row_delta = settled(tl.load(delta + head * rows + row))  # [BM]
            acc_k, acc_v = key_gradients(
                acc_k, acc_v, q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, None, inner, factor, SOFTCAP, False
            )
    for index in tl.range(0, masked_tiles):
        if OWN:
            pair = first_pair + index * BLOCK_M
            limit = pairs_end
        else:
            from_prompt = index < masked_p
            tile_p = first_p + index
            tile_p += tl.where(tile_p >= full_p, full_end_p - full_p, 0)
            tile_r = first_r + index - masked_p
            tile_r += tl.where(tile_r >= full_r, full_end_r - full_r, 0)
            pair = tl.where(from_prompt, tile_p * BLOCK_M, length * R + tile_r * BLOCK_M)
            limit = tl.where(from_prompt, length, rows) * R
        pair += tl.arange(0, BLOCK_M)  # [BM]
        present = pair < limit
        pair = tl.minimum(pair, limit - 1)
        start, end, own, own_end = row_ranges(
            prefix_start, prefix_end, own_start, pair // R, batch * rows, length, horizon, window, WINDOW, FULL
        )
        head = (kv_head * R + pair % R).to(tl.int64)
        row = (pair // R).to(tl.int64)
        q_tile = load_rows(q, head * q_head + row * q_row, D, PAD_D)  # [BM, D]
        grad_tile = load_rows(grad, head * grad_head + row * grad_row, DV, PAD_DV)  # [BM, DV]
        row_lse = tl.load(lse + head * rows + row) * 1.4426950408889634  # [BM]
        row_delta = tl.load(delta + head * rows + row)  # [BM]
        if OWN:  # few registers: nothing to settle
            start = own
            end = own_end
        else:
            row_lse = settled(row_lse)
            row_delta = settled(row_delta)
            start = settled(start)
            end = settled(end)
        seen = present[None, :] & (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        acc_k, acc_v = key_gradients(
            acc_k, acc_v, q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, seen, inner, factor, SOFTCAP, True
        )
    key = first_key + same(0, masked_tiles) + tl.arange(0, BLOCK_N)  # [BN]
    wanted = key <= last_key
    target = (batch * kv_heads + kv_head) * rows + key
    store_rows(grad_k, target * D, wanted, acc_k * scale, D, PAD_D)
    store_rows(grad_v, target * DV, wanted, acc_v, DV, PAD_DV)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: KeyRanges,
    length: int,
    _samples: int,
    horizon: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, in their dtype; accumulated in float32."""
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    grad, q, k, v, out = (readable(x) for x in (grad, q, k, v, out))
    batch, heads, rows, _ = q.shape
    kv_heads, device = k.shape[1], q.device
    repeat, groups = heads // kv_heads, batch * kv_heads
    fixed = constants(q, v, repeat, softcap, window)
    shape = (target_of(device), fixed["PAD_D"], fixed["PAD_DV"], q.itemsize)
    plain = softcap is None and window is None
    tiles = attention_tiles("dkdv" if plain else "dkdv_options", *shape)
    ranges = [x.contiguous() for x in ranges]

    def query_tiles(size):
        return ceil_div(length * repeat, size) + ceil_div((rows - length) * repeat, size)

    delta = q.new_empty(q.shape[:3], dtype=STATISTICS)
    block = tiles[0].sizes["BLOCK_M"]  # all candidates share it
    bounds = ranges[0].new_empty(batch, query_tiles(block), 4)
    sizes = (groups, kv_heads, rows, length, horizon, window or 0)
    launch(
        strided_attention_prepare_kernel,
        lambda x: (groups * query_tiles(x["BLOCK_M"]),),
        grad,
        out,
        delta,
        bounds,
        *ranges,
        *grad.stride()[:3],
        *out.stride()[:3],
        *sizes,
        device=device,
        tiles=attention_row_tiles(shape[0], block, fixed["PAD_DV"]),
        **{name: fixed[name] for name in ("R", "DV", "PAD_DV", "WINDOW")},
    )
    factors = (scale, *score_factors(scale, softcap))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    launch(
        strided_attention_dq_kernel,
        lambda x: (groups * query_tiles(x["BLOCK_M"]),),
        *(q, k, v, grad, lse, delta, grads[0], *ranges, *strides, *sizes, *factors),
        device=device,
        tiles=attention_tiles("dq", *shape),
        FULL=full,
        **fixed,
    )
    for own, keys in ((False, length), (True, rows - length)):
        launch(
            strided_attention_dkdv_kernel,
            lambda x, keys=keys: (groups * ceil_div(keys, x["BLOCK_N"]),),
            *(q, k, v, grad, lse, delta, bounds, *grads[1:], *ranges, *strides, *sizes, *factors),
            device=device,
            tiles=attention_tiles("own", *shape) if own else tiles,
            FULL=full,
            OWN=own,
            **fixed,
        )
    return grads
