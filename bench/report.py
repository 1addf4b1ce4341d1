"""Tables, JSON and plots of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .problems import FLOOR, OURS


@dataclass(frozen=True)
class Row:
    """One contestant at one problem and direction. Without a time where it was wrong or failed: ``error`` says why.

    Attributes:
        median, p20, p80: seconds.
        cold: seconds of the first forward in the process, compilation included.
        peak_bytes: most memory held beyond the inputs.
        rate: FLOP/s or B/s: the unavoidable work over the median.
    """

    op: str
    shape: str
    direction: str
    contestant: str
    error: str = ""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    cold: float | None = None
    peak_bytes: int | None = None
    rate: float | None = None
    unit: str = ""
    formula: str = ""


def write_json(path: Path, machine: str, choices: Mapping[str, str], rows: Iterable[Row]) -> None:
    """Everything, for other programs."""
    content = {"machine": machine, "choices": dict(choices), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def markdown(machine: str, choices: Mapping[str, str], rows: Sequence[Row]) -> str:
    """One table per problem and direction. Last: times over those of the fastest of this library, and of the floor."""
    lines = [machine, "", *(f"* {text}" for text in choices.values())]
    for key in dict.fromkeys((row.op, row.shape, row.direction) for row in rows):
        group = [row for row in rows if (row.op, row.shape, row.direction) == key]
        ours = min((row.median for row in group if row.median and row.contestant.startswith(OURS)), default=None)
        floor = next(row.median for row in group if row.contestant == FLOOR)
        lines += ["", f"### {key[0]}, {key[2]}", "", f"{key[1]}. {group[0].unit}/s: {group[0].formula}.", ""]
        lines += [
            "| | median | p20 - p80 | cold | peak extra memory | rate | x ebft | x floor |",
            "| --- |" + " ---: |" * 7,
        ]
        lines += [_line(row, ours, floor) for row in group]
    return "\n".join(lines) + "\n"


def _line(row: Row, ours: float | None, floor: float) -> str:
    if row.median is None:
        return f"| {row.contestant} | {row.error} | | | | | | |"
    spread = f"{_seconds(row.p20)} - {_seconds(row.p80)}"
    times = f"{row.median / ours:.2f}" if ours else ""
    rate = f"{row.rate / 1e9:.1f} G{row.unit}/s" if row.rate else ""
    memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
    cold = "" if row.cold is None else _seconds(row.cold)
    floors = f"{row.median / floor:.2f}"
    cells = (row.contestant, _seconds(row.median), spread, cold, memory, rate, times, floors)
    return "| " + " | ".join(cells) + " |"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Bars of the medians on a logarithmic axis, one group per problem and direction."""
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys((row.op, row.shape, row.direction) for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(rows) + 0.5 * len(keys)), layout="constrained")
    axes = figure.subplots(len(keys), 1, squeeze=False, height_ratios=[_count(rows, key) for key in keys])
    for axis, key in zip(axes[:, 0], keys, strict=True):
        group = [row for row in rows if (row.op, row.shape, row.direction) == key and row.median]
        names = [row.contestant for row in group]
        colors = ["tab:blue" if name.startswith(OURS) else "tab:gray" for name in names]
        axis.barh(names, [row.median for row in group], color=colors)
        axis.set(xscale="log", xlabel="seconds")
        axis.set_title(f"{key[0]}, {key[2]}: {key[1]}", fontsize=9)
        axis.invert_yaxis()
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=110)


def _count(rows: Sequence[Row], key: tuple[str, str, str]) -> int:
    return 1 + sum((row.op, row.shape, row.direction) == key for row in rows)
