"""Building: under sanitizers; installations in new environments, without torch, from sources and from an sdist, with
and without nvcc and a compiler; what the switch accepts."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from ebft_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="there is no nvcc on PATH")


@needs_compiler
def test_the_module_is_there_where_a_compiler_is():
    assert not _native.why_not("cpu")


@pytest.mark.heavy
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


def sdist(tools: Path, sources: Path) -> Path:
    """What the build backend makes of the sources, as it is called by pip, without the site-packages."""
    program = f"import sys; sys.path.insert(0, {str(tools)!r}); from setuptools.build_meta import *; build_sdist('out')"
    subprocess.run([sys.executable, "-S", "-c", program], cwd=sources, check=True, capture_output=True)
    (archive,) = (sources / "out").iterdir()
    return archive


def install(tools: Path, sources: Path, folder: Path, **environment: str) -> tuple[Path | None, str]:
    """``pip install`` into a new environment where nothing is but the build tools: its Python, and what was said."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-build-isolation",
        "-v",
    ]
    variables = {**os.environ, "PYTHONPATH": str(tools), **environment}
    result = subprocess.run([*command, str(sources)], cwd=folder, env=variables, capture_output=True, text=True)
    return (None if result.returncode else python), result.stdout + result.stderr


def in_environment(python: Path, program: str) -> str:
    """Run ``program`` in the environment, to which torch comes now, in a folder without sources."""
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    result = subprocess.run(
        [str(python), "-c", f"import ebft_kernels as ek\nassert ek.__file__.startswith({str(site)!r})\n{program}"],
        cwd=python.parents[1],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(Path(torch.__file__).parents[1])])},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def outcome(said: str) -> str:
    """The one line about the kernels."""
    (line,) = [line.strip() for line in said.splitlines() if line.strip().startswith("ebft-kernels:")]
    return line


def without_nvcc() -> str:
    """PATH without the folders that hold an nvcc."""
    return os.pathsep.join(x for x in os.environ["PATH"].split(os.pathsep) if not (Path(x) / "nvcc").exists())


