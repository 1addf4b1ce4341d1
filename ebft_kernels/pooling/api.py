"""Public function of feature pooling, its checks and its registration with ``torch.library``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOATING, check_option, check_tensor
from .._dispatch import implementation, resolve_impl
from .._transforms import check_transforms, map_in_turn, once_differentiable
from ..layout import StridedLayout, check_layout
from . import _reference
from ._common import empty_features
from .modes import NORMALIZATIONS, POOLINGS, combine, last_counted


def pool_features(
    hidden_states: Sequence[Tensor],
    layout: StridedLayout,
    *,
    pooling: str = "last_token",
    normalize: str = "joint",
    token_mask: Tensor | None = None,
    rollout_mask: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One feature vector per rollout and per ground-truth window, from hidden states of packed rows (arXiv:2603.12248).

    The feature of one token is its L hidden states side by side, divided by their L2 norm (at least 1e-12), times 0
    where a mask says that it does not count. Then the G tokens of a rollout, or of a window, are pooled.

    F is ordered with the layers outermost, so that ``feature_matching(..., groups=L)`` treats each layer separately.
    The ground-truth features are read from the prompt rows of the same packed hidden states. Those of an anchor that is
    not valid are taken from some rows of the prompt and mean nothing. Differentiable in the hidden states, once; the
    gradients of overlapping windows add up in a fixed order.

    Args:
        hidden_states: L tensors [B, S, C], the tapped layers; float64, float32, bfloat16 or float16, all alike.
        layout: the packed rows' layout, on the same device.
        pooling: of the G tokens:
            "last_token": the last one that counts, zeros if none; F = L*C.
            "mean": the sum of those that count, divided by G; F = L*C.
            "concat": all of them side by side; F = L*G*C, ordered (layer, step, channel).
            "token": none, each token is a feature of its own; F = L*C.
        normalize: "joint": one norm over all layers of a token; "per_layer": one norm per layer; "none".
        token_mask: [B, P] bool, prompt tokens that count; None: all.
        rollout_mask: [B, A, n, G] bool, rollout tokens that count, such as those up to the rollout's end; None: each
            takes the ``token_mask`` of the ground-truth token in whose place it stands.
        impl: "auto", "reference", "torch", ...; see :func:`ebft_kernels.available_impls`.

    Returns:
        rollout features [B, A, n, F] and target features [B, A, F]; with ``pooling="token"`` [B, A, n, G, F] and
        [B, A, G, F]. float32 (float64 for float64 hidden states), whatever the precision of the hidden states.

    Raises:
        ValueError: no hidden states, a shape, device or option that does not fit.
        TypeError: another type or dtype.
    """
    hidden_states = check_hidden_states(hidden_states, layout, token_mask, rollout_mask)
    check_option("pooling", pooling, POOLINGS)
    check_option("normalize", normalize, NORMALIZATIONS)
    layers = len(hidden_states)
    sizes = {"L": layers, "L*K": layers * (layout.horizon if POOLINGS[pooling].adds_up else 1)}
    impl = resolve_impl("pool_features", impl, hidden_states[0].device, hidden_states[0].dtype, sizes)
    if impl == "reference":
        return _reference.pool_features(
            hidden_states,
            layout,
            pooling=pooling,
            normalize=normalize,
            token_mask=token_mask,
            rollout_mask=rollout_mask,
        )
    check_transforms("pool_features", *hidden_states)
    if rollout_mask is not None:
        return _pool_by_own_masks(hidden_states, layout, token_mask, rollout_mask, pooling, normalize, impl)
    rollout_rows, target_rows, weight = feature_rows(layout, token_mask, last_only=POOLINGS[pooling].last_only)
    return _forward_op(hidden_states, rollout_rows, target_rows, weight, pooling, normalize, impl)


def check_hidden_states(
    hidden_states: object, layout: object, token_mask: Tensor | None, rollout_mask: Tensor | None
) -> list[Tensor]:
    """The checked arguments of :func:`pool_features` and of what else starts from hidden states."""
    check_layout(layout)
    if layout.horizon < 1:
        raise ValueError("layout: expected a horizon of at least 1, got 0")
    if isinstance(hidden_states, Tensor) or not isinstance(hidden_states, Sequence):
        raise TypeError(f"hidden_states: expected a sequence of tensors, got {type(hidden_states).__name__}")
    hidden_states = list(hidden_states)
    if not hidden_states:
        raise ValueError("hidden_states: expected at least one tensor, got an empty sequence")
    sizes = {"B": layout.batch_size, "S": layout.packed_length, "P": layout.length}
    for i, hidden in enumerate(hidden_states):
        dtype = FLOATING if i == 0 else hidden_states[0].dtype
        check_tensor(f"hidden_states[{i}]", hidden, "B S C", sizes, dtype=dtype, device=layout.device)
    if token_mask is not None:
        check_tensor("token_mask", token_mask, "B P", sizes, dtype=torch.bool, device=layout.device)
    if rollout_mask is not None:
        sizes = {"B": layout.batch_size, "A": layout.num_anchors, "n": layout.samples, "G": layout.horizon}
        check_tensor("rollout_mask", rollout_mask, "B A n G", sizes, dtype=torch.bool, device=layout.device)
    return hidden_states


