"""Public function of log-probabilities from hidden states, its checks and its registration with ``torch.library``."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import FLOATING, INTEGER, check_finite, check_int, check_positive, check_tensor
from .._dispatch import autocast_inputs, implementation, resolve_impl
from .._transforms import check_transforms, once_differentiable
from . import _reference


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_size: int | None = None,
    computed: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> Tensor:
    """``log p(target)`` of every row under an output head, without the [R, V] logits of all R rows at once.

        logits   = scale * (hidden W^T + bias)         then, with ``softcap``: softcap * tanh(logits / softcap)
        log p(t) = log_softmax(logits / temperature)[t]

    Equal to ``torch.log_softmax(logits.float() / temperature, -1)`` at the targets, with memory for a tile of the
    logits; the backward pass computes them again. Softmax statistics are float32 (float64 for float64 inputs), and the
    gradients of weight and bias are summed over the tiles in that precision. Under ``torch.autocast`` hidden, weight
    and bias are cast to its dtype first, as ``F.linear`` does. Differentiable in all three, once.

    Args:
        hidden: [..., C] float64, float32, bfloat16 or float16.
        weight: [V, C], of the same dtype.
        targets: [...] int64 or int32, each in ``0 .. V-1``; there is no ignore index. On CUDA one outside fails a
            device assertion, since an error would have to wait for the device.
        rows: int64 or int32 of the shape of ``targets``, which is any then: the row that scores each target, counted
            over all leading axes of ``hidden``, as of ``hidden.view(-1, C)``; checked as ``targets`` are. Several
            targets of a row cost little more than one, and a row may have none. None: one target for each row.
        bias: [V], of the same dtype.
        temperature: divides the logits.
        softcap: bound of the logits.
        scale: multiplies the logits.
        chunk_size: rows whose logits are held together; None: up to 4096 on the CPU, elsewhere up to 32768. So many
            columns at a time that in the dtype of their sums it would be 16 MB of logits, elsewhere 512 MB.
        computed: these very log-probabilities, where they are known, as from sampling, and what the backward pass needs
            [2, R] of the logits over the temperature of all R rows: the largest, and the logarithm of the sum of
            ``exp(logit - largest)``. Nothing is computed but, in the backward pass, the gradient. It computes the
            logits again, which in 16 bits may round to others: compute the whole there.
        impl: "auto", "reference", "torch", ...; see :func:`ebft_kernels.available_impls`.

    Returns:
        float32 (float64 for float64 inputs), of the shape of ``targets``.

    Raises:
        ValueError: a shape, device, option, target or row that does not fit (``impl="reference"``: an error of
            PyTorch for target and row); ``computed`` with ``impl="reference"``.
        TypeError: another type or dtype.
    """
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    sizes: dict[str, int] = {}
    check_tensor("hidden", hidden, "... C", sizes, dtype=FLOATING)
    check_tensor("weight", weight, "V C", sizes, dtype=hidden.dtype, device=hidden.device)
    check_tensor("targets", targets, "...", sizes, dtype=INTEGER, device=hidden.device)
    if rows is None:
        _check_shape("targets", targets, hidden.shape[:-1])
    else:
        check_tensor("rows", rows, "...", sizes, dtype=INTEGER, device=hidden.device)
        _check_shape("rows", rows, targets.shape)
    if min(sizes["V"], sizes["C"]) < 1:
        raise ValueError(f"weight: expected at least one token and one channel, got {list(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, "V", sizes, dtype=hidden.dtype, device=hidden.device)
    check_positive("temperature", temperature)
    check_finite("scale", scale)
    if softcap is None:
        check_finite("scale / temperature", scale / temperature)
    else:
        check_positive("softcap", softcap)
        check_finite("scale / softcap", scale / softcap)
        check_positive("softcap / temperature", softcap / temperature)
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, minimum=1)
    impl = resolve_impl("linear_log_probs", impl, hidden.device, hidden.dtype)
    if impl == "reference":
        if computed is not None:
            raise ValueError("computed: expected None with impl='reference', whose gradient is autograd's")
        return _reference.linear_log_probs(
            hidden, weight, targets, rows=rows, bias=bias, temperature=temperature, softcap=softcap, scale=scale
        )
    check_transforms("linear_log_probs", hidden, weight, bias)
    options = (float(temperature), None if softcap is None else float(softcap), float(scale), chunk_size, impl)
    scored = targets.reshape(-1), None if rows is None else rows.reshape(-1)
    inputs = (hidden.reshape(-1, sizes["C"]), weight, *scored, bias, *options)
    if computed is None:
        log_probs, _ = _forward_op(*inputs)
    else:
        _check_computed(computed, inputs[0], targets)
        log_probs, _ = _Computed.apply(*inputs, computed)
    return log_probs.view(targets.shape)


def _check_shape(name: str, x: Tensor, shape: torch.Size) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")


def _check_computed(computed: tuple[Tensor, Tensor], hidden: Tensor, targets: Tensor) -> None:
    if not isinstance(computed, tuple) or len(computed) != 2:
        raise TypeError(
            f"computed: expected a tuple of log-probabilities and statistics, got {type(computed).__name__}"
        )
    expected = {"dtype": torch.promote_types(hidden.dtype, torch.float32), "device": hidden.device}
    check_tensor("computed[0]", computed[0], "...", {}, **expected)
    _check_shape("computed[0]", computed[0], targets.shape)
    check_tensor("computed[1]", computed[1], "2 R", {"R": hidden.shape[0]}, **expected)


_INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? rows, Tensor? bias"
_OPTIONS = "float temperature, float? softcap, float scale, SymInt? chunk_size, str impl"


@torch.library.custom_op(
    "ebft_kernels::linear_log_probs",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward_op(hidden, weight, targets, rows, bias, *options):
    """Log-probabilities [T] and the softmax's statistics [2, R], from hidden [R, C] and targets [T] of the rows [T]."""
    *options, impl = options
    with torch.autocast(hidden.device.type, enabled=False):
        return implementation("linear_log_probs", impl).forward(hidden, weight, targets, rows, bias, *options)


