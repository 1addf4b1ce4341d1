"""The one command for a GPU, without one: a rehearsal of all of it, and stages that crash, hang or are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import measure
from bench.gpu import __main__ as command
from bench.gpu.job import Job, Task, read_rows, run_beside

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_a_rehearsal_runs_every_stage(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--output", tmp_path, "--rehearse", "--minutes", "12"],
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
    for heading in ("Targets", "Machine", "Qwen2.5-1.5B", "What only a GPU can run"):
        assert f"\n## {heading}\n" in report
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
