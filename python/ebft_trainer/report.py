"""`ebft-train report`: runs side by side in one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from transformers.trainer_utils import get_last_checkpoint

from .charts import COLORS, legend, line_chart, number_text, stacked_bars, template
from .checkpoint import STATE_FILE
from .completions import Anchor, ends, read_completions, rows_of
from .monitor import LOG_FILE, Warned, log_line, read_log, warnings_of
from .plots import write_file
from .results import RESULT_FILE, RUN_FILE, flat, read_json_object, seconds_per_step

#: Heading -> which metrics stand under it, the first that matches.
SECTIONS = {
    "Held-out text": r"eval_",
    "Optimization": r"loss|grad_norm|learning_rate|nonfinite_steps",
    "Speed": r"seconds/|tokens",
    "Rollouts": r"",
}
_NO_CURVE = re.compile(r"(step|epoch|total_flos|train_\w+|.*_h\d+|eval_(loss|runtime|samples_per_second))$")
_HORIZON = re.compile(r"eval_(.*)_h([0-9]{1,6})$")


@dataclass(frozen=True)
class Run:
    """What is known of one run.

    Attributes:
        name: of its folder, as short as the runs can still be told apart.
        settings: option -> value.
        history: log lines, as of `transformers.TrainerState.log_history`; not finite numbers are NaN.
        warnings: what `warnings_of` says of them.
        completions: what `read_completions` found.
    """

    name: str
    settings: dict[str, Any]
    history: list[dict[str, float]]
    warnings: list[Warned]
    completions: dict[str, tuple[int, list[Anchor]]] = field(default_factory=dict)

    def curve(self, metric: str) -> list[tuple[float, float]]:
        """(step, value) of every log line that has the metric."""
        return [(line["step"], line[metric]) for line in self.history if metric in line]

    def evaluations(self) -> list[dict[str, float]]:
        """The log lines of evaluations."""
        return [line for line in self.history if "eval_cross_entropy" in line]


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="DIR", help="folders that `ebft-train train` wrote")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="(report.html)")


def prepare_report(arguments: argparse.Namespace) -> Callable[[], None]:
    """Read the runs; the returned function writes the page."""
    if arguments.output.is_dir():
        raise ValueError(f"output: expected a file, got the folder {str(arguments.output)!r}")
    page = report_page(read_runs(arguments.runs))

    def work() -> None:
        # Names of files need not be text.
        write_file(arguments.output, page.encode("utf-8", "backslashreplace"))
        print(f"report: {arguments.output}")

    return work


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs from their folders, finished, under way or broken off.

    The log is that of `log.jsonl`, else of `results.json`, else of the newest checkpoint.

    Raises:
        ValueError: a folder is given twice, does not exist or holds no log; a file in it is broken.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"runs: expected each folder once, got {', '.join(map(str, folders))}")
    return [_read_run(folder, name) for folder, name in zip(folders, _names(resolved), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]


def _read_run(folder: Path, name: str) -> Run:
    history = _history(folder)
    if not history:
        raise ValueError(
            f"runs: expected a folder with a log ({LOG_FILE}, {RESULT_FILE} or a checkpoint), got {str(folder)!r}"
        )
    settings = flat(read_json_object(folder / RUN_FILE)) if (folder / RUN_FILE).is_file() else {}
    samples = settings.get("options.samples", 2)
    if type(samples) is not int or samples < 1:
        raise ValueError(f"{folder / RUN_FILE}: expected options.samples as a number above 0, got {samples!r}")
    history = [{key: math.nan if value is None else value for key, value in line.items()} for line in history]
    return Run(name, settings, history, warnings_of(history, samples), read_completions(folder))


def _history(folder: Path) -> list[dict[str, Any]]:
    if history := read_log(folder / LOG_FILE):
        return history
    if (folder / RESULT_FILE).is_file():
        return _lines_in(folder / RESULT_FILE, "log")
    checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    state = Path(checkpoint or folder) / STATE_FILE
    return _lines_in(state, "log_history") if state.is_file() else []


def _lines_in(path: Path, key: str) -> list[dict[str, Any]]:
    """The log lines that another file holds under ``key``."""
    lines = read_json_object(path).get(key, [])
    if not isinstance(lines, list):
        raise ValueError(f"{path}: expected {key!r} as a list, got {type(lines).__name__}")
    try:
        return [log_line(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{path}: {key}: expected JSON objects of numbers, got {error}") from None


_PAGE = template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ebft-train: {{ names }}</title><style>{{ style }}</style></head>
<body><main>
<h1>{{ count }} run{{ "s" if count > 1 else "" }}</h1>
{% for section in sections %}
{{ section }}
{% endfor %}
</main></body></html>
"""
)
_WARNINGS = template(
    """{% if warnings %}
<section class="warnings" aria-label="Warnings"><h2>Warnings</h2><ul>
{% for name, warned in warnings %}
<li><b>{{ name }}</b>, step {{ warned.step }}: {{ warned.text }}</li>
{% endfor %}
</ul></section>
{% else %}
<p>No warnings: no collapse of rewards or rollouts, no step skipped.</p>
{% endif %}"""
)
_TABLE = template(
    """<h2>{{ heading }}</h2><div class="wide"><table>
<thead><tr>{% for cell in header %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>"""
)
_CHARTS = template(
    """<h2>{{ heading }}</h2><div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>"""
)


