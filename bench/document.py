"""Measure anew what docs/benchmarks.md shows.

    python -m bench.document [--only TEXT] [--list]

The document holds its own commands: what stands between ``<!-- output of: COMMAND -->`` and ``<!-- end -->`` is
replaced by what COMMAND prints. ``--only`` takes the commands that contain a text. A command that needs an environment
variable which is not set ($EBFT_OPENRLHF, a checkout of the authors' repository) is left out; its old output stays.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time

from ._documents import DOCS, write

DOCUMENT = DOCS / "benchmarks.md"
_BLOCK = re.compile(r"(<!-- output of: (?P<command>[^\n]+) -->\n)(?P<output>.*?)(<!-- end -->)", re.S)


def main() -> None:
    """Parse the command line, run the commands, write after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="commands that contain this")
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    arguments = parser.parse_args()
    for command in commands(DOCUMENT.read_text(encoding="utf-8")):
        if arguments.only not in command:
            continue
        print(command, flush=True)
        if not arguments.list:
            start = time.perf_counter()
            output = output_of(command)
            if output is not None:
                write(DOCUMENT, updated(DOCUMENT.read_text(encoding="utf-8"), command, output))
            print(f"    {time.perf_counter() - start:.0f} s", flush=True)


def commands(text: str) -> list[str]:
    """The commands of a document, in its order."""
    return [match["command"] for match in _BLOCK.finditer(text)]


def updated(text: str, command: str, output: str) -> str:
    """The document with another output of ``command``."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{output.strip()}\n\n{match[4]}" if match["command"] == command else match[0]

    return _BLOCK.sub(block, text)


def output_of(command: str) -> str | None:
    """What ``python -m ...`` prints; None if an environment variable in it is not set."""
    expanded = os.path.expandvars(command)
    if missing := re.search(r"\$\w+", expanded):
        print(f"    left out: {missing[0]} is not set")
        return None
    program, *options = shlex.split(expanded)
    if program != "python":
        raise ValueError(f"{DOCUMENT.name}: expected commands that start with python, got {command!r}")
    done = subprocess.run([sys.executable, *options], stdout=subprocess.PIPE, text=True, cwd=DOCS.parent, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
