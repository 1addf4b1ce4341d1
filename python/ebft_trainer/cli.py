"""The commands of `ebft-train`: train, evaluate, report, plan, demo, info."""

from __future__ import annotations

import argparse
import atexit
import importlib.metadata
import logging
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

import ebft_kernels

from . import demo
from .__main__ import COMMANDS, version
from .arguments import Parser, given, part_of, yaml_of
from .checkpoint import (
    UNFINISHED,
    CheckpointError,
    check_whole,
    discard_unfinished,
    publish,
    start_unfinished,
)
from .cli_data import (
    ROW_OPTIONS,
    DataArguments,
    TrainingDataArguments,
    check_training_data_options,
    rows_of,
    source_of,
    train_and_eval_rows,
)
from .cli_model import AdapterArguments, ModelArguments, load_model, model_and_tokenizer, with_adapters
from .config import (
    NO_OPTIONS,
    OBJECTIVES,
    OF_THE_MACHINE,
    EBFTConfig,
    EBFTOptions,
    checkpointing_field,
    device_arguments,
    option,
    options_of,
)
from .corpus import stdlib_sources
from .feature_maps import build_feature_map
from .monitor import LOG_FILE, JsonlLog
from .plan import PLAN_OPTIONS, PlanArguments, prepare_plan
from .plots import table, write_file, write_json
from .recovery import Stopped, stop_on_signals, what_is_left
from .report import add_report_arguments, prepare_report
from .results import CONFIG_FILE, MODEL_FOLDER, RESULT_FILE, RUN_FILE, read_json_object
from .run_folder import (
    FolderInUse,
    check_nothing_inside,
    check_output,
    check_owned,
    check_same_run,
    delete_run,
    fingerprint,
    left_as_it_was,
    model_files,
    owned,
)
from .trainer import EBFTTrainer
from .verifiers import TextVerifier, VerifierError

_ELSEWHERE = NO_OPTIONS | dict.fromkeys(
    ("config", "resume", "overwrite", "allow_changes"), "it belongs on the command line"
)
#: What a run's configuration has not: secrets, and second names, where this transformers has another first one.
_NOT_WRITTEN = {"hub_token", "gradient_checkpointing", "gradient_checkpointing_kwargs"}
_NOT_WRITTEN -= {checkpointing_field(), checkpointing_field() + "_kwargs"}
#: Those that a run records, for one that resumes it.
_RECORDED = frozenset(
    "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps weight_decay max_grad_norm optim optim_args "
    "optim_target_modules adam_beta1 adam_beta2 adam_epsilon average_tokens_across_devices seed data_seed "
    "logging_steps save_steps save_total_limit report_to grad_norm_terms bf16 fp16 tf32 activation_checkpointing "
    "gradient_checkpointing use_liger_kernel torch_compile train_sampling_strategy length_column_name "
    "dataloader_drop_last full_determinism pad_to_multiple_of max_nonfinite_steps kl_reference "
    "shard_feature_network log_completions".split()
)
_METHOD, _OTHERS = [x.name for x in fields(EBFTOptions)], "training and evaluation"
_EVALUATION = ("per_device_eval_batch_size", "eval_rows", "eval_seed", "log_completions", "bf16")

_NO_RESULT = {"eval_loss", "eval_runtime", "eval_samples_per_second"}

#: Exit codes: wrong input; it broke on the way; a signal stopped it and the state is saved (EX_TEMPFAIL: try again).
BAD_INPUT, BROKEN, STOPPED, INTERRUPTED = 2, 1, 75, 130

# A command checks everything first (and raises ValueError or OSError); what it returns does the work.
Work = Callable[[], None]


@dataclass(kw_only=True)
class TrainArguments(AdapterArguments, TrainingDataArguments, ModelArguments):
    """What `train` is told beside its `EBFTConfig`."""


