"""The comparison of objectives at toy scale: run, interrupted, gone on with, reported; and its parts by themselves."""

from __future__ import annotations

import gc
import importlib
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "compare_objectives"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return {name: importlib.import_module(name) for name in ("compare", "tasks", "tables")}


@pytest.fixture
def compare(modules, monkeypatch):
    """With two of the objectives, which between them have every term; without transformers' garbage collections."""
    module = modules["compare"]
    monkeypatch.setattr(module, "OBJECTIVES", {name: module.OBJECTIVES[name] for name in ("rlvr", "ebft+ce")})
    gc.freeze()
    yield module
    gc.unfreeze()


@pytest.mark.heavy
def test_it_runs_is_gone_on_with_and_reports(compare, tmp_path, capsys):
    command = [str(tmp_path), "--scale", "toy"]
    compare.main([*command, "--minutes", "0"])
    assert not (tmp_path / "results.jsonl").exists() and "goes on from here" in capsys.readouterr().out
    compare.main([*command, "--task", "pairs"])
    first = (tmp_path / "results.jsonl").read_text()
    weights = (tmp_path / "weak" / "model.safetensors").read_bytes()
    compare.main(command)
    whole = (tmp_path / "results.jsonl").read_text()
    assert whole.startswith(first) and (tmp_path / "weak" / "model.safetensors").read_bytes() == weights
    lines = [json.loads(line) for line in whole.splitlines()]
    stages = [line["cell"]["stage"] for line in lines]
    assert (stages.count("base"), stages.count("select"), stages.count("test")) == (4, 16, 16)
    assert len({json.dumps(line["cell"]) for line in lines}) == 36
    for line in lines:
        assert 0 <= line["metrics"]["verifier_reward"] <= 1 and line["metrics"]["cross_entropy"] > 0
        assert ("parse_rate" in line["metrics"]) == (line["cell"]["stage"] != "select")
        assert ("tokens_per_step" in line) == (line["cell"]["stage"] != "base")

    document = tmp_path / "document.md"
    document.write_text("before\n<!-- results of: toy -->\nold\n<!-- end -->\nafter\n")
    capsys.readouterr()
    compare.main([*command, "--report"])
    printed = capsys.readouterr().out
    compare.main([*command, "--report", "--write", str(document)])
    assert document.read_text() == f"before\n<!-- results of: toy -->\n\n{printed[:-1]}\n<!-- end -->\nafter\n"
    assert "20 of 20 evaluated runs and 16 runs" in printed and printed.count(" start\n") == 4
    values = [x["metrics"]["cross_entropy"] for x in lines if _is(x, "test", "code", "warm", "ebft+ce")]
    assert len(values) == 2 and f"{sum(values) / 2:.4f} ± {abs(values[0] - values[1]) / 2**0.5:.4f}" in printed

    with pytest.raises(ValueError, match="OUTPUT: expected results with scale = small, got toy"):
        compare.main([str(tmp_path), "--scale", "small", "--report"])
    for wrong, message in (
        ([*command, "--write", str(document)], "--write: expected together with --report"),
        ([str(tmp_path / "empty"), "--report"], "OUTPUT: expected a folder with results.jsonl, got '"),
    ):
        with pytest.raises(SystemExit):
            compare.main(wrong)
        assert message in capsys.readouterr().err


def _is(line: dict, *names: str) -> bool:
    return tuple(line["cell"][key] for key in ("stage", "task", "start", "objective")) == names


def test_a_cell_is_deterministic_and_needs_its_rows(compare, tmp_path):
    workshop = compare.Workshop(tmp_path, compare.SCALES["toy"])
    cell = compare.Cell(stage="select", task="pairs", start="warm", objective="ebft+ce", learning_rate=1e-3)
    first, again = compare.run_cell(cell, workshop), compare.run_cell(cell, workshop)
    assert first["metrics"] == again["metrics"]
    other = compare.run_cell(compare.Cell(**{**compare.asdict(cell), "seed": 1}), workshop)
    assert other["metrics"] != first["metrics"]
    workshop.task("pairs").train.clear()
    with pytest.raises(ValueError, match="train_files: expected 1 rows for 'pairs', got 0"):
        compare.run_cell(cell, workshop)


