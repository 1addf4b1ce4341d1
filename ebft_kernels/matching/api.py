"""Public functions of feature matching, their checks and their registration with ``torch.library``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOATING, check_finite, check_int, check_option, check_tensor
from .._dispatch import implementation, resolve_impl
from .._transforms import check_transforms, once_differentiable
from . import _reference

WHITENINGS = ("none", "sample", "feature")
ESTIMATORS = ("rloo", "reinforce", "group_norm")
REDUCTIONS = ("mean", "sum", "none")


class FeatureMatching(NamedTuple):
    """What :func:`feature_matching` returns. For features per token there is a G axis: [B, A, G] and [B, A, n, G].

    Attributes:
        loss: [B, A], ``|| mean_j phi_j - phi* ||^2`` of the features as given (never whitened).
        alignment: [B, A, n], twice the cosine of each rollout with its target.
        diversity: [B, A, n], twice the mean inner product of each rollout with the others; 0 for n = 1.
        reward: [B, A, n], ``alignment_coef * alignment - diversity_coef * diversity``.
        advantage: [B, A, n], the reward less its baseline.
    """

    loss: Tensor
    alignment: Tensor
    diversity: Tensor
    reward: Tensor
    advantage: Tensor


def mean_embedding_loss(
    rollout_features: Tensor,
    target_features: Tensor,
    *,
    valid: Tensor | None = None,
    unbiased: bool = False,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """``|| mean_j phi_j - phi* ||^2`` per anchor, the feature-matching loss of arXiv:2603.12248.

    ``unbiased`` leaves out the terms k = j, as a U-statistic does; its expectation is the loss at infinitely many
    samples, and a single value may be negative:

        1/(n(n-1)) sum_{j != k} <phi_j, phi_k>  -  2/n sum_j <phi_j, phi*>  +  <phi*, phi*>

    Sums are float32 (float64 for float64 features). Differentiable in both arguments, once.

    Args:
        rollout_features: [B, A, n, F] float64, float32, bfloat16 or float16.
        target_features: [B, A, F], of the same dtype.
        valid: [B, A] bool; the other anchors count as 0 and get no gradient. None: all are valid.
        unbiased: needs n >= 2.
        reduction: "mean" over the valid anchors (0 if there is none), "sum" over them, or "none".
        impl: "auto", "reference", "torch", ...; see :func:`ebft_kernels.available_impls`.

    Returns:
        A scalar, or [B, A] for ``reduction="none"``; float32 (float64 for float64 features).

    Raises:
        ValueError: a shape, device or option that does not fit; ``unbiased`` with n = 1.
        TypeError: another type or dtype.
    """
    _check_features(rollout_features, target_features, valid, "B A n F", "B A F")
    check_option("reduction", reduction, REDUCTIONS)
    check_option("unbiased", unbiased, (False, True))
    if unbiased and rollout_features.shape[2] < 2:
        raise ValueError("unbiased: expected at least n = 2 rollouts per anchor, got n = 1")
    sizes = {"n": rollout_features.shape[2]}
    impl = resolve_impl("mean_embedding_loss", impl, rollout_features.device, rollout_features.dtype, sizes)
    if impl == "reference":
        if valid is not None:
            rollout_features = rollout_features.where(valid[..., None, None], 0)
            target_features = target_features.where(valid[..., None], 0)
        loss = _reference.mean_embedding_loss(rollout_features, target_features, unbiased=unbiased)
    else:
        check_transforms("mean_embedding_loss", rollout_features, target_features)
        loss, _ = _mean_embedding_op(rollout_features, target_features, unbiased, impl)
    if valid is not None:
        loss = loss.where(valid, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    return total / (max(loss.numel(), 1) if valid is None else valid.sum().clamp_min(1))


@torch.no_grad()
def feature_matching(
    rollout_features: Tensor,
    target_features: Tensor,
    *,
    whitening: str = "none",
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    estimator: str = "rloo",
    groups: int = 1,
    valid: Tensor | None = None,
    impl: str = "auto",
) -> FeatureMatching:
    """The rewards of the rollouts and their advantages for a policy gradient (arXiv:2603.12248). No gradient.

    With the (whitened) rollouts ``x_i`` and their targets ``y_i`` of one anchor:

        alignment_i = 2 cos(x_i, y_i)                          (as F.cosine_similarity, eps 1e-8)
        diversity_i = 2/(n-1) sum_{k != i} <x_i, x_k>          (0 for n = 1)
        reward_i    = alignment_coef * alignment_i - diversity_coef * diversity_i

    Whitening drops directions whose singular value is at most 1e-5 of the largest, so that duplicates among the
    rollouts are no special case. Distinct whitened rollouts are orthonormal: diversity is then exactly 0, and what is
    left of it is a penalty on duplicates. There is no 1/n in the second moments, so that diversity means the same under
    both whitenings:

        "sample":  X <- (X X^T)^(-1/2) X,  y_i <- (sum_j W_ij) y  with W = (X X^T)^(-1/2)
        "feature": X <- X (X^T X)^(-1/2),  y   <- y (X^T X)^(-1/2)

    All sums are float64: a cut-off of 1e-5 on singular values is 1e-10 on the eigenvalues of X X^T, which float32
    cannot resolve.

    Args:
        rollout_features: [B, A, n, F], or [B, A, n, G, F] for features per token, where each (anchor, step) is matched
            on its own. float64, float32, bfloat16 or float16.
        target_features: [B, A, F], or [B, A, G, F].
        whitening: "none", "sample" (that of the method's published code) or "feature" (that of the paper).
        alignment_coef: weight of the alignment.
        diversity_coef: weight of the diversity.
        estimator: of the advantage:
            "rloo": reward - (alignment_coef * mean_{k != i} alignment_k - diversity_coef * d_i), where
                ``d_i = (sum_k diversity_k - 2 diversity_i) / (n - 2)`` (0 for n <= 2) is the diversity that the other
                samples would have had without sample i. The baseline is 0 for n = 1.
            "reinforce": the reward.
            "group_norm": (reward - mean over n) / (standard deviation over n, with n - 1, + 1e-9); 0 for n = 1.
        groups: F is split into that many equal parts, which are whitened separately and then put side by side again, so
            that their inner products add up.
        valid: [B, A] bool; every result is 0 for the other anchors. None: all are valid.
        impl: "auto", "reference", "torch", ...; see :func:`ebft_kernels.available_impls`.

    Returns:
        :class:`FeatureMatching`, float32 (float64 for float64 features).

    Raises:
        ValueError: a shape, device or option that does not fit, F not divisible by ``groups``.
        TypeError: another type or dtype.
    """
    per_token = isinstance(rollout_features, Tensor) and rollout_features.ndim == 5
    shapes = ("B A n G F", "B A G F") if per_token else ("B A n F", "B A F")
    _check_features(rollout_features, target_features, valid, *shapes)
    _check_options(whitening, alignment_coef, diversity_coef, estimator, groups, rollout_features.shape[-1])
    sizes = {"n": rollout_features.shape[2]}
    impl = resolve_impl("feature_matching", impl, rollout_features.device, rollout_features.dtype, sizes)
    rollouts = rollout_features.movedim(2, -2)  # [B, A, (G,) n, F]
    coefs = (float(alignment_coef), float(diversity_coef))
    if impl == "reference":
        results = _reference.feature_matching(
            rollouts,
            target_features,
            whitening=whitening,
            alignment_coef=coefs[0],
            diversity_coef=coefs[1],
            estimator=estimator,
            groups=groups,
        )
    else:
        results = _matching_op(rollouts, target_features, whitening, *coefs, estimator, groups, impl)
    return _results(results, valid, per_token=per_token)


def _results(results: Sequence[Tensor], valid: Tensor | None, *, per_token: bool) -> FeatureMatching:
    loss, *others = results
    if per_token:
        others = [x.movedim(-1, 2) for x in others]  # [B, A, n, G]
    results = (loss, *others)
    if valid is not None:
        results = [x.where(valid.view(*valid.shape, *(1,) * (x.ndim - 2)), 0) for x in results]
    return FeatureMatching(*results)


def _check_options(
    whitening: str, alignment_coef: float, diversity_coef: float, estimator: str, groups: int, features: int
) -> None:
    check_option("whitening", whitening, WHITENINGS)
    check_option("estimator", estimator, ESTIMATORS)
    check_finite("alignment_coef", alignment_coef)
    check_finite("diversity_coef", diversity_coef)
    check_int("groups", groups, minimum=1)
    if features % groups:
        raise ValueError(f"groups: expected a divisor of F = {features}, got {groups}")


def _check_features(rollouts: Tensor, targets: Tensor, valid: Tensor | None, *shapes: str) -> None:
    sizes: dict[str, int] = {}
    check_tensor("rollout_features", rollouts, shapes[0], sizes, dtype=FLOATING)
    check_tensor("target_features", targets, shapes[1], sizes, dtype=rollouts.dtype, device=rollouts.device)
    if min(sizes["n"], sizes["F"]) < 1:
        raise ValueError(f"rollout_features: expected at least one rollout and one feature, got {list(rollouts.shape)}")
    if valid is not None:
        check_tensor("valid", valid, "B A", sizes, dtype=torch.bool, device=rollouts.device)


@torch.library.custom_op(
    "ebft_kernels::mean_embedding_loss",
    mutates_args=(),
    schema="(Tensor rollouts, Tensor targets, bool unbiased, str impl) -> (Tensor, Tensor)",
)
def _mean_embedding_op(rollouts, targets, unbiased, impl):
    """Loss [B, A] and what the backward pass needs of the means, [B, A, F]."""
    return implementation("mean_embedding_loss", impl).mean_embedding_forward(rollouts, targets, unbiased)


@_mean_embedding_op.register_fake
def _(rollouts, targets, _unbiased, _impl):
    dtype = torch.promote_types(rollouts.dtype, torch.float32)
    return rollouts.new_empty(rollouts.shape[:2], dtype=dtype), targets.new_empty(targets.shape, dtype=dtype)


@torch.library.custom_op(
    "ebft_kernels::mean_embedding_loss_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor rollouts, Tensor difference, bool unbiased, str impl) -> (Tensor, Tensor)",
)
def _mean_embedding_backward_op(grad, rollouts, difference, unbiased, impl):
    """Gradients of rollouts and targets, contiguous, in their dtype."""
    module = implementation("mean_embedding_loss", impl)
    return module.mean_embedding_backward(grad, rollouts, difference, unbiased)


@_mean_embedding_backward_op.register_fake
def _(_grad, rollouts, difference, _unbiased, _impl):
    return rollouts.new_empty(rollouts.shape), rollouts.new_empty(difference.shape)


once_differentiable("mean_embedding_loss", _mean_embedding_backward_op)


def _save_for_backward(ctx, inputs, output):
    rollouts, _targets, *ctx.options = inputs
    _loss, difference = output
    ctx.mark_non_differentiable(difference)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rollouts, difference)


def _differentiate(ctx, grad, _grad_difference):
    if grad is None:
        return None, None, None, None
    return *_mean_embedding_backward_op(grad, *ctx.saved_tensors, *ctx.options), None, None


_mean_embedding_op.register_autograd(_differentiate, setup_context=_save_for_backward)


@torch.library.custom_op(
    "ebft_kernels::feature_matching",
    mutates_args=(),
    schema="(Tensor rollouts, Tensor targets, str whitening, float alignment_coef, float diversity_coef, "
    "str estimator, SymInt groups, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _matching_op(rollouts, targets, *options):
    """Loss [...], alignment, diversity, reward, advantage [..., n] of rollouts [..., n, F] and targets [..., F]."""
    *options, impl = options
    return implementation("feature_matching", impl).forward(rollouts, targets, *options)


@_matching_op.register_fake
def _(rollouts, targets, *_options):
    dtype = torch.promote_types(rollouts.dtype, torch.float32)
    loss = targets.new_empty(targets.shape[:-1], dtype=dtype)
    return loss, *(rollouts.new_empty(rollouts.shape[:-1], dtype=dtype) for _ in range(4))
