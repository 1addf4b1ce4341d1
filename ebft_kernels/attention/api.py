"""Public functions of strided attention, their checks and their registration with ``torch.library``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import FLOATING, check_int, check_option, check_positive, check_tensor
from .._dispatch import autocast_inputs, implementation, resolve_impl
from .._transforms import check_transforms, once_differentiable
from ..layout import KeyRanges, StridedLayout, check_layout
from . import _reference
from ._common import empty_output, statistics_dtype


def strided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StridedLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    block: str = "causal",
    return_lse: bool = False,
    computed: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of packed rows under the mask of ``layout``, without ever building the mask.

    Equal to ``F.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask(window, block=block),
    enable_gqa=True)``, plus:

        score  = scale * <q, k>                         then, with ``softcap``: softcap * tanh(score / softcap)
        weight = exp(score) / (sum over visible keys of exp(score)  [+ exp(sinks[head])])

    Scores, statistics and sums are float32 (float64 for float64 inputs). Under ``torch.autocast`` q, k and v are cast
    to its dtype first, as PyTorch's own attention does. Differentiable in q, k, v and sinks, once.

    Args:
        q: [B, H, S, D] float64, float32, bfloat16 or float16, packed order. Any strides, as for k and v.
        k: [B, Hkv, S, D]; H must be a multiple of Hkv. Query heads ``h*H/Hkv .. (h+1)*H/Hkv`` share key/value head h.
        v: [B, Hkv, S, Dv].
        layout: who sees whom; on the same device.
        scale: of the scores; default ``1 / sqrt(D)``.
        softcap: bound of the scores.
        window: sliding window: a token sees keys less than ``window`` positions back. Longer than all sequences: none.
        sinks: [H] floating, one more logit per head in the denominator (arXiv:2309.17453).
        block: "causal": a rollout token sees its rollout up to itself. "full": it sees all of its rollout, as the
            drafters of speculative decoding do; a window bounds only what lies before it.
        return_lse: return the log-sum-exp too: the logarithm of each row's denominator. It takes no gradient.
        computed: output and log-sum-exp of these very inputs, where they are known, as from decoding step by step:
            nothing is computed but, in the backward pass, the gradient.
        impl: "auto", "reference", "torch", ...; see :func:`ebft_kernels.available_impls`.

    Returns:
        [B, H, S, Dv] in the dtype of q. Except for the reference, ``out.transpose(1, 2)`` is contiguous. With
        ``return_lse`` also [B, H, S] float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, device or option that does not fit; ``computed`` with ``impl="reference"``.
        TypeError: another type or dtype.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_layout(layout)
    scale = _check_inputs(("q", "k", "v"), q, k, v, layout, layout.packed_length, scale, softcap, sinks)
    window = layout._narrowing(window)
    check_option("block", block, ("causal", "full"))
    impl = resolve_impl("strided_attention", impl, q.device, q.dtype)
    if impl == "reference":
        if computed is not None:
            raise ValueError("computed: expected None with impl='reference', whose gradient is autograd's")
        options = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks, "block": block}
        out, lse = _reference.strided_attention(q, k, v, layout, **options)
        return (out, lse) if return_lse else out
    check_transforms("strided_attention", q, k, v, sinks)
    sizes = (layout.length, layout.samples, layout.horizon)
    inputs = (q, k, v, sinks, *layout.key_ranges, *sizes, scale, softcap, window, block == "full", impl)
    if computed is None:
        out, lse = _forward_op(*inputs)
    else:
        _check_computed(computed, q, v)
        out, lse = _Computed.apply(*inputs, computed)
    return (out, lse) if return_lse else out


@torch.no_grad()
def strided_attention_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layout: StridedLayout,
    step: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One decoding step: the rows of ``step`` of every rollout attend to what is in the cache. No gradient.

    Equal to the rows ``layout.length + step :: layout.horizon`` of :func:`strided_attention` over the whole caches.

    Args:
        q: [B, H, A*n, D], the tokens of ``step`` ordered (anchor, sample).
        k_cache: [B, Hkv, S, D] in packed order, written up to and including ``step``. Later rows are never read into a
            result and may hold anything, NaN included.
        v_cache: [B, Hkv, S, Dv] likewise.
        layout: who sees whom; on the same device.
        step: 0 .. G-1.
        scale, softcap, window, sinks, return_lse, impl: as for :func:`strided_attention`.

    Returns:
        [B, H, A*n, Dv] in the dtype of q. Except for the reference, ``out.transpose(1, 2)`` is contiguous. With
        ``return_lse`` also [B, H, A*n], as for :func:`strided_attention`.

    Raises:
        ValueError: a shape, device or option that does not fit; ``step`` outside ``0 .. G-1``.
        TypeError: another type or dtype.
    """
    q, k_cache, v_cache = autocast_inputs(q, k_cache, v_cache)
    check_layout(layout)
    check_int("step", step, minimum=0)
    if step >= layout.horizon:
        raise ValueError(f"step: expected less than horizon = {layout.horizon}, got {step}")
    rows = layout.num_anchors * layout.samples
    names = ("q", "k_cache", "v_cache")
    scale = _check_inputs(names, q, k_cache, v_cache, layout, rows, scale, softcap, sinks)
    window = layout._narrowing(window)
    impl = resolve_impl("strided_attention_step", impl, q.device, q.dtype)
    if impl == "reference":
        out, lse = _reference.strided_attention_step(
            q, k_cache, v_cache, layout, step, scale=scale, softcap=softcap, window=window, sinks=sinks
        )
    else:
        sizes = (layout.length, layout.samples, layout.horizon, step)
        out, lse = _step_op(q, k_cache, v_cache, sinks, *layout.key_ranges, *sizes, scale, softcap, window, impl)
    return (out, lse) if return_lse else out


