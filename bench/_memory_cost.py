"""Bytes of the memory-bound kernels: needed by their task, and counted while the interpreter runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ebft_kernels import StridedLayout

from . import _cases
from ._interpreted import Traffic, counting
from ._targets import GPUS
from .shapes import Geometry, ModelShape

#: Goal: bytes that the kernels move over bytes that they must.
MEMORY_GOAL = 1.05

# Where all programs of a pass move the same number of bytes, so many of them are run, and the count is scaled.
_FEW = 4
# Where they do not, all are run for these short prompts of one batch row: each token more moves as much more.
_SHORT = (16, 24)


class MemoryCost(NamedTuple):
    """One pass of an op over one batch.

    Attributes:
        name: of the op and the pass.
        kernels: the kernels that were launched.
        needed: bytes of its inputs and outputs, each once.
        moved: bytes that the kernels load and store.
        double_operations: float64 operations.
    """

    name: str
    kernels: tuple[str, ...]
    needed: int
    moved: int
    double_operations: int


class Pass(NamedTuple):
    """Forward or backward of an op.

    Attributes:
        call: makes the op with its inputs.
        backward: which of the two.
        needed: bytes of the inputs and outputs of the pass.
        double_operations: float64 operations of the pass.
        programs: how many are run; None: all.
        lengths: prompt lengths to run at instead of at full size.
    """

    call: Callable[[ModelShape, StridedLayout], _cases.Call]
    backward: bool
    needed: Callable[[ModelShape, StridedLayout], int]
    double_operations: Callable[[ModelShape, StridedLayout], int] = lambda _model, _rows: 0
    programs: int | None = _FEW
    lengths: tuple[int, int] | None = None


def _items(rows: StridedLayout) -> int:
    """Rollouts and windows, each of which has a feature."""
    return rows.batch_size * rows.num_anchors * (rows.samples + 1)


def _anchors(rows: StridedLayout) -> int:
    return rows.batch_size * rows.num_anchors


def _gram_operations(model: ModelShape, rows: StridedLayout) -> int:
    """The distinct inner products of n rollouts and a target, two operations per feature."""
    n = rows.samples
    return 2 * _anchors(rows) * (n * (n + 1) // 2 + n + 1) * model.features


def _pooling(mode: str) -> Callable[[ModelShape, StridedLayout], _cases.Call]:
    return lambda model, rows: _cases.pooling(model, rows, torch.bfloat16, mode)


def _pooling_bytes(model: ModelShape, rows: StridedLayout, tokens: int) -> int:
    """bfloat16 hidden states of each item's tokens, the float32 feature."""
    return _items(rows) * model.features * (2 * tokens + 4)


def _hidden_gradient_bytes(model: ModelShape, rows: StridedLayout) -> int:
    """bfloat16, zeros where nothing was pooled."""
    return 2 * rows.batch_size * rows.packed_length * model.features


PASSES = {
    "pool_features, last_token, forward": Pass(
        _pooling("last_token"), False, lambda model, rows: _pooling_bytes(model, rows, 1)
    ),
    "pool_features, last_token, backward": Pass(
        _pooling("last_token"),
        True,
        lambda model, rows: _pooling_bytes(model, rows, 1) + _hidden_gradient_bytes(model, rows),
        programs=None,
        lengths=_SHORT,
    ),
    "pool_features, mean, forward": Pass(
        _pooling("mean"), False, lambda model, rows: _pooling_bytes(model, rows, rows.horizon)
    ),
    "pool_features, mean, backward": Pass(
        _pooling("mean"),
        True,
        lambda model, rows: _pooling_bytes(model, rows, rows.horizon) + _hidden_gradient_bytes(model, rows),
        programs=None,
        lengths=_SHORT,
    ),
    "mean_embedding_loss, forward": Pass(
        _cases.loss,
        False,
        lambda model, rows: 4 * (_items(rows) + _anchors(rows)) * model.features + 4 * _anchors(rows),
    ),
    "mean_embedding_loss, backward": Pass(
        _cases.loss,
        True,
        lambda model, rows: 4 * (_items(rows) + _anchors(rows)) * model.features + 4 * _anchors(rows),
    ),
    "feature_matching, sample": Pass(
        _cases.matching,
        False,
        lambda model, rows: 4 * _items(rows) * model.features + 4 * _anchors(rows) * (1 + 4 * rows.samples),
        _gram_operations,
    ),
    "StridedLayout.dense_mask": Pass(
        _cases.dense_mask,
        False,
        lambda _model, rows: rows.batch_size * rows.packed_length * (rows.packed_length + 12),
    ),
    "StridedLayout.position_ids, key_ranges": Pass(
        _cases.geometry,
        False,
        lambda _model, rows: 4 * _anchors(rows) + rows.batch_size * (4 * rows.length + 20 * rows.packed_length),
        programs=None,
    ),
}


def memory_cost(name: str, model: ModelShape, geometry: Geometry) -> MemoryCost:
    """One of :data:`PASSES`."""
    one, rows = PASSES[name], geometry.layout()
    if one.lengths is None:
        traffic = count(one, model, geometry, one.programs)
        moved = _bytes(traffic)
    else:
        short, long = (geometry._replace(batch=1, length=length) for length in one.lengths)
        traffic, more = count(one, model, short), count(one, model, long)
        per_token = (_bytes(more) - _bytes(traffic)) / (long.length - short.length)
        moved = geometry.batch * (_bytes(traffic) + per_token * (geometry.length - short.length))
    needed, double = one.needed(model, rows), one.double_operations(model, rows)
    return MemoryCost(name, tuple(traffic), needed, round(moved), double)


def count(one: Pass, model: ModelShape, geometry: Geometry, programs: int | None = None) -> dict[str, Traffic]:
    """Traffic of one pass by kernel; if ``programs`` is given, scaled up from so many of each launch."""
    call = one.call(model, geometry.layout())
    with counting(GPUS["sm_90"], sample=programs) as traffic:
        outputs = call.forward()
        if one.backward:
            traffic.clear()
            call.backward(outputs)
    return dict(traffic)


def _bytes(traffic: dict[str, Traffic]) -> int:
    return sum(x.bytes for x in traffic.values())
