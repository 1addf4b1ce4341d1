"""Log-probabilities as the specification: all logits at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """See :func:`ebft_kernels.linear_log_probs`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))  # [..., V]
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, -1)
    if rows is not None:
        log_probs = log_probs.reshape(-1, len(weight)).index_select(0, rows.flatten()).view(*rows.shape, len(weight))
    return log_probs.gather(-1, targets.long()[..., None])[..., 0]
