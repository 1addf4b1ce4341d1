"""The one command for a GPU, without one: a rehearsal of all of it, and stages that crash, hang or are stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import measure
from bench.gpu import __main__ as command
from bench.gpu import step, tiles
from bench.gpu.job import Job, Task, read_rows, run_beside
from bench.gpu.kernels import FLASH, OURS
from bench.gpu.report import Results, targets
from bench.problems import FLEX, SDPA, SDPA_PER_SAMPLE
from bench.shapes import MODELS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.heavy
@pytest.mark.timeout(1900)
def test_a_rehearsal_runs_every_stage(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--output", tmp_path, "--rehearse"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [row for rows in results["rows"].values() for row in rows]
    assert [row for row in rows if row["kind"] in ("error", "skipped")] == []
    assert [row for row in rows if row["kind"] == "check" and not row["passed"]] == []
    assert {name: stage["how"] for name, stage in results["stages"].items()} == dict.fromkeys(
        command.STAGES, "finished"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["name"] for row in rows if row["kind"] == "ceiling"} == {"copy", "matmul"}
    timed = {row["op"] for row in rows if row["kind"] == "time"}
    assert {"strided_attention", "strided_attention_step", "linear_log_probs", "feature_matching, sample"} <= timed
    assert all(row["median"] > 0 for row in rows if row["kind"] == "time")
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# On a GPU\n\n**A rehearsal without a GPU: no number means anything.**")
    headings = ("Targets", "Machine", "Parts", "Qwen2.5-1.5B", "Steps", "Where the time of a step goes", "Tiles")
    for heading in (*headings, "What only a GPU can run"):
        assert f"\n## {heading}" in report
    assert "A rehearsal without a GPU" in done.stdout and "| machine | finished |" in done.stdout


def _good(job: Job) -> None:
    job.write("fact", name="a", value="b")


def _hung(job: Job) -> None:
    child = subprocess.Popen(["sleep", "60"])
    job.write("fact", name="hangs", value=child.pid)
    time.sleep(600)


def _crashed(job: Job) -> None:
    job.write("fact", name="crashes", value="now")
    os.kill(os.getpid(), signal.SIGSEGV)


def _raised(job: Job) -> None:
    with job.attempt("something small"):
        raise ValueError("by itself")
    raise RuntimeError("not | caught")


@pytest.fixture
def stages(monkeypatch):
    def set_stages(**functions):
        monkeypatch.setattr(command, "STAGES", {name: (1.0, run) for name, run in functions.items()})

    # What a program sets for itself and its stages is none of this process's business.
    monkeypatch.setattr(command, "_prepare", lambda given: given.output.mkdir(exist_ok=True))
    return set_stages


def test_a_stage_that_hangs_crashes_or_raises_costs_only_itself(stages, tmp_path, capsys):
    stages(hung=_hung, crashed=_crashed, raised=_raised, good=_good)
    assert command.main(["--output", str(tmp_path), "--minutes", "0.2", "--rehearse"]) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    ends = {name: stage["how"] for name, stage in results["stages"].items()}
    assert ends["hung"].startswith("killed when its ")
    assert ends | {"hung": ""} == {
        "hung": "",
        "crashed": "died of SIGSEGV",
        "raised": "failed with exit code 1",
        "good": "finished",
    }
    assert [row["name"] for row in results["rows"]["hung"] + results["rows"]["crashed"]] == ["hangs", "crashes"]
    assert [row["error"] for row in results["rows"]["raised"]] == [
        "ValueError: by itself",
        "RuntimeError: not | caught",
    ]
    report = (tmp_path / "report.md").read_text()
    assert "RuntimeError: not \\| caught" in report
    assert "Segmentation fault" in (tmp_path / "crashed.log").read_text()
    assert "| good | finished |" in capsys.readouterr().out
    assert _ended(results["rows"]["hung"][0]["value"])


def test_the_time_of_a_stage_that_is_done_goes_to_the_others(stages, tmp_path):
    def tell(job: Job) -> None:
        job.write("fact", name="left", value=job.left())

    stages(one=tell, two=tell)
    assert command.main(["--output", str(tmp_path), "--minutes", "2", "--rehearse"]) == 0
    one, two = (read_rows(tmp_path / f"{name}.jsonl")[0]["value"] for name in ("one", "two"))
    assert one < 58 and two > 100


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
def test_stopped_early_it_still_reports(tmp_path, number):
    program = (
        "import sys, time, tests.bench.test_gpu as t; from bench.gpu import __main__ as c\n"
        "c.STAGES = {'good': (1.0, t._good), 'hung': (1.0, t._hung), 'never': (1.0, t._good)}\n"
        f"sys.exit(c.main(['--output', {str(tmp_path)!r}, '--rehearse']))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True)
    deadline = time.monotonic() + 120
    while not read_rows(tmp_path / "hung.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped"] == number.name and list(results["stages"]) == ["good"]
    assert list(results["rows"]) == ["good", "hung"]
    report = (tmp_path / "report.md").read_text()
    assert f"**Stopped early by {number.name}.**" in report and "| hung | not ended |" in report
    assert _ended(results["rows"]["hung"][0]["value"])


def _ended(pid: int) -> bool:
    """Whether a process is gone, or waits for somebody to ask how it ended."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_parts_run_beside_each_other_and_end_each_for_itself(tmp_path):
    job = Job(tmp_path, "stage", True, time.monotonic() + 60)
    tasks = [Task("hung", _hung, 0.5), Task("crashed", _crashed), Task("good", _good), Task("raised", _raised)]
    start = time.monotonic()
    run_beside(job, tasks, at_once=2)
    assert time.monotonic() - start < 30
    ends = {row["part"]: row["how"] for row in read_rows(tmp_path / "stage.jsonl") if row["kind"] == "part"}
    assert ends.pop("hung").startswith("killed when its ")
    assert ends == {"crashed": "died of SIGSEGV", "good": "finished", "raised": "failed with exit code 1"}


