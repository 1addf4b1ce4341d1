"""The table of targets and the document that is measured anew, with measurements that take no time."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from bench import document, plain_forward, step, targets
from bench.shapes import Geometry, ModelShape
from bench.targets import Target

SHAPE = ModelShape("small", 24, 40, 4, 4, 2, 8, 97)


def test_a_target_is_met_from_its_side():
    assert Target("a", 5, True, 5.0).met and not Target("a", 5, True, 4.99).met
    assert Target("a", 1.4, False, 1.4).met and not Target("a", 1.4, False, 1.41).met
    assert str(Target("a", 1.03, False, 1.0288)) == "| a | <= 1.030 | 1.029 | yes |"
    assert str(Target("a", 15, True, 13.36)) == "| a | >= 15.00 | 13.36 | no |"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(targets, "MODEL", SHAPE)
    monkeypatch.setattr(targets, "GEOMETRY", Geometry(length=40))
    monkeypatch.setattr(
        step, "peak_in_own_process", lambda name, _: {step.OURS: 1 << 20, step.PUBLISHED: 7 << 20}[name]
    )
    monkeypatch.setattr(plain_forward, "SECONDS", 0.0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("group", targets.GROUPS)
def test_every_group_is_measured(monkeypatch, capsys, group):
    threads = torch.get_num_threads()
    monkeypatch.setattr("sys.argv", ["targets", "--group", group, "--rounds", "1", "--threads", str(threads)])
    targets.main()
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.endswith(("| yes |", "| no |"))]
    assert found
    if group.startswith("memory"):
        assert "7 / 1 MiB" in found[0] and found[0].endswith("| >= 6.00 | 7.00 | yes |")
    if group.startswith("step"):
        vocab = "32768" if "32768" in group else "8192"
        assert all(f"V={vocab}" in line for line in found) and len(found) == 6
        assert any(line.startswith(f"| {step.PUBLISHED} / {step.OURS} |") for line in lines)


def test_plain_forwards_are_compared_under_both_settings(monkeypatch):
    monkeypatch.setattr(plain_forward, "SECONDS", 0.0)
    used = []
    real = LlamaForCausalLM.set_attn_implementation
    monkeypatch.setattr(
        LlamaForCausalLM,
        "set_attn_implementation",
        lambda self, name: (used.append(name), real(self, name))[1],
    )
    found = plain_forward.times(SHAPE, Geometry(length=40))
    assert list(found) == ["forward", "forward, padded", "forward + backward"]
    assert set(used) == set(plain_forward.IMPLEMENTATIONS) and used[:2] == list(plain_forward.IMPLEMENTATIONS)


TEXT = """before
<!-- output of: python -m bench.one -->
old
<!-- end -->
between
<!-- output of: python -m bench.two -->
<!-- end -->
"""


def test_the_output_of_one_command_is_replaced():
    assert document.commands(TEXT) == ["python -m bench.one", "python -m bench.two"]
    text = document.updated(TEXT, "python -m bench.two", "new\n")
    assert text == TEXT.replace("two -->\n", "two -->\n\nnew\n\n")
    assert document.updated(text, "python -m bench.two", "new") == text


def test_commands_run_and_wait_for_their_variables(monkeypatch, capsys):
    monkeypatch.delenv("NO_SUCH_CHECKOUT", raising=False)
    assert document.output_of('python -c "print(1 + 1)"') == "2\n"
    assert document.output_of("python -m bench.step --peer a=$NO_SUCH_CHECKOUT") is None
    assert "NO_SUCH_CHECKOUT is not set" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected commands that start with python, got 'rm -r x'"):
        document.output_of("rm -r x")


def test_main_runs_what_is_asked_for(tmp_path, monkeypatch, capsys):
    path = tmp_path / "benchmarks.md"
    path.write_text(TEXT)
    monkeypatch.setattr(document, "DOCUMENT", path)
    monkeypatch.setattr(document, "output_of", lambda command: f"ran {command}")
    monkeypatch.setattr("sys.argv", ["document", "--list"])
    document.main()
    assert capsys.readouterr().out.split("\n")[:2] == document.commands(TEXT) and path.read_text() == TEXT
    monkeypatch.setattr("sys.argv", ["document", "--only", "one"])
    document.main()
    assert "ran python -m bench.one" in path.read_text() and "ran python -m bench.two" not in path.read_text()


def test_the_commands_of_the_document_are_those_of_the_benchmarks():
    for command in document.commands(document.DOCUMENT.read_text(encoding="utf-8")):
        assert command.startswith("python -m bench")
