"""The page about data cannot drift: its blocks run, its command lines parse, it knows every option."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ebft_trainer import cli
from ebft_trainer.arguments import Parser
from ebft_trainer.cli_data import TrainingDataArguments

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


def test_python_blocks_run(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 5
    exec("\n".join(blocks("python")), {})


def test_command_lines_are_accepted():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        command, *arguments = shlex.split(line)
        assert command == "ebft-train" and callable(cli._parser().parse_args(arguments).prepare)


def test_every_option_about_data_is_named():
    parser = Parser([TrainingDataArguments])
    options = {flag for action in parser.keys.values() for flag in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert options <= named
    assert named - options == {"--context", "--horizon", "--stride", "--max-steps", "--seed", "--model", "--output"}
