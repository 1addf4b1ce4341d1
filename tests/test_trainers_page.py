"""The page about other trainers cannot drift: its blocks run, and name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ebft_kernels.integrations import axolotl, openrlhf

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "trainers.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="of the dev extra where Python is 3.11 or newer, as trl needs it to be")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)
    assert len(blocks) == 6
    exec("\n".join(blocks), {})
    assert "alignment" in capsys.readouterr().out


def test_everything_that_can_be_put_in_is_named():
    for module in (openrlhf, axolotl):
        functions = [name for name in module.__all__ if not isinstance(getattr(module, name), type)]
        assert functions and all(f"`{name}" in PAGE or f".{name}" in PAGE for name in functions)
