"""`ebft-train`: train, evaluate, report, plan, demo, info."""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import json
import logging
import math
import platform
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

import ebft_kernels

from . import demo
from .checkpoint import CheckpointError
from .cli_data import (
    ROW_OPTIONS,
    add_data_options,
    add_training_data_options,
    chat_template_of,
    check_training_data_options,
    rows_of,
    source_of,
    train_and_eval_rows,
)
from .config import EBFTConfig, EBFTOptions, checkpointing_field, device_arguments, options_of
from .corpus import stdlib_sources
from .feature_maps import build_feature_map
from .monitor import LOG_FILE, JsonlLog
from .plan import PLAN_OPTIONS, add_plan_arguments, prepare_plan
from .plots import table, write_json
from .report import add_report_arguments, prepare_report
from .results import MODEL_FOLDER, RESULT_FILE, RUN_FILE
from .trainer import EBFTTrainer

# The training arguments that have an option of their own, and its type; everything else is for scripts.
_TRAINING: dict[str, type] = {
    "max_steps": int,
    "num_train_epochs": float,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "learning_rate": float,
    "lr_scheduler_type": str,
    "warmup_steps": int,
    "weight_decay": float,
    "max_grad_norm": float,
    "seed": int,
    "logging_steps": int,
    "save_steps": int,
    "save_total_limit": int,
    "report_to": str,
    "grad_norm_terms": bool,
    "bf16": bool,
    checkpointing_field(): bool,
    "max_nonfinite_steps": int,
    "kl_reference": str,
    "shard_feature_network": bool,
}
_EVALUATION: dict[str, type] = {"per_device_eval_batch_size": int, "eval_rows": int, "eval_seed": int}

_NO_RESULT = {"eval_loss", "eval_runtime", "eval_samples_per_second"}

