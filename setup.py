"""Two import packages in one distribution, the kernels at the top level and the trainer under ``python/``; and the
compiled modules ``ebft_kernels._C``, for the CPU, and ``ebft_kernels._cuda``.

The environment variable ``EBFT_KERNELS_BUILD`` says what to compile:

    auto   whatever can be compiled here: C++ with gcc or clang, CUDA where nvcc is on PATH (the default)
    cpu    the C++ kernels; fail if that does not work
    cuda   the C++ and the CUDA kernels; fail if that does not work
    none   nothing

``EBFT_KERNELS_CUDA_ARCHITECTURES`` says for which GPUs the CUDA kernels are compiled, which is quicker than for all:

    80;90   these compute capabilities, some of ``TARGETS``
    native  those of the GPUs of this machine, as its driver names them

torch is not needed for it, and one binary serves all its versions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, PlatformError

MODES = ("auto", "cpu", "cuda", "none")

#: GPUs that there is machine code for, as far as nvcc knows them; newer ones translate the PTX of the last.
TARGETS = (80, 86, 89, 90, 100, 120)


# Its name, where it is read and in messages.
ARCHITECTURES = "EBFT_KERNELS_CUDA_ARCHITECTURES"


def build_mode() -> str:
    """What ``EBFT_KERNELS_BUILD`` asks for."""
    mode = os.environ.get("EBFT_KERNELS_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"EBFT_KERNELS_BUILD: expected one of {', '.join(MODES)}; got {mode!r}")
    return mode


#: The version where there is no tag to go by.
BASE_VERSION = "0.1.0"


def version() -> str:
    """Of an sdist what it was made as; of a checkout its newest tag "v1.2.3", and ".postN+gHASH" of N commits since."""
    if os.path.exists("PKG-INFO"):
        with open("PKG-INFO", encoding="utf-8") as file:
            return re.search(r"^Version: (\S+)$", file.read(), flags=re.M)[1]
    command = ["git", "describe", "--tags", "--long", "--match", "v[0-9]*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return BASE_VERSION
    found = re.fullmatch(r"v([0-9][\w.]*)-(\d+)-(g[0-9a-f]+)", described.stdout.strip())
    if not os.path.exists(".git") or found is None:
        return BASE_VERSION
    tag, commits, commit = found.groups()
    return tag if commits == "0" else f"{tag}.post{commits}+{commit}"


# Code for the runtime of gcc, which torch brings on Linux; what clang makes there calls another one.
OPENMP_PROBE = """
#include <omp.h>
#if defined(__clang__) && defined(__linux__)
#error
#endif
int main() { return omp_get_thread_num(); }
"""


class BuildKernels(build_ext):
    """Compiles for every processor of the architecture, where AVX2 and AVX-512 code is chosen when it runs, and for
    every GPU in ``TARGETS``, or those that are asked for."""

    def build_extensions(self) -> None:
        """Compile, and say in one line what was compiled and, in mode "auto", why not the rest."""
        self.check_extensions_list(self.extensions)
        compiled, outcomes = [], []
        for extension in self.extensions:
            name, build = ("CUDA", self._build_cuda) if extension is CUDA_KERNELS else ("C++", self._build_cpp)
            try:
                outcome = build(extension)
            except (BaseError, CCompilerError, ImportError, OSError, subprocess.CalledProcessError) as error:
                if build_mode() != "auto":
                    raise PlatformError(f"the {name} kernels cannot be compiled: {error}") from error
                outcomes.append(f"{name} kernels not compiled ({error})")
            else:
                compiled.append(extension)
                outcomes.append(f"{name} kernels compiled for {outcome}")
        self.extensions = compiled
        print(f"ebft-kernels: {'; '.join(outcomes)}", file=sys.stderr)

    def _build_cpp(self, extension: Extension) -> str:
        """Compile the C++ kernels, and say for what."""
        from pybind11 import get_include
        from pybind11.setup_helpers import ParallelCompile

        if self.compiler.compiler_type != "unix":
            raise PlatformError(f"they need gcc or clang, the compiler here is {self.compiler.compiler_type}")
        ParallelCompile(default=0).install()
        extension.include_dirs.append(get_include())
        extension.extra_compile_args += ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
        # For the compiler alone: the library is linked with no OpenMP runtime and uses the one that torch brings.
        if self._accepts("-fopenmp"):
            extension.extra_compile_args.append("-fopenmp")
        self.build_extension(extension)
        return "the CPU"

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

    def _build_cuda(self, extension: Extension) -> str:
        """Compile the CUDA kernels with nvcc, one source per processor at a time, and say for what."""
        import pybind11

        nvcc, targets = find_nvcc()
        flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-I{folder}" for folder in (*self.include_dirs, pybind11.get_include())]
        flags += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
        flags += [f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
        library = self.get_ext_fullpath(extension.name)
        for folder in (self.build_temp, os.path.dirname(library)):
            os.makedirs(folder, exist_ok=True)

        def compile_one(source: str) -> str:
            made = os.path.join(self.build_temp, f"{os.path.basename(source)}.o")
            self.spawn([nvcc, *flags, "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, extension.sources))
        # With a runtime of its own, hidden from that of torch, the library can be loaded where nothing of CUDA is.
        hidden = ["--no-device-link", "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        self.spawn([nvcc, "-shared", *hidden, *objects, "-o", library])
        return f"{', '.join(f'sm_{target}' for target in targets)} and PTX"


def asked_targets() -> list[int] | None:
    """What ``EBFT_KERNELS_CUDA_ARCHITECTURES`` asks for; empty: all that nvcc knows; None: native."""
    asked = os.environ.get(ARCHITECTURES, "").strip()
    names = [name.strip() for name in asked.split(";")] if asked else []
    if names == ["native"]:
        return None
    if not set(names) <= {str(target) for target in TARGETS}:
        known = ";".join(map(str, TARGETS))
        raise SystemExit(f"{ARCHITECTURES}: expected 'native' or some of {known}, separated by ';'; got {asked!r}")
    return sorted({int(name) for name in names})


def targets_at_hand() -> list[int]:
    """For each GPU of this machine its compute capability, or the nearest one before it that its code runs on."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{ARCHITECTURES}: expected a GPU for 'native', but nvidia-smi found none ({error})"
        ) from error
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", said, flags=re.M)
    targets = set()
    for major, minor in found:
        # Machine code runs on later minor versions of its major version.
        usable = [target for target in TARGETS if int(f"{major}0") <= target <= int(major + minor)]
        if not usable:
            known = ", ".join(map(str, TARGETS))
            raise SystemExit(f"{ARCHITECTURES}: expected a GPU that runs code for one of {known}, got {major}.{minor}")
        targets.add(usable[-1])
    if not targets:
        raise SystemExit(f"{ARCHITECTURES}: expected a GPU for 'native', but nvidia-smi found none (it said {said!r})")
    return sorted(targets)


