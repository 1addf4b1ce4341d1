"""The GPUs that kernels are compiled for without having one, and what decides how many programs they keep in flight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ebft_kernels import _triton

KIB = 1 << 10


class Gpu(NamedTuple):
    """One architecture, by the vendor's tables of "technical specifications per compute capability" (AMD: the CDNA 3
    instruction-set manual).

    Attributes:
        arch: "sm_90", "gfx942", ...
        name: the product whose number of processors is assumed.
        processors: streaming multiprocessors, or compute units.
        shared_limit: bytes of shared memory that one program may use.
        shared: bytes of shared memory per processor.
        warps: warps that one processor keeps.
        programs: programs (thread blocks) that one processor keeps.
    """

    arch: str
    name: str
    processors: int
    shared_limit: int
    shared: int
    warps: int
    programs: int

    @property
    def is_amd(self) -> bool:
        """Whether it runs code for AMD's instruction set."""
        return self.arch.startswith("gfx")


GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("sm_80", "A100", 108, 163 * KIB, 164 * KIB, 64, 32),
        Gpu("sm_86", "RTX 3090", 82, 99 * KIB, 100 * KIB, 48, 16),
        Gpu("sm_89", "RTX 4090", 128, 99 * KIB, 100 * KIB, 48, 24),
        Gpu("sm_90", "H100 SXM", 132, 227 * KIB, 228 * KIB, 64, 32),
        Gpu("sm_100", "B200", 148, 227 * KIB, 228 * KIB, 64, 32),
        Gpu("sm_120", "RTX 5090", 170, 99 * KIB, 100 * KIB, 48, 24),
        Gpu("gfx942", "MI300X", 304, 64 * KIB, 64 * KIB, 32, 32),
    )
}

_REGISTERS = 64 * KIB  # 32-bit registers per NVIDIA processor, a quarter of them for each of its four schedulers
_REGISTER_UNIT = 256  # registers are given to a warp in such units
_SHARED_UNIT = 128  # shared memory is given to a program in such units, and as much as this is kept for the system:
_SHARED_RESERVED = 1 * KIB
_TENSOR_MEMORY_COLUMNS = 512  # of tensor memory per processor, sm_100
_VECTOR_REGISTERS = 512  # per lane of each of the four SIMD units of an AMD compute unit, given in units of 8
_WAVES = 8  # that one SIMD unit keeps


def programs_in_flight(gpu: Gpu, *, registers: int, warps: int, shared: int, tensor_columns: int = 0) -> int:
    """Programs that one processor keeps at a time: the least that registers, warps, shared and tensor memory allow.

    Args:
        gpu: where.
        registers: per thread (AMD: vector registers per lane, both kinds).
        warps: per program.
        shared: bytes of shared memory per program.
        tensor_columns: columns of tensor memory per program.
    """
    if gpu.is_amd:
        waves = min(_WAVES, _VECTOR_REGISTERS // max(_round_up(registers, 8), 8))
        limits = [4 * waves // warps, gpu.programs]
        limits += [gpu.shared // shared] if shared else []
        return min(limits)
    per_scheduler = _REGISTERS // 4 // max(_round_up(registers * 32, _REGISTER_UNIT), _REGISTER_UNIT)
    limits = [4 * per_scheduler // warps, gpu.warps // warps, gpu.programs]
    limits += [gpu.shared // _round_up(shared + _SHARED_RESERVED, _SHARED_UNIT)]
    limits += [_TENSOR_MEMORY_COLUMNS // tensor_columns] if tensor_columns else []
    return min(limits)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


class Launch(NamedTuple):
    """A kernel as it would have been launched: its name, the tile, and what the compiler made of it."""

    kernel: str
    tile: _triton.Tile
    compiled: Any


@contextlib.contextmanager
def compiling(gpu: Gpu) -> Iterator[list[Launch]]:
    """Inside, ops with ``impl="triton"`` on CPU tensors compile the kernels that they would run on ``gpu``.

    Nothing is computed: results hold anything. Needs a process without ``TRITON_INTERPRET``. Gives the list that every
    launch is added to.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    launches: list[Launch] = []
    cleared: set[int] = set()
    tile, run = None, _triton._run

    def launcher(kernel, grid, args, options):
        if id(kernel) not in cleared:  # a kernel remembers its target by device number, and there is only one number
            kernel.device_caches.clear()
            cleared.add(id(kernel))
        launches.append(Launch(kernel.__name__, tile, kernel.warmup(*args, grid=grid, **options)))

    def recorded(kernel, grid, args, device, chosen, constants):
        nonlocal tile
        tile = chosen
        run(kernel, grid, args, device, chosen, constants)

    target = GPUTarget("hip", gpu.arch, 64) if gpu.is_amd else GPUTarget("cuda", int(gpu.arch.removeprefix("sm_")), 32)
    driver.set_active(_NoDriver(target))
    _triton._run = recorded
    # What follows a kernel in plain PyTorch works on whatever was in memory: an eigen-solver may refuse it.
    try:
        with standing_in(gpu, launcher), contextlib.suppress(torch.linalg.LinAlgError):
            yield launches
    finally:
        _triton._run = run


@contextlib.contextmanager
def standing_in(gpu: Gpu, launcher: _triton.Launcher) -> Iterator[None]:
    """Inside, ops with ``impl="triton"`` take CPU tensors and hand every launch to ``launcher``."""
    why_not = _triton.why_not
    _triton.why_not = lambda _device_type: ""
    try:
        with _triton.assume(_triton.Target(gpu.arch, gpu.processors, gpu.shared_limit), launcher=launcher):
            yield
    finally:
        _triton.why_not = why_not


class _NoDriver:
    """What Triton's compiler asks of a driver, without a GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