@dataclass(kw_only=True)
class EvaluateArguments(DataArguments, ModelArguments):
    """What `evaluate` is told beside the method's options."""

    feature_model: str | None = option(
        None,
        "model whose features are compared; default: the one that --model was trained from, as its run recorded (it "
        "is named before it is loaded), else --model itself",
    )
    output: str | None = option(None, "also write the numbers to this JSON file")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Bad input ends the process with exit code 2 and one line, before any work.

    A run that cannot go on (full disk, a verifier that fails, numbers that are not finite) ends with code 1 and one
    line; one that SIGTERM or Ctrl-C stopped, with code 75 and one line.
    """
    arguments = _parser().parse_args(argv)
    atexit.register(_leave_ranks)
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _log_on_stderr():
        try:
            work = _ending(BAD_INPUT, (ValueError, TypeError, OSError), lambda: arguments.prepare(arguments))
            _ending(BROKEN, (OSError, FloatingPointError, VerifierError), work)
        except KeyboardInterrupt:
            print("ebft-train: interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None


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


def _ending(code: int, expected: tuple[type[Exception], ...], work: Callable[[], Any]) -> Any:
    """What ``work`` returns; an ``expected`` error is one line and ends the process."""
    try:
        return work()
    except expected as error:
        print(f"ebft-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(BAD_INPUT if isinstance(error, FolderInUse) else code) from None


def _leave_ranks() -> None:
    """Close what connects this rank with others before the interpreter goes: a rank whose peer left first may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _parser() -> Parser:
    parser = Parser(prog="ebft-train", description="Energy-Based Fine-Tuning of causal language models.")
    parser.add_argument("--version", action="version", version=f"ebft-train {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, prepare: Callable[[Any], Work], *dataclasses: type, **options: Any) -> Parser:
        added = commands.add_parser(name, help=COMMANDS[name], dataclass_types=dataclasses, **options)
        added.set_defaults(prepare=prepare)
        return added

    method = part_of(EBFTOptions, _METHOD, "the method")
    others = part_of(EBFTConfig, {x.name for x in fields(EBFTConfig)} - {*_METHOD, *_ELSEWHERE}, _OTHERS)
    train = command("train", prepare_train, TrainArguments, method, others, elsewhere=_ELSEWHERE)
    train.call("output_dir", "--output", "DIR", "folder of the run; new or empty")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=("auto",),
        help="go on from the last checkpoint of the run in --output; auto: start where there is none yet",
    )
    existing.add_argument("--overwrite", action="store_true", help="delete the run that is in --output first")
    train.add_argument(
        "--allow-changes", action="store_true", help="resume also where data, options or model are not those of before"
    )
    command("evaluate", prepare_evaluate, EvaluateArguments, method, part_of(EBFTConfig, _EVALUATION, _OTHERS))
    shape = part_of(EBFTOptions, PLAN_OPTIONS, "the method")
    step = part_of(EBFTConfig, ("per_device_train_batch_size", checkpointing_field()), _OTHERS)
    command("plan", prepare_plan, PlanArguments, shape, step)
    show = command("demo", prepare_demo)
    show.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="(demo-output)")
    show.add_argument("--overwrite", action="store_true", help="replace the demo results that are in --output")
    show.add_argument("--model", metavar="DIR_OR_NAME", help="a model folder or hub name; default: the shipped model")
    show.add_argument("--learning-rate", type=float, metavar="X", help="of both runs; default: 1e-6 with --model")
    for name, what in _DEMO_SETTINGS.items():
        default = getattr(demo.Settings, name)
        flag = f"--{name.replace('_', '-')}"
        show.add_argument(flag, type=int, default=default, metavar="N", help=f"{what} ({default})")
    add_report_arguments(command("report", prepare_report))
    info = command("info", prepare_info)
    info.add_argument("--self-test", action="store_true", help="also check every op on this machine")
    return parser


_DEMO_SETTINGS = {
    "seed": "of data, rollouts and evaluation",
    "steps": "optimizer steps",
    "rows_per_step": "rows of an optimizer step",
    "length": "tokens per row",
    "eval_rows": "rows that are evaluated on",
}


def _config(arguments: argparse.Namespace, **others: Any) -> EBFTConfig:
    try:
        return EBFTConfig(**(device_arguments() | given(EBFTConfig, arguments) | others))
    except (AttributeError, ImportError, KeyError, NotImplementedError, RuntimeError) as error:
        # transformers' way to say that it cannot use a file, or lacks a package.
        raise ValueError(f"options of transformers: expected some that it can use, got {error!r}") from None


def _resolved(options: TrainArguments, config: EBFTConfig, arguments: argparse.Namespace) -> bytes:
    """`CONFIG_FILE`: every option of the run as it is used, for ``--config``."""
    left_out = {*_ELSEWHERE, *_NOT_WRITTEN} | {x for x in OF_THE_MACHINE if not hasattr(arguments, x)}
    everything = {x.name: getattr(part, x.name) for part in (options, config) for x in fields(part) if x.init}
    # Coefficients that are the objective's own follow it, also when the command line has another one.
    everything |= {name: None for name, x in OBJECTIVES[config.objective].items() if everything[name] == x}
    return yaml_of({name: value for name, value in everything.items() if name not in left_out})