def script(folder: Path, text: str, name: str = "nvcc") -> str:
    """Makes ``text`` the nvcc of a folder, or another program, which is returned as an entry of PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)
    return str(folder)


SELECT = "import torch\nprint(ek.select_impl('feature_matching', 'cpu', torch.float32))"
INFO = "print(ek.build_info()['native'])"


@pytest.mark.heavy
@needs_nvcc
@needs_compiler
def test_the_sdist_holds_all_that_the_cpu_and_cuda_kernels_need(tools, sources, tmp_path):
    """With an nvcc that knows one of the targets, as an older one knows fewer."""
    archive = sdist(tools, sources)
    with tarfile.open(archive) as file:
        packed = {name.split("/", 1)[1] for name in file.getnames() if "/csrc/" in name and Path(name).suffix}
    assert packed == {str(x.relative_to(ROOT)) for x in (ROOT / "csrc").rglob("*") if x.is_file()}
    old = script(tmp_path / "old", f'case "$*" in *list-gpu-code*) echo sm_70 sm_80;; *) exec {NVCC} "$@";; esac')
    path = os.pathsep.join([old, os.environ["PATH"]])
    python, said = install(tools, archive, tmp_path, PATH=path, EBFT_KERNELS_BUILD="cuda")
    assert python, said
    assert outcome(said) == "ebft-kernels: CUDA kernels compiled for sm_80 and PTX; C++ kernels compiled for the CPU"
    assert "warning: " not in "\n".join(line for line in said.splitlines() if "csrc/" in line)
    assert in_environment(python, SELECT) == "native"
    assert "; CUDA: sm_80 and PTX, compiled by CUDA " in in_environment(python, INFO)


@pytest.mark.heavy
@needs_compiler
def test_without_nvcc_the_kernels_for_the_cpu_are_installed(tools, sources, tmp_path):
    python, said = install(tools, sources, tmp_path, PATH=without_nvcc())
    assert python, said
    expected = "ebft-kernels: C++ kernels compiled for the CPU; CUDA kernels not compiled (there is no nvcc on PATH)"
    assert outcome(said) == expected
    assert in_environment(python, SELECT) == "native"
    assert "; CUDA: none, the CUDA module was not built" in in_environment(python, INFO)


@pytest.mark.heavy
def test_without_a_compiler_the_rest_is_installed_and_one_line_says_why(tools, sources, tmp_path):
    python, said = install(tools, sources, tmp_path, PATH=str(tmp_path))
    assert python, said
    assert outcome(said).startswith("ebft-kernels: C++ kernels not compiled (") and "No such file" in outcome(said)
    assert outcome(said).endswith("); CUDA kernels not compiled (there is no nvcc on PATH)")
    assert in_environment(python, SELECT) == "torch"
    assert in_environment(python, INFO).startswith("CPU: none, the C++ module was not built")


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        ("exit 3", "3"),
        ('case "$*" in *list-gpu-code*) echo sm_80;; *) exit 3;; esac', "nvcc' failed with exit code 3"),
        ("echo sm_70", "nvcc compiles for none of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
    ],
)
def test_an_nvcc_that_does_not_work_is_named(nvcc, reason, tools, sources, tmp_path):
    path = script(tmp_path / "bin", nvcc)
    python, said = install(tools, sources, tmp_path, PATH=path)
    assert python, said
    _, _, about_cuda = outcome(said).partition("; CUDA kernels not compiled (")
    assert reason in about_cuda and path in about_cuda


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("cpu", r"the C\+\+ kernels cannot be compiled: .*No such file"),
        ("cuda", "the CUDA kernels cannot be compiled: there is no nvcc on PATH"),
    ],
)
def test_where_kernels_are_asked_for_a_missing_compiler_is_an_error(mode, reason, tools, sources, tmp_path):
    python, said = install(tools, sources, tmp_path, PATH=str(tmp_path), EBFT_KERNELS_BUILD=mode)
    assert python is None and re.search(reason, said), said


@pytest.mark.heavy
def test_none_installs_what_runs_on_every_platform(tools, sources, tmp_path):
    python, said = install(tools, sources, tmp_path, EBFT_KERNELS_BUILD="none")
    assert python, said
    assert "-py3-none-any.whl" in said
    assert in_environment(python, SELECT) == "torch"


def test_another_value_of_the_switch_is_refused(tools, sources, tmp_path):
    python, said = install(tools, sources, tmp_path, EBFT_KERNELS_BUILD="rocm")
    assert python is None
    assert "EBFT_KERNELS_BUILD: expected one of auto, cpu, cuda, none; got 'rocm'" in said


@pytest.fixture
def load_setup(monkeypatch):
    """setup.py as a module, with nothing built, for a value of ``EBFT_KERNELS_CUDA_ARCHITECTURES``."""
    monkeypatch.setattr(setuptools, "setup", lambda **_options: None)

    def load(architectures: str) -> dict[str, Any]:
        monkeypatch.setenv("EBFT_KERNELS_CUDA_ARCHITECTURES", architectures)
        return runpy.run_path(str(ROOT / "setup.py"))

    return load


KNOWN_NVCC = "echo sm_75 sm_80 sm_86 sm_90"


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [
        ("", "exit 1", [80, 86, 90]),
        ("90", "exit 1", [90]),
        (" 90; 80 ;90 ", "exit 1", [80, 90]),
        ("native", "echo 9.0; echo 9.0", [90]),
        ("native", "echo 8.0; echo 9.0", [80, 90]),
        ("native", "echo 8.7", [86]),
    ],
)
def test_the_gpus_that_are_asked_for(asked, gpus, expected, load_setup, tmp_path, monkeypatch):
    script(tmp_path / "bin", gpus, "nvidia-smi")
    monkeypatch.setenv("PATH", script(tmp_path / "bin", KNOWN_NVCC), prepend=os.pathsep)
    assert load_setup(asked)["find_nvcc"]() == (str(tmp_path / "bin" / "nvcc"), expected)


@pytest.mark.parametrize("asked", ["80,90", "sm_90", "90a", "70", "native;90", ";"])
def test_other_gpus_than_there_is_code_for_are_refused_whatever_is_built(asked, load_setup):
    expected = (
        "EBFT_KERNELS_CUDA_ARCHITECTURES: expected 'native' or some of 80;86;89;90;100;120, separated by ';'; got "
    )
    with pytest.raises(SystemExit, match=re.escape(f"{expected}{asked!r}")):
        load_setup(asked)


@pytest.mark.parametrize(
    ("asked", "gpus", "message"),
    [
        ("native", None, "expected a GPU for 'native', but nvidia-smi found none ("),
        ("native", "exit 9", "expected a GPU for 'native', but nvidia-smi found none (Command"),
        ("native", "echo No devices", "expected a GPU for 'native', but nvidia-smi found none (it said 'No devices"),
        ("native", "echo 7.5", "expected a GPU that runs code for one of 80, 86, 89, 90, 100, 120, got 7.5"),
        ("native", "echo 10.0", "nvcc compiles for, got 100"),
        ("90;120", "exit 9", "nvcc compiles for, got 120"),
    ],
)
def test_gpus_that_are_not_there_or_that_nvcc_does_not_know(asked, gpus, message, load_setup, tmp_path, monkeypatch):
    if gpus is not None:
        script(tmp_path / "bin", gpus, "nvidia-smi")
    monkeypatch.setenv("PATH", script(tmp_path / "bin", KNOWN_NVCC), prepend=os.pathsep if gpus else None)
    with pytest.raises(SystemExit, match=f"EBFT_KERNELS_CUDA_ARCHITECTURES: .*{re.escape(message)}"):
        load_setup(asked)["find_nvcc"]()


def test_the_version_is_that_of_the_newest_tag(tools, sources):
    def said() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tools)}
        command = [sys.executable, "setup.py", "--version"]
        return subprocess.run(
            command, cwd=sources, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()[-1]

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=sources, check=True, capture_output=True)

    assert said() == "0.1.0"
    git("init")
    git("add", "setup.py")
    git("commit", "-m", "one")
    assert said() == "0.1.0"
    git("tag", "v3.4.0rc1")
    assert said() == "3.4.0rc1"
    git("commit", "--allow-empty", "-m", "two")
    assert re.fullmatch(r"3\.4\.0rc1\.post1\+g[0-9a-f]+", said())
    (sources / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: x\nVersion: 5.6.7\n")
    assert said() == "5.6.7"


@pytest.mark.slow
def test_a_wheel_works_in_an_environment_of_its_own(tmp_path):
    """Minutes: pip fetches torch."""
    command = [
        sys.executable,
        str(ROOT / "release" / "wheels.py"),
        "--output",
        str(tmp_path),
        "--python",
        sys.executable,
    ]
    result = subprocess.run(
        [*command, "--torch", f"torch=={torch.__version__.split('+')[0]}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "manylinux" in result.stdout and "CPU: " in result.stdout
