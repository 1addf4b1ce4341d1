"""The command line from end to end on a tiny model, and one line for everything that is wrong with its input."""

from __future__ import annotations

import json
import os
from dataclasses import fields

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_trainer import cli
from ebft_trainer.config import EBFTOptions

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
    # transformers may have shown that it read the weights of another model.
    assert all("Loading weights" in text or not text for text in before)
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
    leftover = tmp_path / "run" / "leftover"
    leftover.touch()
    train("--eval-fraction", "0", "--max-steps", "1", "--overwrite")
    assert not leftover.exists() and (tmp_path / "run" / "results.json").exists()


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
    data.write_text("\n".join(json.dumps({"prompt": "2 + 2 = ", "completion": "four, " * 5}) for _ in range(10)))
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
    assert message.startswith("rows: to resume expected")


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


def test_a_run_that_cannot_go_on_ends_with_one_line(train, model_folder, text, tmp_path, capsys):
    train("--max-steps", "2")
    os.truncate(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", 10)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train("--resume")
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 1
    assert line.startswith("ebft-train: error: resume_from_checkpoint:") and "is damaged: expected " in line
    arguments = ["train", "--model", model_folder, "--data", text, "--output", "/proc/run", *SMALL.split()]
    assert error_of(capsys, arguments).startswith(
        "output_dir: expected a folder that can be written to, got '/proc/run'"
    )


def test_another_run_is_not_resumed(train, model_folder, text, tmp_path, capsys):
    train("--max-steps", "2")
    arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *SMALL.split()]
    message = error_of(capsys, [*arguments, "--resume", "--horizon", "2"])
    assert message.startswith("options: to resume expected what the run was started with")
    message = error_of(capsys, [*arguments, "--resume", "--length", "40"])
    assert message.startswith("rows: to resume expected")
    message = error_of(capsys, [*arguments, "--resume", "--lora-rank", "2"])
    assert message.startswith("lora: to resume expected")


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
