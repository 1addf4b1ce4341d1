"""All kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .library import COMPILER, FLAGS, HERE, KERNELS

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sanitize(sources: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Compile ``sources`` and the emulation, and run the program."""

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        options = [*FLAGS, *SANITIZERS, "-O1", "-g1", "-x", "c++", "-c"]
        subprocess.run([COMPILER, *options, str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, HERE / "emulation.cpp"]))
    program = str(folder / "program")
    subprocess.run([COMPILER, *SANITIZERS, *objects, "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True)


@pytest.mark.heavy
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_kernels_under_sanitizers(tmp_path):
    result = sanitize([*KERNELS, HERE / "sanitized.cpp"], tmp_path)
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr[-4000:]
