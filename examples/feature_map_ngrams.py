"""A feature map without any model: which token n-grams a rollout has in common with the real text.

From this folder:

    ebft-train train --model DIR_OR_NAME --data PATH --output DIR --feature-map feature_map_ngrams:build

or in Python ``EBFTTrainer(..., feature_network=NGramCounts())``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels import StridedLayout


class NGramCounts:
    """Counts of token n-grams up to an order, hashed to buckets, divided by their L2 norm."""

    def __init__(self, order: int = 2, buckets: int = 1024) -> None:
        self.order, self.buckets = order, buckets

    def __call__(
        self,
        packed: Tensor,  # [B, S]
        layout: StridedLayout,
        token_mask: Tensor | None = None,  # [B, P]
        *,
        rollout_mask: Tensor | None = None,  # [B, A, n, G]
    ) -> tuple[Tensor, Tensor]:
        rollouts, targets = layout.rollouts(packed), layout.windows(packed)
        counted = torch.ones_like(targets, dtype=torch.bool) if token_mask is None else layout.windows(token_mask)
        if rollout_mask is None:
            rollout_mask = counted[:, :, None].expand_as(rollouts)
        return self._counts(rollouts, rollout_mask), self._counts(targets, counted)

    def _counts(self, tokens: Tensor, counted: Tensor) -> Tensor:
        """[..., G] and which count -> [..., buckets]; an n-gram counts if all its tokens do."""
        counts = torch.zeros(*tokens.shape[:-1], self.buckets, device=tokens.device)
        code, whole = torch.zeros_like(tokens), torch.ones_like(counted)
        for last in range(min(self.order, tokens.shape[-1])):
            starts = tokens.shape[-1] - last
            code = (code[..., :starts] * 1_000_003 + tokens[..., last:] + 1) % (2**31 - 1)
            whole = whole[..., :starts] & counted[..., last:]
            counts.scatter_add_(-1, code % self.buckets, whole.float())
        return F.normalize(counts, dim=-1)


def build(_model: Any, _tokenizer: Any, _options: Any) -> NGramCounts:
    """What ``--feature-map`` calls."""
    return NGramCounts()
