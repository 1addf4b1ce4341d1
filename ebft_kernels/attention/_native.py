"""A decoding step by the compiled module: keys and values are read where they lie, once for all that share them."""

from __future__ import annotations

from torch import Tensor

from .. import _native
from ..layout import KeyRanges
from ._common import empty_output


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
) -> Tensor:
    """Output [B, H, A*n, Dv] of the rows of one step; see :func:`.api.strided_attention_step`."""
    out = empty_output(q, v)
    q, k, v = (_native.rows(x) for x in (q, k, v))
    ranges = [x.contiguous() for x in ranges]
    sinks = None if sinks is None else sinks.double().contiguous()
    batch, heads, rows, size = q.shape
    sizes = (batch, heads, k.shape[1], size, v.shape[3], length, rows // samples, samples, horizon, step)
    _native.library().strided_attention_step(
        *_native.execution(),
        _native.DTYPES[q.dtype],
        sizes,
        *((x.data_ptr(), *_native.byte_strides(x, 3)) for x in (q, k, v)),
        0 if sinks is None else sinks.data_ptr(),
        *(x.data_ptr() for x in ranges),
        scale,
        softcap or 0.0,
        window or 0,
        out.data_ptr(),
    )
    return out