def feature_rows(
    layout: StridedLayout, token_mask: Tensor | None, *, last_only: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The packed rows that make up each feature, [B, A, n, K] and [B, A, K], and which of them count, [B, A, K]."""
    index = torch.arange(layout.packed_length, device=layout.device).expand(layout.batch_size, -1)
    rollouts, targets = layout.rollouts(index), layout.windows(index)
    counted = None if token_mask is None else layout.windows(token_mask)
    if not last_only:
        return rollouts, targets, counted
    if counted is None:
        return rollouts[..., -1:], targets[..., -1:], None
    last = last_counted(counted)
    rollout_last = last[:, :, None].expand(-1, -1, layout.samples, -1)
    return rollouts.gather(-1, rollout_last), targets.gather(-1, last), counted.any(-1, keepdim=True)


def _pool_by_own_masks(
    hidden_states: list[Tensor],
    layout: StridedLayout,
    token_mask: Tensor | None,
    rollout_mask: Tensor,
    pooling: str,
    normalize: str,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The op has one mask for all rollouts of an anchor, so here masks are applied to the features that it gives.

    Unless only the last token is read, that takes the features of every token, in memory.
    """
    rows = feature_rows(layout, None, last_only=False)[:2]  # [B, A, n, G] and [B, A, G]
    window_mask = torch.ones_like(rows[1], dtype=torch.bool) if token_mask is None else layout.windows(token_mask)
    masks = (rollout_mask, window_mask)
    if POOLINGS[pooling].last_only:
        rows = [x.gather(-1, last_counted(mask)) for x, mask in zip(rows, masks, strict=True)]
        features = _forward_op(hidden_states, *rows, None, pooling, normalize, impl)
        rollouts, targets = (x * mask.any(-1, keepdim=True) for x, mask in zip(features, masks, strict=True))
        return rollouts, targets
    features = _forward_op(hidden_states, *rows, None, "token", normalize, impl)
    rollouts, targets = (
        combine((x * mask[..., None]).unflatten(-1, (len(hidden_states), -1)), mask, pooling)
        for x, mask in zip(features, masks, strict=True)
    )
    return rollouts, targets


_INPUTS = "Tensor[] hidden_states, Tensor rollout_rows, Tensor target_rows, Tensor? weight"


@torch.library.custom_op(
    "ebft_kernels::pool_features",
    mutates_args=(),
    schema=f"({_INPUTS}, str pooling, str normalize, str impl) -> (Tensor, Tensor)",
)
def _forward_op(hidden_states, rollout_rows, target_rows, weight, pooling, normalize, impl):
    """Rollout features [B, A, n, F] and target features [B, A, F]; see ``_torch.forward`` for the arguments."""
    with torch.autocast(hidden_states[0].device.type, enabled=False):
        return implementation("pool_features", impl).forward(
            hidden_states, rollout_rows, target_rows, weight, pooling, normalize
        )


@_forward_op.register_fake
def _(hidden_states, rollout_rows, target_rows, _weight, pooling, *_rest):
    return empty_features(hidden_states, rollout_rows, target_rows, pooling)


@torch.library.custom_op(
    "ebft_kernels::pool_features_backward",
    mutates_args=(),
    schema=f"(Tensor grad_rollouts, Tensor grad_targets, {_INPUTS}, str pooling, str normalize, str impl) -> Tensor[]",
)
def _backward_op(grad_rollouts, grad_targets, hidden_states, *options):
    """Gradients of the hidden states, contiguous, in their dtype."""
    *options, impl = options
    with torch.autocast(grad_targets.device.type, enabled=False):
        return implementation("pool_features", impl).backward(grad_rollouts, grad_targets, hidden_states, *options)


@_backward_op.register_fake
def _(_grad_rollouts, _grad_targets, hidden_states, *_options):
    return [hidden.new_empty(hidden.shape) for hidden in hidden_states]


once_differentiable("pool_features", _backward_op)
map_in_turn(_forward_op)
map_in_turn(_backward_op)


def _save_for_backward(ctx, inputs, output):  # noqa: ARG001
    hidden_states, rollout_rows, target_rows, weight, *ctx.options = inputs
    ctx.save_for_backward(rollout_rows, target_rows, weight, *hidden_states)


def _differentiate(ctx, grad_rollouts, grad_targets):
    rollout_rows, target_rows, weight, *hidden_states = ctx.saved_tensors
    grads = _backward_op(grad_rollouts, grad_targets, hidden_states, rollout_rows, target_rows, weight, *ctx.options)
    return grads, *(None,) * (3 + len(ctx.options))


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)
