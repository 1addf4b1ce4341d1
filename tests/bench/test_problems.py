"""The benchmark compares like with like: everyone is checked, and who is wrong gets no time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bench import __main__ as main
from bench.__main__ import Gate, choice, compiling_anew, gate, measure
from bench.problems import FLOOR, PROBLEMS, Contestant, errors
from bench.report import markdown, plot, write_json
from bench.shapes import Geometry, ModelShape, visible_pairs
from ebft_kernels import StridedLayout, _native

MODEL = ModelShape("small", 24, 64, 4, 4, 2, 16, 97)
GEOMETRY = Geometry(batch=2, length=44)
CPU = torch.device("cpu")


def problem(op: str, dtype: torch.dtype = torch.float32):
    """Without FlexAttention, whose compilation takes longer than everything else here."""
    made = PROBLEMS[op](MODEL, GEOMETRY, dtype, CPU)
    return made._replace(contestants={k: v for k, v in made.contestants.items() if "Flex" not in k})


@pytest.mark.parametrize("op", PROBLEMS)
def test_everyone_is_right(op):
    found = errors(problem(op))
    assert len(found) >= 2
    assert not any(found.values()), found


def test_on_a_gpu_long_rows_of_wide_heads_and_the_timed_shape_are_checked_too(monkeypatch, capsys):
    """Who is wrong at one of them gets no time; what does not fit into memory is said, and no mistake."""
    made, checked = problem("mean_embedding_loss"), []
    timed = Geometry(batch=3, length=4096)

    def build(model, geometry, _dtype, _device):
        checked.append((model, geometry))
        return made

    def errors(_problem):
        length = checked[-1][1].length
        if length == 4096:
            raise torch.OutOfMemoryError("no memory")
        return {"ebft torch": "wrong" if length == 1088 else "", "plain PyTorch": "OutOfMemoryError: in the long one"}

    monkeypatch.setitem(main.PROBLEMS, "mean_embedding_loss", build)
    monkeypatch.setattr(main, "errors", errors)
    monkeypatch.setattr(main, "first_run", lambda *_: None)
    passed = gate("mean_embedding_loss", MODEL, timed, torch.float32, torch.device("cuda"))
    assert [geometry.length for _, geometry in checked] == [72, 1088, 4096]
    assert (checked[1][0].head_dim, checked[1][0].heads, checked[1][0].kv_heads) == (128, 2, 1)
    assert checked[2] == (MODEL, timed)
    assert passed.wrong["ebft torch"] == "wrong"
    assert "mean_embedding_loss: not checked at B=3 P=4096" in capsys.readouterr().err


@pytest.mark.parametrize("op", PROBLEMS)
def test_who_is_wrong_or_fails_gets_no_time(op):
    made = problem(op)
    name, right = next((k, v) for k, v in made.contestants.items() if v.exact)

    def broken(*inputs):
        return tuple(x * 1.001 for x in right.finish(right.run(*inputs)))

    def failing(*_inputs):
        raise RuntimeError("no such kernel")

    entries = {
        name: right,
        "broken": Contestant(broken, right.prepare, differentiable=right.differentiable),
        "failing": Contestant(failing, right.prepare, differentiable=right.differentiable),
    }
    made = made._replace(contestants=entries)
    wrong = errors(made)
    assert wrong[name] == ""
    assert "exceeds the budget" in wrong["broken"]
    assert wrong["failing"] == "RuntimeError: no such kernel"
    rows = {row.contestant: row for row in measure(made, Gate(wrong, {}), CPU, ["forward"])}
    assert rows[name].median > 0 and rows[name].error == ""
    assert rows["broken"].median is None and rows["broken"].error == wrong["broken"]
    assert rows["failing"].median is None


def test_a_wrong_gradient_is_seen():
    made = problem("strided_attention")
    right = made.contestants["ebft torch"]

    def run(q, k, v):
        return right.run(q, k.detach() * 0.999 + k * 0.001, v)

    found = errors(made._replace(contestants={"half a gradient": Contestant(run)}))
    assert "tensor 2" in found["half a gradient"]


def test_the_work_is_that_of_the_visible_pairs():
    layout = StridedLayout.strided(2, 30, context=4, stride=3, horizon=5, samples=2)
    assert visible_pairs(layout) == int(layout.dense_mask().sum())


def test_what_is_written(tmp_path):
    made = problem("feature_matching")
    rows = [*measure(made, Gate({"batched SVD": "tensor 0: wrong"}, {"SVD loop over anchors": 2.0}), CPU)]
    assert {row.direction for row in rows} == {"forward"}
    assert rows[-1].contestant == FLOOR and rows[-1].median > 0
    choices = {"feature_matching": choice("feature_matching", CPU, torch.float32)}
    text = markdown("the machine", choices, rows)
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "| batched SVD | tensor 0: wrong |" in text and "### feature_matching, forward" in text
    assert "* feature_matching: impl='auto' takes" in text and "| 2.000 s |" in text
    write_json(tmp_path / "rows.json", "the machine", choices, rows)
    read = json.loads((tmp_path / "rows.json").read_text())
    assert read["machine"] == "the machine" and len(read["rows"]) == len(rows)
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib; all else was compared")
    plot(tmp_path / "rows.png", "the machine", rows)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_the_gate_runs_everyone_once(monkeypatch):
    passed = gate("mean_embedding_loss", MODEL, GEOMETRY, torch.float32, CPU)
    assert set(passed.wrong) == set(passed.cold) and not any(passed.wrong.values()) and min(passed.cold.values()) > 0
    assert list(gate("mean_embedding_loss", MODEL, GEOMETRY, torch.float32, CPU, only="plain").wrong) == [
        "plain PyTorch"
    ]

    def failing(*_inputs):
        raise RuntimeError("no such kernel")

    made = PROBLEMS["mean_embedding_loss"]
    broken = lambda *args: made(*args)._replace(contestants={"failing": Contestant(failing)})  # noqa: E731
    monkeypatch.setitem(PROBLEMS, "mean_embedding_loss", broken)
    passed = gate("mean_embedding_loss", MODEL, GEOMETRY, torch.float32, CPU)
    assert passed == Gate({"failing": "RuntimeError: no such kernel"}, {})


def test_the_choice_says_why_not_another(monkeypatch):
    monkeypatch.setattr(_native, "why_not", lambda _device_type: "not built")
    said = choice("strided_attention", CPU, torch.float64)
    assert said.startswith("strided_attention: impl='auto' takes 'torch' (not 'triton': it computes in ")
    assert said.endswith("; not 'native': not built)")
    assert choice("linear_log_probs", CPU, torch.float32) == (
        "linear_log_probs: impl='auto' takes 'torch' (not 'native': not built)"
    )


def test_nothing_compiled_earlier_is_found(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    with compiling_anew():
        folder = Path(os.environ["TRITON_CACHE_DIR"])
        assert folder.is_dir() and not list(folder.iterdir())
    assert os.environ["TRITON_CACHE_DIR"] == "kept"
