"""The command line from end to end on a tiny model, and one line for everything that is wrong with its input."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_trainer import cli, run_folder
from ebft_trainer.checkpoint import check_whole
from ebft_trainer.config import EBFTOptions
from ebft_trainer.monitor import read_log

SMALL = "--length 48 --context 4 --stride 6 --horizon 3 --samples 2 --eval-rows 4 --max-steps 4 --save-steps 2 --bf16"
SMALL += " --per-device-train-batch-size 2 --learning-rate 1e-3 --logging-steps 2 --eval-fraction 0.2"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40)), encoding="utf-8")
    return path


@pytest.fixture
def train(model_folder, text, tmp_path):
    """Runs ``ebft-train train`` with more options."""

    def run(*more: object) -> None:
        arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *SMALL.split()]
        cli.main([str(argument) for argument in (*arguments, *more)])

    return run


def error_of(capsys, arguments: list[object]) -> str:
    """The one line that a command ends with before it does anything."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    *before, line = captured.err.splitlines()
    # transformers may have shown that it read the weights of another model, and what was imported is said.
    assert all("Loading weights" in text or not text or " is from " in text for text in before)
    assert line.startswith("ebft-train: error: ")
    return line.removeprefix("ebft-train: error: ")


def test_train_resume_and_evaluate(train, model_folder, text, tmp_path, capsys):
    output = tmp_path / "run"
    train()
    run = json.loads((output / "ebft.json").read_text())
    assert run["model"] == str(model_folder) and run["options"]["horizon"] == 3
    results = json.loads((output / "results.json").read_text())
    assert {"before", "after", "log"} == set(results)
    assert results["before"]["eval_cross_entropy"] != results["after"]["eval_cross_entropy"]
    assert sum("loss" in line for line in results["log"]) == 2
    assert sorted(path.name for path in output.iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
        "config.yaml",
        "ebft.json",
        "log.jsonl",
        "model",
        "results.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert len(AutoTokenizer.from_pretrained(output / "model")) == model.config.vocab_size
    table = capsys.readouterr().out
    assert "feature_matching_loss_h3" in table and f"model: {output / 'model'}" in table

    # Further steps from the last checkpoint; the folder's final model is replaced.
    before = model.get_input_embeddings().weight
    train("--resume", "--max-steps", "6")
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"after", "log"} and results["log"][-1]["step"] == 6
    assert (output / "checkpoint-6").is_dir()
    after = AutoModelForCausalLM.from_pretrained(output / "model").get_input_embeddings().weight
    assert not torch.equal(before, after)

    # Evaluation compares in the features of the model that the run started from.
    file = tmp_path / "numbers.json"
    geometry = SMALL[: SMALL.index("--max-steps")].split()
    arguments = ["evaluate", "--model", output / "model", "--data", text, "--output", file, *geometry]
    cli.main([str(argument) for argument in arguments])
    assert f"features of {model_folder}" in capsys.readouterr().out
    numbers = json.loads(file.read_text())
    assert numbers["feature_model"] == str(model_folder)
    cli.main([str(argument) for argument in [*arguments[:5], *geometry, "--feature-model", output / "model"]])
    assert f"features of {output / 'model'}" in capsys.readouterr().out


def test_a_run_can_be_overwritten_and_nothing_else(train, tmp_path):
    train("--eval-fraction", "0", "--max-steps", "1")
    assert "before" not in json.loads((tmp_path / "run" / "results.json").read_text())
    mine, old = tmp_path / "run" / "notes.txt", tmp_path / "run" / "checkpoint-7"
    mine.touch()
    old.mkdir()
    train("--eval-fraction", "0", "--max-steps", "1", "--overwrite")
    assert mine.exists() and not old.exists() and (tmp_path / "run" / "results.json").exists()


def test_held_out_data_may_be_given(train, text, tmp_path):
    train("--eval-data", text, "--eval-fraction", "0", "--max-steps", "2", "--eval-steps", "1")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 1, 2, 2]
    assert "before" in json.loads((tmp_path / "run" / "results.json").read_text())


