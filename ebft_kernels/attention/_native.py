"""Strided attention by the compiled module: tiles of rows against blocks of exactly the keys that they see."""

from __future__ import annotations

from torch import Tensor

from .. import _native
from ..layout import KeyRanges, slide_key_ranges
from ._common import empty_output, statistics_dtype


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    samples: int,  # noqa: ARG001 (every implementation takes the same arguments)
    horizon: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, S, Dv] and log-sum-exp [B, H, S]; see :func:`.api.strided_attention`."""
    return _attend(q, k, v, sinks, ranges, length, horizon, -1, scale, softcap, window, full)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    samples: int,  # noqa: ARG001
    horizon: int,
    step: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, A*n, Dv] and log-sum-exp [B, H, A*n] of one step; see :func:`.api.strided_attention_step`."""
    return _attend(q, k, v, sinks, ranges, length, horizon, step, scale, softcap, window, False)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: KeyRanges,
    length: int,
    samples: int,  # noqa: ARG001
    horizon: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, in their dtype."""
    q, k, v, grad, out = (_native.rows(x) for x in (q, k, v, grad, out))
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    ranges, lse = _visible(ranges, window), lse.contiguous()
    _native.run(
        "strided_attention_backward",
        q.device,
        _native.DTYPES[q.dtype],
        _sizes(q, k, v, length, horizon),
        *map(_operand, (q, k, v)),
        [_native.layout_tensor(x) for x in ranges],
        full,
        scale,
        softcap or 0.0,
        _operand(out),
        lse.data_ptr(),
        *map(_operand, (grad, *grads)),
    )
    return grads


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    ranges: KeyRanges,
    length: int,
    horizon: int,
    step: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """The rows of one step, or all of them with ``step = -1``."""
    out, lse = empty_output(q, v), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
    q, k, v = (_native.rows(x) for x in (q, k, v))
    ranges = _visible(ranges, window)
    sinks = None if sinks is None else sinks.double().contiguous()
    _native.run(
        "strided_attention",
        q.device,
        _native.DTYPES[q.dtype],
        _sizes(q, k, v, length, horizon),
        step,
        *map(_operand, (q, k, v)),
        [_native.layout_tensor(x) for x in ranges],
        full,
        scale,
        softcap or 0.0,
        0 if sinks is None else sinks.data_ptr(),
        _operand(out),
        lse.data_ptr(),
    )
    return out, lse


def _sizes(q: Tensor, k: Tensor, v: Tensor, length: int, horizon: int) -> tuple[int, ...]:
    """B, H, Hkv, D, Dv, P, A*n, G."""
    rollouts = (k.shape[2] - length) // max(horizon, 1)
    return (*q.shape[:2], k.shape[1], q.shape[3], v.shape[3], length, rollouts, horizon)


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), *_native.byte_strides(x, 3)


def _visible(ranges: KeyRanges, window: int | None) -> KeyRanges:
    visible = ranges if window is None else slide_key_ranges(ranges, window)
    return KeyRanges(*(x.contiguous() for x in visible))
