"""What all Triton kernels share: whether they can run on a device, what that device offers, and how they are launched.

Importing this module needs no Triton; the modules that hold kernels are imported on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

#: The oldest Triton that compiles the kernels, and the oldest that multiplies float64 matrices.
OLDEST, MULTIPLIES_FLOAT64 = (3, 3), (3, 5)

#: dtypes that the kernels compute in; float64 belongs to the other implementations.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Target(NamedTuple):
    """What the choice of tiles depends on.

    Attributes:
        arch: "sm_90", "gfx942", ...; "interpreter" on the CPU.
        processors: streaming multiprocessors, or compute units.
        shared_memory: bytes that one program may use.
    """

    arch: str
    processors: int
    shared_memory: int


class Tile(NamedTuple):
    """One way to run a kernel: its compile-time sizes (by the kernel's argument names), warps and pipeline stages.

    ``max_registers``, per thread, matters on NVIDIA only: without it the assembler may spill to run more programs.
    """

    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None


Launcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


@torch.compiler.assume_constant_result
def version() -> tuple[int, int]:
    """Major and minor version of Triton, which must be installed."""
    return _version()


@functools.cache
def _version() -> tuple[int, int]:
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@torch.compiler.assume_constant_result
def why_not(device_type: str) -> str:
    """Why the kernels cannot run on tensors of this device type; "" if they can."""
    return _why_not(device_type)


@functools.cache
def _why_not(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU only in Triton's interpreter, for tests: TRITON_INTERPRET=1 in the environment"
    if device_type not in ("cpu", "cuda"):
        return f"there are none for {device_type}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "there is no GPU"
    if device_type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "they need compute capability 8.0"
    if version() < OLDEST:
        return f"they need Triton {OLDEST[0]}.{OLDEST[1]}, there is {version()[0]}.{version()[1]}"
    return ""


_assumed: Target | None = None
_launcher: Launcher | None = None


@contextlib.contextmanager
def assume(target: Target, launcher: Launcher | None = None) -> Iterator[None]:
    """Choose tiles as on ``target``; hand every launch to ``launcher(kernel, grid, args, options)`` if there is one.

    For the tools that compile, count and time what would run on a GPU that is not there.
    """
    global _assumed, _launcher
    before = _assumed, _launcher
    _assumed, _launcher = target, launcher
    try:
        yield
    finally:
        _assumed, _launcher = before


def target_of(device: torch.device) -> Target:
    """What the device offers."""
    return _assumed or _target(device.type, device.index)


@functools.cache
def _target(device_type: str, index: int | None) -> Target:
    if device_type == "cpu":
        return Target("interpreter", 4, 64 << 10)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], properties.multi_processor_count, 64 << 10)
    arch = f"sm_{properties.major}{properties.minor}"
    return Target(arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


def launch(
    kernel: Any,
    grid: Callable[[Mapping[str, int]], tuple[int, ...]],
    *args: Any,
    device: torch.device,
    tiles: Sequence[Tile],
    **constants: Any,
) -> None:
    """Run ``kernel`` over ``grid(sizes)`` programs on ``device``.

    Args:
        grid: number of programs per axis, from the sizes of the tile that is used; nothing runs if one of them is 0.
        args: the kernel's run-time arguments.
        tiles: what to choose from, the best guess first. The guess is taken, unless the environment has
            ``EBFT_KERNELS_AUTOTUNE=1``: then each is timed once for calls of a kind, :func:`_kind`.
        constants: further compile-time arguments.
    """
    tile = tiles[0]
    if len(tiles) > 1 and _autotune() and device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        tile = _fastest(kernel, grid, args, device, tiles, constants)
    _run(kernel, grid(tile.sizes), args, device, tile, constants)


@functools.cache
def _autotune() -> bool:
    return os.environ.get("EBFT_KERNELS_AUTOTUNE") == "1"


def _run(kernel, grid, args, device, tile, constants):
    if 0 in grid:
        return
    options = {**constants, **tile.sizes, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    options["enable_fp_fusion"] = True  # the default, but Triton 3.9 announces another one
    if tile.max_registers is not None and target_of(device).arch.startswith("sm_"):
        options["maxnreg"] = tile.max_registers
    if _launcher is not None:
        _launcher(kernel, grid, args, options)
    elif device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):  # Triton launches on the current device, wherever the pointers point
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


_FASTEST: dict[tuple, Tile] = {}


def _kind(kernel, args, device, tiles, constants) -> tuple:
    """What calls have in common that one tile may serve: kernel, device, compile-time arguments, the tiles to choose
    from, the dtypes of all tensors, and the sizes' powers of two, so that a new length is rarely a new kind.
    """

    def kind(x: object) -> object:
        if isinstance(x, torch.Tensor):
            return x.dtype, *(size.bit_length() for size in x.shape)
        return x.bit_length() if type(x) is int else type(x)

    return kernel, device, repr(sorted(constants.items())), repr(list(tiles)), *map(kind, args)


def _fastest(kernel, grid, args, device, tiles, constants):
    key = _kind(kernel, args, device, tiles, constants)
    if key not in _FASTEST:
        from triton.testing import do_bench

        times = [
            do_bench(lambda tile=tile: _run(kernel, grid(tile.sizes), args, device, tile, constants)) for tile in tiles
        ]
        _FASTEST[key] = tiles[times.index(min(times))]
    return _FASTEST[key]
