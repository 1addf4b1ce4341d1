"""One decoding step of strided attention in Triton, split along the keys where there are too few tiles for a GPU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._tiles import attention_row_tiles, attention_tiles
from .._triton import launch, target_of
from ..layout import KeyRanges
from ._common import empty_output
from ._triton_core import (
    NOTHING,
    STATISTICS,
    attend_keys,
    ceil_div,
    constants,
    first_weights,
    load_rows,
    load_some_rows,
    normalize,
    readable,
    row_ranges,
    same,
    score_factors,
    store_rows,
)

# Fewer prompt keys than this are not worth a program of their own.
_SPLIT_KEYS = 256


@triton.jit
def step_tile(tile, kv_head, rollouts, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rollout and head of the pairs [BM] of a tile, and whether they exist; those beyond the last are copies of it."""
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    last = tl.minimum(pair, rollouts * R - 1)
    return last // R, kv_head * R + last % R, pair == last


@triton.jit(do_not_specialize=["groups", "rollouts", "rows", "length", "horizon", "window", "step", "splits"])
def strided_attention_step_kernel(
    q,  # [B, H, A*n, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, DV]
    sinks,  # [H], or anything without SINKS
    out,  # [B, H, A*n, DV] over [B, A*n, H, DV] memory; with SPLIT one such per split, float32
    lse,  # [B, H, A*n]; with SPLIT [splits, B, A*n, H] in units of log 2
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
    groups,  # B*Hkv
    kv_heads,
    rollouts,  # A*n
    rows,
    length,
    horizon,
    window,
    step,
    splits,
    inner,
    factor,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One tile of (rollout, head) pairs over one split of its prompt keys; the first split has its own tokens too."""
    group = tl.program_id(0) % groups
    kv_head = group % kv_heads
    batch = (group // kv_heads).to(tl.int64)
    split = tl.program_id(0) // groups % splits
    tile = tl.cdiv(rollouts * R, BLOCK_M) - 1 - tl.program_id(0) // groups // splits  # longest first
    rollout, head, present = step_tile(tile, kv_head, rollouts, R, BLOCK_M)
    start, end, own, own_end = row_ranges(
        prefix_start,
        prefix_end,
        own_start,
        length + rollout * horizon + step,
        batch * rows,
        length,
        horizon,
        window,
        WINDOW,
        False,
    )
    # Of every rollout in the tile, the tokens up to this step that its row sees: equally many for all.
    own_first = tl.min(own, 0)
    own_steps = tl.max(own_end - own, 0)
    own_count = (tl.max(rollout, 0) - tl.min(rollout, 0) + 1) * own_steps
    top, total = first_weights(sinks, head, SINKS, BLOCK_M)
    if SPLIT:
        first = tl.min(start, 0)
        keys = tl.cdiv(tl.cdiv(tl.max(end, 0) - first, BLOCK_N), splits) * BLOCK_N
        start = tl.maximum(start, first + split * keys)
        end = tl.maximum(tl.minimum(end, first + (split + 1) * keys), start)
        own_count = tl.where(split == 0, own_count, 0)
        top = tl.where(split == 0, top, NOTHING)
        total = tl.where(split == 0, total, 0.0)
    offset = batch * q_batch + head.to(tl.int64) * q_head + rollout.to(tl.int64) * q_row
    acc, top, total = attend_keys(
        load_rows(q, offset, D, PAD_D),  # [BM, D]
        top,
        total,
        k + batch * k_batch + kv_head.to(tl.int64) * k_head,
        v + batch * v_batch + kv_head.to(tl.int64) * v_head,
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
        D,
        DV,
        PAD_D,
        PAD_DV,
        SOFTCAP,
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_E,
    )
    acc, value = normalize(acc, top, total)
    rollout, head, present = step_tile(same(tile, own_count), kv_head, rollouts, R, BLOCK_M)
    place = (batch * rollouts + rollout) * kv_heads * R + head
    if SPLIT:
        place += split.to(tl.int64) * groups * R * rollouts
        tl.store(lse + place, value, mask=present)
    else:
        tl.store(lse + (batch * kv_heads * R + head) * rollouts + rollout, value / 1.4426950408889634, mask=present)
    store_rows(out, place * DV, present, acc, DV, PAD_DV)


@triton.jit(do_not_specialize=["splits", "count", "heads", "rollouts"])
def strided_attention_combine_kernel(
    parts,  # [splits, count, DV] float32
    parts_lse,  # [splits, count] in units of log 2
    out,  # [count, DV]
    lse,  # [B, H, A*n]
    splits,
    count,  # B*A*n*H
    heads,
    rollouts,
    DV: tl.constexpr,
    PAD_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Join what the splits computed."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    present = place < count
    top = tl.full([BLOCK_M], NOTHING, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PAD_DV], tl.float32)
    for _ in tl.range(0, splits):
        part = load_some_rows(parts, place * DV, present, DV, PAD_DV)  # [BM, DV]
        value = tl.load(parts_lse + place, mask=present, other=NOTHING)  # [BM]
        new_top = tl.maximum(top, value)
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(value - new_top)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        top = new_top
        place += count
    place -= splits * count
    store_rows(out, place * DV, present, acc / total[:, None], DV, PAD_DV)
    row, head = place // heads, place % heads
    place = (row // rollouts * heads + head) * rollouts + row % rollouts
    tl.store(lse + place, (top + tl.log2(total)) / 1.4426950408889634, mask=present)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    _samples: int,
    horizon: int,
    step: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, A*n, Dv] and log-sum-exp [B, H, A*n] of one step; see :func:`.api.strided_attention_step`."""
    out = empty_output(q, v)
    q, k, v = readable(q), readable(k), readable(v)
    batch, heads, rollouts, _ = q.shape
    lse = q.new_empty((batch, heads, rollouts), dtype=STATISTICS)
    kv_heads, device = k.shape[1], q.device
    repeat, groups = heads // kv_heads, batch * kv_heads
    fixed = constants(q, v, repeat, softcap, window)
    target = target_of(device)
    tiles = attention_tiles("step", target, fixed["PAD_D"], fixed["PAD_DV"], q.itemsize)
    programs = groups * ceil_div(rollouts * repeat, tiles[0].sizes["BLOCK_M"])
    splits = max(1, min(ceil_div(target.processors, max(programs, 1)), length // _SPLIT_KEYS))
    parts, parts_lse = out, lse
    if splits > 1:
        parts = q.new_empty((splits, *out.shape), dtype=STATISTICS)
        parts_lse = q.new_empty((splits, batch, rollouts, heads), dtype=STATISTICS)
    launch(
        strided_attention_step_kernel,
        lambda x: (groups * splits * ceil_div(rollouts * repeat, x["BLOCK_M"]),),
        q,
        k,
        v,
        out if sinks is None else sinks.contiguous(),
        parts,
        parts_lse,
        *(x.contiguous() for x in ranges),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        groups,
        kv_heads,
        rollouts,
        k.shape[2],
        length,
        horizon,
        window or 0,
        step,
        splits,
        *score_factors(scale, softcap),
        device=device,
        tiles=tiles,
        SINKS=sinks is not None,
        SPLIT=splits > 1,
        **fixed,
    )
    if splits > 1:
        count = batch * rollouts * heads
        launch(
            strided_attention_combine_kernel,
            lambda x: (ceil_div(count, x["BLOCK_M"]),),
            *(parts, parts_lse, out, lse, splits, count, heads, rollouts),
            device=device,
            tiles=attention_row_tiles(target, max(1, 1024 // fixed["PAD_DV"]), fixed["PAD_DV"]),
            DV=fixed["DV"],
            PAD_DV=fixed["PAD_DV"],
        )
    return out, lse
