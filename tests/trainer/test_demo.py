"""The demo at toy size: both runs, the two files, and the same numbers again."""

from __future__ import annotations

import builtins
import json
import math

import pytest

from ebft_trainer import cli, demo
from ebft_trainer.corpus import SourceFile
from ebft_trainer.plots import table, write_json

TOY = demo.Settings(steps=2, rows_per_step=2, length=40, eval_rows=3)


@pytest.fixture
def run(model_folder, tmp_path):
    sources = [SourceFile(f"m{i}", f"def f{i}(x):\n    return x * {i}\n" * 6) for i in range(4)]

    def start(folder: str = "out", settings: demo.Settings = TOY) -> dict:
        return demo.run(tmp_path / folder, settings, sources[1:], sources[:1], model_folder=model_folder)

    return start


@pytest.mark.heavy
def test_it_compares_both_methods_from_one_start_and_is_deterministic(run, tmp_path, capsys):
    results = run()
    printed = capsys.readouterr().out
    assert results == json.loads((tmp_path / "out" / demo.RESULT_FILE).read_text())
    assert (tmp_path / "out" / demo.PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [demo.RESULT_FILE, demo.PLOT_FILE]
    for name in ("base", "ebft", "cross_entropy"):
        assert {"cross_entropy", "perplexity", "feature_matching_loss", "alignment_h1"} <= set(results[name])
        assert all(math.isfinite(value) for value in results[name].values())
        assert f"{results[name]['cross_entropy']:.4f}" in printed
        assert len(results["continuations"][name]) == 3
        for shown in results["continuations"][name]:
            assert len(shown["written"]) == 2 and all(repr(text) in printed for text in shown["written"])
            assert repr(shown["real"]) in printed and shown["prompt"]
    values = [results[name]["cross_entropy"] for name in ("base", "ebft", "cross_entropy")]
    assert len(set(values)) == 3
    seconds = results["seconds"]
    assert set(seconds["ebft"]) == {"step", "rollout", "features", "matching", "policy", "backward and optimizer"}
    assert set(seconds["cross_entropy"]) == {"step", "policy", "backward and optimizer"}
    for part in seconds.values():
        assert sum(part.values()) == pytest.approx(2 * part["step"]) and min(part.values()) >= 0

    again = run("again")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in results.items() if k != "seconds"}
    other = run("other", demo.Settings(**{**demo.asdict(TOY), "seed": 1}))
    assert other["base"] == results["base"] and other["ebft"] != results["ebft"]


def test_without_matplotlib_there_is_a_table_and_no_picture(run, tmp_path, capsys, monkeypatch):
    original = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    run(settings=demo.Settings(**{**demo.asdict(TOY), "steps": 1}))
    printed = capsys.readouterr().out
    assert "no picture: matplotlib is not installed" in printed and "feature-matching loss" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == [demo.RESULT_FILE]


def test_rows_are_full_and_from_one_file_each(byte_tokenizer):
    sources = [SourceFile("a", "x" * 9), SourceFile("b", "y" * 3)]
    rows = [row["input_ids"].tolist() for row in demo.text_rows(sources, byte_tokenizer, 4)]
    x, y, end = (*byte_tokenizer("xy")["input_ids"], byte_tokenizer.eos_token_id)
    assert rows == [[end, x, x, x], [x] * 4, [end, y, y, y]]


@pytest.mark.heavy
def test_any_model_takes_the_place_of_the_shipped_one(model_folder, tmp_path, monkeypatch, capsys):
    sources = [SourceFile(f"m{i}", f"def f{i}(x):\n    return x * {i}\n" * 6) for i in range(4)]
    monkeypatch.setattr(cli, "stdlib_sources", lambda split: sources[1:] if split == "train" else sources[:1])
    output = tmp_path / "out"
    sizes = "--steps 1 --rows-per-step 2 --length 40 --eval-rows 2".split()
    cli.main(["demo", "--model", str(model_folder), "--output", str(output), *sizes])
    results = json.loads((output / demo.RESULT_FILE).read_text())
    assert results["settings"]["learning_rate_ebft"] == results["settings"]["learning_rate_cross_entropy"] == 1e-6
    assert set(results["continuations"]) == {"base", "ebft", "cross_entropy"} and "EBFT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "model: expected a model folder or hub name, got './nowhere'"),
        (["--learning-rate", "0"], "learning_rate_ebft: expected a finite number above 0, got 0"),
        (["--length", "3"], "length: expected at least 16 tokens, got 3"),
        (["--eval-rows", "0"], "eval_rows: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_named_before_anything_is_written(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["demo", "--output", str(tmp_path / "out"), *options])
    assert done.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["steps", "rows_per_step", "eval_rows"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        demo.Settings(**{name: 0})


def test_the_command_refuses_a_used_folder_and_a_bad_number(tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.chdir(tmp_path.parent)  # The default output folder may exist where the tests are started.
    monkeypatch.setattr(demo, "run", lambda output, settings, *_text: calls.append((output, settings)))
    cli.main(["demo", "--output", str(tmp_path / "new"), "--seed", "5", "--steps", "7"])
    assert calls == [(tmp_path / "new", demo.Settings(seed=5, steps=7))]
    (tmp_path / demo.RESULT_FILE).touch()
    cli.main(["demo", "--output", str(tmp_path), "--overwrite"])
    for arguments, message in (
        (["--output", str(tmp_path)], "is not empty; --overwrite it"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["demo", *arguments])
        assert ended.value.code == 2 and message in capsys.readouterr().err
    assert len(calls) == 2


def test_tables_are_aligned():
    assert table(["a", "bb"], [["long", "1"], ["x", "22.5"]]) == ("a       bb\n----  ----\nlong     1\nx     22.5")


def test_json_appears_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"b": [1]})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"b": [1]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"b": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
