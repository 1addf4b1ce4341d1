"""Strided attention in plain PyTorch: blocks of keys that whole tiles of rows share, merged by their log-sum-exps.

A row sees a range of the prompt and a range of its own rollout. Neighbouring rows see nearly the same range of the
prompt, so a *tile* of rows attends to few rectangular *parts* of it: one that all its rows see whole, which needs no
mask, and a narrow masked one at a ragged end. The rollouts' own tokens are one more part, batched over rollouts.

All of it works on *folded* tensors: the H/Hkv query heads that share a key/value head become neighbouring rows, so that
they read one copy of the keys:

    q [B, H, S, D] -> [1, X, S*H/Hkv, D]        k, v [B, Hkv, S, D] -> [1, X, S, D]        X = B*Hkv
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import KeyRanges
from ._common import empty_output, statistics_dtype
from ._plan import MASKED, Part, Plan, plan_rows, plan_step

# PyTorch's fused CPU kernels work in blocks that fit the cache and return the log-sum-exp too. Their names are private.
try:
    _FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    _FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
except AttributeError:  # pragma: no cover
    _FUSED = _FUSED_BACKWARD = None

# Folded rows per tile: more rows waste more scores at ragged ends, fewer cost more calls and (backward) more passes
# over the gradients of k and v. Measured at P = 256 and 1024, G = stride = 8, n = 4: the optimum is flat.
_TILE_ROWS = 256
_STEP_ROWS = 128

# Unfused, the scores of a tile, all its heads and the whole prompt are in memory at once: at most this many.
_MAX_SCORES = 2**22


class _Scoring(NamedTuple):
    """What turns <q, k> into a score, whether the fused kernels can, and whether adding MASKED hides every score.

    Where it does not, hidden keys are left out. That takes longer, so on a CPU one looks at the numbers first;
    elsewhere one would have to wait for them.
    """

    scale: float
    softcap: float | None
    fused: bool
    hides: bool


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    samples: int,
    horizon: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, Dv] and log-sum-exp [B, H, S]; see :func:`.api.strided_attention`."""
    out, lse = empty_output(q, v), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
    if q.numel():
        scoring = _scoring(q, k, v, scale, softcap)
        kv_heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
        q, k, v = (_fold(x, kv_heads, lse.dtype) for x in (q, k, v))
        rows = _tile_rows(_TILE_ROWS, k, length, repeat, scoring)
        options = {"window": window, "full": full, "rows": rows, "repeat": repeat, "dtype": lse.dtype}
        plan = plan_rows(ranges, length, samples, horizon, **options)
        own = None
        if plan.own_mask is not None:
            views = (_per_rollout(q, length, horizon, repeat), *(_per_rollout(x, length, horizon) for x in (k, v)))
            own = _attend(*views, plan.own_mask, scoring._replace(fused=False))
        _attend_rows(out, lse, q, k, v, sinks, own, plan, scoring)
    return out, lse


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    samples: int,
    horizon: int,
    step: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, A*n, Dv] and log-sum-exp [B, H, A*n] of one step; see :func:`.api.strided_attention_step`."""
    out, lse = empty_output(q, v), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
    if q.numel():
        # Later rows are not written yet: what they hold says nothing about the scores.
        scoring = _scoring(q, k[:, :, :length], v[:, :, :length], scale, softcap)
        kv_heads, repeat = k.shape[1], q.shape[1] // k.shape[1]
        first = 0 if window is None else max(0, step + 1 - window)
        own = (x[:, :, length:].unflatten(2, (-1, horizon))[:, :, :, first : step + 1] for x in (k, v))
        own_k, own_v = (x.to(lse.dtype).flatten(0, 1) for x in own)  # [X, A*n, tokens, D]
        q, k, v = (_fold(x, kv_heads, lse.dtype) for x in (q, k[:, :, :length], v[:, :, :length]))
        own = _attend(_per_rollout(q, 0, 1, repeat), own_k, own_v, None, scoring._replace(fused=False))
        rows = _tile_rows(_STEP_ROWS, k, length, repeat, scoring)
        plan = plan_step(
            ranges, length, samples, horizon, step, window=window, rows=rows, repeat=repeat, dtype=lse.dtype
        )
        _attend_rows(out, lse, q, k, v, sinks, own, plan, scoring)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: KeyRanges,
    length: int,
    samples: int,
    horizon: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, in their dtype; accumulated in at least float32."""
    if not q.numel():
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    inputs, scoring = (q, k, v), _scoring(q, k, v, scale, softcap)
    batch, kv_heads, repeat = k.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    grad, q, k, v, out, lse = (_fold(x, kv_heads, lse.dtype) for x in (grad, q, k, v, out, lse[..., None]))
    rows = _tile_rows(_TILE_ROWS, k, length, repeat, scoring)
    options = {"window": window, "full": full, "rows": rows, "repeat": repeat, "dtype": lse.dtype}
    plan = plan_rows(ranges, length, samples, horizon, **options)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    for x, rows in ((grad_q, length * repeat), (grad_k, length), (grad_v, length)):
        x[:, :, :rows].zero_()
    if plan.own_mask is not None:
        own_rows = (_per_rollout(x, length, horizon, repeat) for x in (grad, q, out, lse))
        own_keys = (_per_rollout(x, length, horizon) for x in (k, v))
        targets = (
            _per_rollout(grad_q, length, horizon, repeat),
            *(_per_rollout(x, length, horizon) for x in (grad_k, grad_v)),
        )
        _attend_backward(*own_rows, *own_keys, plan.own_mask, scoring._replace(fused=False), targets)
    for stripe in plan.stripes:
        heads = slice(stripe.start * kv_heads, stripe.end * kv_heads)
        sizes = [(tile.end - tile.start) * repeat for tile in stripe.tiles]
        by_tile = zip(*(x[:, heads].split(sizes, 2) for x in (grad_q, grad, q, out, lse)), strict=True)
        by_key = [x[:, heads] for x in (k, v, grad_k, grad_v)]
        for tile, (grad_q_tile, *row_tensors) in zip(stripe.tiles, by_tile, strict=True):
            _prompt_backward(grad_q_tile, row_tensors, by_key, tile.parts, scoring)
    grad_q = grad_q.view(batch, kv_heads, -1, repeat, q.shape[3]).transpose(2, 3)
    return tuple(x.reshape(y.shape).to(y.dtype) for x, y in zip((grad_q, grad_k, grad_v), inputs, strict=True))