def test_objectives_of_the_command_line(train, tmp_path):
    options = "--objective rlvr --verifier char_f_score --kl-coef 0.1 --eos-token-ids --max-steps 1 --logging-steps 1"
    train(*options.split())
    run = json.loads((tmp_path / "run" / "ebft.json").read_text())["options"]
    assert (run["objective"], run["rl_coef"], run["verifier_coef"], run["eos_token_ids"]) == ("rlvr", 0, 1, [])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (line,) = (line for line in results["log"] if "loss/verifier" in line)
    assert "loss/kl" in line and "eos_rate" not in line and "loss/rl" not in line
    assert 0 <= results["after"]["eval_verifier_reward"] <= 1


def test_several_documents_are_held_out_whole(model_folder, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"2 + {i} = ", "completion": "four, " * 5}) for i in range(10)))
    arguments = ["train", "--model", model_folder, "--data", data, "--output", tmp_path / "run", *SMALL.split()]
    cli.main([str(argument) for argument in [*arguments, "--max-steps", "1"]])
    assert "perplexity" in capsys.readouterr().out


def test_columns_and_conversations_by_option(model_folder, tmp_path):
    """From a table with other columns too; the template is the trained model's from then on."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}")
    chat = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "four, " * 3}]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "\n".join(json.dumps({"text": "", "chat": chat, "question": "two?", "reply": "no " * 9}) for _ in "ab")
    )
    for i, columns in enumerate(
        (
            ["--messages-column", "chat", "--chat-template", template],
            ["--prompt-column", "question", "--completion-column", "reply", "--pack"],
        )
    ):
        arguments = ["train", "--model", model_folder, "--data", data, "--output", tmp_path / f"run{i}", *SMALL.split()]
        arguments += ["--max-steps", "1", "--eval-fraction", "0", *columns]
        cli.main([str(argument) for argument in arguments])
    assert AutoTokenizer.from_pretrained(tmp_path / "run0" / "model").chat_template == template.read_text()
    own = AutoTokenizer.from_pretrained(model_folder).chat_template
    assert own != template.read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "run1" / "model").chat_template == own


def test_a_stream_is_trained_on_and_resumed(train, text, tmp_path, capsys):
    stream = ("--stream", "--eval-fraction", "0", "--shuffle-buffer", "5")
    train(*stream, "--eval-data", text)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"before", "after", "log"} == set(results)
    train(*stream, "--eval-data", text, "--max-steps", "6", "--resume")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["log"][-1]["step"] == 6
    arguments = ["train", "--model", tmp_path / "tiny-model", "--data", text, "--output", tmp_path / "run"]
    message = error_of(capsys, [*arguments, *SMALL.split(), *stream[:-1], "6", "--eval-data", text, "--resume"])
    assert message.startswith("rows.shuffle_buffer: to resume expected what the run was started with, 5; got 6")


def test_a_folder_that_holds_something_is_refused(model_folder, text, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["train", "--model", model_folder, "--data", text, "--output", output, *SMALL.split()]
    output.mkdir()
    (output / "letter.txt").touch()
    assert error_of(capsys, arguments).endswith("is not empty; choose another folder")
    assert "holds files but no ebft.json" in error_of(capsys, [*arguments, "--overwrite"])
    assert "expected a run with a checkpoint to resume" in error_of(capsys, [*arguments, "--resume"])
    (output / "ebft.json").write_text("{}")
    assert "expected a run with a checkpoint to resume" in error_of(capsys, [*arguments, "--resume"])
    assert error_of(capsys, arguments).endswith("is not empty; --resume or --overwrite it")
    assert sorted(path.name for path in output.iterdir()) == ["ebft.json", "letter.txt"]
    assert "expected a folder, got the file" in error_of(capsys, [*arguments[:6], text, *SMALL.split()])


def test_a_damaged_checkpoint_is_one_line(train, model_folder, text, tmp_path, capsys):
    train("--max-steps", "2")
    os.truncate(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", 10)
    arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *SMALL.split()]
    line = error_of(capsys, [*arguments, "--resume"])
    assert line.startswith("resume_from_checkpoint:") and "is damaged: expected " in line
    assert error_of(capsys, [*arguments, "--output", "/proc/run"]).startswith(
        "output_dir: expected a folder that can be written to, got '/proc/run'"
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_run_is_not_resumed(train, model_folder, text, tmp_path, capsys):
    train("--max-steps", "2")
    before = contents(tmp_path / "run")
    resume = [
        "train",
        "--model",
        model_folder,
        "--data",
        text,
        "--output",
        tmp_path / "run",
        *SMALL.split(),
        "--resume",
    ]
    expected = "to resume expected what the run was started with"
    for changes, message in (
        (["--horizon", "2"], f"options.horizon: {expected}, 3; got 2"),
        (["--length", "40"], f"rows.length: {expected}, 48; got 40"),
        (["--lora-rank", "2"], f"lora: {expected}, null; got nothing; lora.rank: {expected}, nothing; got 2"),
        (["--learning-rate", "2e-3"], f"training.learning_rate: {expected}, 0.001; got 0.002"),
        (["--weight-decay", "0.1"], f"training.weight_decay: {expected}, 0.0; got 0.1"),
        (["--gradient-accumulation-steps", "2"], f"training.gradient_accumulation_steps: {expected}, 1; got 2"),
        (["--data", Path(__file__)], f"data: {expected}"),
    ):
        assert error_of(capsys, [*resume, *changes]).startswith(message)
    text.write_text(text.read_text().replace("x + 1", "x - 1"))
    assert f"contents.data.{text}: {expected}" in error_of(capsys, resume)
    assert contents(tmp_path / "run") == before
    # Wanted, and said.
    train("--resume", "--allow-changes", "--max-steps", "3", "--learning-rate", "2e-3")
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ebft-train: warning: ")]
    assert len(warnings) == 2 and "contents.data" in warnings[0] and "training.learning_rate" in warnings[1]
    assert json.loads((tmp_path / "run" / "ebft.json").read_text())["training"]["learning_rate"] == 2e-3
    model = tmp_path / "tiny-model" / "model.safetensors"
    weights = load_file(model)
    save_file({name: x + 1 for name, x in weights.items()}, model, {"format": "pt"})
    assert "contents.model: to resume expected" in error_of(capsys, [*resume, "--learning-rate", "2e-3"])


def test_resume_auto_starts_resumes_and_starts_anew(train, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    def fail(*_args, **_options):
        raise OSError("no more")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(cli.EBFTTrainer, "train", fail)
        train("--resume", "auto")
    assert ended.value.code == 1 and capsys.readouterr().err.endswith("ebft-train: error: no more\n")
    (run / "log.jsonl").write_text("the log of the start that failed")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "ebft.json", "log.jsonl"]
    train("--resume", "auto", "--max-steps", "2")
    assert "before" in json.loads((run / "results.json").read_text())
    train("--resume", "auto")
    assert [line["step"] for line in read_log(run / "log.jsonl") if "loss" in line] == [2, 4]
    assert "before" not in json.loads((run / "results.json").read_text())


def test_inputs_inside_the_output_are_never_deleted(train, model_folder, text, tmp_path, capsys):
    run = tmp_path / "run"
    train("--max-steps", "1")
    (run / "data.txt").write_text(text.read_text())
    before = contents(run)
    overwrite = ["--output", run, *SMALL.split(), "--overwrite"]
    for inputs, message in (
        (["--model", run / "model", "--data", text], f"got --model '{run / 'model'}'; nothing was deleted"),
        (["--model", model_folder, "--data", run / "data.txt"], f"got --data '{run / 'data.txt'}'"),
        (["--model", model_folder, "--data", text, "--eval-data", run, "--eval-fraction", "0"], "got --eval-data"),
        (["--model", model_folder, "--data", text, "--chat-template", run / "data.txt"], "got --chat-template"),
    ):
        assert message in error_of(capsys, ["train", *inputs, *overwrite])
    assert contents(run) == before


@pytest.mark.parametrize("when", ["training", "evaluation"])
def test_a_signal_ends_a_run_with_a_code_of_its_own(train, tmp_path, monkeypatch, capsys, when):
    if when == "training":
        after = lambda trainer: trainer.state.global_step == 1  # noqa: E731
        name, original = "compute_loss", cli.EBFTTrainer.compute_loss
    else:
        after = lambda trainer: trainer.state.global_step == 4  # noqa: E731
        name, original = "evaluate", cli.EBFTTrainer.evaluate

    def interrupted(trainer, *args, **options):
        if after(trainer):
            signal.raise_signal(signal.SIGTERM)
        return original(trainer, *args, **options)

    train("--output", tmp_path / "whole")
    capsys.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(cli.EBFTTrainer, name, interrupted)
        train()
    assert ended.value.code == 75
    saved = tmp_path / "run" / f"checkpoint-{2 if when == 'training' else 4}"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"ebft-train: stopped by SIGTERM; saved as {saved}; --resume goes on from there"
    assert not (tmp_path / "run" / "ebft.lock").exists() and not (tmp_path / "run" / "model").exists()
    train("--resume", "auto")
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())


def test_ctrl_c_before_the_run_begins_is_one_line(monkeypatch, capsys):
    def interrupted(_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prepare_info", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info"])
    assert ended.value.code == 130 and capsys.readouterr().err == "ebft-train: interrupted\n"


def ended_with(capsys, train, *options: object) -> str:
    """The one line of a run that breaks on the way."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train(*options)
    assert ended.value.code == 1
    return capsys.readouterr().err.splitlines()[-1].removeprefix("ebft-train: error: ")


