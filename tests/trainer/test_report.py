"""The page: what it shows of several runs, that it loads nothing, and what it refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ebft_trainer import cli
from ebft_trainer.charts import line_chart, number_text, stacked_bars, style_of, ticks
from ebft_trainer.report import read_runs
from ebft_trainer.results import seconds_per_step


def write_run(folder: Path, rate: float, *, spread: float = 0.5, steps: int = 60, jsonl: bool = True) -> Path:
    """A made-up run of `ebft-train train` with two evaluations."""
    folder.mkdir(parents=True)
    settings = {"model": "m<1>", "options": {"samples": 4, "horizon": 2}, "training": {"learning_rate": rate}}
    (folder / "ebft.json").write_text(json.dumps(settings))
    evaluation = {"eval_cross_entropy": 2.0, "eval_alignment": 0.1, "eval_alignment_h1": 0.3, "eval_alignment_h2": 0.1}
    log = [{"step": 0, **evaluation}]
    for step in range(10, steps + 1, 10):
        seconds = {"seconds/rollout": 1.0, "seconds/policy": 0.5, "seconds/step": 2.0}
        log.append({"step": step, "loss": rate * step, "reward_std": spread, "reward": 1 / step, **seconds})
    log.append({"step": steps, **evaluation, "eval_cross_entropy": 1.5})
    if jsonl:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    else:
        (folder / "results.json").write_text(json.dumps({"log": log}))
    return folder


class Page(HTMLParser):
    """Checks that tags nest, and collects text, captions and what would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.labels: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.policy = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(values)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]
        self.links += [values[name] for name in ("src", "href", "xlink:href", "data") if name in values]
        if values.get("role") == "img":
            self.labels.append(values["aria-label"])
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data + "\n"


@pytest.fixture
def page(tmp_path, capsys) -> tuple[Path, Page]:
    runs = [write_run(tmp_path / "a", 1e-3), write_run(tmp_path / "b", 2e-3, spread=0.0, jsonl=False)]
    output = tmp_path / "out" / "report.html"
    cli.main(["report", *map(str, runs), "--output", str(output)])
    assert f"report: {output}" in capsys.readouterr().out
    return output, Page(output.read_text(encoding="utf-8"))


def test_the_page_shows_both_runs(page):
    _, parsed = page
    for words in (
        "2 runs",
        "training.learning_rate",
        "0.001",
        "0.002",
        "2 → 1.5",
        "Warnings",
        "rewards have collapsed",
    ):
        assert words in parsed.words, words
    assert "m<1>" not in parsed.words  # the same in both runs
    label = next(x for x in parsed.labels if x.startswith("loss:"))
    assert label == "loss: a, last 0.06; b, last 0.12"
    assert any(x.startswith("alignment by horizon, last evaluation: a, last 0.1") for x in parsed.labels)
    assert any(x.startswith("mean of all logged steps: a 2 s; b 2 s") for x in parsed.labels)


def test_the_page_loads_nothing(page):
    output, parsed = page
    text = output.read_text(encoding="utf-8")
    assert not parsed.links and "<script" not in text
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme:dark" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium; the page's content is tested without")
def test_a_browser_draws_the_page(page, tmp_path):
    output, _ = page
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}", output.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 10_000


def test_what_is_read(tmp_path):
    """The log file, else the results, else the newest checkpoint's state."""
    folder = write_run(tmp_path / "one" / "run", 1e-3)
    other = tmp_path / "two" / "run" / "checkpoint-20"
    other.mkdir(parents=True)
    (other / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 20, "loss": 3.0}]}))
    first, second = read_runs([folder, other.parent])
    assert (first.name, second.name) == ("one/run", "two/run")
    assert first.curve("loss")[-1] == (60, 0.06) and second.curve("loss") == [(20, 3.0)]
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"step": 70, "loss": null, "nonfinite_steps": 10}\n{"half')
    (again,) = read_runs([folder])
    assert len(again.history) == len(first.history) + 1 and "not a" not in str(again.warnings)
    assert [warned.step for warned in again.warnings] == [70]


def test_bad_input(tmp_path, capsys):
    folder = write_run(tmp_path / "a", 1e-3)
    with pytest.raises(ValueError, match="runs: expected each folder once"):
        read_runs([folder, tmp_path / "b" / ".." / "a"])
    with pytest.raises(ValueError, match=r"runs: expected a folder with a log \(log.jsonl, .*got '.*nowhere'"):
        read_runs([tmp_path / "nowhere"])
    for content, got in (("{", "'{': Expecting"), ("[]", "list"), ("[" * 100_000, ".*: too deeply nested")):
        (folder / "ebft.json").write_text(content)
        with pytest.raises(ValueError, match=f"ebft.json: expected a JSON object, got {got}"):
            read_runs([folder])
    for samples in ('"many"', "0", "true", "null"):
        (folder / "ebft.json").write_text(f'{{"options": {{"samples": {samples}}}}}')
        with pytest.raises(ValueError, match="ebft.json: expected options.samples as a number above 0, got "):
            read_runs([folder])
    (folder / "ebft.json").unlink()
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder), "--output", str(tmp_path)])
    assert "output: expected a file, got the folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("3", "results.json: expected 'log' as a list, got int"),
        ('["step"]', "results.json: log: expected JSON objects of numbers, got str"),
        ('[{"step": 1, "loss": "<b>"}]', "results.json: log: expected JSON objects of numbers, got 'loss': '<b>'"),
    ],
)
def test_results_that_are_broken_are_one_line(tmp_path, log, message):
    folder = write_run(tmp_path / "a", 1e-3, jsonl=False)
    (folder / "results.json").write_text(f'{{"log": {log}}}')
    with pytest.raises(ValueError, match=message):
        read_runs([folder])