# A command checks everything first (and raises ValueError or OSError); what it returns does the work.
Work = Callable[[], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ebft-train: error: {message} (options: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Bad input ends the process with exit code 2 and one line, before any work.

    A run that cannot go on (full disk, damaged checkpoint, numbers that are not finite) ends with code 1 and one line.
    """
    arguments = _parser().parse_args(argv)
    atexit.register(_leave_ranks)
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _log_on_stderr():
        try:
            work = arguments.prepare(arguments)
        except (ValueError, TypeError, OSError) as error:
            print(f"ebft-train: error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        try:
            work()
        except (CheckpointError, FloatingPointError) as error:
            print(f"ebft-train: error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(1) from None


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the trainer settles by itself and warns of, one line each."""
    log, handler = logging.getLogger(__package__), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("ebft-train: %(message)s"))
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _leave_ranks() -> None:
    """Close what connects this rank with others before the interpreter goes: a rank whose peer left first may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ebft-train", description="Energy-Based Fine-Tuning of causal language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="fine-tune a model on text")
    _add_inputs(train)
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run; new or empty")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run in --output")
    existing.add_argument("--overwrite", action="store_true", help="delete the run that is in --output first")
    add_training_data_options(train)
    train.add_argument(
        "--eval-steps", type=int, metavar="N", help="also evaluate every N steps; default: start and end"
    )
    train.add_argument("--lora-rank", type=int, metavar="N", help="train LoRA adapters of this rank, not the weights")
    train.add_argument("--lora-alpha", type=float, metavar="X", help="scale of the adapters; default: twice the rank")
    _add_options(train, _TRAINING | _EVALUATION)
    train.set_defaults(prepare=prepare_train)

    evaluate = commands.add_parser("evaluate", help="measure a model on text")
    _add_inputs(evaluate)
    evaluate.add_argument(
        "--feature-model",
        metavar="DIR_OR_NAME",
        help="model whose features are compared; default: the one that --model was trained from, else --model itself",
    )
    evaluate.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers to this JSON file")
    _add_options(evaluate, _EVALUATION | {"bf16": bool})
    evaluate.set_defaults(prepare=prepare_evaluate)

    show = commands.add_parser("demo", help="fine-tune the shipped small model both ways and compare; minutes on a CPU")
    show.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="(demo-output)")
    show.add_argument("--overwrite", action="store_true", help="replace the demo results that are in --output")
    show.add_argument("--seed", type=int, default=0, help="(0)")
    show.add_argument("--steps", type=int, default=demo.Settings.steps, help=f"optimizer steps ({demo.Settings.steps})")
    show.set_defaults(prepare=prepare_demo)

    report = commands.add_parser("report", help="runs side by side in one HTML page")
    add_report_arguments(report)
    report.set_defaults(prepare=prepare_report)

    planning = commands.add_parser("plan", help="tokens, operations, memory and time of a step, from a model's config")
    add_plan_arguments(planning)
    _add_options(planning, {"per_device_train_batch_size": int, checkpointing_field(): bool}, PLAN_OPTIONS)
    planning.set_defaults(prepare=prepare_plan)

    info = commands.add_parser("info", help="versions, devices and implementations, and why")
    info.add_argument("--self-test", action="store_true", help="also check every op on this machine")
    info.set_defaults(prepare=prepare_info)
    return parser


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR_OR_NAME", help="model folder or hub name")
    add_data_options(parser)
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights (float32)"
    )


def _add_options(
    parser: argparse.ArgumentParser, training: dict[str, type], method_options: Sequence[str] | None = None
) -> None:
    """Options for the method (None: all) and for training arguments, with the defaults and help of `EBFTConfig`."""
    types = typing.get_type_hints(EBFTOptions)
    config = {field.name: field for field in fields(EBFTConfig)}
    method = parser.add_argument_group("the method")
    for option in fields(EBFTOptions):
        if method_options is None or option.name in method_options:
            _add_option(method, option, types[option.name])
    group = parser.add_argument_group("training and evaluation")
    for name, kind in training.items():
        _add_option(group, config[name], kind)


def _add_option(group: argparse._ArgumentGroup, option: Field[Any], kind: Any) -> None:
    if type(None) in typing.get_args(kind):
        kind = typing.get_args(kind)[0]
    default = option.default if option.default_factory is MISSING else option.default_factory()
    flag = "--" + option.name.replace("_", "-")
    shown = " ".join(map(str, default)) if isinstance(default, list) else getattr(default, "value", default)
    text = option.metadata["help"].split(". ")[0].rstrip(".").replace("%", "%%")
    if default is not None:
        text += f" ({shown})"
    # SUPPRESS: only what was given reaches EBFTConfig, which is the one owner of defaults.
    common: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        group.add_argument(flag, action="store_true", **common)
    elif kind == list[float]:
        group.add_argument(flag, type=_layer, nargs="+", metavar="X", **common)
    elif kind == list[int]:
        group.add_argument(flag, type=int, nargs="*", metavar="N", **common)
    else:
        choices = option.metadata.get("choices") if kind is str else None
        metavar = None if choices else {int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(flag, type=kind, choices=choices, metavar=metavar, **common)


def _layer(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _config(arguments: argparse.Namespace, output: Path | str, **others: Any) -> EBFTConfig:
    names = {option.name for option in fields(EBFTConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return EBFTConfig(output_dir=str(output), **device_arguments(), **(given | others))


def load_model(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name.

    Raises:
        ValueError: there is none, or it is not a causal language model; the message names the argument.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model: expected a model folder or hub name, got {name!r}, which does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        expected = "files such as tokenizer.json beside the weights"
        raise ValueError(f"model: no tokenizer can be loaded from {name!r}, expected {expected}: {error}") from None
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)), tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: cannot load {name!r}: {error}") from None


def _model_and_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    template = chat_template_of(arguments)
    model, tokenizer = load_model(arguments.model, arguments.dtype)
    if template is not None:
        tokenizer.chat_template = template
    return model, tokenizer


def with_adapters(model: Any, rank: int | None, alpha: float | None = None) -> Any:
    """A PEFT model with LoRA adapters on every linear layer but the head.

    Raises:
        ValueError: a rank below 1 or none, an alpha that is not above 0, or peft is not installed.
    """
    if rank is None or rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {rank}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha: expected a number above 0, got {alpha}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("lora_rank: needs the package peft, which is not installed") from None
    alpha = 2 * rank if alpha is None else alpha
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def prepare_train(arguments: argparse.Namespace) -> Work:
    """Check options, output folder, data and model; the returned function trains."""
    output = arguments.output
    checkpoint = _check_output(output, resume=arguments.resume, overwrite=arguments.overwrite)
    evaluation = {} if arguments.eval_steps is None else {"eval_strategy": "steps", "eval_steps": arguments.eval_steps}
    config = _config(arguments, output, **evaluation)
    check_training_data_options(arguments, config)
    run = {
        "model": arguments.model,
        "data": arguments.data,
        "options": vars(options_of(config)),
        "rows": {name: getattr(arguments, name) for name in (*ROW_OPTIONS, "dtype")},
        "training": {name: value for name, value in config.to_dict().items() if name in _TRAINING},
        "seeds": {"seed": config.seed, "eval_seed": config.eval_seed},
        "lora": None if arguments.lora_rank is None else {"rank": arguments.lora_rank, "alpha": arguments.lora_alpha},
        "versions": _versions(),
    }
    if arguments.resume:
        _check_same_run(output, run)
    documents = source_of(arguments, arguments.data)
    documents = documents if arguments.stream else list(documents)
    held_out = list(source_of(arguments, arguments.eval_data)) if arguments.eval_data else None
    model, tokenizer = _model_and_tokenizer(arguments)
    if arguments.lora_rank is not None or arguments.lora_alpha is not None:
        model = with_adapters(model, arguments.lora_rank, arguments.lora_alpha)
    train_rows, eval_rows = train_and_eval_rows(arguments, config, tokenizer, documents, held_out)
    trainer = EBFTTrainer(
        model, config, train_dataset=train_rows, eval_dataset=eval_rows or None, processing_class=tokenizer
    )
    trainer.add_callback(JsonlLog(output / LOG_FILE))

    def work() -> None:
        with trainer.accelerator.main_process_first():
            if arguments.overwrite and trainer.is_world_process_zero():
                shutil.rmtree(output, ignore_errors=True)
        if trainer.is_world_process_zero():
            write_json(output / RUN_FILE, run)
        results = {}
        # From inside the training, where the model is wrapped for several processes.
        config.eval_on_start = bool(eval_rows) and checkpoint is None
        trainer.train(resume_from_checkpoint=checkpoint)
        if config.eval_on_start:
            results["before"] = next(line for line in trainer.state.log_history if "eval_loss" in line)
        if eval_rows:
            results["after"] = trainer.evaluate()
        _save_model(trainer, output / MODEL_FOLDER)
        if trainer.is_world_process_zero():
            write_json(output / RESULT_FILE, {**results, "log": trainer.state.log_history})
            if results:
                print(_evaluation_table(results))
            print(f"model: {output / MODEL_FOLDER}")

    return work


def prepare_evaluate(arguments: argparse.Namespace) -> Work:
    """Check options, data and models; the returned function measures and prints."""
    if arguments.output is not None and arguments.output.exists():
        raise ValueError(f"output: expected a new file, got {str(arguments.output)!r}, which exists")
    folder = tempfile.TemporaryDirectory()  # The trainer wants one; nothing is kept in it.
    config = _config(arguments, folder.name, report_to="none")
    documents = list(source_of(arguments, arguments.data))
    model, tokenizer = _model_and_tokenizer(arguments)
    rows = rows_of(arguments, config, tokenizer, documents)
    source = arguments.feature_model or _recorded_model(Path(arguments.model)) or arguments.model
    feature_model = model if source == arguments.model else load_model(source, arguments.dtype)[0]
    network = build_feature_map(feature_model, tokenizer, config)
    trainer = EBFTTrainer(model, config, eval_dataset=rows, feature_network=network, processing_class=tokenizer)

    def work() -> None:
        with folder:
            metrics = trainer.evaluate()
        print(f"{arguments.model} on {min(len(rows), config.eval_rows)} of {len(rows)} rows, features of {source}")
        print(_evaluation_table({"value": metrics}))
        if arguments.output is not None:
            write_json(arguments.output, {"model": arguments.model, "feature_model": source, **metrics})

    return work


def prepare_demo(arguments: argparse.Namespace) -> Work:
    """Check the output folder and that there is text; the returned function runs the demo."""
    _check_output(arguments.output, overwrite=arguments.overwrite, marker=demo.RESULT_FILE)
    settings = demo.Settings(seed=arguments.seed, steps=arguments.steps)
    train, held_out = stdlib_sources("train"), stdlib_sources("held_out")
    return lambda: demo.run(arguments.output, settings, train, held_out)


def prepare_info(arguments: argparse.Namespace) -> Work:
    """Nothing to check; the returned function prints."""

    def work() -> None:
        for name, value in {**ebft_kernels.build_info(), **_versions()}.items():
            print(f"{name:<24}{value}")
        if arguments.self_test and not ebft_kernels.self_test():
            raise SystemExit(1)

    return work


def _versions() -> dict[str, str]:
    """Versions of what the trainer uses, and what is missing without an optional package."""
    optional = {
        "datasets": "no Parquet files and data sets",
        "peft": "no LoRA",
        "matplotlib": "no plot from the demo",
    }
    out = {"python": platform.python_version()}
    for name in ("ebft-kernels", "torch", "transformers", "accelerate", "tokenizers", *optional):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = f"not installed{': ' + optional[name] if name in optional else ''}"
    return out


def _check_output(output: Path, *, resume: bool = False, overwrite: bool = False, marker: str = RUN_FILE) -> str | None:
    """The checkpoint to go on from. Raises ValueError if the folder may not be written to."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: expected a folder, got the file {str(output)!r}")
    used, is_run = output.is_dir() and any(output.iterdir()), (output / marker).is_file()
    if resume:
        checkpoint = get_last_checkpoint(str(output)) if is_run else None
        if checkpoint is None:
            raise ValueError(f"output: expected a run with a checkpoint to resume, got {str(output)!r} without one")
        return checkpoint
    if used and overwrite and not is_run:
        raise ValueError(f"output: {str(output)!r} holds files but no {marker}: not a run of this command, not deleted")
    if used and not overwrite:
        hint = "--resume or --overwrite it" if marker == RUN_FILE else "--overwrite it"
        raise ValueError(f"output: {str(output)!r} is not empty; {hint if is_run else 'choose another folder'}")
    return None


def _check_same_run(output: Path, run: dict[str, Any]) -> None:
    recorded = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
    for name in ("model", "data", "options", "rows", "seeds", "lora"):
        expected, got = recorded.get(name), json.loads(json.dumps(run[name]))
        if expected != got:
            raise ValueError(f"{name}: to resume expected what the run was started with, {expected}; got {got}")


def _recorded_model(model: Path) -> str | None:
    """What a run of `ebft-train train` that wrote the folder ``model`` started from."""
    run = model.parent / RUN_FILE
    return json.loads(run.read_text(encoding="utf-8"))["model"] if model.is_dir() and run.is_file() else None


def _save_model(trainer: EBFTTrainer, folder: Path) -> None:
    """Model and tokenizer, under a temporary name until they are complete."""
    temporary = folder.with_name(folder.name + ".tmp")
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)


def _evaluation_table(results: dict[str, dict[str, float]]) -> str:
    names = [name for name in next(iter(results.values())) if name.startswith("eval_") and name not in _NO_RESULT]
    lines = [[name.removeprefix("eval_"), *(f"{metrics[name]:.4f}" for metrics in results.values())] for name in names]
    return table(["", *results], lines)
