"""The specification of strided attention, written to be read: quadratic in S, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import StridedLayout


def strided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StridedLayout,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    block: str = "causal",
) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> [B, H, S, Dv] and log-sum-exp [B, H, S]."""
    visible = layout.dense_mask(window, block=block)  # [B, 1, S, S]
    return masked_attention(q, k, v, visible, scale=scale, softcap=softcap, sinks=sinks)


def strided_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: StridedLayout,
    step: int,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, A*n, D], caches [B, Hkv, S, D] and [B, Hkv, S, Dv] -> [B, H, A*n, Dv] and log-sum-exp [B, H, A*n]."""
    visible = layout.dense_mask(window)[:, :, layout.length + step :: layout.horizon]  # [B, 1, A*n, S]
    return masked_attention(q, k_cache, v_cache, visible, scale=scale, softcap=softcap, sinks=sinks)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [B, H, Q, D] over the ``visible`` [B, 1, Q, K] keys, computed in float32 or float64, and
    the logarithm of its denominator [B, H, Q], without gradient.

    H/Hkv neighbouring query heads share a key/value head. A sink is one more logit per head in the denominator. A row
    without a visible key, or whose visible scores are all -inf, gives 0, and -inf.

    Keys and values that are not visible weigh nothing, whatever they hold. Products with a weight of 0 are not enough
    for that: 0 * NaN is NaN. So products are of numbers that are finite, and what is not is brought to the rows that
    see it, and to them alone.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        grouped, k, v = q.to(dtype).unflatten(1, (k.shape[1], -1)), k.to(dtype), v.to(dtype)  # [B, Hkv, H/Hkv, Q, D]
        known = k.isfinite()
        scores = torch.einsum("bhrqd,bhkd->bhrqk", grouped, k.where(known, 0))
        as_they_are = torch.einsum("bhrqd,bhkd->bhrqk", grouped.detach(), k.detach())
        scores = scores.where(known.all(-1)[:, :, None, None], as_they_are).flatten(1, 2) * scale  # [B, H, Q, K]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            sink = sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        highest = scores.amax(-1, keepdim=True).detach()
        weights = torch.exp(scores - highest.clamp_min(torch.finfo(dtype).min))
        total = weights.sum(-1, keepdim=True)
        lse = (total.detach().log() + highest)[..., 0]
        weights = weights / total.where(total > 0, 1)
        weights = weights[..., : k.shape[2]].masked_fill(~visible, 0)  # NaN where one is among the row's others
        weights = weights.unflatten(1, (k.shape[1], -1))  # [B, Hkv, H/Hkv, Q, K]
        out = torch.einsum("bhrqk,bhkd->bhrqd", weights, v.where(v.isfinite(), 0))
        for value in (float("inf"), float("-inf")):  # NaN is both
            holds = ((v == value) | v.isnan()).to(dtype)
            seen = torch.einsum("bqk,bhkd->bhqd", visible[:, 0].to(dtype), holds) > 0  # [B, Hkv, Q, Dv]
            out = out + torch.where(seen, value, 0.0)[:, :, None].to(dtype)
        out = out.flatten(1, 2)
    return out.to(q.dtype), lse
