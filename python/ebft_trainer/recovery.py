"""What a run survives: steps that are not finite, a kill at any moment, an end on request, a checkpoint of another run.

`EBFTTrainer` adds the method to it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from .checkpoint import (
    STATE_FILE,
    UNFINISHED,
    CheckpointError,
    WholeCheckpoint,
    check_whole,
    discard_unfinished,
    keep_newest,
    publish,
    start_unfinished,
)
from .features import has_adapters
from .metrics import MetricSums
from .results import read_json_object
from .run_folder import owned

#: In each checkpoint: what transformers' own state does not hold.
TOTALS_FILE = "ebft_totals.json"

_SHOWN = 3

logger = logging.getLogger(__name__)


class RecoveringTrainer(Trainer):
    """`transformers.Trainer` whose runs can be stopped, killed and resumed; see `EBFTTrainer` for what that means.

    A subclass appends the loss of each micro-batch, as large a part of its optimizer step's as the gradient is, to
    ``_losses``, and its metrics to ``_metrics``.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._metrics = MetricSums()
        self._losses: list[Tensor] = []
        self._loss_sum, self._steps_taken = 0.0, 0
        self._nonfinite_in_a_row = 0
        self._saving = False
        self._stop_requested = self._stopping = False
        self.add_callback(_StepEnds(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As `Trainer.train`; a checkpoint to resume from is checked first, and loaded in full or not at all.

        While checkpoints are saved, no other process trains in ``args.output_dir``. The training loss that is returned
        and logged at the end is the mean over all steps of the run that were taken, also before it was resumed.

        Raises:
            CheckpointError: it is damaged, was never finished or is of another model; or a checkpoint cannot be
                written, or what it is to be written to is deleted or in use.
            FloatingPointError: the loss or the gradient was not finite too often; the state is saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"resume_from_checkpoint: no checkpoint in {self.args.output_dir!r}")
        if resume_from_checkpoint and self.is_local_process_zero():
            if not isinstance(resume_from_checkpoint, WholeCheckpoint):
                check_whole(resume_from_checkpoint)
        self._loss_sum, self._steps_taken = 0.0, 0
        if resume_from_checkpoint:
            _check_state(Path(resume_from_checkpoint))
            self._loss_sum, self._steps_taken = _totals(Path(resume_from_checkpoint))
        self._stop_requested = self._stopping = False
        saves = self.args.should_save and self.args.save_strategy != "no"
        if saves:
            os.makedirs(self.args.output_dir, exist_ok=True)
        with owned(self.args.output_dir) if saves else nullcontext():
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    def request_stop(self) -> None:
        """Have `train` finish the running step on all ranks, save a checkpoint and return.

        May be called at any time while it runs, from a signal handler or on one rank alone.
        """
        self._stop_requested = True

    @property
    def stopped(self) -> bool:
        """Whether the last `train` ended because of `request_stop`."""
        return self._stopping

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the training loss of the whole run in the place of that since it was resumed."""
        if "train_loss" in logs:
            logs["train_loss"] = self._loss_sum / self._steps_taken if self._steps_taken else float("nan")
        super().log(logs, start_time)

    def _end_gradient(self, model: nn.Module) -> None:
        """Before the optimizer's step: take the gradients away if they, or a loss, are not finite on any rank."""
        losses = torch.stack([loss.float() for loss in self._losses]).to(self.args.device)
        self._losses = []
        finite = losses.isfinite().all()
        if self.accelerator.scaler is None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            gradients = [x.to_local() if isinstance(x, DTensor) else x for x in gradients]
            finite &= get_total_norm(gradients).isfinite().to(finite.device)
        stop = torch.tensor(float(self._stop_requested), device=losses.device)
        # The one moment in a step at which the host waits for the device, and the ranks agree.
        told = torch.stack([(~finite).float(), stop, losses.sum() / self.accelerator.num_processes])
        skip, stop, loss = self.accelerator.reduce(told, "sum").tolist()
        self._stopping = stop > 0
        self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skip else 0
        self._metrics.end_step(taken=not skip)
        if skip and self.is_deepspeed_enabled:
            raise FloatingPointError(f"loss: expected finite numbers, got others in step {self.state.global_step}")
        if skip:
            model.zero_grad(set_to_none=True)
        else:
            self._loss_sum += loss
            self._steps_taken += 1

    # Writing

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint where nobody takes it for one, and rename it when it is complete."""
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        with owned(self.args.output_dir) if self.args.should_save else nullcontext():
            try:
                self._write_checkpoint(model, trial, run, name)
            except (OSError, RuntimeError, SafetensorError) as error:
                if self.args.should_save:
                    discard_unfinished(run)
                raise CheckpointError(f"output_dir: cannot write {name} to {what_is_left(run, error)}") from error
            finally:
                self._saving = False
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any, run: Path, name: str) -> None:
        if self.args.should_save:
            if trial is not None:
                run.mkdir(exist_ok=True)
            start_unfinished(run)
        self.accelerator.wait_for_everyone()
        self._saving = True
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(run / name)
        if self.args.should_save:
            finished = run / UNFINISHED / name
            self.state.save_to_json(str(finished / STATE_FILE))
            totals = {"loss_sum": self._loss_sum, "steps_taken": self._steps_taken}
            (finished / TOTALS_FILE).write_text(json.dumps(totals), encoding="utf-8")
            publish(run, name)
            keep_newest(run, self.args.save_total_limit, str(run / name), self.state.best_model_checkpoint)

    # Reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """All weights, or an error: transformers would leave those that it misses as they are."""
        with _loading("the weights", resume_from_checkpoint):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            elif has_adapters(self.model):
                _check_adapters(self.model, Path(resume_from_checkpoint))
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                _load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What the optimizer has gathered and where the schedule stands; the options of both are those given now."""
        asked = [{name: x for name, x in group.items() if name != "params"} for group in self.optimizer.param_groups]
        with _loading("the optimizer's state", checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self.is_deepspeed_enabled:
            _set_options(self.optimizer, self.lr_scheduler, asked)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _loading("the gradient scaler's state", checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _loading("the random number generators' state", checkpoint):
            super()._load_rng_state(checkpoint)


class _StepEnds(TrainerCallback):
    """Tells the trainer that a gradient is complete; ends the run on request, or after too many that are not finite."""

    def __init__(self, trainer: RecoveringTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, _args: Any, _state: Any, _control: Any, **others: Any) -> None:
        self._trainer._end_gradient(others["model"])

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_others: Any) -> None:
        control.should_save |= self._too_many
        if self._trainer.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # Who asks for an end does not wait for long.

    def on_save(self, args: Any, state: Any, _control: Any, **_others: Any) -> None:
        if self._too_many:
            raise FloatingPointError(
                f"loss: expected finite numbers, got NaN or infinity in the loss or the gradient of "
                f"{args.max_nonfinite_steps} steps in a row; the state before them is saved as "
                f"checkpoint-{state.global_step} in {args.output_dir!r}"
            )

    @property
    def _too_many(self) -> bool:
        return self._trainer._nonfinite_in_a_row >= self._trainer.args.max_nonfinite_steps


class Stopped(BaseException):
    """A signal came while there was no step to finish; as `KeyboardInterrupt`, not to be caught by accident."""


@contextmanager
def stop_on_signals(trainer: RecoveringTrainer) -> Iterator[list[str]]:
    """SIGTERM and SIGINT stop `train` after the running step, and raise `Stopped` where it does not run.

    In one process a second SIGINT raises it at once. (With several, the launcher passes on what the terminal has sent
    already.) A signal that is ignored, as in a job in the background, stays so. Outside the main thread, which alone
    receives signals, nothing is changed.

    Yields:
        Names of the signals that came.
    """
    came: list[str] = []

    def handle(number: int, _frame: Any) -> None:
        name = signal.Signals(number).name
        again = number == signal.SIGINT and name in came and trainer.accelerator.num_processes == 1
        came.append(name)
        if again or not trainer.is_in_train:
            raise Stopped(name)
        trainer.request_stop()

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    heard = [x for x in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(x) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def what_is_left(run: Path, error: Exception) -> str:
    """How much room there is and what was saved before, in a folder that may be gone."""
    if not run.is_dir():
        return f"{str(run)!r}, which was deleted while the run was going on"
    free, last = shutil.disk_usage(run).free, get_last_checkpoint(str(run))
    return f"{str(run)!r} with {free / 1e9:.3g} GB free: {error}; the last whole checkpoint is {last}"


def _check_state(folder: Path) -> None:
    with _loading(STATE_FILE, folder):
        state = TrainerState.load_from_json(str(folder / STATE_FILE))
        for name in ("global_step", "train_batch_size"):
            if not isinstance(getattr(state, name), int):
                raise ValueError(f"expected {name} as an int, got {getattr(state, name)!r}")


def _totals(folder: Path) -> tuple[float, int]:
    path = folder / TOTALS_FILE
    if not path.is_file():
        logger.warning("%s: no %s: train_loss will be that of the steps after this one", folder, TOTALS_FILE)
        return 0.0, 0
    with _loading(TOTALS_FILE, folder):
        totals = read_json_object(path)
        return float(totals["loss_sum"]), int(totals["steps_taken"])


@contextmanager
def _loading(what: str, folder: str | Path | None) -> Iterator[None]:
    """Whatever goes wrong in it becomes one line that says in which checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise CheckpointError(
            f"resume_from_checkpoint: cannot load {what} of {str(folder)!r}: {type(error).__name__}: {reason}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report, of many lines, and bars."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_weights(model: nn.Module, folder: str) -> None:
    """By transformers' loader: names and shapes on the disk need not be those in memory, as of mixtures of experts."""
    dtypes = [x.dtype for x in model.state_dict().values() if x.is_floating_point()]
    with _quiet():
        loaded, report = type(model).from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=max(dtypes, key=lambda dtype: torch.finfo(dtype).bits),  # nothing is rounded
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
        )
    shapes = [f"{name} {list(found)}, not {list(expected)}" for name, found, expected in report["mismatched_keys"]]
    _require_same(report["missing_keys"], report["unexpected_keys"], shapes)
    model.load_state_dict(loaded.state_dict())


def _set_options(optimizer: Any, schedule: Any, asked: list[dict[str, Any]]) -> None:
    """Give loaded parameter groups the options of ``asked``; the learning rate keeps its share of the initial one."""
    for group, options in zip(optimizer.param_groups, asked, strict=True):
        initial, now = group.get("initial_lr"), group["lr"]
        group.update(options)
        group["lr"] = now * (options["initial_lr"] / initial) if initial else now
    if hasattr(schedule, "base_lrs"):
        schedule.base_lrs = [options["initial_lr"] for options in asked]
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def _check_adapters(model: nn.Module, folder: Path) -> None:
    """Compare the adapters of a PEFT model with those that were saved: peft warns of what it misses, and goes on."""
    from peft import get_peft_model_state_dict

    for name in model.peft_config:
        path = (folder if name == "default" else folder / name) / "adapter_model.safetensors"
        if not path.is_file() and name not in model.active_adapters:
            continue
        expected = {key: list(x.shape) for key, x in get_peft_model_state_dict(model, adapter_name=name).items()}
        with safe_open(path, "pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        shapes = [
            f"{key} {found[key]}, not {expected[key]}"
            for key in expected
            if found.get(key, expected[key]) != expected[key]
        ]
        _require_same(expected.keys() - found.keys(), found.keys() - expected.keys(), shapes)


def _require_same(missing: Any, unexpected: Any, shapes: list[str]) -> None:
    parts = {"no": sorted(missing), "besides": sorted(unexpected), "other shapes:": sorted(shapes)}
    found = [
        f"{what} {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' * (len(names) > _SHOWN)}"
        for what, names in parts.items()
        if names
    ]
    if found:
        raise ValueError(f"expected the weights of this model, got {'; '.join(found)}")
