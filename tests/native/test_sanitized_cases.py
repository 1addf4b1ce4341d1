"""The module for the CPU, compiled for AddressSanitizer and UndefinedBehaviorSanitizer, on random cases and hostile
inputs: what torch allocates has a border that must not be touched, whatever strides and sizes a call has."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .test_build import COMPILER, ROOT, needs_compiler

FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Python in which ebft_kernels._C is the module that is given.
LOAD = """
import importlib.util, sys
import torch, pytest
spec = importlib.util.spec_from_file_location("ebft_kernels._C", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from ebft_kernels import _native
assert _native.library("cpu") is module
"""
RUN_TESTS = 'sys.exit(pytest.main(["-q", "-x", "-n0", "-p", "no:cacheprovider", *sys.argv[2:]]))'
# Logits of one row, of which it is told that there are more.
READ_BEYOND = """
logits, largest, total = torch.zeros(8), torch.zeros(3), torch.zeros(3)
module.softmax_blocks(0, 1, 1, (1, 9, 3), logits.data_ptr(), largest.data_ptr(), total.data_ptr())
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The module, with the bindings."""
    import pybind11

    folder = tmp_path_factory.mktemp("sanitized")
    includes = [f"-isystem{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([COMPILER, *FLAGS, *includes, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]))
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, *FLAGS, "-shared", *objects, "-o", str(module)], check=True)
    return module


def run(sanitized: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    def path(library: str) -> str:
        found = subprocess.run([COMPILER, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    environment = {
        **os.environ,
        # With the library of C++: exceptions, which the sanitizer sees too, are thrown before anything else loads it.
        "LD_PRELOAD": os.pathsep.join([path("libasan.so"), path("libstdc++.so.6")]),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little before it ends
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", LOAD + program, str(sanitized), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_compiler
@pytest.mark.parametrize(
    "selection",
    [
        ("tests/test_random_cases.py", "-k", "native", "--fuzz-examples", "200"),
        ("tests/attention/test_hidden_keys.py", "-k", "native"),
        ("tests/native/test_layout.py", "-k", "replaced or elsewhere or refused"),
    ],
    ids=("random cases", "hidden keys", "tampered layouts"),
)
def test_under_sanitizers(selection, sanitized):
    result = run(sanitized, RUN_TESTS, *selection)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:] + result.stderr[-4000:]


@pytest.mark.slow
@needs_compiler
def test_a_read_beyond_the_end_is_found(sanitized):
    result = run(sanitized, READ_BEYOND)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr, result.stderr[-4000:]
