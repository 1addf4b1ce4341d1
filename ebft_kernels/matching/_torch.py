"""Feature matching from one float64 Gram matrix per anchor, and a mean-embedding loss that reads its inputs once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Eigenvalues of the Gram matrix are squared singular values: the cut-off of 1e-5 on those is 1e-10 here, which is why
# the Gram matrix is float64.
CUTOFF = 1e-10
# As torch.nn.functional.cosine_similarity.
EPS = 1e-8
# Float64 rows that are multiplied while a CPU still has them in its cache; enough to keep an accelerator busy.
CPU_TILE_BYTES = 4 << 20
TILE_BYTES = 256 << 20


def mean_embedding_forward(rollouts: Tensor, targets: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Loss [B, A] of rollouts [B, A, n, F] and targets [B, A, F], and ``mean_j phi_j - phi*`` [B, A, F]."""
    n = rollouts.shape[2]
    mean = rollouts.mean(2, dtype=torch.promote_types(rollouts.dtype, torch.float32))
    # sum_{j != k} K_jk / (n (n - 1)) = |mean|^2 - sum_j |phi_j - mean|^2 / (n (n - 1)), but without cancellation.
    spread = (rollouts - mean[:, :, None]).square_().sum((2, 3)) / (n * (n - 1)) if unbiased else 0
    difference = mean.sub_(targets)
    return difference.square().sum(-1) - spread, difference


