"""Options from dataclasses: what the command line and a file give, and that a run's own file gives the same run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from ebft_trainer import __main__, cli
from ebft_trainer.arguments import given
from ebft_trainer.card import changed_options
from ebft_trainer.config import EBFTConfig, checkpointing_field

NEEDED = ["train", "--model", "m", "--data", "d", "e", "--output", "run"]


def resolved(arguments: list[str]) -> tuple[cli.TrainArguments, EBFTConfig, bytes]:
    parsed = cli._parser().parse_args(arguments)
    options = cli.TrainArguments(**given(cli.TrainArguments, parsed))
    config = cli._config(parsed, **cli._evaluation_of(parsed))
    cli.check_training_data_options(options, config)
    return options, config, cli._resolved(options, config, parsed)


def error_of(capsys, arguments: list[object]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(x) for x in arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.err.count("\n") == 1
    return captured.err.removeprefix("ebft-train: error: ")


def test_every_training_argument_is_an_option_or_has_a_reason(capsys):
    train = cli._parser()._subparsers._group_actions[0].choices["train"]
    names = {x.name for x in fields(EBFTConfig) if x.init}
    assert {x.name for x in fields(TrainingArguments) if x.init} <= names
    assert names - set(train.keys) == set(cli._ELSEWHERE) & names
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in text for name in names - {"output_dir", *cli._ELSEWHERE})


def test_both_spellings_and_no_abbreviations(capsys):
    for flag in ("--weight_decay", "--weight-decay"):
        assert resolved([*NEEDED, flag, "0.1"])[1].weight_decay == 0.1
    assert "unrecognized arguments: --weight-dec 0.1" in error_of(capsys, [*NEEDED, "--weight-dec", "0.1"])


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--eval-steps 5 --bf16 --optim adafactor --run-name 1e-3 --report-to none --feature-layers 0.5 1 "
        "--eos-token-ids",
        '--lr-scheduler-type cosine_with_min_lr --lr-scheduler-kwargs {"min_lr":0.1} --save-strategy no --debug'
        " underflow_overflow --stream --max-steps 4 --max-grad-norm 0 --warmup-steps 0.1",
        "--load-best-model-at-end --eval-strategy epoch --save-strategy epoch --no-log-on-each-node --use-cpu",
        '--fsdp --fsdp-config {"min_num_params":2000} --accelerator-config {"even_batches":false} --lora-rank 3',
        "--objective rlvr --verifier exact_match --run-name on --project 1:30 --ce-coef 0.5 --text-column Ä:#",
        f'--{checkpointing_field()} --liger-kernel-config {{"rope":true}} --metric-for-best-model eval_perplexity',
    ],
)
def test_the_file_of_a_run_resolves_to_the_same_run(tmp_path, options):
    arguments, config, content = resolved([*NEEDED, *options.split()])
    (tmp_path / "config.yaml").write_bytes(content)
    again, same_config, same_content = resolved(["train", "--config", str(tmp_path / "config.yaml")])
    assert again == arguments and same_content == content
    different = [x.name for x in fields(config) if x.init and getattr(config, x.name) != getattr(same_config, x.name)]
    assert different == []


def test_what_is_written_down(tmp_path):
    settings = yaml.safe_load(resolved([*NEEDED, "--hub-token", "secret"])[2])
    absent = {"hub_token", "use_cpu", "dataloader_pin_memory", "disable_tqdm", "do_train"}
    assert settings[checkpointing_field()] is False
    assert settings["seed"] == 42 and settings["eval_fraction"] == 0.05 and not absent & set(settings)
    assert "use_cpu" in yaml.safe_load(resolved([*NEEDED, "--use-cpu"])[2])
    # Coefficients of one objective do not outlive it, those that were given do.
    file = tmp_path / "config.yaml"
    file.write_bytes(resolved([*NEEDED, "--kl-coef", "0.1", "--verifier-coef", "2"])[2])
    config = resolved(["train", "--config", str(file), "--objective", "sft"])[1]
    assert (config.rl_coef, config.verifier_coef, config.ce_coef, config.kl_coef) == (0.0, 2.0, 1.0, 0.1)


def test_the_options_in_a_model_card_are_read(tmp_path):
    config = resolved([*NEEDED, "--eval-steps", "5", "--feature-layers", "1", "0.5", f"--{checkpointing_field()}"])[1]
    config.eval_on_start = True  # as `train` does
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(changed_options(config)))
    assert changed_options(resolved([*NEEDED, "--config", str(tmp_path / "card.yaml")])[1]) == changed_options(config)


def test_the_command_line_comes_before_the_file_wherever_it_stands(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: [a, b]\noutput: there\nhorizon: 3\nlearning_rate: 1e-6\nsave_strategy: no\n")
    config = ["--config", str(file)]
    for arguments in (["--horizon", "5", *config], [*config, "--horizon", "5"]):
        options, resolved_config, _ = resolved(["train", *arguments])
        assert options.data == ["a", "b"] and resolved_config.output_dir == "there"
        assert (resolved_config.horizon, resolved_config.learning_rate) == (5, 1e-6)
        assert resolved_config.save_strategy == "no"
    assert resolved(["train", *config, "--data", "c"])[0].data == ["c"]
    assert resolved(["train", *config, "--eval-steps", "7"])[1].eval_strategy == "steps"


def test_depths_and_numbers_of_layers_stay_apart(tmp_path):
    (tmp_path / "run.yaml").write_text("feature_layers: [0.5, 1]\n")
    for arguments in (["--feature-layers", "0.5", "1"], ["--config", str(tmp_path / "run.yaml")]):
        layers = resolved([*NEEDED, *arguments])[1].feature_layers
        assert layers == [0.5, 1] and [type(x) for x in layers] == [float, int]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a mapping of options to values, got nothing"),
        ("- horizon\n", "expected a mapping of options to values, got a list"),
        ("horizon\n", "expected a mapping of options to values, got text"),
        ("3\n", "expected a mapping of options to values, got 3"),
        ("horizon: 3\nseed: 1\nhorizon: 3\n", "horizon: expected once, got it in lines 1 and 3"),
        ("accelerator_config: {a: 1, a: 2}\n", "a: expected once, got it in lines 1 and 1"),
        ("output: a\noutput_dir: b\n", "output_dir: expected once, got it as output_dir too"),
        ("learning_rte: 1\n", "expected an option of this command, got 'learning_rte'; did you mean learning_rate?"),
        ("learning-rate: 1\n", "expected an option of this command, got 'learning-rate'; did you mean learning_rate?"),
        ("no_log_on_each_node: true\n", "did you mean log_on_each_node?"),
        ("3: 4\n", "3: expected an option of this command, got 3"),
        ("do_train: true\n", "do_train: expected no such option here: the command says what is done"),
        ("resume: true\n", "resume: expected no such option here: it belongs on the command line"),
        ("horizon: 3.0\n", "horizon: expected a whole number, got 3.0"),
        ("horizon: true\n", "horizon: expected a whole number, got true"),
        ("horizon: null\n", "horizon: expected a whole number, got null"),
        ("horizon: '3'\n", 'horizon: expected a whole number, got "3"'),
        ("learning_rate: fast\n", 'learning_rate: expected a finite number, got "fast"'),
        ("learning_rate: .nan\n", "learning_rate: expected a finite number, got NaN"),
        ("bf16: yes\n", 'bf16: expected true or false, got "yes"'),
        ("data: text.txt\n", 'data: expected a list (text each), got "text.txt"'),
        ("data: [1]\n", "data: expected a list (text each), got [1]"),
        ("eos_token_ids: [2.5]\n", "eos_token_ids: expected a list (a whole number each) or null, got [2.5]"),
        ("pooling: max\n", 'pooling: expected one of last_token, mean, concat, token, got "max"'),
        ("lr_scheduler_type: straight\n", "lr_scheduler_type: expected one of linear, "),
        ("run_name: 2026-01-01\n", 'run_name: expected text or null, got "2026-01-01"'),
        ("lr_scheduler_kwargs: [1]\n", "lr_scheduler_kwargs: expected a mapping or text or null, got [1]"),
        ("horizon: [\n", "while parsing a flow node"),
        ("x: !!python/object:os.system\n", "could not determine a constructor for the tag"),
        ("horizon: \xff\n", "codec can't decode byte 0xff"),
        ("? [1]\n: 2\n", "found unhashable key"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_and_leaves_nothing(tmp_path, capsys, content, message):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content.encode("latin-1"))
    line = error_of(capsys, ["train", "--model", "m", "--data", "d", "--output", tmp_path / "run", "--config", file])
    assert line.startswith(f"argument --config: {file}: ") and message in line
    assert not (tmp_path / "run").exists()


def test_what_a_file_may_not_say_is_said_of_options_too(tmp_path, capsys):
    """Ranges, and what is missing: as on the command line."""
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nhorizon: 0\n")
    assert "arguments are required: --data, --output" in error_of(capsys, ["train", "--config", file])
    both = ["--config", file, "--data", "d", "--output", tmp_path / "run"]
    assert error_of(capsys, ["train", *both]) == "horizon: expected at least 1, got 0\n"
    assert "expected one file" in error_of(capsys, ["train", *both, "--config", file])
    assert "No such file" in error_of(capsys, ["train", "--config", tmp_path / "none.yaml"])
    assert "did you mean eval_fraction" not in error_of(capsys, ["evaluate", "--config", file, "--data", "d"])
    expected = "eval_steps: expected none with eval_strategy 'epoch', got 3.0"
    assert expected in error_of(capsys, [*NEEDED, "--eval-steps", "3", "--eval-strategy", "epoch"])


def test_a_package_that_transformers_lacks_is_one_line(tmp_path, monkeypatch, capsys):
    def lacking():
        raise ImportError("needs a newer accelerate")

    monkeypatch.setattr(cli, "device_arguments", lacking)
    line = error_of(capsys, [*NEEDED[:-1], tmp_path / "run"])
    assert line.startswith("options of transformers: expected some that it can use, got ImportError('needs a newer")


def test_a_run_and_its_evaluation_from_files(model_folder, tmp_path, capsys):
    """The run that its own file makes elsewhere ends with the same weights."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40)), encoding="utf-8")
    geometry = {"length": 48, "context": 4, "stride": 6, "horizon": 3, "samples": 2, "eval_rows": 4}
    file = tmp_path / "run.yaml"
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "adam_beta2": 0.9}
    inputs = {"model": str(model_folder), "data": [str(text)]}
    file.write_text(yaml.safe_dump(inputs | geometry | training | {"output_dir": str(tmp_path / "one")}))
    cli.main(["train", "--config", str(file)])
    cli.main(["train", "--config", str(tmp_path / "one" / "config.yaml"), "--output", str(tmp_path / "two")])
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two"))
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    written = [yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("one", "two")]
    assert written[0] == written[1] | {"output_dir": str(tmp_path / "one")}
    capsys.readouterr()
    file.write_text(yaml.safe_dump(inputs | geometry))
    cli.main(["evaluate", "--config", str(file), "--model", str(tmp_path / "two" / "model")])
    assert f"features of {model_folder}" in capsys.readouterr().out


