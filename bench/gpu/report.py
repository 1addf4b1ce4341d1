"""From lines of results to a report, a file for other programs and a short table. Nothing here needs a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .._documents import table
from ..problems import FLEX, SDPA, SDPA_PER_SAMPLE
from .job import Ended, Row, read_rows
from .kernels import FLASH, OURS

#: What kernels and steps are wanted to reach; see docs/gpu.md.
FORWARD_OF_FLASH, BACKWARD_OF_FLASH, OF_FLEX, OF_DENSE, OF_COPY = 0.6, 0.5, 2.0, 6.0, 0.8
OF_PUBLISHED, UTILIZATION, OF_PUBLISHED_MEMORY = 5.0, 0.4, 1 / 3
#: What tells one way to train from another.
_SETTING = ("adapters", "checkpointing", "batch")
#: Bytes from which a kernel is expected to be bound by memory alone.
_LARGE = 100e6


class Target(NamedTuple):
    """A ratio that was measured, and what it should be at least, or at most."""

    name: str
    wanted: float
    measured: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    @property
    def cells(self) -> tuple[str, ...]:
        """Of a table."""
        sign = ">=" if self.at_least else "<="
        return self.name, f"{sign} {self.wanted:.2f}", f"{self.measured:.2f}", "yes" if self.met else "no"


class Results(NamedTuple):
    """All lines of all stages."""

    rows: dict[str, list[Row]]

    def of(self, kind: str, **values: object) -> list[Row]:
        """Lines of a kind with these values."""
        every = (row for rows in self.rows.values() for row in rows)
        return [row for row in every if row["kind"] == kind and all(row.get(k) == v for k, v in values.items())]

    def ceiling(self, name: str) -> float | None:
        """Operations or bytes per second that were measured; of several the most."""
        return max((row["rate"] for row in self.of("ceiling", name=name)), default=None)


def write_report(folder: Path, ended: Mapping[str, Ended], *, rehearsal: bool, stopped: str = "") -> bool:
    """Write ``report.md`` and ``results.json``, print a short table; whether all ended well and no check failed."""
    results = Results({path.stem: read_rows(path) for path in sorted(folder.glob("*.jsonl"))})
    wanted = [*targets(results)]
    stages = {name: end._asdict() for name, end in ended.items()}
    content = {"rehearsal": rehearsal, "stopped": stopped, "stages": stages, "rows": results.rows}
    content["targets"] = [target._asdict() | {"met": target.met} for target in wanted]
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    note = "**A rehearsal without a GPU: no number means anything.**\n\n" if rehearsal else ""
    note += f"**Stopped early by {stopped}.**\n\n" if stopped else ""
    parts = [f"# On a GPU\n\n{note}{_stages(results, ended)}", *_sections(results, wanted)]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    print(note.replace("*", "") + _stages(results, ended) + "\n" + _short(wanted), end="")
    print(f"{folder / 'report.md'}, results.json and, of every stage, its lines and its log")
    failed = [row for row in results.of("check") if not row["passed"]] + results.of("error")
    ends = [end.how for end in ended.values()] + [row["how"] for row in results.of("part")]
    return not failed and not stopped and all(how == "finished" for how in ends)


def _stages(results: Results, ended: Mapping[str, Ended]) -> str:
    rows = []
    for name, found in results.rows.items():
        ended_ = ended.get(name, Ended(0.0, "not ended"))
        checks = [row for row in found if row["kind"] == "check"]
        counts = {
            "checks": len(checks),
            "failed": sum(not row["passed"] for row in checks),
            "errors": sum(row["kind"] == "error" for row in found),
            "left out": sum(row["kind"] == "skipped" for row in found),
            "times": sum(row["kind"] in ("time", "step") for row in found),
        }
        rows.append((name, ended_.how, f"{ended_.seconds:.0f} s", *counts.values()))
    rows += [
        (name, end.how, f"{end.seconds:.0f} s", *"00000") for name, end in ended.items() if name not in results.rows
    ]
    return table(("stage", "ended", "after", "checks", "failed", "errors", "left out", "times"), rows)


def _short(wanted: Iterable[Target]) -> str:
    return table(("target", "wanted", "measured", "met"), [target.cells for target in wanted])


def targets(results: Results) -> Iterator[Target]:
    """All targets for which there is a measurement."""
    copy, product = results.ceiling("copy"), results.ceiling("matmul")
    times = results.of("time")
    for model in dict.fromkeys(row["model"] for row in times):
        yield from _attention_targets(model, [row for row in times if row["model"] == model])
    for row in times:
        if copy and row.get("kernel_seconds") and row["bytes"] > _LARGE:
            share = row["bytes"] / row["kernel_seconds"] / copy
            yield Target(f"{row['model']}: {row['op']}: bytes per second of the copy's", OF_COPY, share)
    yield from _step_targets(results, product)


def _attention_targets(model: str, times: list[Row]) -> Iterator[Target]:
    for direction, wanted in (("forward", FORWARD_OF_FLASH), ("backward", BACKWARD_OF_FLASH)):
        by_name = {
            row["who"]: row
            for row in times
            if row["op"] == "strided_attention" and row["direction"] == direction and "kernel" not in row
        }
        if OURS not in by_name:
            continue
        ours = by_name[OURS]
        name = f"{model}: attention {direction}"
        if FLASH in by_name:
            flash = by_name[FLASH]
            share = (ours["work"] / ours["median"]) / (flash["work"] / flash["median"])
            yield Target(f"{name}: FLOP/s of causal flash SDPA's", wanted, share)
        if FLEX in by_name:
            yield Target(f"{name}: FlexAttention / ours", OF_FLEX, by_name[FLEX]["median"] / ours["median"])
        dense = [by_name[x]["median"] for x in (SDPA, SDPA_PER_SAMPLE) if x in by_name]
        if dense:
            yield Target(f"{name}: faster dense-mask SDPA / ours", OF_DENSE, min(dense) / ours["median"])


def _step_targets(results: Results, product: float | None) -> Iterator[Target]:
    steps = results.of("step", adapters=False, checkpointing=False)
    ours = {row["batch"]: row for row in steps if row["who"] == OURS}
    for published in (row for row in steps if row["who"] != OURS):
        if own := ours.get(published["batch"]):
            name = f"step, B={published['batch']}"
            yield Target(f"{name}: {published['who']} / ours", OF_PUBLISHED, published["seconds"] / own["seconds"])
            extra, others = ((row["peak_bytes"] - row["held_bytes"]) for row in (own, published))
            yield Target(
                f"{name}: peak memory above the loaded models, ours / {published['who']}",
                OF_PUBLISHED_MEMORY,
                extra / max(others, 1),
                at_least=False,
            )
    utilizations = [
        (share, row)
        for row in results.of("step", who=OURS, adapters=False, batch=8)
        if (share := _utilization(results, row, product))
    ]
    if utilizations:
        share, row = max(utilizations, key=lambda entry: entry[0])
        how = ", checkpointing" * row["checkpointing"]
        yield Target(f"step, B=8{how}: FLOP/s of the product's (MFU)", UTILIZATION, share)


def _utilization(results: Results, row: Row, product: float | None) -> float | None:
    """The model's own operations, none of them twice, over the seconds and the measured rate."""
    plans = results.of("plan", adapters=row["adapters"], batch=row["batch"], checkpointing=False)
    return plans[0]["operations"] / row["seconds"] / product if plans and product else None