def find_nvcc() -> tuple[str, list[int]]:
    """nvcc, and what it is to compile for: what is asked for, or those of ``TARGETS`` that it knows."""
    if not sys.platform.startswith("linux"):
        raise PlatformError("they are built on Linux only")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise PlatformError("there is no nvcc on PATH")
    said = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"\bsm_(\d+)\b", said)}
    asked = asked_targets()
    wanted = targets_at_hand() if asked is None else asked
    if unknown := sorted(set(wanted) - known):
        raise SystemExit(f"{ARCHITECTURES}: expected what {nvcc} compiles for, got {';'.join(map(str, unknown))}")
    targets = wanted or [target for target in TARGETS if target in known]
    if not targets:
        raise PlatformError(f"{nvcc} compiles for none of {', '.join(f'sm_{target}' for target in TARGETS)}")
    return nvcc, targets


CPU_KERNELS = Extension(
    "ebft_kernels._C",
    sources=sorted(["csrc/bindings.cpp", *glob("csrc/cpu/*.cpp")]),
    depends=sorted([*glob("csrc/*.h"), *glob("csrc/*/*.h")]),
    language="c++",
)
CUDA_KERNELS = Extension(
    "ebft_kernels._cuda",
    sources=sorted(["csrc/bindings_cuda.cpp", *glob("csrc/cuda/*.cu")], key=os.path.getsize, reverse=True),
    depends=CPU_KERNELS.depends,
    language="c++",
)
EXTENSIONS = {
    "auto": [CPU_KERNELS, CUDA_KERNELS],
    "cpu": [CPU_KERNELS],
    "cuda": [CUDA_KERNELS, CPU_KERNELS],
    "none": [],
}

asked_targets()  # a mistake in it is one whatever is compiled

setup(
    version=version(),
    packages=[
        *find_packages(include=["ebft_kernels", "ebft_kernels.*"]),
        *find_packages("python"),
    ],
    package_dir={"ebft_trainer": "python/ebft_trainer"},
    package_data={
        "ebft_kernels": ["py.typed"],
        "ebft_trainer.demo_model": ["*.json", "*.safetensors", "*.log", "*.md"],
    },
    ext_modules=EXTENSIONS[build_mode()],
    cmdclass={"build_ext": BuildKernels},
)