#: Ends every context that a page has: an element, an attribute in either quotes, a script, a style, CDATA, a comment.
HOSTILE = "'\"--></style></title><script>alert(1)</script><img src=x onerror=alert(2)>]]>{{ 7 * 7 }}{% x %}&lt;\ud800"


def test_names_from_files_are_text_and_nothing_else(tmp_path, capsys):
    """Of folders, models, options and their values, and metrics, in every part of the page."""
    name = HOSTILE.replace("/", "\u2215").replace("\ud800", "")  # as a file can be called
    folders = [tmp_path / f"{number}{name}" for number in "12"]
    for number, folder in enumerate(folders):
        write_run(folder, 1e-3, spread=0.0)
        settings = {"model": HOSTILE + str(number), HOSTILE: {HOSTILE: [HOSTILE, number]}}
        (folder / "ebft.json").write_text(json.dumps(settings))
        line = {"step": 70, "eval_cross_entropy": 1.0, f"eval_{HOSTILE}": 1.0, f"eval_{HOSTILE}_h1": 2.0, HOSTILE: 3.0}
        line |= {"seconds/step": 2.0, f"seconds/{HOSTILE}": 1.0}
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    output = tmp_path / "report.html"
    cli.main(["report", *map(str, folders), "--output", str(output)])
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    allowed = "html head meta title style body main h1 h2 section ul li b p span div table thead tbody tr th td figure"
    assert page.tags <= {*allowed.split(), *"figcaption svg g line text polyline circle rect".split()}
    assert not [name for name in page.attributes if name.startswith("on") or name in ("style", "src", "href", "srcset")]
    assert page.words.count(HOSTILE.replace("\ud800", "\\ud800")) >= 15
    policy = page.policy
    (style,) = re.findall("<style>(.*?)</style>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert text.index("Content-Security-Policy") < text.index("<title>")
    capsys.readouterr()


@pytest.mark.parametrize(
    "values", [(1e308, -1e308), (5e-324, 0.0), (1e16, 1e16 + 2), (-0.0, 0.0), (1e-300, 2e-300), (10**300,)]
)
def test_whatever_numbers_a_log_holds_are_drawn(values):
    chart = line_chart("x", "step", {"a": [(2**53 - number, y) for number, y in enumerate(values)]})
    places = [float(x) for x in re.findall(r' c[xy]="(.*?)"', chart)]
    assert len(places) == 2 * len(values) and all(0 <= x <= 420 for x in places)
    assert "seconds" in stacked_bars("x", {"a": {"b": values[0], "c": -1.0}}, "seconds")


def test_one_run_alone_has_nothing_to_differ(tmp_path):
    output = tmp_path / "report.html"
    cli.main(["report", str(write_run(tmp_path / "a", 1e-3)), "--output", str(output)])
    words = Page(output.read_text(encoding="utf-8")).words
    assert "1 run\n" in words and "No warnings" in words and "Options that differ" not in words


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12.1), (1e-7, 3e-7), (4.2599, 4.3601), (0, 1e9)])
def test_ticks_enclose_and_are_round(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low + 1e-9 * abs(low) and found[-1] >= high * (1 - 1e-9)
    assert 3 <= len(found) <= 8
    step = found[1] - found[0]
    assert f"{step:.1e}"[0] in "125"


def test_charts_leave_gaps_and_draw_constants():
    chart = line_chart("x", "step", {"a": [(1, 1.0), (2, 2.0), (3, float("nan")), (4, 2.0), (5, 1.0)]})
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 4
    assert "<polyline" in line_chart("x", "step", {"a": [(1, 0.0), (2, 0.0)]})
    assert "no finite value" in line_chart("x", "step", {"a": [(1, float("nan"))]})
    long = line_chart("x", "step", {"a": [(x, x) for x in range(10_000)]})
    assert long.count("<circle") == 250 and "step 9,999" in long or "step 9999" in long
    assert len({style_of(number) for number in range(32)}) == 32
    assert number_text(1234567.0) == "1,234,567"


def test_seconds_add_up():
    seconds = seconds_per_step([{"seconds/step": 3.0, "seconds/policy": 1.0, "seconds/rollout": 0.5}, {"loss": 1.0}])
    assert seconds == {"step": 3.0, "policy": 1.0, "rollout": 0.5, "backward and optimizer": 1.5}
    assert seconds_per_step([{"loss": 1.0}]) == {}