def _sections(results: Results, wanted: list[Target]) -> Iterator[str]:
    if wanted:
        yield "## Targets\n\n" + _short(wanted)
    facts = [(row["name"], _cell(row["value"])) for row in results.of("fact")]
    if facts:
        ceilings = [
            (
                f"{row['name']} of {row['size']}",
                _rate(row["rate"], "FLOP" if row["name"] == "matmul" else "B"),
                row["how"],
            )
            for row in results.of("ceiling")
        ]
        yield "## Machine\n\n" + table(("what", "is"), facts)
        yield table(("ceiling", "measured", "how"), ceilings)
    failed = [row for row in results.of("check") if not row["passed"]]
    if failed:
        cells = [
            (
                _cell(row.get("part")),
                row["case"],
                _number(row.get("error")),
                _number(row.get("budget")),
                _cell(row.get("detail")),
            )
            for row in failed
        ]
        yield "## Checks that failed\n\n" + table(("part", "case", "error", "allowed", "what"), cells)
    if parts := results.of("part"):
        cells = []
        for row in parts:
            checks = [x for x in results.of("check") if x.get("part") == row["part"]]
            failing = sum(not x["passed"] for x in checks)
            cells.append((row["part"], row["how"], f"{row['seconds']:.0f} s", len(checks), failing))
        yield "## Parts\n\n" + table(("part", "ended", "after", "checks", "failed"), cells)
    yield from _times(results)
    yield from _steps(results)
    yield from _profiles(results)
    if tiles := results.of("tile"):
        cells = [
            (row["model"], row["kernel"], row["row"], ", ".join(f"{k}: {_seconds(x)}" for k, x in row["times"].items()))
            for row in tiles
        ]
        yield "## Tiles\n\n" + table(("model", "kernel", "row", "sizes, warps, stages: seconds"), cells)
    if patches := [row["patch"] for row in results.of("patch")]:
        yield "".join(f"```diff\n{x}```\n" if x else "The first candidates are the best.\n" for x in patches)
    for kind, title, columns in (
        ("error", "Errors", ("part", "what", "error")),
        ("skipped", "Left out", ("what", "why")),
        ("only on a GPU", "What only a GPU can run", ("what",)),
    ):
        if found := results.of(kind):
            yield f"## {title}\n\n" + table(
                columns, dict.fromkeys(tuple(_cell(row.get(c)) for c in columns) for row in found)
            )


