"""Pooling as the specification: every token's feature first, then the pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import StridedLayout
from .modes import combine


def pool_features(
    hidden_states: Sequence[Tensor],
    layout: StridedLayout,
    *,
    pooling: str,
    normalize: str,
    token_mask: Tensor | None,
    rollout_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`ebft_kernels.pool_features`."""
    hidden = torch.stack(list(hidden_states), 2)  # [B, S, L, C]
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if token_mask is None:
        token_mask = torch.ones(layout.batch_size, layout.length, dtype=torch.bool, device=hidden.device)
    counted = layout.windows(token_mask)  # [B, A, G]
    if rollout_mask is None:
        rollout_mask = counted[:, :, None].expand(-1, -1, layout.samples, -1)
    rollouts = _pool(layout.rollouts(hidden), rollout_mask, pooling, normalize)
    return rollouts, _pool(layout.windows(hidden), counted, pooling, normalize)


def _pool(tokens: Tensor, counted: Tensor, pooling: str, normalize: str) -> Tensor:
    """Hidden states [..., G, L, C] and which tokens count [..., G] -> [..., F], or [..., G, F] for ``"token"``."""
    tokens = tokens.where(counted[..., None, None], 0)
    if normalize == "joint":
        tokens = F.normalize(tokens.flatten(-2), dim=-1).view_as(tokens)
    elif normalize == "per_layer":
        tokens = F.normalize(tokens, dim=-1)
    return combine(tokens, counted, pooling)
