"""How time and peak memory of one training step grow with its geometry.

    python -m bench.growth [--axis length --axis samples] [--model demo] [--threads 2] [--output bench-output]

One axis at a time is varied, the others stay at the method's defaults. Every point runs in a process of its own: the
fastest of a few steps, and the peak memory of the first above the loaded models. Per axis it prints a table with the
fitted exponents, seconds ~ operations^a and bytes ~ tokens^b (operations: those of the linear layers and of the visible
attention pairs; tokens: of the packed rows), and draws a plot. Linear growth is a = b = 1; below it, fixed costs still
show.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .measure import machine_line
from .shapes import MODELS, Geometry, ModelShape, visible_pairs
from .step import OURS, Setup

AXES = {
    "length": (256, 512, 1024, 2048, 4096),
    "samples": (1, 2, 4, 8, 16),
    "horizon": (1, 2, 4, 8, 16, 32, 64),
    "stride": (64, 32, 16, 8, 4),
    "batch": (1, 2, 4, 8),
}
#: What stays the same on every axis but its own.
BASE = Geometry(length=512)


class Point(NamedTuple):
    """One geometry: its packed tokens, forward operations, seconds of a step and peak bytes."""

    value: int
    tokens: int
    operations: int
    seconds: float
    peak_bytes: int


def main() -> None:
    """Parse the command line, measure, print tables, draw plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", action="append", choices=list(AXES), help="default: all; may be repeated")
    parser.add_argument("--model", choices=list(MODELS), default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="steps per point, the fastest counts")
    parser.add_argument("--points", type=int, help="only the first so many of each axis; at least 2")
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = MODELS[arguments.model]
    if arguments.point is not None:
        print(json.dumps(_measure(model, arguments.axis[0], arguments.point, arguments.steps)))
        return
    machine = machine_line(torch.device("cpu"))
    print(f"{model.name}, {BASE} but for the axis, float32. {machine}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for axis in arguments.axis or AXES:
        points = [_in_own_process(arguments, axis, value) for value in AXES[axis][: arguments.points]]
        print(table(axis, points), flush=True)
        plot(arguments.output / f"growth-{axis}.png", axis, points, machine)


def _measure(model: ModelShape, axis: str, value: int, steps: int) -> Point:
    geometry = BASE._replace(**{axis: value})
    setup = Setup(model, geometry, torch.float32)
    peak = setup.peak_bytes(OURS)
    seconds = min(sum(setup.run(OURS)[1].values()) for _ in range(steps))
    tokens = geometry.batch * setup.layout.packed_length
    return Point(value, tokens, operations(model, geometry), seconds, peak)


def operations(model: ModelShape, geometry: Geometry) -> int:
    """Of one forward pass over the packed rows: linear layers and visible attention pairs, without the head."""
    layout = geometry.layout()
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    linear = 2 * geometry.batch * layout.packed_length * (attention + 3 * model.hidden * model.intermediate)
    return model.layers * (linear + 4 * model.head_dim * model.heads * visible_pairs(layout))


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The least-squares slope of log y over log x."""
    xs, ys = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def table(axis: str, points: Sequence[Point]) -> str:
    """A markdown table with the fitted exponents below it."""
    lines = [f"\n| {axis} | tokens | GFLOP forward | s/step | peak memory |", "| ---: |" + " ---: |" * 4]
    for p in points:
        lines.append(
            f"| {p.value} | {p.tokens} | {p.operations / 1e9:.1f} | {p.seconds:.3f} | {p.peak_bytes / 2**20:.0f} MiB |"
        )
    seconds, memory = exponents(points)
    return "\n".join([*lines, "", f"seconds ~ operations^{seconds:.2f}, peak memory ~ tokens^{memory:.2f}"])


def exponents(points: Sequence[Point]) -> tuple[float, float]:
    """Of seconds over operations and of peak memory over tokens."""
    seconds = exponent([p.operations for p in points], [p.seconds for p in points])
    return seconds, exponent([p.tokens for p in points], [p.peak_bytes for p in points])


def plot(path: Path, axis: str, points: Sequence[Point], title: str) -> None:
    """Seconds and peak memory over the axis, both logarithmic, with linear growth from the largest point dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    series = (("seconds per step", "seconds", "operations"), ("peak memory, bytes", "peak_bytes", "tokens"))
    panels = zip(figure.subplots(1, 2), series, exponents(points), strict=True)
    for axes, (label, quantity, cause), fitted in panels:
        values = [getattr(p, quantity) for p in points]
        causes = [getattr(p, cause) for p in points]
        axes.plot([p.value for p in points], values, "o-", label=f"measured, ~ {cause}^{fitted:.2f}")
        linear = [values[-1] * x / causes[-1] for x in causes]
        axes.plot([p.value for p in points], linear, "k--", linewidth=0.8, label=f"linear in {cause}")
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        axes.legend()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)


def _in_own_process(arguments: argparse.Namespace, axis: str, value: int) -> Point:
    options = {"axis": axis, "point": value, "model": arguments.model, "threads": arguments.threads}
    options["steps"] = arguments.steps
    command = [sys.executable, "-m", "bench.growth", *(f"--{name}={option}" for name, option in options.items())]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return Point(*json.loads(result.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