def _fold(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, H, S, D] -> [1, B*Hkv, S*H/Hkv, D]: a view where the strides allow it."""
    batch, heads, rows, size = x.shape
    repeat = heads // kv_heads
    x = x.to(dtype).unflatten(1, (kv_heads, repeat)).transpose(2, 3)
    return _dense(x.reshape(1, batch * kv_heads, rows * repeat, size))


def _dense(x: Tensor) -> Tensor:
    """[..., R, D] with the memory order that matrix products want, which an expanded or transposed tensor has not."""
    return x if x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] else x.contiguous()


def _per_rollout(x: Tensor, length: int, horizon: int, repeat: int = 1) -> Tensor:
    """The rollouts' rows of a folded tensor, one batch entry each: [1, X, S.., D] -> view [X, A*n, G.., D]."""
    return x[0, :, length * repeat :].unflatten(1, (-1, horizon * repeat))


def _tile_rows(rows: int, k: Tensor, length: int, repeat: int, scoring: _Scoring) -> int:
    """Query rows per tile for about ``rows`` folded ones, fewer where their scores would take too much memory."""
    if not scoring.fused:
        rows = min(rows, _MAX_SCORES // (k.shape[1] * max(length, 1)))
    return max(1, rows // repeat)


def _attend_rows(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    own: tuple[Tensor, Tensor] | None,
    plan: Plan,
    scoring: _Scoring,
) -> None:
    """Fill ``out`` [B, H, R, Dv] and ``lse`` [B, H, R] with folded queries' attention to the prompt.

    Joined with what the last rows already have: ``own``, [X, A*n, G.., Dv] and [X, A*n, G..].
    """
    kv_heads = k.shape[1] // out.shape[0]
    out, lse = (x.unflatten(1, (kv_heads, -1)).transpose(2, 3) for x in (out, lse[..., None]))  # [B, Hkv, R, H/Hkv, Dv]
    rows, repeat = out.shape[2:4]
    own = [] if own is None else [x.flatten(1, 2) for x in own]  # [X, A*n*G.., Dv]
    first = rows * repeat - own[0].shape[1] if own else 0
    if sinks is not None:
        sinks = sinks.to(lse.dtype).view(kv_heads, 1, repeat, 1)
    for stripe in plan.stripes:
        heads = slice(stripe.start * kv_heads, stripe.end * kv_heads)
        k_stripe, v_stripe = k[:, heads], v[:, heads]
        sizes = [tile.end - tile.start for tile in stripe.tiles]
        tiles = q[:, heads].split([size * repeat for size in sizes], 2)
        targets = (x[stripe.start : stripe.end].split(sizes, 2) for x in (out, lse))
        for tile, q_tile, out_tile, lse_tile in zip(stripe.tiles, tiles, *targets, strict=True):
            results = [
                _attend(q_tile, k_stripe[:, :, start:end], v_stripe[:, :, start:end], mask, scoring)
                for start, end, mask in tile.parts
            ]
            if tile.rollouts:
                span = slice(tile.start * repeat - first, tile.end * repeat - first)
                results.append((own[0][heads, span], own[1][heads, span]))
            _merge(out_tile, lse_tile, results, sinks)


def _merge(out: Tensor, lse: Tensor, results: list[tuple[Tensor, Tensor]], sinks: Tensor | None) -> None:
    """Join attention to disjoint sets of keys into ``out`` [b, Hkv, R, H/Hkv, Dv] and ``lse`` [b, Hkv, R, H/Hkv, 1]."""
    results = [(x.reshape(out.shape), x_lse.reshape(lse.shape)) for x, x_lse in results]
    total = functools.reduce(torch.logaddexp, [x_lse for _, x_lse in results] + ([] if sinks is None else [sinks]))
    joint, joint_lse = results[0]
    if len(results) > 1 or sinks is not None:
        joint = joint.mul_((joint_lse - total).exp_())
    for x, x_lse in results[1:]:
        joint.addcmul_(x, (x_lse - total).exp_())
    out.copy_(joint)
    lse.copy_(total)


def _prompt_backward(
    grad_q: Tensor, rows: list[Tensor], keys: list[Tensor], parts: list[Part], scoring: _Scoring
) -> None:
    """Add the gradients that one tile's attention to the prompt gives its queries and the prompt's keys and values."""
    for start, end, mask in parts:
        k, v, grad_k, grad_v = (x[:, :, start:end] for x in keys)
        grads = _attend_backward(*rows, k, v, mask, scoring)
        for target, x in zip((grad_q, grad_k, grad_v), grads, strict=True):
            target += x


def _scoring(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> _Scoring:
    hides = q.device.type == "cpu" and _are_ordinary(q, k, v, scale)
    fused = _FUSED is not None and hides and softcap is None and q.shape[3] == v.shape[3]
    return _Scoring(scale, softcap, fused, hides)


def _are_ordinary(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether values are finite and scores so small beside MASKED that the two add up to a weight of 0."""

    def largest(x: Tensor) -> float:
        return max(abs(float(bound)) for bound in x.aminmax()) if x.numel() else 0.0

    most = q.shape[3] * scale * largest(q) * largest(k)
    return most < -MASKED / 10 and largest(v) < float("inf")


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: _Scoring) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [X, Y, R, D] over k, v [X, Y, K, D or Dv] and its log-sum-exp [X, Y, R]."""
    scale, softcap, fused, hides = scoring
    if fused:
        return _FUSED(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    scores = _products(q, k.mT).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    hidden = None if mask is None or hides else mask < 0
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    elif mask is not None:
        scores += mask
    highest = scores.amax(-1, keepdim=True).clamp_min_(MASKED)
    total = scores.sub_(highest).exp_().sum(-1, keepdim=True)
    total.masked_fill_(total == 0, 1)  # all scores are -inf
    out = _products(scores, v) if hidden is None else _products_with_seen(scores, v, ~hidden)
    return out.div_(total), total.log_().add_(highest)[..., 0]


def _products_with_seen(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Weights [X, Y, R, K], 0 unless ``seen`` [R, K], times v [X, Y, K, Dv]: not NaN by what is not seen."""
    out = _products(weights, v.where(v.isfinite(), 0))
    for value in (float("inf"), float("-inf")):  # NaN is both
        holds = ((v == value) | v.isnan()).to(v.dtype)
        out += torch.where(seen.to(v.dtype) @ holds > 0, value, 0.0)
    return out


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: _Scoring,
    targets: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """These keys' share of the gradients of q, k and v; ``out`` and ``lse`` [X, Y, R, 1] are those over *all* keys.

    Written to ``targets`` where they are given, which the fused kernel cannot.
    """
    scale, softcap, fused, hides = scoring
    if fused:
        return _FUSED_BACKWARD(grad, q, k, v, out, lse[..., 0], 0.0, False, attn_mask=mask, scale=scale)
    weights = _products(q, k.mT).mul_(scale)
    slope = None
    if softcap is not None:
        weights.div_(softcap).tanh_()
        slope = 1 - weights * weights
        weights *= softcap
    hidden = None if mask is None or hides else mask < 0
    if mask is not None and hides:
        weights += mask
    weights.sub_(lse).exp_()
    if hidden is not None:
        weights.masked_fill_(hidden, 0)
    grad_v = _products(weights.mT, grad, targets[2])
    grad_scores = _products(grad, v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    if slope is not None:
        grad_scores *= slope
    if hidden is not None:
        grad_scores.masked_fill_(hidden, 0)
        k = k.where(k.isfinite(), 0)  # a row that sees one that is not has NaN for a gradient of its score
    return _products(grad_scores, k, targets[0]), _products(grad_scores.mT, q, targets[1]), grad_v


def _products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """[X, Y, M, N] @ [X, Y, N, K], one X at a time: PyTorch copies operands whose X and Y do not fuse into one."""
    if out is None:
        out = a.new_empty(*a.shape[:3], b.shape[3])
    for x, y, target in zip(a, b, out, strict=True):
        torch.bmm(x, y, out=target)
    return out
