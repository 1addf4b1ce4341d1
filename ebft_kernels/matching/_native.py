"""Feature matching and the mean-embedding loss by the compiled modules, which read each input once."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

_WHITENINGS = {"none": 0, "sample": 1, "feature": 2}
_ESTIMATORS = {"rloo": 0, "reinforce": 1, "group_norm": 2}


def mean_embedding_forward(rollouts: Tensor, targets: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Loss [B, A] of rollouts [B, A, n, F] and targets [B, A, F], and ``mean_j phi_j - phi*`` [B, A, F]."""
    dtype = torch.promote_types(rollouts.dtype, torch.float32)
    loss = rollouts.new_empty(rollouts.shape[:2], dtype=dtype)
    difference = targets.new_empty(targets.shape, dtype=dtype)
    rollouts, targets = _native.rows(rollouts), _native.rows(targets)
    _native.run(
        "mean_embedding_forward",
        loss.device,
        *_features(rollouts),
        *_operand(targets),
        unbiased,
        loss.data_ptr(),
        difference.data_ptr(),
    )
    return loss, difference


def mean_embedding_backward(
    grad: Tensor, rollouts: Tensor, difference: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of rollouts and targets, in the dtype of the rollouts, from ``grad`` [B, A]."""
    grad_rollouts = rollouts.new_empty(rollouts.shape)
    grad_targets = rollouts.new_empty(difference.shape)
    grad, difference = grad.contiguous(), difference.contiguous()
    if unbiased:  # else their values are not read
        rollouts = _native.rows(rollouts)
    _native.run(
        "mean_embedding_backward",
        grad_rollouts.device,
        *_features(rollouts),
        grad.data_ptr(),
        difference.data_ptr(),
        unbiased,
        grad_rollouts.data_ptr(),
        grad_targets.data_ptr(),
    )
    return grad_rollouts, grad_targets


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
    dtype = torch.promote_types(rollouts.dtype, torch.float32)
    loss = rollouts.new_empty(rollouts.shape[:-2], dtype=dtype)
    others = [rollouts.new_empty(rollouts.shape[:-1], dtype=dtype) for _ in range(4)]
    rollouts, targets = _native.rows(rollouts), _native.rows(targets)
    n, scratch = rollouts.shape[-2], ()
    if _native.on_cuda(loss.device):  # where the Gram matrices and the arithmetic on them are two kernels
        scratch = (loss.new_empty(loss.numel() * groups * (n + 1) ** 2, dtype=torch.float64),)
    _native.run(
        "feature_matching",
        loss.device,
        *_features(rollouts),
        *_operand(targets),
        groups,
        _WHITENINGS[whitening],
        alignment_coef,
        diversity_coef,
        _ESTIMATORS[estimator],
        loss.data_ptr(),
        *(x.data_ptr() for x in others),
        *(x.data_ptr() for x in scratch),
    )
    return loss, *others


def _features(rollouts: Tensor) -> tuple:
    """dtype, sizes, address and strides of the rollouts, as the kernels take them."""
    return _native.DTYPES[rollouts.dtype], rollouts.shape, *_operand(rollouts)


def _operand(x: Tensor) -> tuple[int, list[int]]:
    return x.data_ptr(), _native.byte_strides(x, x.ndim - 1)
