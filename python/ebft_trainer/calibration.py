"""Whether a model's probabilities mean what they say: expected calibration error of its next-token predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout
from ebft_kernels.integrations.transformers import OutputHead, apply_head

from .rollout import rows_at_once
from .scoring import scored_prompt_tokens

#: Equal parts of the interval of probabilities.
BINS = 15


@torch.no_grad()
def calibration_sums(
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    *,
    token_mask: Tensor | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """What `calibration_error` needs of one batch, to be added up over batches and ranks.

    Args:
        model: a transformers causal language model in eval mode.
        prompt: [B, P] int64.
        layout: of the packed rows; its documents and padding count, its anchors do not.
        token_mask: [B, P] bool, prompt tokens that count; None: all.
        vocabulary: token ids below this are all that there are; None: all of the head's.

    Returns:
        [3 * BINS] float32: for every bin of the probability of the most likely next token, the number of predictions,
        the sum of these probabilities, and how many of the predictions were right.
    """
    counted = scored_prompt_tokens(layout, token_mask)
    targets = prompt[:, 1:][counted]

    def count(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
        return (_bins(hidden[:, :-1][counted], targets, head),)

    (sums,) = apply_head(model, prompt, layout.prompt_only(), count, vocabulary=vocabulary)
    return sums.flatten()


def _bins(hidden: Tensor, targets: Tensor, head: OutputHead) -> Tensor:
    """[3, BINS] of rows [T, C] and the tokens [T] that follow them."""
    sums = torch.zeros(3, BINS, device=hidden.device)
    size = rows_at_once(head.weight.shape[0])
    for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = head.logits(rows).float()
        highest, predicted = logits.max(-1)
        confidence = (highest - logits.logsumexp(-1)).exp()
        values = torch.stack([torch.ones_like(confidence), confidence, (predicted == wanted).float()])
        index = (confidence * BINS).long().clamp_max(BINS - 1)
        # A product in place of scatter_add, whose order of addition is not fixed on a GPU.
        sums += values @ torch.nn.functional.one_hot(index, BINS).float()
    return sums


def calibration_error(sums: Tensor) -> float:
    """Expected calibration error (Guo et al., arXiv:1706.04599) from the added-up sums of `calibration_sums`.

    The mean over all predictions of the distance between the share that was right and the mean probability in the
    prediction's bin; 0: probabilities can be taken at their word, 1: at the opposite of it.
    """
    count, confidence, right = sums.view(3, BINS)
    return ((right - confidence).abs().sum() / count.sum().clamp_min(1)).item()
