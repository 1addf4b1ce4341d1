"""The layout's large tensors, each number written once by a compiled kernel: the dense mask, the position ids and the
key ranges. As in ``_layout_triton``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native


def dense_mask(
    prefix_start: Tensor, prefix_end: Tensor, own_start: Tensor, *, length: int, horizon: int, full: bool
) -> Tensor:
    """[B, 1, S, S] bool from the key ranges, each [B, S] int32.

    Args:
        length: P.
        horizon: G.
        full: a rollout token sees the later tokens of its rollout too.
    """
    batch_size, packed_length = own_start.shape
    rollouts = (packed_length - length) // max(horizon, 1)  # of all anchors: which is whose does not matter here
    mask = own_start.new_empty((batch_size, 1, packed_length, packed_length), dtype=torch.bool)
    ranges = [x.contiguous() for x in (prefix_start, prefix_end, own_start)]
    _native.run(
        "layout_mask",
        mask.device,
        (batch_size, length, rollouts, 1, horizon),
        *(_native.layout_tensor(x) for x in ranges),
        full,
        mask.data_ptr(),
    )
    return mask


def geometry(
    anchors: Tensor, prompt_start: Tensor, horizon: int, samples: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Position ids [B, S] int64 and the three key ranges [B, S] int32 of all packed rows.

    Args:
        anchors: [B, A] int32.
        prompt_start: [B, P] int32.
    """
    (batch_size, length), num_anchors = prompt_start.shape, anchors.shape[1]
    shape = (batch_size, length + num_anchors * samples * horizon)
    position_ids = anchors.new_empty(shape, dtype=torch.int64)
    ranges = tuple(anchors.new_empty(shape) for _ in range(3))
    inputs = (anchors.contiguous(), prompt_start.contiguous())
    _native.run(
        "layout_geometry",
        anchors.device,
        (batch_size, length, num_anchors, samples, horizon),
        *(_native.layout_tensor(x) for x in inputs),
        position_ids.data_ptr(),
        *(_native.layout_tensor(x) for x in ranges),
    )
    return position_ids, ranges
