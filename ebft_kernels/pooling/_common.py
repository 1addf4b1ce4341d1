"""What every implementation of pooling agrees on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .modes import POOLINGS


def empty_features(
    hidden_states: Sequence[Tensor], rollout_rows: Tensor, target_rows: Tensor, pooling: str
) -> tuple[Tensor, Tensor]:
    """Uninitialised features [B, A, n, F] and [B, A, F], with a K axis before F for ``"token"``."""
    first = hidden_states[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    shape = POOLINGS[pooling].shape(rollout_rows.shape[-1], len(hidden_states), first.shape[-1])
    rollouts, targets = (first.new_empty(*x.shape[:-1], *shape, dtype=dtype) for x in (rollout_rows, target_rows))
    return rollouts, targets
