"""The kernels of csrc/cuda as they stand, compiled, in ``ebft_kernels._cuda``: figures and demands as for Triton's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ebft_kernels import _native

from ._binaries import nvidia_instructions, nvidia_resources, tool
from ._documents import table
from ._targets import GPUS, programs_in_flight

ARCHS = [arch for arch, gpu in GPUS.items() if not gpu.is_amd]

#: Kernels that need not load, or store, 16 bytes at a time, and why.
NARROW: dict[tuple[str, str], str] = {
    ("geometry_kernel", "loads"): "it looks up one anchor and one document per row",
    ("geometry_kernel", "stores"): "a handful of numbers per row",
    ("gram_kernel", "stores"): "one small matrix per anchor",
    ("mask_kernel", "loads"): "it reads the ranges of a few rows per block",
    ("match_kernel", "loads"): "it reads a small matrix per thread",
    ("match_kernel", "stores"): "a handful of numbers per anchor",
}


class Kernel(NamedTuple):
    """One compiled kernel.

    Attributes:
        arch: what it is compiled for.
        name: without its template arguments.
        arguments: these, shortened: the type of the elements, then numbers.
        registers: per thread.
        spilled: bytes of stack, or spilled, per thread: must be 0.
        shared: bytes of static shared memory per block.
        instructions: how often those of interest stand in the code.
    """

    arch: str
    name: str
    arguments: str
    registers: int
    spilled: int
    shared: int
    instructions: dict[str, int]

    @property
    def warps(self) -> int:
        """Warps per block where a row is long."""
        return 1 if self.name == "match_kernel" else 4  # the arithmetic of match_kernel is for one warp

    @property
    def programs(self) -> int:
        """How many blocks one SM keeps in flight."""
        return programs_in_flight(GPUS[self.arch], registers=self.registers, warps=self.warps, shared=self.shared)


def compiler() -> str:
    """The CUDA that the module was compiled by, as "CUDA 13.0"; "" if there is no module, or not for all ``ARCHS``."""
    try:
        module = _native.library("cuda")
    except ImportError:
        return ""
    complete = {f"sm_{target // 10}" for target in module.targets} >= set(ARCHS)
    return f"CUDA {_native.cuda_version(module.runtime)}" if complete else ""


def read(arch: str, library: Path | None = None) -> list[Kernel]:
    """All kernels for ``arch`` in a compiled library, or cubin; default: the module."""
    path = str(library or _native.library("cuda").__file__)
    usage, code = (_by_function(tool("cuobjdump", "-arch", arch, what, path)) for what in ("-res-usage", "-sass"))
    kernels = [
        Kernel(
            arch,
            *_readable(mangled),
            **nvidia_resources(text),
            shared=int(re.search(r"SHARED:(\d+)", text)[1]),
            instructions=nvidia_instructions(code[mangled]),
        )
        for mangled, text in usage.items()
    ]
    return sorted(kernels)


def read_all() -> list[Kernel]:
    """All kernels of the module for all ``ARCHS``; none where :func:`compiler` says that there are none."""
    if not compiler():
        return []
    with ThreadPoolExecutor(2) as pool:
        return [kernel for kernels in pool.map(read, ARCHS) for kernel in kernels]


def _by_function(text: str) -> dict[str, str]:
    _, *parts = re.split(r"^\s*Function (?:: )?(\w+):?$", text, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _readable(mangled: str) -> tuple[str, str]:
    """``..gram_kernelIfLi5ELb0EE...`` as ("gram_kernel", "float32, 5, 0")."""
    name, arguments = re.search(r"(?<=\d)([a-z_]+_kernel)(?:I(.*?)EEv)?", mangled).groups()
    if arguments is None:
        return name, ""
    arguments = re.sub(r"N4ebft4cuda\w*?E|NS_\d+|N4ebft\d+", "", arguments + "E")
    dtype = {"d": "float64", "f": "float32", "B": "bfloat16", "F": "float16"}[arguments[0]]
    return name, ", ".join([dtype, *re.findall(r"L[bi](\d+)E", arguments)])


def problems(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel."""
    if kernel.spilled:
        yield f"spills {kernel.spilled} bytes per thread"
    for access, wanted in (("loads", "LDG.128"), ("stores", "STG.128")):
        if (kernel.name, access) not in NARROW and not kernel.instructions.get(wanted):
            yield f"has no 16-byte {access}"


def details(kernels: list[Kernel]) -> str:
    """Every kernel of one architecture."""
    header = ("kernel", "case", "warps", "registers", "spills", "shared", "programs", "instructions")
    rows = []
    for k in kernels:
        instructions = ", ".join(f"{name} {count}" for name, count in sorted(k.instructions.items()))
        rows.append((f"`{k.name}`", k.arguments, k.warps, k.registers, k.spilled, k.shared, k.programs, instructions))
    return table(header, rows)
