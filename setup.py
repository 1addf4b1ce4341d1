"""Two import packages in one distribution, the kernels at the top level and the trainer under ``python/``; and the C++
module ``ebft_kernels._C``.

The environment variable ``EBFT_KERNELS_BUILD`` says what to compile:

    auto   the C++ kernels if that works here; otherwise install without them (the default)
    cpu    the C++ kernels; fail if that does not work
    none   nothing

torch is not needed for it, and one binary serves all its versions.
"""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, PlatformError

MODES = ("auto", "cpu", "none")


def build_mode() -> str:
    """What ``EBFT_KERNELS_BUILD`` asks for."""
    mode = os.environ.get("EBFT_KERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"EBFT_KERNELS_BUILD: expected one of {', '.join(MODES)}; got {mode!r}")
    return mode


# Code for the runtime of gcc, which torch brings on Linux; what clang makes there calls another one.
OPENMP_PROBE = """
#include <omp.h>
#if defined(__clang__) && defined(__linux__)
#error
#endif
int main() { return omp_get_thread_num(); }
"""


class BuildKernels(build_ext):
    """Compiles for every processor of the architecture; AVX2 and AVX-512 code is chosen when it runs."""

    def build_extensions(self) -> None:
        """Compile, or in mode "auto" say in one line why not."""
        try:
            self._prepare()
            super().build_extensions()
        except (BaseError, CCompilerError, ImportError) as error:
            if build_mode() != "auto":
                raise
            self.extensions = []
            print(f"ebft-kernels: installing without the C++ kernels: {error}", file=sys.stderr)
        else:
            print("ebft-kernels: compiled the C++ kernels for the CPU", file=sys.stderr)

    def _prepare(self) -> None:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        if self.compiler.compiler_type != "unix":
            raise PlatformError(f"they need gcc or clang, the compiler here is {self.compiler.compiler_type}")
        ParallelCompile(default=0).install()
        for extension in self.extensions:
            extension.include_dirs.append(pybind11.get_include())
            extension.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
            # For the compiler alone: the library is linked with no OpenMP runtime and uses the one that torch brings.
            if self._accepts("-fopenmp"):
                extension.extra_compile_args.append("-fopenmp")

    def _accepts(self, flag: str) -> bool:
        os.makedirs(self.build_temp, exist_ok=True)
        probe = os.path.join(self.build_temp, "probe.cpp")
        with open(probe, "w", encoding="utf-8") as file:
            file.write(OPENMP_PROBE)
        try:
            self.compiler.compile([probe], output_dir=self.build_temp, extra_postargs=[flag])
        except CCompilerError:
            return False
        return True


KERNELS = Extension(
    "ebft_kernels._C",
    sources=sorted(["csrc/bindings.cpp", *glob("csrc/cpu/*.cpp")]),
    depends=sorted(glob("csrc/*/*.h")),
    language="c++",
)

setup(
    packages=[
        *find_packages(include=["ebft_kernels", "ebft_kernels.*"]),
        *find_packages("python"),
    ],
    package_dir={"ebft_trainer": "python/ebft_trainer"},
    package_data={
        "ebft_kernels": ["py.typed"],
        "ebft_trainer.demo_model": ["*.json", "*.safetensors", "*.log", "*.md"],
    },
    ext_modules=[] if build_mode() == "none" else [KERNELS],
    cmdclass={"build_ext": BuildKernels},
)
