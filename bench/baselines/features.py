"""Pooling, matching and log-probabilities as one writes them in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels import FeatureMatching, StridedLayout


def pool_last_token(hidden_states: list[Tensor], layout: StridedLayout) -> tuple[Tensor, Tensor]:
    """All layers side by side, all rows normalised, then the last token of each rollout and window taken."""
    features = torch.cat([x.to(torch.promote_types(x.dtype, torch.float32)) for x in hidden_states], -1)
    features = F.normalize(features, dim=-1, eps=1e-12)  # [B, S, F]
    return layout.rollouts(features)[:, :, :, -1], layout.windows(features)[:, :, -1]


def mean_embedding_loss(rollouts: Tensor, targets: Tensor) -> Tensor:
    """Squared distance between the mean rollout feature and the target, averaged over anchors."""
    return (rollouts.mean(2) - targets).square().sum(-1).mean()


def match_by_batched_svd(
    rollouts: Tensor, targets: Tensor, alignment_coef: float = 1.0, diversity_coef: float = 1.0
) -> FeatureMatching:
    """Whitening by one batched SVD in feature space, estimator "rloo"."""
    u, s, _ = torch.linalg.svd(rollouts, full_matrices=False)
    return _match(rollouts, targets, u, s, alignment_coef, diversity_coef)


def match_by_svd_loop(rollouts: Tensor, targets: Tensor) -> FeatureMatching:
    """The same with a Python loop over anchors, one SVD each."""
    factors = [torch.linalg.svd(x, full_matrices=False)[:2] for x in rollouts.flatten(0, 1)]
    u, s = (torch.stack(x).unflatten(0, rollouts.shape[:2]) for x in zip(*factors, strict=True))
    return _match(rollouts, targets, u, s, 1.0, 1.0)


def _match(
    rollouts: Tensor, targets: Tensor, u: Tensor, s: Tensor, alignment_coef: float, diversity_coef: float
) -> FeatureMatching:
    """From the left singular vectors and the singular values of the rollouts [B, A, n, F]."""
    n = rollouts.shape[-2]
    loss = (rollouts.mean(-2) - targets).square().sum(-1)
    whitening = (u * torch.where(s > 1e-5 * s[..., :1], 1 / s, 0)[..., None, :]) @ u.mT  # [B, A, n, n]
    rollouts = whitening @ rollouts
    targets = whitening.sum(-1, keepdim=True) * targets[..., None, :]
    alignment = 2 * F.cosine_similarity(rollouts, targets, dim=-1)
    products = rollouts @ rollouts.mT
    diversity = 2 / max(n - 1, 1) * (products.sum(-1) - products.diagonal(dim1=-2, dim2=-1))
    reward = alignment_coef * alignment - diversity_coef * diversity
    if n == 1:
        return FeatureMatching(loss, alignment, diversity, reward, reward)
    baseline = alignment_coef * (alignment.sum(-1, keepdim=True) - alignment) / (n - 1)
    if n > 2:
        baseline = baseline - diversity_coef * (diversity.sum(-1, keepdim=True) - 2 * diversity) / (n - 2)
    return FeatureMatching(loss, alignment, diversity, reward, reward - baseline)


def full_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities through all logits in float32 at once."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
