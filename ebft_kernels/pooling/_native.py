"""Pooling by the compiled modules: rows are read where they lie, and every row of a gradient is written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _native
from ._common import empty_features
from .modes import NORMALIZATIONS, POOLINGS


def forward(
    hidden_states: Sequence[Tensor],
    rollout_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor | None,
    pooling: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Features [B, A, n, F] and [B, A, F], with a K axis before F for ``"token"``.

    Args:
        hidden_states: L tensors [B, S, C].
        rollout_rows: [B, A, n, K] int64, the packed rows whose tokens make up each feature.
        target_rows: [B, A, K] int64.
        weight: [B, A, K] bool, which of these tokens count; None: all.
        pooling, normalize: keys of ``POOLINGS`` and ``NORMALIZATIONS``.
    """
    hidden = [_native.rows(x) for x in hidden_states]
    rollouts, targets = empty_features(hidden, rollout_rows, target_rows, pooling)
    index = [x if x is None else x.contiguous() for x in (rollout_rows, target_rows, weight)]
    _native.run(
        "pool_features",
        rollouts.device,
        *_inputs(hidden, index, pooling, normalize),
        rollouts.data_ptr(),
        targets.data_ptr(),
    )
    return rollouts, targets


def backward(
    grad_rollouts: Tensor,
    grad_targets: Tensor,
    hidden_states: Sequence[Tensor],
    rollout_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor | None,
    pooling: str,
    normalize: str,
) -> list[Tensor]:
    """Gradients of the hidden states, from those of the two results of :func:`forward`."""
    hidden = [_native.rows(x) for x in hidden_states]
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    grad_rollouts, grad_targets = (x.to(dtype).contiguous() for x in (grad_rollouts, grad_targets))
    grads = [x.new_empty(x.shape) for x in hidden]
    index = [x if x is None else x.contiguous() for x in (rollout_rows, target_rows, weight)]
    gather = _uses(rollout_rows, target_rows, hidden[0].shape[1]) if _native.on_cuda(grads[0].device) else ()
    _native.run(
        "pool_features_backward",
        grads[0].device,
        *_inputs(hidden, index, pooling, normalize),
        grad_rollouts.data_ptr(),
        grad_targets.data_ptr(),
        [_layer(x) for x in grads],
        *(x.data_ptr() for x in gather),
    )
    return grads


def _uses(rollout_rows: Tensor, target_rows: Tensor, packed_length: int) -> tuple[Tensor, Tensor]:
    """Which tokens of which features each packed row is, found on the device without waiting for it.

    Returns:
        [B*S + 1] int64, where those of each row begin;
        [B*A*(n+1)*K] int64, the numbers of all tokens, those of rollouts first, sorted by row.
    """
    batch_size = rollout_rows.shape[0]
    first = packed_length * torch.arange(batch_size, device=rollout_rows.device)[:, None]
    rows = torch.cat([(x.flatten(1) + first).flatten() for x in (rollout_rows, target_rows)])
    in_order, uses = rows.sort(stable=True)
    return torch.searchsorted(in_order, torch.arange(batch_size * packed_length + 1, device=rows.device)), uses


def _layer(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), *_native.byte_strides(x, 2)


def _inputs(hidden: list[Tensor], index: list[Tensor | None], pooling: str, normalize: str) -> tuple:
    """dtype, sizes (B, S, C, A, n, K), layers, indices and options, as the kernels take them."""
    return (
        _native.DTYPES[hidden[0].dtype],
        (*hidden[0].shape, *index[0].shape[1:]),
        [_layer(x) for x in hidden],
        *(0 if x is None else x.data_ptr() for x in index),
        POOLINGS[pooling].code,
        NORMALIZATIONS.index(normalize),
    )