def test_a_folder_that_is_deleted_meanwhile_is_an_error(train, tmp_path, monkeypatch, capsys):
    """While it trains, where the log notices, and in the last evaluation."""
    original = {name: getattr(cli.EBFTTrainer, name) for name in ("compute_loss", "evaluate")}
    for name, step in (("compute_loss", 1), ("evaluate", 4)):

        def deleting(trainer, *args, _name=name, _step=step, **options):
            if trainer.state.global_step == _step:
                shutil.rmtree(tmp_path / "run")
            return original[_name](trainer, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(cli.EBFTTrainer, name, deleting)
            line = ended_with(capsys, train)
        assert line.startswith("output: ") and "no such folder" in line or "was deleted while" in line
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("owner", "name", "limit", "message"),
    [
        (cli.EBFTTrainer, "evaluate", 100, r"cannot write '.*log.jsonl': File too large \(.* GB free\)$"),
        (cli.EBFTTrainer, "save_model", 9999, "cannot write the final model to '.*run' with .* is .*checkpoint-4$"),
        (cli, "write_json", 9, r"cannot write '.*results.json': File too large \(.* GB free\)$"),
    ],
)
def test_a_full_disk_at_the_end_is_one_line(train, tmp_path, monkeypatch, capsys, owner, name, limit, message):
    """A limit of the size of files, from the first use of a function after the training on."""
    run, original = tmp_path / "run", getattr(owner, name)

    def full(*args, **options):
        if (run / "checkpoint-4").exists():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return original(*args, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            line = ended_with(capsys, train)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert re.match(f"output: {message}", line), line
    assert not list(run.glob("*.tmp")) and not (run / "_unfinished").exists() and not (run / "ebft.lock").exists()
    check_whole(run / "checkpoint-4")
    assert read_log(run / "log.jsonl")[-1]["step"] == 4
    train("--resume")
    assert (run / "model").is_dir() and (run / "results.json").is_file()


def test_a_verifier_that_fails_later_is_one_line(train, tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards.py").write_text("f = lambda prompt, completion, target: 1 if completion == target else [][0]")
    monkeypatch.chdir(tmp_path)
    line = ended_with(capsys, train, "--verifier", "rewards:f")
    assert line.startswith("verifier: expected a number, got IndexError: list index out of range for the completion ")


def test_what_a_neighbouring_file_names_is_said_before_it_is_loaded(model_folder, text, tmp_path, capsys):
    run = tmp_path / "download"
    shutil.copytree(model_folder, run / "model")
    evaluate = ["evaluate", "--model", run / "model", "--data", text, *SMALL[: SMALL.index("--max-steps")].split()]
    (run / "ebft.json").write_text(json.dumps({"model": "./nowhere"}))
    with pytest.raises(SystemExit):
        cli.main([str(argument) for argument in evaluate])
    captured = capsys.readouterr()
    assert f"features of ./nowhere, which {run / 'model'} was trained from, says {run / 'ebft.json'};" in captured.out
    assert "got './nowhere', which does not exist" in captured.err
    for content, message in (
        ("{", "expected a JSON object"),
        ("{}", "expected 'model' as a name, got None"),
        ('{"model": 3}', "expected 'model' as a name, got 3"),
    ):
        (run / "ebft.json").write_text(content)
        assert error_of(capsys, evaluate).startswith(f"{run / 'ebft.json'}: {message}")
    cli.main([str(argument) for argument in [*evaluate, "--feature-model", model_folder]])


def test_code_that_comes_with_a_model_is_not_run(model_folder, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to whoever asks whether it may
    for file, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((model_folder / file).read_text())
        remote = {"auto_map": {key: "code.Model" if "Model" in key else ["code.Model", None]}, "model_type": "unheard"}
        (model_folder / file).write_text(json.dumps(settings | remote | {"tokenizer_class": "Unheard"}))
        (model_folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
        assert error_of(capsys, ["evaluate", "--model", model_folder, "--data", text]).startswith("model: ")
        (model_folder / file).write_text(json.dumps(settings))
    assert not (tmp_path / "ran").exists()


def test_a_second_run_in_the_folder_is_refused(train, model_folder, text, tmp_path, capsys):
    train("--max-steps", "1")
    before = contents(tmp_path / "run")
    # Another process: a lock that this process did not take through `owned`.
    lock = run_folder._Lock(tmp_path / "run")
    arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *SMALL.split()]
    for option in ("--resume", "--overwrite"):
        assert f"is in use by process {os.getpid()} on host" in error_of(capsys, [*arguments, option])
    lock.release()
    assert contents(tmp_path / "run") == before


def test_a_folder_that_another_run_filled_meanwhile_is_left_alone(train, tmp_path, monkeypatch, capsys):
    """Both found it empty; the other one was quicker."""
    original = cli.EBFTTrainer.__init__

    def slow(trainer, *args, **options):
        original(trainer, *args, **options)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "ebft.json").write_text("{}")

    monkeypatch.setattr(cli.EBFTTrainer, "__init__", slow)
    with pytest.raises(SystemExit) as ended:
        train()
    assert ended.value.code == 2 and "another process wrote to it meanwhile" in capsys.readouterr().err
    assert contents(tmp_path / "run") == {str(tmp_path / "run" / "ebft.json"): b"{}"}
    (tmp_path / "run" / "checkpoint-3").mkdir()
    with pytest.raises(run_folder.FolderInUse, match="output: another process wrote to .* meanwhile; start again"):
        cli._begin(tmp_path / "run", {"resume": True}, "checkpoint-2", {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--horizon", "0"], "horizon: expected at least 1, got 0"),
        (["--horizon", "many"], "argument --horizon: invalid int value: 'many'"),
        (["--pooling", "max"], "argument --pooling: invalid choice"),
        (["--objective", "dpo"], "argument --objective: invalid choice: 'dpo'"),
        (["--objective", "rlvr"], "verifier: expected one with verifier_coef = 1.0, got None"),
        (["--verifier", "bleu"], "verifier: expected 'exact_match', 'parses_as_python', 'char_f_score' or"),
        (["--feature-map", "no_such_module:f"], "feature_map: cannot load 'no_such_module:f'"),
        (["--feature-layers", "half"], "argument --feature-layers: invalid"),
        (["--feature-layers", "9"], "layers: expected layer numbers from 0 to 4"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--length", "6"], "length: expected at least context + horizon = 4 + 3 tokens, got 6"),
        (["--data", "nowhere.txt"], "data: expected a file or folder, got 'nowhere.txt', which does not exist"),
        (["--eval-fraction", "0", "--eval-data", "nowhere.txt"], "got 'nowhere.txt', which does not exist"),
        (["--eval-data", "nowhere.txt"], "eval_fraction: expected none with --eval-data, got 0.2"),
        (["--stream"], "eval_fraction: expected none with --stream, got 0.2"),
        (
            ["--stream", "--max-steps", "-1"],
            "max_steps: expected --max-steps with --stream, which never ends, got none",
        ),
        (["--shuffle-buffer", "9"], "shuffle_buffer: expected --stream with it, got 9 without"),
        (["--data", "hub:nobody/nothing"], "data: cannot load 'hub:nobody/nothing': Couldn't reach"),
        (["--text-column", "a", "--messages-column", "b"], "expected columns of one kind"),
        (["--learning-rate", "nan"], "argument --learning-rate: expected a finite number, got nan"),
        (["--max-grad-norm", "inf"], "argument --max-grad-norm: expected a finite number, got inf"),
        (["--temperature", "-inf"], "argument --temperature: expected"),
        (["--allow-changes"], "allow_changes: expected --resume with it, got none"),
        (["--verifier", "math:sqrt"], "verifier: expected a number, got TypeError: math.sqrt() takes exactly one arg"),
        (["--feature-map", "math:sqrt"], "feature_map: expected 'math:sqrt' to give a FeatureMap, got TypeError: "),
        (["--resume", "perhaps"], "argument --resume: invalid choice: 'perhaps'"),
        (["--chat-template", "nowhere.jinja"], "No such file or directory: 'nowhere.jinja'"),
        (["--eval-fraction", "2"], "eval_fraction: expected a number between 0 and 1, got 2.0"),
        (["--model", "./nowhere"], "model: expected a model folder or hub name, got './nowhere', which does not exist"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(model_folder, text, tmp_path, capsys, changes, message):
    arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *SMALL.split()]
    assert message in error_of(capsys, [*arguments, *changes])
    assert not (tmp_path / "run").exists()


def test_bad_data_and_models_are_one_line(model_folder, text, tmp_path, capsys):
    arguments = ["evaluate", "--model", model_folder, "--data", text]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder").mkdir()
    assert "which is empty" in error_of(capsys, [*arguments, tmp_path / "empty.txt"])
    assert "byte 0xe9 at offset 3" in error_of(capsys, [*arguments, tmp_path / "latin.txt"])
    message = f"model: no tokenizer can be loaded from '{tmp_path / 'folder'}', expected files such as tokenizer.json"
    assert message in error_of(capsys, [*arguments, "--model", tmp_path / "folder"])
    assert message in error_of(capsys, [*arguments, "--feature-model", tmp_path / "folder"])
    for file in model_folder.glob("tokenizer*"):
        file.rename(tmp_path / "folder" / file.name)
    assert "model: no tokenizer can be loaded" in error_of(capsys, arguments)
    assert "model: cannot load" in error_of(capsys, [*arguments, "--model", tmp_path / "folder"])
    assert "output: expected a new file" in error_of(capsys, [*arguments, "--output", text])


def test_every_option_of_the_method_is_an_option_of_the_command(capsys):
    for command in ("train", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for option in fields(EBFTOptions):
            assert f"--{option.name.replace('_', '-')} " in text
            assert " ".join(option.metadata["help"].split()) in text
        assert "(0.25 0.5 0.75)" in text


def test_info_names_versions_and_implementations(capsys):
    cli.main(["info"])
    out = capsys.readouterr().out
    for name in ("torch", "transformers", "threads", "strided_attention", "feature_matching"):
        assert any(line.startswith(f"{name} ") for line in out.splitlines()), name


def test_a_command_is_needed(capsys):
    assert "arguments are required: COMMAND" in error_of(capsys, [])
    assert "invalid choice: 'trian'" in error_of(capsys, ["trian"])


def test_ranks_are_left_before_the_interpreter_goes():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    cli._leave_ranks()
    assert not torch.distributed.is_initialized()
    cli._leave_ranks()