def _times(results: Results) -> Iterator[str]:
    copy, product = results.ceiling("copy"), results.ceiling("matmul")
    times = results.of("time")
    for model in dict.fromkeys(row["model"] for row in times):
        rows = [_time_cells(row, copy, product) for row in times if row["model"] == model]
        header = (
            "op",
            "who",
            "median",
            "p20 - p80",
            "rate",
            "of the ceiling",
            "least by data sheet",
            "times that",
            "peak MB",
            "how",
        )
        yield f"## {model}\n\n" + table(header, rows)


def _steps(results: Results) -> Iterator[str]:
    """Seconds as measured by the whole; the phases, of one step more, with a clock that waits after each."""
    product, rows = results.ceiling("matmul"), []
    found = results.of("step")
    for row in found:
        plans = [] if row["who"] != OURS else results.of("plan", **{k: row[k] for k in _SETTING})
        share = _utilization(results, row, product) if plans else None
        rows.append(
            (
                row["who"],
                _setting(row),
                _seconds(row["seconds"]),
                " - ".join(_seconds(x) for x in plans[0]["seconds"]) if plans else "",
                f"{row['tokens'] / row['seconds']:.0f}",
                f"{row['prompt_tokens'] / row['seconds']:.0f}",
                f"{share:.2f}" if share else "",
                f"{row['peak_bytes'] / 2**30:.1f}",
                f"{plans[0]['peak_bytes'] / 2**30:.1f}" if plans else "",
                f"{(row['peak_bytes'] - row['held_bytes']) / 2**30:.1f}",
                *(_seconds(x) for x in row["phases"].values()),
            )
        )
    if rows:
        header = ("who", "setting", "step", "planned", "tokens/s", "prompt tokens/s", "MFU")
        header += ("peak GiB", "planned GiB", "above the loaded models", *found[0]["phases"])
        yield "## Steps\n\n" + table(header, rows)


def _setting(row: Row) -> str:
    how = "adapters" if row["adapters"] else "all weights"
    return f"B={row['batch']}, {how}{', checkpointing' * row['checkpointing']}"


def _profiles(results: Results) -> Iterator[str]:
    for row in results.of("shares"):
        if "shares" not in row:
            continue
        shares = ", ".join(f"{name} {share:.0%}" for name, share in sorted(row["shares"].items(), key=lambda x: -x[1]))
        yield f"## Where the time of a step goes: {_setting(row)}\n\n{_seconds(row['span'])} of kernels: {shares}.\n"
        kernels = [
            (_cell(x["kernel"])[:90], x["group"], x["runs"], _seconds(x["seconds"]), f"{x['share']:.1%}")
            for x in results.of("kernel", **{k: row[k] for k in _SETTING})
        ]
        yield table(("kernel", "whose", "runs", "seconds", "share"), kernels)


def _time_cells(row: Row, copy: float | None, product: float | None) -> tuple[str, ...]:
    """The kernels' own time where it was taken: around them an op prepares indices, which is the op's time."""
    median = row.get("kernel_seconds") or row["median"]
    unit, work = ("B", row["bytes"]) if row.get("bytes") else ("FLOP", row.get("work"))
    ceiling, predicted = copy if unit == "B" else product, row.get("predicted")
    name = " ".join(x for x in (row["op"], row.get("direction", "")) if x)
    name += f", {row['kernel']}" if "kernel" in row else ""
    spread = f"{_seconds(row['p20'])} - {_seconds(row['p80'])}"
    if row.get("kernel_seconds"):
        spread = f"whole op {_seconds(row['median'])}"
    return (
        name,
        row["who"],
        _seconds(median),
        spread,
        _rate(work / median, unit) if work else "",
        f"{work / median / ceiling:.2f}" if work and ceiling else "",
        _seconds(predicted) if predicted else "",
        f"{median / predicted:.2f}" if predicted else "",
        f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        row["how"],
    )


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value >= 1 else f"{value * 1e3:.3f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def _rate(value: float, unit: str) -> str:
    return f"{value / 1e12:.3g} TFLOP/s" if unit == "FLOP" else f"{value / 1e9:.4g} GB/s"


def _number(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, (int, float)) else _cell(value)


def _cell(value: object) -> str:
    """Anything in one line of a table."""
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")
