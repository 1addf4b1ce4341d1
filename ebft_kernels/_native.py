"""The compiled modules ``ebft_kernels._C``, for the CPU, and ``ebft_kernels._cuda``: loaded on first use, and why not
where one is missing, broken or made for other machines."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

#: The codes by which the modules name element types.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}

# Device type -> its module.
_MODULES = {"cpu": "_C", "cuda": "_cuda"}
# Device type -> the ops that there are kernels for, and the most that these take of the sizes that a call names.
_LIMITS: dict[str, dict[str, dict[str, int]]] = {
    "cpu": {
        "strided_attention": {},
        "strided_attention_step": {},
        "pool_features": {},
        "mean_embedding_loss": {"n": 16384},
        "feature_matching": {"n": 16384},
        "linear_log_probs": {},
    },
    "cuda": {
        "pool_features": {"L": 64, "L*K": 2560},
        "mean_embedding_loss": {"n": 32767},
        "feature_matching": {"n": 16},
        "layout": {},
    },
}
# Module -> its language, and what pip needs to build it.
_BUILT = {"_C": ("C++", "a C++17 compiler"), "_cuda": ("CUDA", "nvcc on PATH")}


@torch.compiler.assume_constant_result
def why_not(device_type: str) -> str:
    """Why the compiled kernels cannot run on tensors of this device type; "" if they can."""
    if device_type not in _MODULES:
        return "they are compiled for the CPU and for CUDA only"
    return _load(_MODULES[device_type])[1] or (_why_not_this_gpu() if device_type == "cuda" else "")


def declines(op: str, device: torch.device, sizes: Mapping[str, int]) -> str:
    """Why there is no kernel for a call of these sizes; "" if there is. See :func:`ebft_kernels.select_impl`."""
    kind = "cuda" if on_cuda(device) else "cpu"
    if op not in _LIMITS[kind]:
        return f"there is no compiled kernel for {kind}"
    for name, most in _LIMITS[kind][op].items():
        if sizes.get(name, 0) > most:
            return f"on {kind} it takes at most {name} = {most}, got {sizes[name]}"
    return ""


def library(device_type: str = "cpu") -> ModuleType:
    """The compiled module for tensors of this device type.

    Raises:
        ImportError: there is none, or it cannot be loaded; the message says why.
    """
    module, reason = _load(_MODULES[device_type])
    if module is None:
        raise ImportError(f"the native kernels cannot run: {reason}")
    return module


def build_info() -> str:
    """What was compiled, with what and for what, and what of it this machine uses; or why there is nothing."""
    (cpu, no_cpu), (cuda, no_cuda) = _load("_C"), _load("_cuda")
    info = [f"CPU: none, {no_cpu}", f"CUDA: none, {no_cuda}"]
    if cpu is not None:
        threads = "OpenMP" if cpu.openmp else "one thread"
        info[0] = f"CPU: {cpu.isas()[-1]}, {threads}, compiled by {cpu.compiler}"
    if cuda is not None:
        info[1] = f"CUDA: {_targets(cuda)}, compiled by CUDA {cuda_version(cuda.runtime)}"
        if reason := why_not("cuda"):
            info[1] += f", not used here: {reason}"
    return "; ".join(info)


def on_cuda(device: torch.device) -> bool:
    """Whether the CUDA kernels run on tensors of ``device``, not those for the CPU.

    This and :func:`current_stream` are what a test replaces to run CUDA kernels that were compiled for the CPU.
    """
    return device.type == "cuda"


def run(kernel: str, device: torch.device, *arguments: object) -> None:
    """Run a kernel on tensors of ``device``, whose addresses are among ``arguments``; on a GPU in the current stream.

    Raises:
        ValueError: an argument that the kernel refuses.
        RuntimeError: an error of CUDA, with the name of the kernel and the launch geometry.
    """
    if not on_cuda(device):
        getattr(library("cpu"), kernel)(*execution(), *arguments)
        return
    function = getattr(library("cuda"), kernel)
    with current_stream(device) as stream:
        function(stream, *arguments)


@contextlib.contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """The handle of torch's current stream on a GPU, and inside that GPU as the current one."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def execution() -> tuple[int, int]:
    """The first two arguments of every kernel for the CPU: the best instruction set of this machine and torch's number
    of threads.

    A test may choose another instruction set with :func:`assume_isa`.
    """
    return _best_isa() if _assumed_isa is None else _assumed_isa, torch.get_num_threads()


_assumed_isa: int | None = None


@contextlib.contextmanager
def assume_isa(name: str) -> Iterator[None]:
    """Run the kernels for the instruction set ``name``, one of ``library("cpu").isas()``."""
    global _assumed_isa
    before, _assumed_isa = _assumed_isa, library("cpu").isas().index(name)
    try:
        yield
    finally:
        _assumed_isa = before


def rows(x: Tensor) -> Tensor:
    """``x``, copied only if its last axis is not contiguous, as the kernels need it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def layout_tensor(x: Tensor) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
    """A tensor of a layout, described so that the modules can tell whether it is the one that the sizes promise."""
    return x.data_ptr(), str(x.dtype), tuple(x.shape), x.stride()


def byte_strides(x: Tensor, axes: int) -> list[int]:
    """Strides in bytes of the first ``axes`` axes."""
    return [stride * x.element_size() for stride in x.stride()[:axes]]


@functools.cache
def _best_isa() -> int:
    return len(library("cpu").isas()) - 1


@functools.cache
def _why_not_this_gpu() -> str:
    """Why the CUDA module, which was loaded, cannot run on the current GPU; "" if it can."""
    if torch.version.hip:
        return "they are compiled for NVIDIA only"
    if not torch.cuda.is_available():
        return "there is no GPU"
    module, (major, minor) = library("cuda"), torch.cuda.get_device_capability()
    # Machine code runs on GPUs of the same major version and no lesser minor one, PTX on all that came later.
    exact = any(target // 100 == major and target // 10 % 10 <= minor for target in module.targets)
    if not exact and module.targets[-1] > 100 * major + 10 * minor:
        return f"they are compiled for {_targets(module)}, the GPU is sm_{major}{minor}"
    if module.driver() // 1000 < module.runtime // 1000:
        runtime, driver = (cuda_version(number) for number in (module.runtime, module.driver()))
        return f"they are compiled by CUDA {runtime}, the driver is for {driver}"
    return ""


def _targets(module: ModuleType) -> str:
    return f"{', '.join(f'sm_{target // 10}' for target in module.targets)} and PTX"


def cuda_version(number: int) -> str:
    """13000, as CUDA numbers its versions, as "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """The module, or None and why."""
    language, needed = _BUILT[name]
    # In this very package: an editable installation beside it would offer the module of its own source folder too.
    if PathFinder.find_spec(f"ebft_kernels.{name}", sys.modules["ebft_kernels"].__path__) is None:
        return None, f"the {language} module was not built; pip builds it where it finds {needed}"
    try:
        return _import(f"ebft_kernels.{name}"), ""
    except (ImportError, OSError) as error:
        reason = f"the {language} module cannot be loaded: {error}"
        warnings.warn(f"ebft_kernels: {reason}. Other implementations are used.", RuntimeWarning, stacklevel=2)
        return None, reason


def _import(name: str) -> ModuleType:
    """Import a module. The one for the CPU is linked with no OpenMP runtime: it uses the one of torch.

    A second runtime would have threads of its own, which spin beside those of torch. torch usually makes its own
    visible to all libraries; where it does not, that is done here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not any(prefix in str(error) for prefix in ("GOMP_", "omp_", "__kmpc_")):
            raise
        for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module(name)
