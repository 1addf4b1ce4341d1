"""Pooling that gathers only the rows it needs, tile by tile, and a backward pass that adds into only those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .modes import POOLINGS, SHORTEST_TOKEN

# Gathered rows that are worked on together: few enough to stay in a CPU's cache; enough to keep an accelerator busy.
CPU_TILE_BYTES = 2 << 20
TILE_BYTES = 64 << 20


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
    rollout_weight = None if weight is None else weight[:, :, None].expand_as(rollout_rows)
    return (
        _pool(hidden_states, rollout_rows, rollout_weight, pooling, normalize),
        _pool(hidden_states, target_rows, weight, pooling, normalize),
    )


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
    batch_size, packed_length, channels = hidden_states[0].shape
    dtype = torch.promote_types(hidden_states[0].dtype, torch.float32)
    totals = [rollout_rows.new_zeros(batch_size * packed_length, channels, dtype=dtype) for _ in hidden_states]
    rollout_weight = None if weight is None else weight[:, :, None].expand_as(rollout_rows)
    parts = ((grad_rollouts, rollout_rows, rollout_weight), (grad_targets, target_rows, weight))
    for grad, rows, part_weight in parts:
        grad = _by_token(grad, rows, len(hidden_states), channels, pooling)
        if POOLINGS[pooling].adds_up:
            grad = grad / rows.shape[-1]
        for items, index, tokens in _tiles(hidden_states, rows):
            item_weight = None if part_weight is None else part_weight.reshape(-1, rows.shape[-1], 1)[items]
            d = _token_gradient(grad[:, items], tokens, item_weight, normalize)
            for total, rows_of_layer in zip(totals, d.flatten(1, 2), strict=True):
                _add_rows(total, index, rows_of_layer)
    return [total.view(h.shape).to(h.dtype) for total, h in zip(totals, hidden_states, strict=True)]


def _pool(hidden_states: Sequence[Tensor], rows: Tensor, weight: Tensor | None, pooling: str, normalize: str) -> Tensor:
    layers, channels = len(hidden_states), hidden_states[0].shape[-1]
    dtype = torch.promote_types(hidden_states[0].dtype, torch.float32)
    mode = POOLINGS[pooling]
    out = rows.new_empty(*rows.shape[:-1], *mode.shape(rows.shape[-1], layers, channels), dtype=dtype)
    by_token = _by_token(out, rows, layers, channels, pooling)
    for items, _, tokens in _tiles(hidden_states, rows):
        if weight is not None:
            tokens.masked_fill_(~weight.reshape(-1, rows.shape[-1], 1)[items], 0)
        if normalize != "none":
            tokens /= _norm(tokens, normalize).clamp_min_(SHORTEST_TOKEN)
        by_token[:, items] = tokens.mean(2, keepdim=True) if mode.adds_up else tokens
    return out


def _by_token(features: Tensor, rows: Tensor, layers: int, channels: int, pooling: str) -> Tensor:
    """Pooled features (any leading shape) as [L, M, K, C], a view if they are contiguous; K = 1 where tokens add up."""
    mode = POOLINGS[pooling]
    steps = 1 if mode.adds_up else rows.shape[-1]
    items = rows.numel() // rows.shape[-1]
    if mode.own_axis:
        return features.reshape(items, steps, layers, channels).movedim(2, 0)
    return features.reshape(items, layers, steps, channels).movedim(1, 0)


def _tiles(hidden_states: Sequence[Tensor], rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the M items of ``rows`` [..., K], the rows they take [M*K] and the hidden states there [L, M, K, C].

    The gathered hidden states are in the precision that sums are kept in, and every tile's lie in the same memory.
    """
    batch_size, packed_length, channels = hidden_states[0].shape
    flat = [hidden.reshape(batch_size * packed_length, channels) for hidden in hidden_states]
    batch = torch.arange(batch_size, device=rows.device).view(-1, *(1,) * (rows.ndim - 1))
    index = (rows + batch * packed_length).flatten(0, -2)  # [M, K]
    items, steps = index.shape
    dtype = torch.promote_types(flat[0].dtype, torch.float32)
    item_bytes = dtype.itemsize * len(flat) * steps * channels
    tile = max(1, (CPU_TILE_BYTES if rows.device.type == "cpu" else TILE_BYTES) // max(item_bytes, 1))
    memory = rows.new_empty(len(flat), min(tile, items) * steps, channels, dtype=dtype)
    for start in range(0, items, tile):
        part = index[start : start + tile].flatten()
        tokens = memory[:, : part.numel()]
        for hidden, gathered in zip(flat, tokens, strict=True):
            if hidden.dtype == dtype:
                torch.index_select(hidden, 0, part, out=gathered)
            else:
                gathered.copy_(hidden.index_select(0, part))
        yield slice(start, start + tile), part, tokens.unflatten(1, (-1, steps))


def _token_gradient(grad: Tensor, tokens: Tensor, weight: Tensor | None, normalize: str) -> Tensor:
    """Gradient of ``tokens`` [L, M, K, C] from ``grad`` of the normalised, weighted ones; overwrites ``tokens``."""
    grad = grad.to(tokens.dtype)
    if weight is not None:
        grad = grad.masked_fill(~weight, 0)
        tokens.masked_fill_(~weight, 0)
    if normalize == "none":
        return grad.expand_as(tokens)
    norm = _norm(tokens, normalize)
    clamped = norm.clamp_min(SHORTEST_TOKEN)
    unit = tokens.div_(clamped)
    # Along the token itself its unit vector does not change, unless it is so short that it is divided by a constant.
    axes = (0, -1) if normalize == "joint" else (-1,)
    along = (grad * unit).sum(axes, keepdim=True) * (norm > SHORTEST_TOKEN)
    return unit.mul_(along).neg_().add_(grad).div_(clamped)


def _norm(tokens: Tensor, normalize: str) -> Tensor:
    """[1, M, K, 1] or, per layer, [L, M, K, 1]."""
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(norm, dim=0, keepdim=True) if normalize == "joint" else norm


def _add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """``total[index] += rows``, equal indices in a fixed order; the function that keeps one differs by device."""
    if total.device.type == "cpu":
        total.index_add_(0, index, rows)
    else:
        total.index_put_((index,), rows, accumulate=True)