def test_calls_are_timed_in_turn():
    seen = []
    found = measure.per_call([lambda: seen.append(1), lambda: seen.append(2)], CPU, seconds=0.0, least=3)
    assert found.how == "clock" and 0 < found.seconds.p20 <= found.seconds.median <= found.seconds.p80
    assert seen == [1, 2, 1] + [1, 2] * 3
    assert measure.recorded(lambda: None, CPU) is None


def test_nothing_asks_for_a_gpu_before_the_forks():
    """A process that did cannot share the GPU with its forks."""
    program = """
import torch
asked = []
for name in ("is_available", "device_count", "current_device", "get_device_properties", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: asked.append(name) or 0)
import time
from pathlib import Path
from bench.gpu import __main__, right
from bench.gpu.job import Job
assert len(right.tasks(Job(Path("nowhere"), "right", False, time.monotonic() + 60))) > 30
print(asked)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_parts_of_a_profile_add_up():
    trace = [
        {"ph": "X", "cat": "kernel", "name": "strided_attention_fwd_kernel", "ts": 100, "dur": 40},
        {"ph": "X", "cat": "kernel", "name": "nvjet_tst_128x256_bf16", "ts": 120, "dur": 30},  # 20 of them beside it
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 190, "dur": 10},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 900},
        {"ph": "M", "name": "process_name"},
    ]
    events = [*step.device_events(trace, ("kernel", "gpu_memcpy"))]
    found = step.shares(events)
    assert found["span"] == pytest.approx(100e-6) and sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["idle"] == pytest.approx(0.4)
    assert found["shares"]["ebft-kernels"] == pytest.approx(0.6 * 40 / 80)
    first, *_ = step.largest_kernels(events, 2)
    assert first == {
        "kernel": "strided_attention_fwd_kernel",
        "group": "ebft-kernels",
        "runs": 1,
        "seconds": pytest.approx(40e-6),
        "share": pytest.approx(0.5),
    }
    assert step.shares([]) == {"span": 0.0}


def test_every_kernel_is_known_by_its_name():
    names = [
        line.split("(")[0].removeprefix("def ")
        for path in (ROOT / "ebft_kernels").rglob("*triton*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    ]
    assert len(names) > 12 and {step.group(name) for name in names} == {"ebft-kernels"}
    assert step.group("sm90_xmma_gemm_bf16bf16") == "matrix products"
    assert step.group("vectorized_elementwise_kernel") == "everything else"


def test_winning_tiles_are_a_patch_of_the_table():
    source = (ROOT / "ebft_kernels" / "_tiles.py").read_text()
    model = MODELS["Qwen2.5-1.5B"]
    choices = [*tiles._made_up(model)]
    text = tiles.patch(source, "sm_90", choices)
    removed = [line for line in text.splitlines() if line.startswith("-  ")]
    assert len(removed) == len(choices) and all(line[1:] in source for line in removed)
    best = choices[0].tiles[1]
    assert f"{(*best.sizes.values(), best.num_warps, best.num_stages)}" in text
    unchanged = [choice._replace(seconds=(0.5,) + (1.0,) * (len(choice.tiles) - 1)) for choice in choices]
    assert tiles.patch(source, "sm_90", unchanged) == ""


def test_targets_are_ratios_to_what_was_measured():
    def attention(who, direction, seconds, work=1.0):
        return {
            "kind": "time",
            "model": "m",
            "op": "strided_attention",
            "who": who,
            "direction": direction,
            "median": seconds,
            "work": work,
        }

    setting = {"adapters": False, "checkpointing": False, "batch": 8}
    rows = [
        {"kind": "ceiling", "name": "copy", "rate": 3e12},
        {"kind": "ceiling", "name": "matmul", "rate": 8e14},
        attention(OURS, "forward", 2.0),
        attention(FLASH, "forward", 1.0),
        attention(FLEX, "forward", 5.0),
        attention(SDPA, "forward", 16.0),
        attention(SDPA_PER_SAMPLE, "forward", 14.0),
        {"kind": "time", "model": "m", "op": "large", "median": 1.0, "kernel_seconds": 1e-3, "bytes": 2.7e9},
        {"kind": "time", "model": "m", "op": "small", "median": 1.0, "kernel_seconds": 1e-3, "bytes": 9e7},
        {"kind": "step", "who": OURS, **setting, "seconds": 2.0, "peak_bytes": 30, "held_bytes": 10},
        {"kind": "step", "who": "published", **setting, "seconds": 20.0, "peak_bytes": 110, "held_bytes": 10},
        {"kind": "plan", **setting, "operations": 8e14},
    ]
    found = {target.name: (round(target.measured, 3), target.met) for target in targets(Results({"all": rows}))}
    assert found == {
        "m: attention forward: FLOP/s of causal flash SDPA's": (0.5, False),
        "m: attention forward: FlexAttention / ours": (2.5, True),
        "m: attention forward: faster dense-mask SDPA / ours": (7.0, True),
        "m: large: bytes per second of the copy's": (0.9, True),
        "step, B=8: published / ours": (10.0, True),
        "step, B=8: peak memory above the loaded models, ours / published": (0.2, True),
        "step, B=8: FLOP/s of the product's (MFU)": (0.5, True),
    }


def test_without_a_gpu_it_says_so_at_once(stages, tmp_path, capsys):
    stages(never=_good)
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path)])
    said = capsys.readouterr().err
    assert re.search(
        r"expected a GPU that torch can use \((Assertion|Runtime)Error: .*\); --rehearse runs without", said
    )
    assert not list(tmp_path.iterdir())
