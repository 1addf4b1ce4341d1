"""The pytest-benchmark suites run, and write down what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_suite_runs_by_itself(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "bench/suites", "-q", "-k", "mean_embedding_loss and torch"]
    command += ["--length", "40", "--benchmark-max-time=0", "--benchmark-min-rounds=1", f"--benchmark-json={results}"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    read = json.loads(results.read_text())
    assert "threads, torch" in read["machine_info"]["line"]
    found = {entry["group"]: entry["extra_info"] for entry in read["benchmarks"]}
    assert set(found) == {f"mean_embedding_loss {x}" for x in ("forward", "backward", "forward+backward")}
    assert all(info["times the floor"] > 0 and info["GB/s"] > 0 for info in found.values())
