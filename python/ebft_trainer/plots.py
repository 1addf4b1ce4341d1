"""Results as text, JSON and a picture."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import writing


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([row(header), row(["-" * width for width in widths]), *map(row, lines)])


def write_json(path: Path, content: Any) -> None:
    """Write under a temporary name, then rename: there is a whole file or none. Raises CheckpointError if not."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """As `write_json`, of bytes."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def plot_demo(results: dict[str, Any], path: Path) -> None:
    """Draw what `ebft_trainer.demo.run` returns.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"base": "#8a8a8a", "ebft": "#c2410c", "cross_entropy": "#1d4ed8"}
    titles = {"base": "base model", "ebft": "EBFT", "cross_entropy": "cross-entropy"}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    (first, second), (third, fourth) = figure.subplots(2, 2)
    _draw_bars(first, results, colors, titles)
    for axes, name, title in (
        (second, "feature_matching_loss", "feature-matching loss (lower is better)"),
        (third, "alignment", "alignment (higher is better)"),
    ):
        _draw_by_horizon(axes, results, name, colors, titles)
        axes.set_title(title)
    _draw_seconds(fourth, results["seconds"], titles)
    settings = results["settings"]
    figure.suptitle(
        f"{settings['steps']} optimizer steps of {settings['rows_per_step']} rows x {settings['length']} tokens, "
        f"evaluated on {settings['eval_rows']} held-out rows"
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_file(path, picture.getvalue())


def _draw_bars(axes: Any, results: dict[str, Any], colors: dict[str, str], titles: dict[str, str]) -> None:
    values = [results[name]["cross_entropy"] for name in titles]
    bars = axes.bar(list(titles.values()), values, color=[colors[name] for name in titles], width=0.6)
    axes.bar_label(bars, [f"{value:.4f}" for value in values])
    # The differences are small beside the value: the axis is cut, and says so.
    spread = max(max(values) - min(values), 1e-3)
    axes.set_ylim(min(values) - spread, max(values) + 0.5 * spread)
    axes.set_ylabel("nats per token (axis does not start at 0)")
    axes.set_title("cross-entropy (lower is better)")


def _draw_by_horizon(
    axes: Any, results: dict[str, Any], name: str, colors: dict[str, str], titles: dict[str, str]
) -> None:
    horizons = sorted(int(key.rpartition("_h")[2]) for key in results["base"] if key.startswith(f"{name}_h"))
    for model, title in titles.items():
        values = [results[model][f"{name}_h{g}"] for g in horizons]
        axes.plot(horizons, values, marker="o", color=colors[model], label=title)
    axes.set_xlabel("horizon: tokens of the rollout")
    axes.set_xticks(horizons)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_seconds(axes: Any, seconds: dict[str, dict[str, float]], titles: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    phases = [name for name in next(iter(seconds.values())) if name != "step"]
    for model, run in seconds.items():
        left = 0.0
        for number, phase in enumerate(phases):
            axes.barh(titles[model], run.get(phase, 0.0), left=left, color=f"C{number}", height=0.5)
            left += run.get(phase, 0.0)
        axes.text(left, titles[model], f" {run['step']:.2f} s", va="center")
    axes.legend(handles=[Patch(color=f"C{number}", label=phase) for number, phase in enumerate(phases)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(run["step"] for run in seconds.values()))
    axes.set_xlabel("seconds")
    axes.set_title("time per optimizer step")
