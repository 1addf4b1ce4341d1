"""Softmax statistics of blocks of logits, from which tokens can be drawn without a probability for each of all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._dispatch import select_impl


def block_statistics(logits: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of every ``size`` columns the largest logit and the sum of ``exp(logit - largest)``, without gradient.

    Args:
        logits: [R, V] float64, float32, bfloat16 or float16, contiguous.
        size: of a block; the last one has what is left.

    Returns:
        Two [R, ceil(V / size)], float32 (float64 for float64 logits). Where all of a block are -inf, the lowest finite
        number and 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    lowest = torch.finfo(dtype).min
    rows, vocabulary = logits.shape
    blocks = -(-vocabulary // size)
    if select_impl("linear_log_probs", logits.device, logits.dtype) == "native":
        largest = logits.new_full((rows, blocks), lowest, dtype=dtype)
        total = torch.zeros_like(largest)
        addresses = [x.data_ptr() for x in (logits, largest, total)]
        _native.run("softmax_blocks", logits.device, _native.DTYPES[logits.dtype], (rows, vocabulary, size), *addresses)
        return largest, total
    if missing := blocks * size - vocabulary:
        logits = F.pad(logits, (0, missing), value=-torch.inf)
    scores = logits.unflatten(1, (blocks, size)).to(dtype)
    largest = scores.amax(2).clamp_min(lowest)
    room = None if dtype == logits.dtype else scores  # a copy already
    return largest, torch.sub(scores, largest[:, :, None], out=room).exp_().sum(2)