def test_what_a_resumed_run_must_agree_in_is_recorded(model_folder):
    parsed = cli._parser().parse_args([*NEEDED[:2], str(model_folder), "--data", __file__, *NEEDED[-2:]])
    arguments = cli.TrainArguments(**given(cli.TrainArguments, parsed))
    record = cli._run_record(arguments, cli._config(parsed))["training"]
    assert set(record) == cli._RECORDED & {x.name for x in fields(EBFTConfig)} and record["adam_beta2"] == 0.999


def imported_by(*arguments: str) -> tuple[str, set[str]]:
    """What a command prints, and which of the slow packages it imports."""
    slow = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")
    script = f"import sys\nfrom ebft_trainer.__main__ import main\nmain({list(arguments)})\n"
    script += f"print(*({{*sys.modules}} & {{*{slow}}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines() or [""]
    return "\n".join(lines), set(last.split())


def test_help_and_version_import_nothing():
    text, imported = imported_by("--help")
    assert not imported and all(f"  {name} " in text for name in __main__.COMMANDS)
    text, imported = imported_by("--version")
    assert not imported and text == f"ebft-train {__main__.version()}"


def test_the_commands_of_the_short_help_are_those_that_there_are(capsys):
    assert set(__main__.COMMANDS) == set(cli._parser()._subparsers._group_actions[0].choices)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"ebft-train {__main__.version()}\n"
    __main__.main(["info"])
    assert "strided_attention" in capsys.readouterr().out


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ebft_trainer.cli")
    monkeypatch.delattr("ebft_trainer.cli")
    monkeypatch.setitem(sys.modules, "transformers.hf_argparser", None)
    monkeypatch.delitem(sys.modules, "ebft_trainer.arguments")
    with pytest.raises(SystemExit) as ended:
        __main__.main(["info"])
    assert ended.value.code == 2
    assert "which is not installed: pip install 'ebft-kernels[trainer]'" in capsys.readouterr().err


def test_the_entry_point_is_the_quick_one():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'ebft-train = "ebft_trainer.__main__:main"' in text