_COMPLETIONS = template(
    """<h2>{{ heading }}</h2>
{% for title, anchors in parts %}
<h3>{{ title }}</h3>
{% for prefix, rows in anchors %}
<div class="wide"><table class="texts"><caption>{{ prefix }}</caption>
<thead><tr><th scope="col">after this</th><th scope="col"></th><th scope="col">alignment</th><th scope="col">reward</th>
<th scope="col"></th></tr></thead><tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[1] }}</th><td>{{ row[0] }}</td>{% for cell in row[2:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% endfor %}"""
)


def report_page(runs: Sequence[Run]) -> str:
    """The whole page. Nothing in it is run or loaded, by its Content-Security-Policy too: it has one style sheet."""
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _PAGE(
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        names=", ".join(run.name for run in runs),
        style=Markup(style),  # a constant
        count=len(runs),
        sections=[
            legend([run.name for run in runs]),
            _WARNINGS(warnings=[(run.name, warned) for run in runs for warned in run.warnings]),
            _settings(runs),
            _evaluations(runs),
            *_curves(runs),
            _seconds(runs),
            *_completions(runs),
        ],
    )


def _settings(runs: Sequence[Run]) -> Markup:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = []
    for name in names:
        values = [run.settings.get(name, "") for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *(_setting_text(value) for value in values)])
    if not rows:
        return Markup("" if len(runs) == 1 else "<h2>Options that differ</h2><p>None.</p>")
    return _TABLE(heading="Options that differ", header=["option", *(run.name for run in runs)], rows=rows)


def _setting_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _evaluations(runs: Sequence[Run]) -> Markup:
    found = [run.evaluations() for run in runs]
    names = dict.fromkeys(name for lines in found if lines for name in lines[-1] if name.startswith("eval_"))
    rows = []
    for name in names:
        if not _NO_CURVE.match(name):
            cells = [" \u2192 ".join(dict.fromkeys(_ends(name, lines))) for lines in found]
            rows.append([name.removeprefix("eval_"), *cells])
    if not rows:
        return Markup()
    header = ["held-out text", *(run.name for run in runs)]
    return _TABLE(heading="Evaluation, first \u2192 last", header=header, rows=rows)


def _ends(name: str, lines: Sequence[dict[str, float]]) -> Iterator[str]:
    values = [line[name] for line in lines if name in line]
    yield from (number_text(value) for value in (values[:1] + values[-1:]))


def _curves(runs: Sequence[Run]) -> Iterator[Markup]:
    metrics = dict.fromkeys(name for run in runs for line in run.history for name in line)
    metrics = [name for name in metrics if not _NO_CURVE.match(name)]
    for heading, pattern in SECTIONS.items():
        chosen = [name for name in metrics if re.match(pattern, name)]
        metrics = [name for name in metrics if name not in chosen]
        charts = [line_chart(name.removeprefix("eval_"), "step", _by_run(runs, name)) for name in chosen]
        if heading == "Held-out text":
            charts += _by_horizon(runs)
        if charts:
            yield _CHARTS(heading=heading, charts=charts)


def _by_run(runs: Sequence[Run], metric: str) -> dict[str, list[tuple[float, float]]]:
    return {run.name: run.curve(metric) for run in runs}


def _by_horizon(runs: Sequence[Run]) -> Iterator[Markup]:
    """One chart per metric of the last evaluation that is measured for every horizon."""
    last = {run.name: (run.evaluations() or [{}])[-1] for run in runs}
    found = [match for line in last.values() for match in map(_HORIZON.match, line) if match]
    for metric in dict.fromkeys(match[1] for match in found):
        curves = {
            name: [(int(m[2]), line[m[0]]) for m in map(_HORIZON.match, line) if m and m[1] == metric]
            for name, line in last.items()
        }
        yield line_chart(f"{metric} by horizon, last evaluation", "tokens of the rollout", curves)


