"""What nvcc makes of the CUDA kernels: registers, stack, spills, shared memory and 16-byte accesses of each.

``python -m tests.native.cuda_binaries`` compiles all kernels for all targets and prints a table; it takes minutes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

KERNELS = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
TARGETS = (80, 86, 89, 90, 100, 120)
FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings")


class Kernel(NamedTuple):
    """One compiled kernel.

    Attributes:
        name: its name and template arguments, shortened.
        target: 80 for sm_80, ...
        registers: per thread.
        stack: bytes of the stack per thread.
        spilled: bytes written to and read from memory for want of registers.
        shared: bytes of static shared memory per block.
        instructions: the code, as nvdisasm writes it; empty without nvdisasm.
    """

    name: str
    target: int
    registers: int
    stack: int
    spilled: int
    shared: int
    instructions: str

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the code, whatever its modifiers between the given ones are."""
        family, *modifiers = instruction.split(".")
        found = re.findall(rf"\b{family}((?:\.\w+)*)\b", self.instructions)
        return sum(set(modifiers) <= set(x.split(".")) for x in found)


def compile_kernels(targets: Iterable[int], sources: Iterable[Path] | None = None) -> list[Kernel]:
    """All kernels of all sources for ``targets``, compiled two at a time."""
    sources = sorted(KERNELS.glob("*.cu")) if sources is None else sources
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_compile, source, target, Path(folder)) for target in targets for source in sources]
        return [kernel for job in jobs for kernel in job.result()]


def _compile(source: Path, target: int, folder: Path) -> list[Kernel]:
    """In two steps, as nvcc does it: to PTX, which newer GPUs can run too, and from there to machine code."""
    ptx, cubin = (str(folder / f"{source.stem}.{target}.{suffix}") for suffix in ("ptx", "cubin"))
    _run(NVCC, *FLAGS, "-ptx", f"-arch=compute_{target}", str(source), "-o", ptx)
    said = _run(NVCC, "-cubin", f"-arch=sm_{target}", "-Xptxas", "-v", ptx, "-o", cubin)
    code = _code(Path(cubin))
    return [_kernel(text, target, code) for text in said.split("Compiling entry function")[1:]]


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
    return result.stderr


def _kernel(text: str, target: int, code: dict[str, str]) -> Kernel:
    """From what ``ptxas -v`` says of one kernel."""
    mangled = re.search(r"'(\w+)'", text)[1]
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
    )
    registers = int(re.search(r"Used (\d+) registers", text)[1])
    shared = re.search(r"(\d+) bytes smem", text)
    instructions = code.get(mangled, "")
    size = int(shared[1]) if shared else 0
    return Kernel(_readable(mangled), target, registers, stack, stores + loads, size, instructions)


def _readable(mangled: str) -> str:
    """``gram_kernelIfLi5ELb0EE...`` as gram_kernel<float, 5, 0>."""
    name, arguments = re.search(r"(?<=\d)([a-z_]+_kernel)(?:I(.*?)EEv)?", mangled).groups()
    if arguments is None:
        return name
    arguments = re.sub(r"N4ebft4cuda\w*?E|NS_\d+|N4ebft\d+", "", arguments + "E")
    dtype = {"d": "float64", "f": "float32", "B": "bfloat16", "F": "float16"}[arguments[0]]
    numbers = re.findall(r"L[bi](\d+)E", arguments)
    return f"{name}<{', '.join([dtype, *numbers])}>"


def disassembler() -> Path | None:
    """nvdisasm, from the CUDA toolkit or from triton, which brings one along."""
    if found := shutil.which("nvdisasm"):
        return Path(found)
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def _code(cubin: Path) -> dict[str, str]:
    """The code of each kernel, by its mangled name."""
    tool = disassembler()
    if tool is None:
        return {}
    text = subprocess.run([str(tool), "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    _, *sections = re.split(r"^\.section\s+\.text\.(?=\w)|^//-+ \.text\.", text, flags=re.MULTILINE)
    code: dict[str, str] = {}
    for section in sections:
        name = re.match(r"\w+", section)[0]
        code[name] = code.get(name, "") + section
    return code


def main() -> None:
    """Print a table of all kernels for the targets given as arguments, or all."""
    targets = [int(x) for x in sys.argv[1:]] or TARGETS
    print("| kernel | target | registers | stack | spills | shared | 16-byte loads | 16-byte stores |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for k in compile_kernels(targets):
        figures = (k.registers, k.stack, k.spilled, k.shared, k.count("LDG.128"), k.count("STG.128"))
        print(f"| {k.name} | sm_{k.target} | {' | '.join(map(str, figures))} |")


if __name__ == "__main__":
    main()