def mean_embedding_backward(
    grad: Tensor, rollouts: Tensor, difference: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of rollouts and targets, in the dtype of the rollouts, from ``grad`` [B, A]."""
    n = rollouts.shape[2]
    grad = grad[..., None]
    # An anchor without weight has gradients of 0, whatever its features are.
    difference = difference.masked_fill(grad == 0, 0)
    grad_targets = difference * (-2 * grad)  # [B, A, F]
    grad_rollouts = (grad_targets / -n)[:, :, None]
    if unbiased:
        rollouts = rollouts.masked_fill(grad[..., None] == 0, 0)
        mean = rollouts.mean(2, dtype=difference.dtype, keepdim=True)
        grad_rollouts = grad_rollouts - (rollouts - mean) * (2 / (n * (n - 1)) * grad)[:, :, None]
    grad_rollouts = grad_rollouts.to(rollouts.dtype).expand_as(rollouts).contiguous()
    return grad_rollouts, grad_targets.to(rollouts.dtype)


def forward(
    rollouts: Tensor,
    targets: Tensor,
    whitening: str,
    alignment_coef: float,
    diversity_coef: float,
    estimator: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [...], alignment, diversity, reward and advantage [..., n] of rollouts [..., n, F] and targets [..., F]."""
    gram = _gram(rollouts, targets, groups)
    dtype = torch.promote_types(rollouts.dtype, torch.float32)
    return from_gram(gram, whitening, alignment_coef, diversity_coef, estimator, dtype)


def from_gram(
    gram: Tensor, whitening: str, alignment_coef: float, diversity_coef: float, estimator: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of :func:`forward` in ``dtype`` from the inner products [..., groups, n+1, n+1], the target last."""
    n = gram.shape[-1] - 1
    k, v, t = gram[..., :n, :n], gram[..., :n, n], gram[..., n, n]
    loss = k.sum((-3, -2, -1)) / n**2 - 2 / n * v.sum((-2, -1)) + t.sum(-1)
    products, cross, target_norm = _whiten(k, v, t, whitening)
    squares = products.diagonal(dim1=-2, dim2=-1)
    alignment = 2 * cross / (_norm(squares) * _norm(target_norm))
    others = products - torch.diag_embed(squares)
    diversity = others.sum(-1) * (2 / (n - 1) if n > 1 else 0)
    reward = alignment_coef * alignment - diversity_coef * diversity
    advantage = _advantage(alignment, diversity, reward, alignment_coef, diversity_coef, estimator)
    return tuple(z.to(dtype) for z in (loss.clamp_min(0), alignment, diversity, reward, advantage))


def _gram(rollouts: Tensor, targets: Tensor, groups: int) -> Tensor:
    """[..., groups, n+1, n+1] float64: all inner products of the rollouts and, last, the target, per part of F."""
    *leading, n, features = rollouts.shape
    rollouts = rollouts.unflatten(-1, (groups, features // groups)).movedim(-2, -3)  # [..., groups, n, F/groups]
    targets = targets.unflatten(-1, (groups, features // groups))
    # Tiles run along the anchors, the second axis; all of them use the same few pages of memory.
    per_anchor = (n + 1) * features * math.prod((*leading[:1], *leading[2:]))
    tile_bytes = CPU_TILE_BYTES if rollouts.device.type == "cpu" else TILE_BYTES
    tile = min(max(tile_bytes // (8 * per_anchor), 1), leading[1]) if per_anchor else leading[1]
    memory = rollouts.new_empty(tile * per_anchor, dtype=torch.float64)
    gram = rollouts.new_empty(*leading, groups, n + 1, n + 1, dtype=torch.float64)
    for start in range(0, leading[1] if per_anchor else 0, max(tile, 1)):
        rows = slice(start, start + tile)
        x = rollouts[:, rows]
        stack = memory[: x.shape[1] * per_anchor].view(*x.shape[:-2], n + 1, x.shape[-1])
        stack[..., :n, :] = x
        stack[..., n, :] = targets[:, rows]
        gram[:, rows] = stack @ stack.mT
    return gram


def _whiten(k: Tensor, v: Tensor, t: Tensor, whitening: str) -> tuple[Tensor, Tensor, Tensor]:
    """Inner products of the whitened vectors, the parts of F summed.

    Args:
        k: [..., groups, n, n], rollouts with rollouts.
        v: [..., groups, n], rollouts with the target.
        t: [..., groups], the target with itself.
        whitening: "none", "sample" or "feature".

    Returns:
        rollouts with rollouts [..., n, n], each rollout with the target as it meets it [..., n], and the square of that
        target [..., n] or [..., 1].
    """
    if whitening == "none":
        return k.sum(-3), v.sum(-2), t.sum(-1, keepdim=True)
    # A group that holds NaN or infinity comes out as NaN through v; the eigen-solver would raise for all groups.
    finite = k.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(k.where(finite, 0))
    keep = values > CUTOFF * values[..., -1:]
    # The projection on the kept directions, by what is dropped: exactly the identity when nothing is.
    dropped = vectors * ~keep[..., None, :]
    projection = (torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - dropped @ vectors.mT).sum(-3)
    power = -0.5 if whitening == "sample" else -1.0
    inverse = (vectors * values.where(keep, torch.inf).pow(power)[..., None, :]) @ vectors.mT
    met = (inverse @ v[..., None])[..., 0]  # [..., groups, n]
    if whitening == "feature":
        return projection, met.sum(-2), met.square().sum((-2, -1))[..., None]
    row_sum = inverse.sum(-1)
    return projection, (row_sum * met).sum(-2), (row_sum.square() * t[..., None]).sum(-2)


def _norm(square: Tensor) -> Tensor:
    return square.clamp_min(0).sqrt().clamp_min(EPS)


def _advantage(
    alignment: Tensor,
    diversity: Tensor,
    reward: Tensor,
    alignment_coef: float,
    diversity_coef: float,
    estimator: str,
) -> Tensor:
    n = reward.shape[-1]
    if estimator == "reinforce" or (estimator == "rloo" and n == 1):
        return reward.clone()  # an operator may not return one tensor twice
    if estimator == "group_norm":
        spread = reward.std(-1, keepdim=True) if n > 1 else 0
        return (reward - reward.mean(-1, keepdim=True)) / (spread + 1e-9)
    advantage = reward - alignment_coef / (n - 1) * (alignment.sum(-1, keepdim=True) - alignment)
    if n > 2:
        advantage += diversity_coef / (n - 2) * (diversity.sum(-1, keepdim=True) - 2 * diversity)
    return advantage
