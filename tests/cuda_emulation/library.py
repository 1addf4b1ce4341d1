"""The module ``ebft_kernels._cuda``, kernels and bindings alike, compiled for the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
COMPILER = shutil.which("g++") or shutil.which("clang++")
# longjmp between fibers looks like a mistake to glibc's fortified one.
LENIENT = ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", *LENIENT, f"-I{HERE}"]


class Emulation:
    """The compiled module, and what only the emulation can do."""

    def __init__(self, kernels: Path, module: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", module)
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(kernels))
        self._library.emulation_run_broken.restype = ctypes.c_char_p

    def set_order(self, order: int) -> None:
        """0: threads, and warps, take turns in ascending order; 1: descending; else shuffled in one way or another."""
        self._library.emulation_set_order(order)

    def run_broken(self, which: int, out: int) -> str:
        """Run a kernel of broken.cu with 64 threads that write a float64 each to ``out``; what went wrong, or ""."""
        return self._library.emulation_run_broken(which, ctypes.c_void_p(out)).decode()


def build(folder: Path) -> Emulation:
    """Compile all kernels and the emulation into a library in ``folder``, the bindings into another, and load them.

    Apart, because every block begins with NaN in all thread-local memory of the library that holds the kernels.
    """
    includes = [f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        options = [*FLAGS, *includes, "-O2", "-fPIC", "-x", "c++", "-c"]
        subprocess.run([COMPILER, *options, str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        bindings, *objects = pool.map(
            compile_one, [CSRC / "bindings_cuda.cpp", *KERNELS, HERE / "broken.cu", HERE / "emulation.cpp"]
        )
    kernels, module = folder / "libkernels.so", folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(kernels)], check=True)
    subprocess.run([COMPILER, "-shared", bindings, str(kernels), f"-Wl,-rpath,{folder}", "-o", str(module)], check=True)
    return Emulation(kernels, module)
