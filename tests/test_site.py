"""The site of all pages can be built, and what its pages claim of the code is so."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.heavy
def test_the_site_is_built_without_a_warning(tmp_path):
    """Strict: a link that leads nowhere, a page that no menu names and a docstring that cannot be found are errors."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    api = (tmp_path / "site" / "ops" / "index.html").read_text(encoding="utf-8")
    assert 'id="ebft_kernels.strided_attention"' in api and "docstring:" not in api and ":func:" not in api
    assert "Your first run" in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_the_notebook_runs():
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None, "saved with outputs, which go stale"
            exec("".join(cell["source"]), names)
    assert names["number"] == 2


@pytest.mark.parametrize("page", ["ops.md", "method.md"])
def test_python_blocks_of_a_page_run(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    exec("\n".join(blocks), {})


def messages() -> set[str]:
    """Every string, and every constant part of a formatted one, in the packages."""
    found = set()
    for path in [*(ROOT / "ebft_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_the_messages_that_the_page_of_errors_explains_are_those_of_the_code():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    explained = [x for row in re.findall(r"^\| (`.*?`) \|", text, flags=re.M) for x in re.findall(r"`(.*?)`", row)]
    known = messages()
    assert len(explained) >= 10
    assert not [x for x in explained if not any(x in message for message in known)]
