"""The compiled module ``ebft_kernels._C``: loaded on first use, and why not where it is missing or broken."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

#: The codes by which the module names element types.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@torch.compiler.assume_constant_result
def why_not(device_type: str) -> str:
    """Why the compiled kernels cannot run on tensors of this device type; "" if they can."""
    if device_type != "cpu":
        return "they are compiled for the CPU only"
    return _load()[1]


def library() -> ModuleType:
    """The compiled module.

    Raises:
        ImportError: there is none, or it cannot be loaded; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(f"the native kernels cannot run: {reason}")
    return module


def build_info() -> str:
    """What was compiled, with what, and which instruction set this machine uses; or why there is nothing."""
    module, reason = _load()
    if module is None:
        return f"none: {reason}"
    threads = "OpenMP" if module.openmp else "one thread"
    return f"CPU ({module.isas()[-1]}, {threads}), compiled by {module.compiler}; CUDA: not built"


def execution() -> tuple[int, int]:
    """The first two arguments of every kernel: the best instruction set of this machine and torch's number of threads.

    A test may choose another instruction set with :func:`assume_isa`.
    """
    return _best_isa() if _assumed_isa is None else _assumed_isa, torch.get_num_threads()


_assumed_isa: int | None = None


@contextlib.contextmanager
def assume_isa(name: str) -> Iterator[None]:
    """Run the kernels for the instruction set ``name``, one of ``library().isas()``."""
    global _assumed_isa
    before, _assumed_isa = _assumed_isa, library().isas().index(name)
    try:
        yield
    finally:
        _assumed_isa = before


def rows(x: Tensor) -> Tensor:
    """``x``, copied only if its last axis is not contiguous, as the kernels need it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def byte_strides(x: Tensor, axes: int) -> list[int]:
    """Strides in bytes of the first ``axes`` axes."""
    return [stride * x.element_size() for stride in x.stride()[:axes]]


@functools.cache
def _best_isa() -> int:
    return len(library().isas()) - 1


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The module, or None and why."""
    # In this very package: an editable installation beside it would offer the module of its own source folder too.
    if PathFinder.find_spec("ebft_kernels._C", sys.modules["ebft_kernels"].__path__) is None:
        return None, "the C++ module was not built; pip builds it where it finds a C++17 compiler"
    try:
        return _import(), ""
    except (ImportError, OSError) as error:
        reason = f"the C++ module cannot be loaded: {error}"
        warnings.warn(f"ebft_kernels: {reason}. Other implementations are used.", RuntimeWarning, stacklevel=2)
        return None, reason


def _import() -> ModuleType:
    """Import the module, which is linked with no OpenMP runtime: it uses the one of torch.

    A second runtime would have threads of its own, which spin beside those of torch. torch usually makes its own
    visible to all libraries; where it does not, that is done here.
    """
    try:
        return importlib.import_module("ebft_kernels._C")
    except ImportError as error:
        if not any(prefix in str(error) for prefix in ("GOMP_", "omp_", "__kmpc_")):
            raise
        for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module("ebft_kernels._C")