def _check_inputs(
    names: tuple[str, str, str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: StridedLayout,
    query_rows: int,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> float:
    """Check all arguments that both functions share; returns the scale to use."""
    sizes = {"B": layout.batch_size, "rows": query_rows, "S": layout.packed_length}
    check_tensor(names[0], q, "B H rows D", sizes, dtype=FLOATING, device=layout.device)
    check_tensor(names[1], k, "B Hkv S D", sizes, dtype=q.dtype, device=q.device)
    check_tensor(names[2], v, "B Hkv S Dv", sizes, dtype=q.dtype, device=q.device)
    for name, x in zip(names, (q, k, v), strict=True):
        if x.shape[1] < 1 or x.shape[3] < 1:
            raise ValueError(f"{name}: expected at least one head of size 1, got shape {list(x.shape)}")
    if sizes["H"] % sizes["Hkv"]:
        raise ValueError(
            f"{names[1]}: expected a number of heads that divides {names[0]}'s {sizes['H']}, got {sizes['Hkv']}"
        )
    if sinks is not None:
        check_tensor("sinks", sinks, "H", sizes, dtype=FLOATING, device=q.device)
    if softcap is not None:
        check_positive("softcap", softcap)
    if scale is None:
        scale = sizes["D"] ** -0.5
    check_positive("scale", scale)
    if softcap is not None:
        check_positive("scale / softcap", scale / softcap)
    return float(scale)


def _check_computed(computed: tuple[Tensor, Tensor], q: Tensor, v: Tensor) -> None:
    if not isinstance(computed, tuple) or len(computed) != 2:
        raise TypeError(f"computed: expected a tuple of an output and a log-sum-exp, got {type(computed).__name__}")
    out, lse = computed
    sizes = dict(zip(("B", "H", "S", "Dv"), (*q.shape[:3], v.shape[3]), strict=True))
    check_tensor("computed[0]", out, "B H S Dv", sizes, dtype=q.dtype, device=q.device)
    check_tensor("computed[1]", lse, "B H S", sizes, dtype=statistics_dtype(q.dtype), device=q.device)


_GEOMETRY = "Tensor prefix_start, Tensor prefix_end, Tensor own_start, SymInt length, SymInt samples, SymInt horizon"
_SCORING = "float scale, float? softcap, SymInt? window"
_OPTIONS = f"{_SCORING}, bool full, str impl"


@torch.library.custom_op(
    "ebft_kernels::strided_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_GEOMETRY}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward_op(q, k, v, sinks, prefix_start, prefix_end, own_start, *rest):
    """Output [B, H, S, Dv] over [B, S, H, Dv] memory, and the log-sum-exp [B, H, S] of the scores and the sink."""
    ranges = KeyRanges(prefix_start, prefix_end, own_start)
    *options, impl = rest
    with torch.autocast(q.device.type, enabled=False):
        return implementation("strided_attention", impl).forward(q, k, v, sinks, ranges, *options)


@_forward_op.register_fake
def _(q, _k, v, *_rest):
    return empty_output(q, v), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


@torch.library.custom_op(
    "ebft_kernels::strided_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    f"{_GEOMETRY}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(grad, q, k, v, sinks, out, lse, prefix_start, prefix_end, own_start, *rest):
    """Gradients of q, k, v and sinks, contiguous, in their dtype; an empty tensor where there are no sinks."""
    ranges = KeyRanges(prefix_start, prefix_end, own_start)
    *options, impl = rest
    with torch.autocast(q.device.type, enabled=False):
        grads = implementation("strided_attention", impl).backward(grad, q, k, v, out, lse, ranges, *options)
    if sinks is None:
        return *grads, q.new_empty(0)
    # A sink is one more logit whose value vector is 0: d loss / d sink = -sum over rows of weight * <grad, out>.
    weight = torch.exp(sinks[:, None] - lse)  # [B, H, S]
    return *grads, -(weight * (grad.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)


@_backward_op.register_fake
def _(_grad, q, k, v, sinks, *_rest):
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


once_differentiable("strided_attention", _backward_op)


def _save_for_backward(ctx, inputs, output):
    q, k, v, sinks, prefix_start, prefix_end, own_start, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, out, lse, prefix_start, prefix_end, own_start)


def _differentiate(ctx, grad, _grad_lse):
    rest = (None,) * (3 + len(ctx.options))
    if grad is None:
        return None, None, None, None, *rest
    *grads, grad_sinks = _backward_op(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, grad_sinks if ctx.needs_input_grad[3] else None, *rest


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


class _Computed(torch.autograd.Function):
    """The forward op where output and log-sum-exp are known."""

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, computed = inputs
        out, lse = computed[0].detach(), computed[1].detach().contiguous()
        _save_for_backward(ctx, inputs, (out, lse))
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        return *_differentiate(ctx, grad, grad_lse), None


@torch.library.custom_op(
    "ebft_kernels::strided_attention_step",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? sinks, {_GEOMETRY}, SymInt step, {_SCORING}, str impl)"
    " -> (Tensor, Tensor)",
)
def _step_op(q, k_cache, v_cache, sinks, prefix_start, prefix_end, own_start, *rest):
    """Output [B, H, A*n, Dv] over [B, A*n, H, Dv] memory, and the log-sum-exp [B, H, A*n]."""
    ranges = KeyRanges(prefix_start, prefix_end, own_start)
    *options, impl = rest
    with torch.autocast(q.device.type, enabled=False):
        module = implementation("strided_attention_step", impl)
        return module.step(q, k_cache, v_cache, sinks, ranges, *options)


@_step_op.register_fake
def _(q, _k_cache, v_cache, *_rest):
    return empty_output(q, v_cache), q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))
