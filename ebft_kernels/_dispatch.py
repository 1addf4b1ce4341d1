"""Which implementation runs: a pure function of the op, the device, the dtype and sizes, never a silent fallback."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from . import _native, _tiles, _triton
from ._checks import check_option

#: Implementations that can be asked for by name, fastest first where several are available.
IMPLS = ("auto", "reference", "torch", "triton", "native")

# Op -> the folder that holds its implementations, and which of them exist, in the order in which "auto" prefers them.
# `_torch` and `_reference` run on every device and for every dtype; the others may decline.
# On CUDA Triton comes before native: its matching does in one kernel what takes the compiled code two, for any n.
# Neither has been timed on a GPU.
OPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "strided_attention": ("attention", ("triton", "native", "torch", "reference")),
    "strided_attention_step": ("attention", ("triton", "native", "torch", "reference")),
    "pool_features": ("pooling", ("triton", "native", "torch", "reference")),
    "mean_embedding_loss": ("matching", ("triton", "native", "torch", "reference")),
    "feature_matching": ("matching", ("triton", "native", "torch", "reference")),
    "linear_log_probs": ("logprob", ("triton", "native", "torch", "reference")),
}


def available_impls(op: str, device: torch.device | str) -> tuple[str, ...]:
    """Names of the implementations of ``op`` that can run on ``device``, in the order ``"auto"`` prefers them.

    Raises:
        ValueError: ``op`` is not one of the package's ops.
    """
    check_option("op", op, OPS)
    device = torch.device(device)
    found = tuple(impl for impl in OPS[op][1] if not why_not(op, impl, device))
    if device.type == "cpu" and "triton" in found:  # the interpreter is there for tests; nobody wants it by default
        found = (*(impl for impl in found if impl != "triton"), "triton")
    return found


def why_not(
    op: str,
    impl: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    sizes: Mapping[str, int] | None = None,
) -> str:
    """Why an implementation of ``op`` cannot run on tensors of this device, dtype and these sizes; "" if it can."""
    if impl == "native":
        return _native.why_not(device.type) or _native.declines(op, device, sizes or {})
    if impl != "triton":
        return ""
    if dtype is not None and dtype not in _triton.DTYPES:
        return f"it computes in {', '.join(str(x).removeprefix('torch.') for x in _triton.DTYPES)}, not in {dtype}"
    return _triton.why_not(device.type) or _tiles.declines(op, sizes or {})


def select_impl(
    op: str, device: torch.device | str, dtype: torch.dtype, *, sizes: Mapping[str, int] | None = None
) -> str:
    """The implementation that ``impl="auto"`` runs for ``op`` on tensors of this device and dtype.

    Args:
        sizes: those that an implementation may have a limit for, by name: "n", rollouts per anchor, of
            ``feature_matching`` and ``mean_embedding_loss``; "L", layers, of ``pool_features``, and "L*K", hidden
            states of one mean, of its ``pooling="mean"``. None: all are within the limits.

    Raises:
        ValueError: ``op`` is not one of the package's ops.
        TypeError: ``dtype`` is no floating-point dtype that the ops support.
    """
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    device = torch.device(device)
    return next(impl for impl in available_impls(op, device) if not why_not(op, impl, device, dtype, sizes))


def resolve_impl(
    op: str, impl: str, device: torch.device, dtype: torch.dtype, sizes: Mapping[str, int] | None = None
) -> str:
    """The implementation to run for the public argument ``impl``; raises ValueError rather than choose another one."""
    check_option("impl", impl, IMPLS)
    if impl == "auto":
        return select_impl(op, device, dtype, sizes=sizes)
    known = impl in OPS[op][1]
    reason = why_not(op, impl, device, dtype, sizes) if known else ""
    if reason or not known:
        available = ", ".join(x for x in available_impls(op, device) if not why_not(op, x, device, dtype, sizes))
        because = f" ({reason})" if reason else ""
        raise ValueError(
            f"impl: {op} has no implementation {impl!r} on {device}{because}; available there: {available}"
        )
    return impl


def implementation(op: str, impl: str) -> ModuleType:
    """The module that implements ``op`` (``impl`` already resolved); imported on first use."""
    return importlib.import_module(f"ebft_kernels.{OPS[op][0]}._{impl}")


def autocast_inputs(*inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The inputs of a matrix product, or of attention, in the dtype of an enclosing ``torch.autocast``.

    float64 stays as it is, as do integers and what is no tensor; the first input says which device's autocast counts.
    """
    device = inputs[0].device.type if isinstance(inputs[0], Tensor) else ""
    if not device or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in inputs
    )