def _completions(runs: Sequence[Run]) -> Iterator[Markup]:
    """What each run wrote in its last evaluation: the worst matches, then the best."""
    for run in runs:
        for name, (step, anchors) in run.completions.items():
            heading = f"What the model writes: {run.name}, {name}, step {step}"
            parts = [
                (title, [(anchor.prefix, rows_of(anchor)) for anchor in part])
                for title, part in ends(anchors).items()
                if part
            ]
            yield _COMPLETIONS(heading=heading, parts=parts)


def _seconds(runs: Sequence[Run]) -> Markup:
    bars = {run.name: seconds for run in runs if (seconds := seconds_per_step(run.history))}
    if not bars:
        return Markup()
    parts = {name: {kind: x for kind, x in seconds.items() if kind != "step"} for name, seconds in bars.items()}
    kinds = dict.fromkeys(kind for seconds in bars.values() for kind in seconds)
    rows = [
        [kind, *(number_text(bars[run.name][kind]) if kind in bars.get(run.name, {}) else "" for run in runs)]
        for kind in kinds
    ]
    charts = [stacked_bars("mean of all logged steps", parts, "s")]
    return _CHARTS(heading="Seconds per optimizer step", charts=charts) + _TABLE(
        heading="Phases", header=["phase", *(run.name for run in runs)], rows=rows
    )


_LIGHT = ("#0b63b0", "#c2410c", "#0f7b4f", "#8a3ab9", "#8d6708", "#be185d", "#0e7490", "#525252")
_DARK = ("#6cb2f5", "#fb923c", "#4ade80", "#c793f0", "#facc15", "#f472b6", "#22d3ee", "#bdbdbd")


def _style() -> str:
    def colors(values: Sequence[str]) -> str:
        return "".join(f"--c{number}:{value};" for number, value in enumerate(values))

    classes = "".join(f".c{n}{{stroke:var(--c{n});fill:var(--c{n})}}" for n in range(COLORS))
    return (
        f":root{{color-scheme:light dark;--paper:#fff;--ink:#1c1c1c;--soft:#5c5c5c;--rule:#d9d9d9;--warn:#fff4e5;"
        f"{colors(_LIGHT)}}}"
        f"@media (prefers-color-scheme:dark){{:root{{--paper:#17181a;--ink:#ececec;--soft:#a8a8a8;--rule:#3a3c40;"
        f"--warn:#3a2a12;{colors(_DARK)}}}}}" + _RULES + classes
    )


_RULES = """
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
main{max-width:1340px;margin:0 auto;padding:1rem 1.5rem 3rem}
h1{font-size:1.5rem;margin:.3em 0}h2{font-size:1.15rem;margin:1.8em 0 .5em}
.legend{display:flex;flex-wrap:wrap;gap:.3em 1.4em;margin:.4em 0}.key{display:inline-flex;align-items:center;gap:.5em}
.key line{stroke-width:3}
main>.legend{position:sticky;top:0;background:var(--paper);padding:.4em 0;border-bottom:1px solid var(--rule);z-index:1}
.warnings{background:var(--warn);border-left:4px solid var(--c1);padding:.1em 1em .6em;margin:1em 0}
.warnings h2{margin:.5em 0 0}.warnings ul{margin:.4em 0;padding-left:1.2em}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25em .9em;border-bottom:1px solid var(--rule);text-align:right}
th:first-child{text-align:left;font-weight:400}thead th{font-weight:600!important}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,390px),1fr));gap:1rem 1.4rem}
figure{margin:0}figcaption{font-weight:600;font-size:.9rem}
.texts{margin:.6em 0 1.4em}.texts caption{text-align:left;white-space:pre-wrap;color:var(--soft)}
.texts tbody th{white-space:pre-wrap;max-width:60em}
svg.chart{width:100%;height:auto;display:block;overflow:visible}
svg text{font-size:11px;fill:var(--soft);stroke:none}svg .axis{text-anchor:middle}svg .y{text-anchor:end}
svg .grid{stroke:var(--rule);stroke-width:1}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
circle{stroke:none}.many circle{opacity:0}.many circle:hover{opacity:1}.few circle:hover{r:6px}
rect{stroke:none!important}
"""