def prepare_train(parsed: argparse.Namespace) -> Work:
    """Check options, output folder, data and model; the returned function trains."""
    arguments = TrainArguments(**given(TrainArguments, parsed))
    output = Path(parsed.output_dir)
    existing = {"resume": parsed.resume, "overwrite": parsed.overwrite}
    checkpoint = check_output(output, **existing)
    if parsed.allow_changes and not parsed.resume:
        raise ValueError("allow_changes: expected --resume with it, got none")
    if checkpoint is None:
        inputs = {"--data": arguments.data, "--eval-data": arguments.eval_data or [], "--model": [arguments.model]}
        check_nothing_inside(output, inputs | {"--chat-template": [arguments.chat_template]})
    config = _config(parsed, **_evaluation_of(parsed))
    check_training_data_options(arguments, config)
    documents = source_of(arguments, arguments.data)
    documents = documents if arguments.stream else list(documents)
    held_out = list(source_of(arguments, arguments.eval_data)) if arguments.eval_data else None
    run = _run_record(arguments, config)
    if checkpoint is not None:
        for difference in check_same_run(output, run, allowed=parsed.allow_changes):
            print(f"ebft-train: warning: {difference}", file=sys.stderr)
        if config.local_process_index == 0:
            checkpoint = check_whole(checkpoint)
    settings = _resolved(arguments, config, parsed)
    model, tokenizer = model_and_tokenizer(arguments, arguments.chat_template)
    if arguments.lora_rank is not None or arguments.lora_alpha is not None:
        model = with_adapters(model, arguments.lora_rank, arguments.lora_alpha)
    train_rows, eval_rows = train_and_eval_rows(arguments, config, tokenizer, documents, held_out)
    with left_as_it_was(output):
        trainer = EBFTTrainer(
            model, config, train_dataset=train_rows, eval_dataset=eval_rows or None, processing_class=tokenizer
        )
        known = eval_rows or ([] if arguments.stream else train_rows)
        if isinstance(trainer.verifier, TextVerifier) and known:
            _try_verifier(trainer, known[0])
    trainer.add_callback(JsonlLog(output / LOG_FILE))
    # From inside the training, where the model is wrapped for several processes.
    config.eval_on_start = bool(eval_rows) and checkpoint is None

    def work() -> None:
        main = trainer.is_world_process_zero()
        if main:
            output.mkdir(parents=True, exist_ok=True)
        with owned(output) if main else nullcontext(), stop_on_signals(trainer) as came:
            if main:
                _begin(output, existing, checkpoint, run)
                write_file(output / CONFIG_FILE, settings)
            trainer.accelerator.wait_for_everyone()
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
                if trainer.stopped:
                    raise Stopped(came[0] if came else "a signal to another process")
                _finish(trainer, output)
            except Stopped as stopped:
                if main:
                    last = get_last_checkpoint(str(output))
                    then = f"saved as {last}; --resume goes on from there" if last else "before the first checkpoint"
                    print(f"ebft-train: stopped by {stopped}; {then}", file=sys.stderr)
                raise SystemExit(STOPPED) from None

    return work


def _evaluation_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """``--eval-steps`` alone asks for evaluations. Raises ValueError for one beside another strategy."""
    steps, strategy = getattr(arguments, "eval_steps", None), getattr(arguments, "eval_strategy", "no")
    if steps is None:
        return {}
    if strategy not in ("no", "steps"):
        raise ValueError(f"eval_steps: expected none with eval_strategy {strategy!r}, got {steps}")
    return {"eval_strategy": "steps"}


def _run_record(arguments: TrainArguments, config: EBFTConfig) -> dict[str, Any]:
    """What a run is started with: what it must agree in with one that it resumes, and versions."""
    contents = {}
    for part, names in (("data", arguments.data), ("eval_data", arguments.eval_data or [])):
        files = {name: source_of(arguments, [name]).files_of(name) for name in names}
        contents[part] = {name: fingerprint(paths) for name, paths in files.items() if paths}
    others = {"model": model_files(arguments.model), "chat_template": [Path(x) for x in [arguments.chat_template] if x]}
    return {
        "model": arguments.model,
        "data": arguments.data,
        "contents": contents | {name: fingerprint(files) for name, files in others.items() if files},
        "options": vars(options_of(config)),
        "rows": {name: getattr(arguments, name) for name in (*ROW_OPTIONS, "dtype")},
        "training": {name: value for name, value in config.to_dict().items() if name in _RECORDED},
        "seeds": {"seed": config.seed, "eval_seed": config.eval_seed},
        "lora": None if arguments.lora_rank is None else {"rank": arguments.lora_rank, "alpha": arguments.lora_alpha},
        "processes": config.world_size,
        "versions": _versions(),
    }


def _begin(output: Path, existing: dict[str, Any], checkpoint: str | None, run: dict[str, Any]) -> None:
    """Make the folder that of this run, now that no other process writes to it."""
    try:
        unchanged = check_output(output, **existing) == checkpoint
    except ValueError as error:
        raise FolderInUse(f"{error} (another process wrote to it meanwhile)") from None
    if not unchanged:
        raise FolderInUse(f"output: another process wrote to {str(output)!r} meanwhile; start again")
    if checkpoint is None:
        delete_run(output)
    write_json(output / RUN_FILE, run)