def test_each_objective_chooses_by_what_it_minimises(modules, tmp_path):
    compare = modules["compare"]
    settings, results = compare.SCALES["toy"], compare.Results(tmp_path, "toy")
    metrics = {
        1e-4: {"cross_entropy": 2.0, "feature_matching_loss": 0.9, "verifier_reward": 0.5},
        1e-3: {"cross_entropy": 2.5, "feature_matching_loss": 0.6, "verifier_reward": 0.4},
    }
    expected = {"sft": (2.0, 2.5), "rlvr": (-0.5, -0.4), "ebft": (0.9, 0.6), "ebft+ce": (2.9, 3.1)}
    chosen = {}
    for cell in compare.cells(results, settings, ["code"]):
        if cell.start == "weak" and cell.stage == "test":
            chosen[cell.objective] = cell.learning_rate
        results.add(cell, {"metrics": metrics.get(cell.learning_rate, {})})
    assert chosen == {"sft": 1e-4, "rlvr": 1e-4, "ebft": 1e-3, "ebft+ce": 1e-4}
    for objective, values in expected.items():
        found = compare.validation_values(results, settings, "code", "warm", objective)
        assert found == pytest.approx(dict(zip(metrics, values, strict=True)))
        assert compare.validation_values(results, settings, "pairs", "warm", objective) == {}
    assert compare.Results(tmp_path, "toy").lines == results.lines


def test_what_counts_as_python(modules):
    is_python = modules["tasks"].is_python
    prompt = "def f(x):\n"
    cut = {"    return x\n": True, "    return (x\n": True, "    return x": False, "    return )\n": False}
    cut |= {"    y = 1\n    'no end": True, "    y = 1\n  z = 2\n": False, "": False, "\0\n": False}
    assert {text: is_python(prompt, text, ended=False) for text in cut} == cut
    ended = {"    return x": True, "    return (x": False, "": False, "    return x\n": True, "    '''": False}
    assert {text: is_python(prompt, text, ended=True) for text in ended} == ended


def test_pairs_are_cut_behind_the_docstring(modules):
    source = '''
class A:
    @property
    def f(self):
        """One.

        Two.
        """
        # Three.
        return 1

    def g(self): "No room."; return 2

    def h(self):
        return 3

def i():
    """Nothing else."""
'''
    pairs = list(modules["tasks"].docstring_pairs(source))
    assert pairs == [('def f(self):\n    """One.\n\n    Two.\n    """\n', "    # Three.\n    return 1\n")]


def test_validation_and_test_share_no_family(modules):
    family = modules["tasks"].family
    validation, test = ({family(file.name) for file in part} for part in modules["tasks"].held_out_files())
    assert validation and len(test) > len(validation) and not validation & test


def test_the_verdict_names_what_is_within_the_spread(modules):
    tables = modules["tables"]
    validation = {("code", "warm", name): {1e-4: 0.5} for name in ("sft", "rlvr", "ebft")}
    values = {"base": [3.0], "sft": [1.0, 1.2], "rlvr": [1.3, 1.3], "ebft": [1.2, 1.4]}
    lines = []
    for objective, numbers in values.items():
        for value in numbers:
            names = [*tables._COLUMNS, "feature_matching_loss_h1", "alignment_h1", "parse_rate_of_real_text"]
            cell = {"stage": "test", "task": "code", "start": "warm", "objective": objective}
            cell["learning_rate"] = 0.0 if objective == "base" else 1e-3
            cost = {"seconds": 1.0, "cpu_seconds_per_step": 0.5, "tokens_per_step": 64.0}
            lines.append({"cell": cell, "metrics": dict.fromkeys(names, value), **cost})
    made_with = {"scale": "toy", "learning_rates": [1e-4, 1e-3], "seeds": [1, 2], "versions": {"python": "3"}}
    text = tables.report(lines, made_with, validation)
    assert "7 of 7 evaluated runs" in text and "| sft | 0.001 (end of the grid) | 1.1000 ± 0.1414 |" in text
    assert "| sft | 0.5000 | - |" in text
    assert "| Python source, warm | cross-entropy | sft | ebft |" in text
    assert "| Python source, warm | parse rate | base | - |" in text


def test_a_document_needs_its_markers(modules, tmp_path):
    document = tmp_path / "document.md"
    document.write_text("<!-- results of: small -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="write: expected '<!-- results of: toy -->' and '<!-- end -->' once"):
        modules["tables"].update_document(document, "toy", "text")
