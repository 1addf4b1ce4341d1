"""The pages that are made of docstrings and options are what the code gives now, and leave nothing public out."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from pathlib import Path

import pytest

import ebft_kernels
import ebft_trainer

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "build.py"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_pages", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_what_the_code_says(build):
    found = [problem for path, text in build.pages() for problem in build.drift(path, text, "python docs/build.py")]
    assert not found, "\n".join(found)


def test_everything_public_has_its_place(build):
    shown = {name.rpartition(".")[2] for name in build.names()}
    elsewhere = {"EBFTTrainer", "EBFTCollator"}  # docs/training.md and docs/data.md tell of them
    assert {*ebft_kernels.__all__, *ebft_trainer.__all__} - elsewhere <= shown


def test_a_page_that_drifted_is_noticed(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Title\n<!-- options: ebft_trainer.EBFTOptions -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["build.py", "--check"])
    with pytest.raises(SystemExit, match="page.md is not what the code gives now"):
        build.main()
    monkeypatch.setattr("sys.argv", ["build.py"])
    with pytest.raises(SystemExit) as done:
        build.main()
    text = page.read_text()
    assert done.value.code is None and text.startswith("# Title\n") and text.endswith("<!-- end -->\nafter\n")
    assert all(f"| `{option.name}` |" in text for option in fields(ebft_trainer.EBFTOptions)) and "old" not in text
