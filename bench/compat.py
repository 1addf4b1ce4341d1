"""What the project works with: every supported version of a dependency in an environment of its own, tested there.

    python -m bench.compat [--folder bench-output/compat] [--only "triton 3.6.0" ..]

An environment takes torch, and all else that is not its own, from the one that runs this: nothing large is downloaded
twice. Prints a table, writes it and all logs to the folder, and fails if a check did. `make compat` runs all of it:
about an hour on two cores. An environment whose folder is there already is used as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path
from typing import NamedTuple

from ._documents import table

ROOT = Path(__file__).resolve().parents[1]
TEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly")
_KERNELS = [f"tests/{op}/test_triton.py" for op in ("attention", "pooling", "matching", "logprob")]
#: Name -> the arguments of Python.
CHECKS: dict[str, tuple[str, ...]] = {
    "interpreter": (*TEST, *_KERNELS, "tests/test_layout_triton.py"),
    "sm_90": ("-m", "bench.compiled_kernels", "--arch", "sm_90", "--workers", "1"),
    # Without TRL, which has requirements of its own.
    "integrations": (*TEST, "tests/integrations", "-m", "not speed", "--ignore", "tests/integrations/test_trl.py"),
    "trainer": (*TEST, "tests/trainer", "-m", "not speed and not heavy"),
    "pip install": ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", "{folder}/installed", "."),
}
_TRITON, _TRAINER = ("interpreter", "sm_90"), ("integrations", "trainer")


class Environment(NamedTuple):
    """What is installed above the environment that runs this, and what is checked there."""

    packages: tuple[str, ...]
    checks: tuple[str, ...]


#: Triton's interpreter before 3.7 calls what numpy 2.4 has no longer. Every other bound is one of pyproject.toml.
ENVIRONMENTS = {
    "triton 3.3.1": Environment(("triton==3.3.1", "numpy<2.4"), _TRITON),
    "triton 3.6.0": Environment(("triton==3.6.0", "numpy<2.4"), _TRITON),
    "triton, newest": Environment(("triton",), _TRITON),
    "transformers 5.17.0": Environment(("transformers==5.17.0",), _TRAINER),
    "transformers, newest": Environment(("transformers",), _TRAINER),
    "setuptools 77": Environment(("setuptools==77.0.3",), ("pip install",)),
    "setuptools < 82, as torch 2.11 wants": Environment(("setuptools<82",), ("pip install",)),
}


class Result(NamedTuple):
    """How one check ended: "passed", or the last thing it said."""

    environment: str
    versions: str
    check: str
    outcome: str
    seconds: float


def main() -> None:
    """Parse the command line, build, check, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "bench-output" / "compat", help="environments and logs")
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, metavar="NAME", help="these environments only")
    arguments = parser.parse_args()
    folder, results = arguments.folder.resolve(), []
    for name in arguments.only or ENVIRONMENTS:
        own = folder / re.sub(r"\W+", "-", name)
        python = environment(own, ENVIRONMENTS[name].packages)
        versions = _versions(python, ENVIRONMENTS[name].packages)
        for check in ENVIRONMENTS[name].checks:
            results.append(run(name, versions, check, python, own))
            print(*results[-1], sep=" | ", flush=True)
    report = table(Result._fields, (x._replace(seconds=round(x.seconds)) for x in results))
    (folder / "table.md").write_text(report, encoding="utf-8")
    print(report)
    sys.exit(any(x.outcome != "passed" for x in results))


def environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """The Python of an environment with ``packages`` that sees all else that this one has; made unless it is there."""
    python = folder / "bin" / "python"
    done = folder / "packages.json"
    if done.exists() and json.loads(done.read_text()) == list(packages):
        return python
    venv.create(folder, clear=True, symlinks=True)
    (folder / "lib" / python_name() / "site-packages" / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--upgrade", *packages]
    subprocess.run(command, check=True)
    done.write_text(json.dumps(packages))
    return python


def python_name() -> str:
    """The folder of this Python's packages."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _versions(python: Path, packages: tuple[str, ...]) -> str:
    names = [re.split(r"\W", package)[0] for package in packages]
    program = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names}), sep=', ')"
    return subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def run(name: str, versions: str, check: str, python: Path, folder: Path) -> Result:
    """One check in one environment; what it says goes to a file beside it."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    variables = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [str(python), *(argument.format(folder=folder) for argument in CHECKS[check])]
    start = time.perf_counter()
    ended = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    (folder / f"{check.replace(' ', '-')}.log").write_text(ended.stdout + ended.stderr, encoding="utf-8")
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    return Result(name, versions, check, "passed" if ended.returncode == 0 else said[-1][:200], seconds)


if __name__ == "__main__":
    main()
