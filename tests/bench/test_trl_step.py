"""The comparison with TRL's own head runs, and compares what it times."""

from __future__ import annotations

import sys

import pytest

from bench.shapes import ModelShape


def test_a_table(monkeypatch, capsys):
    pytest.importorskip("trl", reason="of the dev extra where Python is 3.11 or newer, as trl needs it to be")
    from bench import trl_step

    shape = ModelShape("tiny", 16, 16, 1, 2, 2, 8, 64)
    monkeypatch.setattr(trl_step, "MODELS", {"llama-256": shape})
    monkeypatch.setattr(trl_step, "SECONDS", 0.0)
    sizes = "--vocab 64 --batch 2 --prompt 14 --completion 3 --threads 1"
    monkeypatch.setattr(sys, "argv", ["trl_step", *sizes.split()])
    trl_step.main()
    *_, header, _rule, line = capsys.readouterr().out.splitlines()
    assert header == "|  | patch_trl | TRL | all logits | TRL / patch_trl | all logits / patch_trl |"
    assert line.startswith("| SFT, loss + backward | ") and line.count("|") == header.count("|")
