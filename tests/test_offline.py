"""What a machine without a network may lack: nothing of the ops, of their tests or of the build needs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("ruff", "pytest_timeout", "datasets", "bitsandbytes", "deepspeed", "xdist")
OP_TESTS = [f"tests/{name}" for name in ("attention", "pooling", "matching", "logprob")]
COLLECT = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *{[*OP_TESTS, "tests/test_layout.py"]}]))
"""


def test_the_tests_of_the_ops_are_collected_without_optional_packages():
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    ran = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
    collected = re.search(r"(?:(\d+)/)?(\d+) tests collected", ran.stdout)
    assert collected and int(collected[2]) > 1000
