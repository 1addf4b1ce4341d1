"""What came out, as Markdown: means and standard deviations over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TASKS = {"code": "Python source", "pairs": "docstring to body"}
_COLUMNS = {
    "cross_entropy": "cross-entropy",
    "perplexity": "perplexity",
    "feature_matching_loss": "feature-matching loss",
    "alignment": "alignment",
    "verifier_reward": "verifier reward",
    "parse_rate": "parse rate",
}
_DECIMALS = {"perplexity": 1, "verifier_reward": 3, "parse_rate": 3}
_JUDGED = {"cross_entropy": min, "feature_matching_loss": min, "verifier_reward": max, "parse_rate": max}
_BLOCK = "<!-- results of: {scale} -->\n"
_END = "<!-- end -->"

Line = Mapping[str, Any]
# What each objective minimises, on validation, by learning rate; the key is (task, start, objective).
Validation = Mapping[tuple[str, str, str], Mapping[float, float]]


def report(lines: Sequence[Line], made_with: Mapping[str, Any], validation: Validation) -> str:
    """Everything that is known from the finished cells; what is not finished is left out and counted."""
    groups = list(dict.fromkeys((task, start) for task, start, _ in validation))
    runs = {key: _runs(lines, key) for task, start in groups for key in _keys(task, start, validation)}
    versions = ", ".join(f"{name} {version}" for name, version in made_with["versions"].items())
    sizes = ", ".join(
        f"{name} {value}" for name, value in made_with.items() if name not in ("scale", "versions")
    ).replace("_", " ")
    wanted = len(groups) + sum(objective != "base" for _, _, objective in runs) * len(made_with["seeds"])
    finished = sum(len(found) for found in runs.values())
    seconds = sum(line["seconds"] for line in lines)
    parts = [
        f"Scale `{made_with['scale']}`: {sizes}. {versions}. {finished} of {wanted} evaluated runs and "
        f"{sum(line['cell']['stage'] == 'select' for line in lines)} runs to choose learning rates; "
        f"{seconds / 60:.0f} minutes of all processes together."
    ]
    for task, start in groups:
        own = {objective: runs[task, start, objective] for _, _, objective in _keys(task, start, validation)}
        own = {objective: found for objective, found in own.items() if found}
        if own:
            parts += [f"### {_TASKS[task]}, {start} start", *_group(own, task, start, validation, made_with)]
    parts += ["### Best, and what cannot be told from it", _verdicts(runs, groups, validation)]
    return "\n\n".join(parts) + "\n"


def _keys(task: str, start: str, validation: Validation) -> list[tuple[str, str, str]]:
    return [(task, start, "base"), *(key for key in validation if key[:2] == (task, start))]


def _runs(lines: Sequence[Line], key: tuple[str, str, str]) -> list[Line]:
    def belongs(cell: Mapping[str, Any]) -> bool:
        return cell["stage"] != "select" and (cell["task"], cell["start"], cell["objective"]) == key

    return [line for line in lines if belongs(line["cell"])]


def _group(
    runs: Mapping[str, Sequence[Line]], task: str, start: str, validation: Validation, made_with: Mapping[str, Any]
) -> Iterator[str]:
    """Tables of one task and start."""
    grid, base = made_with["learning_rates"], runs["base"][0]["metrics"]
    prefix = "feature_matching_loss_h"
    horizons = sorted(int(name.removeprefix(prefix)) for name in base if name.startswith(prefix))
    quality = []
    for objective, found in runs.items():
        rate = found[0]["cell"]["learning_rate"]
        edge = "" if min(grid) < rate < max(grid) else " (end of the grid)"
        values = [_spread(_metric(found, name), _DECIMALS.get(name, 4)) for name in _COLUMNS]
        quality.append([objective, f"{rate:g}{edge}" if rate else "-", *values])
    yield _table(["", "learning rate", *_COLUMNS.values()], quality)
    yield f"Parse rate of the real text: {base['parse_rate_of_real_text']:.3f}."
    values = {key[2]: validation[key] for key in _keys(task, start, validation)[1:]}
    yield _table(
        ["minimised, on validation, by learning rate", *(f"{rate:g}" for rate in grid)],
        [[o, *(f"{found[rate]:.4f}" if rate in found else "-" for rate in grid)] for o, found in values.items()],
    )
    for name in ("feature_matching_loss", "alignment"):
        header = [f"{_COLUMNS[name]} at horizon", *map(str, horizons)]
        yield _table(
            header, [[o, *(_spread(_metric(found, f"{name}_h{h}")) for h in horizons)] for o, found in runs.items()]
        )
    costs = [
        [o, f"{found[0]['tokens_per_step']:,.0f}", _spread([x["cpu_seconds_per_step"] for x in found], 2)]
        for o, found in runs.items()
        if o != "base"
    ]
    yield _table(["cost of a step", "tokens forwarded", "CPU seconds"], costs)


def _metric(found: Sequence[Line], name: str) -> list[float]:
    return [line["metrics"][name] for line in found]


def _spread(values: Sequence[float], decimals: int = 4) -> str:
    """Mean and standard deviation of several runs, of one run its value."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{decimals}f}"
    return f"{mean:.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def _verdicts(
    runs: Mapping[tuple[str, str, str], Sequence[Line]], groups: Sequence[tuple[str, str]], validation: Validation
) -> str:
    """Per task, start and metric: the best mean, and all whose distance from it is within both spreads together."""
    rows = []
    for task, start in groups:
        found = {key[2]: runs[key] for key in _keys(task, start, validation) if runs[key]}
        for name, best_of in _JUDGED.items() if len(found) > 1 else ():
            values = {objective: _metric(lines, name) for objective, lines in found.items()}
            means = {objective: statistics.fmean(x) for objective, x in values.items()}
            spreads = {objective: statistics.stdev(x) if len(x) > 1 else 0.0 for objective, x in values.items()}
            best = best_of(means, key=means.__getitem__)
            equal = [
                other
                for other in means
                if other != best and abs(means[other] - means[best]) <= spreads[other] + spreads[best]
            ]
            rows.append([f"{_TASKS[task]}, {start}", _COLUMNS[name], best, ", ".join(equal) or "-"])
    return _table(["", "metric", "best mean", "within the spread"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def update_document(path: Path, scale: str, text: str) -> None:
    """Replace what stands between the markers of ``scale`` in a document.

    Raises:
        ValueError: there are no such markers.
    """
    start = _BLOCK.format(scale=scale)
    document = path.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(_END), re.S)
    if len(pattern.findall(document)) != 1:
        raise ValueError(f"write: expected {start.strip()!r} and {_END!r} once in {str(path)!r}")
    path.write_text(pattern.sub(lambda _: f"{start}\n{text}\n{_END}", document), encoding="utf-8")