def _finish(trainer: EBFTTrainer, output: Path) -> None:
    """Evaluate what was trained, and write the model and the results."""
    results = {}
    if trainer.args.eval_on_start:
        results["before"] = next(line for line in trainer.state.log_history if "eval_loss" in line)
    if trainer.eval_dataset is not None:
        results["after"] = trainer.evaluate()
    _save_model(trainer, output)
    if trainer.is_world_process_zero():
        write_json(output / RESULT_FILE, {**results, "log": trainer.state.log_history})
        if results:
            print(_evaluation_table(results))
        print(f"model: {output / MODEL_FOLDER}")


def _try_verifier(trainer: EBFTTrainer, row: Any) -> None:
    """Ask the verifier once for the reward of the real text, before anything is written.

    Raises:
        VerifierError: it fails.
    """
    batch = trainer.data_collator([row])
    layout = batch["layout"]
    windows = layout.windows(batch["input_ids"])[:, :, None].expand(-1, -1, layout.samples, -1)
    trainer.verifier(batch["input_ids"], windows, layout, token_mask=batch.get("completion_mask"))


def prepare_evaluate(parsed: argparse.Namespace) -> Work:
    """Check options, data and models; the returned function measures and prints."""
    arguments = EvaluateArguments(**given(EvaluateArguments, parsed))
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and output.exists():
        raise ValueError(f"output: expected a new file, got {str(output)!r}, which exists")
    recorded = None if arguments.feature_model else _recorded_model(Path(arguments.model))
    folder = tempfile.TemporaryDirectory()  # The trainer wants one; nothing is kept in it.
    config = _config(parsed, output_dir=folder.name, report_to="none")
    documents = list(source_of(arguments, arguments.data))
    model, tokenizer = model_and_tokenizer(arguments, arguments.chat_template)
    rows = rows_of(arguments, config, tokenizer, documents)
    source = arguments.feature_model or recorded or arguments.model
    feature_model = model if source == arguments.model else load_model(source, arguments.dtype)[0]
    network = build_feature_map(feature_model, tokenizer, config)
    trainer = EBFTTrainer(model, config, eval_dataset=rows, feature_network=network, processing_class=tokenizer)

    def work() -> None:
        with folder:
            metrics = trainer.evaluate()
        print(f"{arguments.model} on {min(len(rows), config.eval_rows)} of {len(rows)} rows, features of {source}")
        print(_evaluation_table({"value": metrics}))
        if output is not None:
            write_json(output, {"model": arguments.model, "feature_model": source, **metrics})

    return work


def prepare_demo(arguments: argparse.Namespace) -> Work:
    """Check the output folder and that there is text; the returned function runs the demo."""
    check_output(arguments.output, overwrite=arguments.overwrite, marker=demo.RESULT_FILE)
    rate = arguments.learning_rate
    if rate is None and arguments.model is not None:
        rate = 1e-6  # the authors'
    rates = {} if rate is None else {"learning_rate_ebft": rate, "learning_rate_cross_entropy": rate}
    settings = demo.Settings(**{name: getattr(arguments, name) for name in _DEMO_SETTINGS}, **rates)
    model = {} if arguments.model is None else {"model_folder": arguments.model}
    if model:
        load_model(arguments.model)  # an error of it comes before anything is written
    train, held_out = stdlib_sources("train"), stdlib_sources("held_out")
    return lambda: demo.run(arguments.output, settings, train, held_out, **model)


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


def _recorded_model(model: Path) -> str | None:
    """What a run of `ebft-train train` that wrote the folder ``model`` started from, if that is recorded beside it.

    Raises:
        ValueError: there is a record that cannot be read.
    """
    run = model.parent / RUN_FILE
    if not (model.is_dir() and run.is_file()):
        return None
    name = read_json_object(run).get("model")
    if not isinstance(name, str):
        raise ValueError(f"{run}: expected 'model' as a name, got {name!r} (--feature-model makes it needless)")
    said = f"features of {name}, which {model} was trained from, says {run}"
    print(f"{said}; --feature-model chooses another", flush=True)
    return name


def _save_model(trainer: EBFTTrainer, output: Path) -> None:
    """Model and tokenizer, whole or not at all."""
    main = trainer.is_world_process_zero()
    try:
        if main:
            check_owned(output)
            start_unfinished(output)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(output / UNFINISHED / MODEL_FOLDER))
        if main:
            publish(output, MODEL_FOLDER, manifest=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        if main:
            discard_unfinished(output)
        raise CheckpointError(f"output: cannot write the final model to {what_is_left(output, error)}") from error


def _evaluation_table(results: dict[str, dict[str, float]]) -> str:
    names = [name for name in next(iter(results.values())) if name.startswith("eval_") and name not in _NO_RESULT]
    lines = [[name.removeprefix("eval_"), *(f"{metrics[name]:.4f}" for metrics in results.values())] for name in names]
    return table(["", *results], lines)
