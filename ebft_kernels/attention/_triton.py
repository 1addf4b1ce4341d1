"""Strided attention in Triton: the forward kernel; backward and step are in the files beside it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._tiles import attention_tiles
from .._triton import launch, target_of
from ..layout import KeyRanges
from ._common import empty_output
from ._triton_backward import backward
from ._triton_core import (
    STATISTICS,
    attend_keys,
    ceil_div,
    constants,
    first_weights,
    load_rows,
    normalize,
    query_tile,
    readable,
    row_ranges,
    same,
    score_factors,
    store_rows,
)
from ._triton_step import step

__all__ = ["backward", "forward", "step"]


@triton.jit(do_not_specialize=["groups", "rows", "length", "horizon", "window"])
def strided_attention_fwd_kernel(
    q,  # [B, H, S, D]
    k,  # [B, Hkv, S, D]
    v,  # [B, Hkv, S, DV]
    sinks,  # [H], or anything without SINKS
    out,  # [B, H, S, DV] over [B, S, H, DV] memory
    lse,  # [B, H, S]
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
    rows,
    length,
    horizon,
    window,
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
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Output and log-sum-exp of one tile of (row, head) pairs."""
    group = tl.program_id(0) % groups
    kv_head = group % kv_heads
    batch = (group // kv_heads).to(tl.int64)
    row, head, present, is_rollout = query_tile(tl.program_id(0) // groups, kv_head, rows, length, R, BLOCK_M)
    start, end, own, own_end = row_ranges(
        prefix_start, prefix_end, own_start, row, batch * rows, length, horizon, window, WINDOW, FULL
    )
    own_first = tl.min(own, 0)
    own_count = tl.where(is_rollout, tl.max(own_end, 0) - own_first, 0)
    offset = batch * q_batch + head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
    q_tile = load_rows(q, offset, D, PAD_D)  # [BM, D]
    top, total = first_weights(sinks, head, SINKS, BLOCK_M)
    acc, top, total = attend_keys(
        q_tile,
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
        horizon,
        horizon,
        inner,
        factor,
        D,
        DV,
        PAD_D,
        PAD_DV,
        SOFTCAP,
        True,
        BLOCK_M,
        BLOCK_N,
        BLOCK_E,
    )
    acc, value = normalize(acc, top, total)
    index = same(tl.program_id(0) // groups, own_count)
    row, head, present, _ = query_tile(index, kv_head, rows, length, R, BLOCK_M)
    heads = kv_heads * R
    store_rows(out, ((batch * rows + row) * heads + head) * DV, present, acc, DV, PAD_DV)
    tl.store(lse + (batch * heads + head) * rows + row, value / 1.4426950408889634, mask=present)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    _samples: int,
    horizon: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, Dv] and log-sum-exp [B, H, S]; see :func:`.api.strided_attention`."""
    out, lse = empty_output(q, v), q.new_empty(q.shape[:3], dtype=STATISTICS)
    q, k, v = readable(q), readable(k), readable(v)
    batch, heads, rows, _ = q.shape
    kv_heads = k.shape[1]
    repeat, groups = heads // kv_heads, batch * kv_heads
    fixed = constants(q, v, repeat, softcap, window)

    def grid(sizes):
        tile = sizes["BLOCK_M"]
        return (groups * (ceil_div(length * repeat, tile) + ceil_div((rows - length) * repeat, tile)),)

    launch(
        strided_attention_fwd_kernel,
        grid,
        q,
        k,
        v,
        lse if sinks is None else sinks.contiguous(),
        out,
        lse,
        *(x.contiguous() for x in ranges),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        groups,
        kv_heads,
        rows,
        length,
        horizon,
        window or 0,
        *score_factors(scale, softcap),
        device=q.device,
        tiles=attention_tiles("forward", target_of(q.device), fixed["PAD_D"], fixed["PAD_DV"], q.itemsize),
        FULL=full,
        SINKS=sinks is not None,
        **fixed,
    )
    return out, lse
