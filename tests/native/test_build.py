"""Building: under sanitizers, from an sdist, without a compiler, and what the switch accepts. torch is never there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ebft_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")


@needs_compiler
def test_the_module_is_there_where_a_compiler_is():
    assert not _native.why_not("cpu")


@needs_compiler
def test_kernels_under_sanitizers(tmp_path):
    flags = ["-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", "-fopenmp"]  # optimised, it takes twice as long
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

    def compile_one(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        subprocess.run([COMPILER, *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), Path(__file__).with_name("core_test.cpp")]
        objects = list(pool.map(compile_one, sources))
    program = str(tmp_path / "program")
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert result.returncode == 0 and result.stdout == "passed\n", result.stdout + result.stderr


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A folder with what ``[build-system]`` in pyproject.toml requires, and nothing else."""
    folder = tmp_path_factory.mktemp("tools")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    result = subprocess.run([*pip, "setuptools>=77", "pybind11>=2.13"], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"pip cannot install the build tools: {result.stderr[-500:]}")
    return folder


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources, as a clone has them."""
    folder = tmp_path / "sources"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "ebft_kernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(tools: Path, sources: Path, what: str, **environment: str) -> tuple[Path | None, str]:
    """Run a hook of the build backend as pip does, without the site-packages: the file it makes, and what it says."""
    out = sources.parent / "out"
    out.mkdir(exist_ok=True)
    program = (
        f"import sys; sys.path.insert(0, {str(tools)!r}); from setuptools.build_meta import *; {what}({str(out)!r})"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=sources,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    made = sorted(out.iterdir(), key=lambda path: path.stat().st_mtime)
    return (made[-1] if made and not result.returncode else None), result.stdout + result.stderr


def in_new_process(wheel: Path, folder: Path, program: str) -> str:
    """Run ``program`` with what the wheel holds, from a folder without sources."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    result = subprocess.run(
        [sys.executable, "-c", f"import ebft_kernels as ek\nassert ek.__file__.startswith({str(site)!r})\n{program}"],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


SELECT = "import torch\nprint(ek.select_impl('feature_matching', 'cpu', torch.float32))"


@needs_compiler
def test_a_wheel_from_the_sdist_holds_the_module(tools, sources, tmp_path):
    archive, said = build(tools, sources, "build_sdist")
    assert archive, said
    with tarfile.open(archive) as file:
        assert any(name.endswith("csrc/core/matching.h") for name in file.getnames())
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel, said = build(tools, unpacked, "build_wheel", EBFT_KERNELS_BUILD="cpu")
    assert wheel and "compiled the C++ kernels for the CPU" in said, said
    assert "warning: " not in "\n".join(line for line in said.splitlines() if "csrc/" in line)
    assert in_new_process(wheel, tmp_path, SELECT) == "native"


def test_without_a_compiler_the_rest_is_installed_and_one_line_says_why(tools, sources, tmp_path):
    wheel, said = build(tools, sources, "build_wheel", PATH=str(tmp_path))
    assert wheel, said
    (line,) = [line for line in said.splitlines() if line.startswith("ebft-kernels:")]
    assert line.startswith("ebft-kernels: installing without the C++ kernels: ")
    assert "No such file" in line
    assert in_new_process(wheel, tmp_path, SELECT) == "torch"


def test_where_the_kernels_are_asked_for_a_missing_compiler_is_an_error(tools, sources, tmp_path):
    wheel, said = build(tools, sources, "build_wheel", PATH=str(tmp_path), EBFT_KERNELS_BUILD="cpu")
    assert wheel is None and "No such file" in said


def test_none_makes_a_wheel_for_every_platform(tools, sources, tmp_path):
    wheel, said = build(tools, sources, "build_wheel", EBFT_KERNELS_BUILD="none")
    assert wheel and wheel.name.endswith("-py3-none-any.whl"), said
    assert in_new_process(wheel, tmp_path, SELECT) == "torch"


def test_another_value_of_the_switch_is_refused(tools, sources):
    wheel, said = build(tools, sources, "build_wheel", EBFT_KERNELS_BUILD="cuda")
    assert wheel is None
    assert "EBFT_KERNELS_BUILD: expected one of auto, cpu, none; got 'cuda'" in said
