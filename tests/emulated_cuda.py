"""Tensors that say they are on a GPU but lie in the CPU's memory: the host code of CUDA where there is no GPU.

What would go wrong on a GPU goes wrong here: two tensors on different devices in one operation, and, where it is
forbidden, a host that waits for the device. Triton's kernels get the memory of the tensors and run in the interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from ebft_kernels import _triton

DEVICE = torch.device("cuda", 0)
_ATEN = torch.ops.aten
#: What makes the host wait until the device has computed a number, or how many there are.
_WAITING = (
    _ATEN._local_scalar_dense,
    _ATEN.item,
    _ATEN.is_nonzero,
    _ATEN.equal,
    _ATEN.nonzero,
    _ATEN.masked_select,
    _ATEN.unique_dim,
    _ATEN._unique2,
    _ATEN.unique_consecutive,
    _ATEN.repeat_interleave,  # by a tensor; by a number it never gets here
    _ATEN.bincount,
)


class HostWaits(AssertionError):
    """The host would wait for the device, where that is forbidden."""


class EmulatedTensor(Tensor):
    """A tensor on a GPU, whose numbers are those of ``inner`` on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> EmulatedTensor:
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="meta",  # autograd knows no others here that have no memory of their own
        )
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _self: DEVICE)
    is_cuda = property(lambda _self: True)
    is_meta = property(lambda _self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        return _run(func, args, kwargs or {})

    def __repr__(self, **_options: object) -> str:
        return f"EmulatedTensor({self.inner!r})"

    def data_ptr(self) -> int:
        """That of the memory on the CPU."""
        return self.inner.data_ptr()

    def tolist(self) -> object:
        """A copy, which waits."""
        return self.cpu().tolist()

    def numpy(self) -> object:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class _FromNumbers(TorchFunctionMode):
    """Makes tensors of Python's numbers, which PyTorch would copy to a GPU by means of its own."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class _Factories(TorchDispatchMode):
    """Makes what is asked for on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        return _run(func, args, kwargs or {})


_waiting_allowed = True


@contextlib.contextmanager
def emulated_cuda() -> Iterator[torch.device]:
    """Inside, ``device="cuda"`` works, and Triton has kernels for it."""
    why_not, lazy_init = _triton.why_not, torch.cuda._lazy_init
    interpreter = _triton.Target("interpreter", 4, 64 << 10)

    def launcher(kernel, grid, args, options):
        kernel[grid](*tree_map(_inner, args), **tree_map(_inner, options))

    _triton.why_not = lambda device_type: "" if device_type == "cuda" else why_not(device_type)
    torch.cuda._lazy_init = lambda: None
    try:
        with _triton.assume(interpreter, launcher), _Factories(), _FromNumbers():
            yield DEVICE
    finally:
        _triton.why_not, torch.cuda._lazy_init = why_not, lazy_init


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the emulated GPU raises :class:`HostWaits`."""
    with waiting(allowed=False):
        yield


@contextlib.contextmanager
def waiting(*, allowed: bool = True) -> Iterator[None]:
    """Inside, the host may wait for the emulated GPU, as elsewhere, or may not."""
    global _waiting_allowed
    before, _waiting_allowed = _waiting_allowed, allowed
    try:
        yield
    finally:
        _waiting_allowed = before


def _inner(x: object) -> object:
    return x.inner if isinstance(x, EmulatedTensor) else x


def _run(func, args, kwargs):
    """``func`` on the memory of its arguments; its results are where they would be."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    emulated = [x for x in tensors if isinstance(x, EmulatedTensor)]
    if func.namespace == "ebft_kernels" and emulated:  # an op of the package: its code, on these very tensors
        with _Factories():
            return OPDEFS[func._schema.name]._backend_fns[None](*args, **kwargs)
    if not _waiting_allowed and emulated and (func.overloadpacket in _WAITING or _counts(func, args)):
        raise HostWaits(f"{func} of a tensor on {DEVICE}")
    device = kwargs.get("device")
    # What asks the tensors themselves, below Python, is told that they are on "meta".
    here = bool(emulated) if device is None else torch.device(device).type in ("cuda", "meta")
    if func is _ATEN._to_copy.default:
        if bool(emulated) != here and not kwargs.get("non_blocking") and not _waiting_allowed:
            raise HostWaits(f"a copy from {DEVICE} to {device}" if emulated else f"a copy to {DEVICE}")
    elif func is _ATEN.copy_.default:
        if len(emulated) == 1 and not (args[2:] or [False])[0] and not _waiting_allowed:
            raise HostWaits(f"a copy between {DEVICE} and the CPU")
    elif emulated and any(x.ndim and not isinstance(x, EmulatedTensor) for x in tensors) and not _indexes(func, args):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    results = func(*inner_args, **inner_kwargs)
    if not here or func is _ATEN._local_scalar_dense.default:
        return results
    known = {id(x.inner): x for x in emulated}  # what was written to in place is the result itself

    def outer(x: object) -> object:
        return x if not isinstance(x, Tensor) else known[id(x)] if id(x) in known else EmulatedTensor(x)

    return tree_map(outer, results)


_INDEXING = (_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._index_put_impl_)


def _indexes(func, args) -> bool:
    """Whether this takes elements by an index, which may be on the CPU as long as what is indexed is not."""
    return func.overloadpacket in _INDEXING and isinstance(args[0], EmulatedTensor)


def _counts(func, args) -> bool:
    """Whether elements are taken by a mask, of which there are as many as it has ones."""
    masks = (torch.bool, torch.uint8)
    return func.overloadpacket in _INDEXING and any(x is not None and x.dtype in masks for x in args[1])
