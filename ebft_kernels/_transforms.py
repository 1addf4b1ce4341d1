"""What autograd and ``torch.func`` make of the ops: one derivative, in reverse mode, and vmap. Any other derivative is
refused, never zero.

PyTorch drops the tangents of an op that it knows no forward-mode derivative of, and a derivative that goes through the
op is then exactly 0.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def check_transforms(op: str, *inputs: Tensor | None) -> None:
    """Raise NotImplementedError if ``inputs`` are differentiated in forward mode or by ``torch.func``, unlike vmap.

    In compiled code, where that cannot be told of a tensor, if anything is.
    """
    # Read here, not in `_transform`: compiled code is to be traced anew where this changes.
    mode = "forward" if forward_ad._current_level >= 0 else _transform()
    if mode and (torch.compiler.is_compiling() or any(_differentiated(x) for x in inputs if x is not None)):
        _refuse(op, mode)


@torch.compiler.assume_constant_result
def _refuse(op: str, mode: str) -> NoReturn:
    """Not inlined by the compiler, which would lose the message."""
    if mode == "forward":
        raise NotImplementedError(
            f"{op}: it has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad); use reverse "
            "mode, torch.autograd.grad or backward(), or impl='reference'"
        )
    raise NotImplementedError(
        f"{op}: torch.func.grad, vjp and jacrev cannot differentiate it; use torch.autograd.grad or backward(), or "
        "impl='reference'"
    )


def once_differentiable(op: str, backward_op: torch.library.CustomOpDef) -> None:
    """Have autograd refuse to differentiate ``backward_op``, the gradient of ``op``."""

    def refuse(_ctx: Any, *_grads: object) -> NoReturn:
        raise NotImplementedError(
            f"{op}: it is once differentiable, its gradient has no derivative; for second derivatives use "
            "impl='reference'"
        )

    backward_op.register_autograd(refuse)


def transforming() -> bool:
    """Whether this runs within a transform of ``torch.func``: new tensors are then wrapped, and have no memory."""
    return _functorch.peek_interpreter_stack() is not None


def map_in_turn(op: torch.library.CustomOpDef) -> None:
    """Have vmap run ``op`` on one input after the other, as PyTorch has it for ops that take no list of tensors."""

    def run(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        def one(x: Any, dim: Any, index: int) -> Any:
            if isinstance(x, list):
                return [one(y, d, index) for y, d in zip(x, dim or [None] * len(x), strict=True)]
            return x if dim is None else x.select(dim, index)

        results = []
        for index in range(info.batch_size):
            results.append(op(*(one(x, dim, index) for x, dim in zip(inputs, in_dims, strict=True))))
        joined = [torch.stack(x) for x in zip(*results, strict=True)]
        return type(results[0])(joined), type(results[0])([0] * len(joined))

    op.register_vmap(run)


@torch.compiler.assume_constant_result
def _transform() -> str:
    """The innermost of the transforms of ``torch.func`` that differentiate and that this runs in: "forward", "reverse"
    or none, "".

    In compiled code those in which it is traced: a transform is either within it or what it is traced anew for.
    """
    modes = {"Jvp": "forward", "Grad": "reverse"}
    found = [modes.get(x.key().name, "") for x in _functorch.get_interpreter_stack() or ()]
    return next((mode for mode in reversed(found) if mode), "")


def _differentiated(x: Tensor) -> bool:
    """Whether ``x`` depends on what is differentiated; within a transform all new tensors are wrapped, those too that
    do not."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x) and (x.requires_grad or _has_tangent(x)):
            return True
        x = _functorch.get_unwrapped(x)
    return _has_tangent(x)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