@_forward_op.register_fake
def _(hidden, _weight, targets, *_rest):
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.new_empty(targets.shape, dtype=dtype), hidden.new_empty(2, hidden.shape[0], dtype=dtype)


@torch.library.custom_op(
    "ebft_kernels::linear_log_probs_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor statistics, {_INPUTS}, bool[] needs, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(grad, statistics, hidden, weight, targets, rows, bias, needs, *options):
    """Gradients of hidden, weight and bias, in their dtype; an empty tensor for each that is not needed."""
    *options, impl = options
    with torch.autocast(hidden.device.type, enabled=False):
        module = implementation("linear_log_probs", impl)
        return module.backward(grad, statistics, hidden, weight, targets, rows, bias, needs, *options)


@_backward_op.register_fake
def _(_grad, _statistics, hidden, weight, _targets, _rows, bias, needs, *_options):
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


once_differentiable("linear_log_probs", _backward_op)


def _save_for_backward(ctx, inputs, output):
    hidden, weight, targets, rows, bias, *ctx.options = inputs
    _log_probs, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(statistics, hidden, weight, targets, rows, bias)


def _differentiate(ctx, grad, _grad_statistics):
    options = (None,) * len(ctx.options)
    if grad is None:
        return None, None, None, None, None, *options
    hidden, weight, _, _, bias = ctx.needs_input_grad[:5]
    needs = [hidden, weight, bias]
    grads = _backward_op(grad, *ctx.saved_tensors, needs, *ctx.options)
    hidden, weight, bias = (x if need else None for x, need in zip(grads, needs, strict=True))
    return hidden, weight, None, None, bias, *options


_forward_op.register_autograd(_differentiate, setup_context=_save_for_backward)


class _Computed(torch.autograd.Function):
    """The forward op where log-probabilities and statistics are known."""

    @staticmethod
    def forward(ctx, *inputs):
        *inputs, computed = inputs
        log_probs, statistics = (x.detach() for x in computed)
        log_probs = log_probs.reshape(-1)
        _save_for_backward(ctx, inputs, (log_probs, statistics))
        return log_probs, statistics

    @staticmethod
    def backward(ctx, grad, grad_statistics):
        return *_differentiate(ctx, grad, grad_statistics), None
