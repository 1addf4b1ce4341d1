"""What is left when a run is killed, the disk is full, a checkpoint is damaged or numbers stop being finite."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from transformers import TrainerCallback

import ebft_kernels
import ebft_trainer
from ebft_trainer.checkpoint import MANIFEST, CheckpointError, _write_manifest, check_whole
from ebft_trainer.config import EBFTConfig
from ebft_trainer.monitor import read_log
from ebft_trainer.recovery import Stopped, stop_on_signals
from ebft_trainer.trainer import EBFTTrainer

from . import killed_run


def rows_of(*lengths: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 40, (n,), generator=generator)} for n in lengths]


ROWS = rows_of(*[24, 11, 17, 8] * 4)


@pytest.fixture
def trainer(plain, tmp_path):
    """A function that makes one; all write to the same folder."""

    def make(callbacks=None, model=None, **options) -> EBFTTrainer:
        usual = {
            **{"context": 4, "stride": 6, "horizon": 3, "samples": 3, "output_dir": str(tmp_path / "run")},
            **{"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2},
            **{"save_strategy": "steps", "save_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            "dataloader_pin_memory": False,
        }
        config = EBFTConfig(**(usual | options))
        model = plain.build() if model is None else model
        return EBFTTrainer(model, config, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=callbacks)

    return make


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)


def checkpoints(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run").iterdir())


def losses(trainer: EBFTTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def environment() -> dict[str, str]:
    paths = [str(Path(package.__file__).parents[1]) for package in (ebft_kernels, ebft_trainer)]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *sys.path]), "OMP_NUM_THREADS": "1"}


# Killed


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("attempts", "seed"), [(5, 0), *(pytest.param(50, seed, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_whatever_happens_to_a_run_it_loses_nothing_but_time(model_folder, tmp_path, attempts, seed):
    """Kills at any moment, full disks, SIGTERM, two runs at once; with --slow 150 of them."""
    model_folder.rename(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(7)))
    command = [sys.executable, killed_run.__file__, str(tmp_path), str(attempts), str(seed)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert "Traceback" not in ended.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report) == attempts and sum(attempt["status"] != 0 for attempt in report) >= attempts // 2
    # A step is logged before it is saved.
    assert all(attempt["newest"] in (attempt["last_step"] - 1, attempt["last_step"]) for attempt in report)
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    expected, found = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert equal(expected, found)
    logs = [read_log(run / "log.jsonl") for run in (whole, killed)]
    for name in ("step", "loss", "entropy", "grad_norm", "train_loss"):
        values = [[line[name] for line in log if name in line] for log in logs]
        assert values[0] == values[1] and values[0], name
    files = ["checkpoint-5", "checkpoint-6", "config.yaml", "ebft.json", "log.jsonl", "model", "results.json"]
    assert sorted(path.name for path in killed.iterdir()) == files == sorted(path.name for path in whole.iterdir())


def test_a_run_resumes_from_its_last_checkpoint(trainer):
    whole = trainer()
    whole.train()
    resumed = trainer(max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[:4] == losses(whole) and len(losses(resumed)) == 6
    finished = trainer(max_steps=6)
    finished.train(resume_from_checkpoint=True)
    assert finished.state.global_step == 6 and losses(finished) == losses(resumed)
    assert equal(finished.model.state_dict(), resumed.model.state_dict())


def test_the_newest_checkpoints_and_the_best_are_kept(trainer, tmp_path, monkeypatch):
    results = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}
    run = trainer(
        save_total_limit=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=False,
    )  # fmt: skip
    monkeypatch.setattr(run, "evaluate", lambda **_: {"eval_loss": results[run.state.global_step]})
    run.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert run.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-2")
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    check_whole(tmp_path / "run" / "checkpoint-2")


def test_a_checkpoint_of_the_same_step_is_replaced(trainer, tmp_path):
    trainer(max_steps=2).train()
    (tmp_path / "run" / "checkpoint-2" / "old").touch()
    trainer(max_steps=2).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert not (tmp_path / "run" / "checkpoint-2" / "old").exists()
    check_whole(tmp_path / "run" / "checkpoint-2")


# The disk


@contextmanager
def largest_file(size: int):
    """Writing beyond ``size`` bytes fails as on a full disk, in Python, C++ and Rust alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 20_000, 250_000])
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(trainer, tmp_path, size):
    trainer(max_steps=1).train()
    files = {path.name: path.stat().st_size for path in (tmp_path / "run" / "checkpoint-1").iterdir()}
    assert any(100 < n < 20_000 for n in files.values())
    assert 20_000 < files["model.safetensors"] < 250_000 < files["optimizer.pt"]
    message = "output_dir: cannot write checkpoint-2 to .*run' with .* GB free: .*; the last whole .* is .*checkpoint-1"
    with pytest.raises(CheckpointError, match=message), largest_file(size):
        trainer().train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    check_whole(tmp_path / "run" / "checkpoint-1")
    resumed = trainer(max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_that_cannot_be_written_to_is_refused_at_set_up(trainer, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(
            CheckpointError, match=f"output_dir: expected a folder that can be written to, got '{folder}'"
        ):
            trainer(output_dir=str(folder))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: os.truncate(path / "optimizer.pt", 1000),
            "is damaged: expected .* bytes of optimizer.pt, got 1000",
        ),
        (lambda path: (path / "rng_state.pth").unlink(), "is damaged: expected .* bytes of rng_state.pth, got no file"),
        (
            lambda path: flip(path / "model.safetensors"),
            "is damaged: model.safetensors was changed after it was saved; other checkpoints there: checkpoint-1",
        ),
        (lambda path: (path / MANIFEST).unlink(), f"is not a whole checkpoint: no readable {MANIFEST}"),
        (lambda path: (path / MANIFEST).write_text("{"), f"is not a whole checkpoint: no readable {MANIFEST}"),
        (lambda path: (path / MANIFEST).write_text("[]"), "is not a whole .* expected a JSON object, got list"),
        (
            lambda path: (path / MANIFEST).write_text('{"files": 3}'),
            f"is not a whole checkpoint: no readable {MANIFEST}",
        ),
        (
            lambda path: (path / MANIFEST).write_text('{"files": {"a": 3}}'),
            f"is not a whole checkpoint: no readable {MANIFEST}",
        ),
        (
            lambda path: (path / MANIFEST).write_text('{"files": {}}'),
            f"is not a whole checkpoint: expected trainer_state.json in {MANIFEST}, got no files",
        ),
        (lambda path: (path / "pytorch_model.bin").touch(), f"is damaged: pytorch_model.bin is not in {MANIFEST}"),
    ],
)
def test_a_damaged_checkpoint_is_refused(trainer, tmp_path, damage, message):
    trainer(max_steps=2).train()
    damage(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=f"resume_from_checkpoint: '.*checkpoint-2' {message}"):
        trainer().train(resume_from_checkpoint=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_no_checkpoint_to_resume_from_is_an_error(trainer, tmp_path):
    with pytest.raises(CheckpointError, match="resume_from_checkpoint: no checkpoint in "):
        trainer().train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="resume_from_checkpoint: expected a checkpoint folder, got "):
        trainer().train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))


# Of another model, or broken before it was saved


def forge(checkpoint: Path, name: str, content: bytes | None = None) -> None:
    """Change a file of a checkpoint, or leave it out, and its manifest with it."""
    path = checkpoint / name
    path.unlink() if content is None else path.write_bytes(content)
    (checkpoint / MANIFEST).unlink()
    _write_manifest(checkpoint)


def change_weights(checkpoint: Path, change) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    forge(checkpoint, "model.safetensors", save(weights, {"format": "pt"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.norm.weight"), "got no model.norm.weight$"),
        (lambda x: [x.pop(name) for name in list(x) if "layers.3" in name], "got no model.layers.3.* and 6 more$"),
        (lambda x: x.update(extra=torch.ones(2)), "got besides extra$"),
        (
            lambda x: x.update({"model.norm.weight": torch.ones(7)}),
            r"got other shapes: model.norm.weight \[7\], not \[32\]$",
        ),
    ],
)
def test_weights_are_loaded_all_or_none(trainer, tmp_path, change, message):
    trainer(max_steps=1).train()
    change_weights(tmp_path / "run" / "checkpoint-1", change)
    resumed = trainer()
    before = copy.deepcopy(resumed.model.state_dict())
    with pytest.raises(
        CheckpointError, match=f"cannot load the weights of '.*checkpoint-1': .* of this model, {message}"
    ):
        resumed.train(resume_from_checkpoint=True)
    assert equal(before, resumed.model.state_dict())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"no weights", "cannot load the weights"),
        ("model.safetensors", None, "cannot load the weights"),
        ("optimizer.pt", b"no pickle", "cannot load the optimizer's state"),
        ("optimizer.pt", pickle.dumps(subprocess.run), "cannot load the optimizer's state"),
        ("rng_state.pth", b"", "cannot load the random number generators' state"),
        ("ebft_totals.json", b"{}", "cannot load ebft_totals.json"),
        ("trainer_state.json", b"[]", "cannot load trainer_state.json"),
        ("trainer_state.json", b'{"global_step": "many"}', "cannot load trainer_state.json"),
    ],
)
def test_whatever_cannot_be_read_is_one_line(trainer, tmp_path, name, content, message):
    trainer(max_steps=1).train()
    forge(tmp_path / "run" / "checkpoint-1", name, content)
    with pytest.raises(CheckpointError, match=f"resume_from_checkpoint: {message} of '.*checkpoint-1': ") as raised:
        trainer(max_steps=2).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "tied"])
def test_models_whose_weights_have_other_names_on_the_disk_are_resumed(trainer, plain, kind):
    changes = {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "tied": {"tie_word_embeddings": True},
    }[kind]
    name = "llama" if kind == "tied" else kind
    whole = trainer(model=plain.build(name, **changes))
    whole.train()
    resumed = trainer(model=plain.build(name, **changes))
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    best = trainer(model=plain.build(name, **changes))
    best.state.best_model_checkpoint = str(Path(whole.args.output_dir) / "checkpoint-4")
    best._load_best_model()
    assert equal(whole.model.state_dict(), best.model.state_dict())


def test_adapters_are_loaded_all_or_none(trainer, plain, tmp_path):
    def adapted(**options):
        torch.manual_seed(0)
        return get_peft_model(
            plain.build(), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"]} | options)
        )

    whole = trainer(model=adapted())
    whole.train()
    resumed = trainer(model=adapted())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    for options, message in (
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "got no base_model.*k_proj"),
        ({"target_modules": ["q_proj"]}, "got besides base_model.*down_proj"),
        ({"r": 3}, r"got other shapes: .*lora_A.weight \[2, 40\], not \[3, 40\]"),
    ):
        with pytest.raises(CheckpointError, match=f"expected the weights of this model, {message}"):
            trainer(model=adapted(**options)).train(resume_from_checkpoint=True)


def test_options_of_the_optimizer_are_those_of_the_run_that_resumes(trainer, tmp_path):
    """Loaded states are not to bring the old ones back; the schedule goes on where it was."""
    options = {"lr_scheduler_type": "linear", "max_steps": 4}
    trainer(**options).train()
    used = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, _args, _state, _control, optimizer=None, **_others):
            used.append(optimizer.param_groups[0]["lr"])

    resumed = trainer([Rates()], learning_rate=4e-2, weight_decay=0.25, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    rates = [line["learning_rate"] for line in resumed.state.log_history if "loss" in line]
    assert rates == pytest.approx([1e-2, 0.75e-2, 2e-2, 1e-2]) and used == rates[2:]
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.25, 0.0}


# The mean of a whole run


def test_the_training_loss_after_resuming_is_that_of_the_whole_run(trainer, tmp_path):
    """Also where it was saved between two log lines."""
    whole = trainer(logging_steps=3, max_steps=5)
    output = whole.train()
    each = trainer(save_strategy="no", max_steps=5)
    each.train()
    assert output.training_loss == pytest.approx(sum(losses(each)) / 5)
    resumed = trainer(logging_steps=3, max_steps=5)
    again = resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert again.training_loss == output.training_loss == again.metrics["train_loss"]
    assert resumed.state.log_history[-1]["train_loss"] == output.training_loss
    finished = trainer(max_steps=5).train(resume_from_checkpoint=True)
    assert finished.training_loss == output.training_loss


def test_without_the_totals_of_a_checkpoint_there_is_a_warning(trainer, tmp_path, caplog):
    trainer(max_steps=1).train()
    forge(tmp_path / "run" / "checkpoint-1", "ebft_totals.json")
    resumed = trainer(max_steps=2)
    output = resumed.train(resume_from_checkpoint=True)
    assert "no ebft_totals.json: train_loss will be that of the steps after this one" in caplog.text
    assert output.training_loss == pytest.approx(losses(resumed)[1])


# Stopped


class At(TrainerCallback):
    """Does something when the second step begins."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, _args, state, _control, **_others):
        if state.global_step == 1:
            self.action()


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_saves(trainer, tmp_path):
    whole = trainer()
    whole.train()
    run = trainer([At(lambda: run.request_stop())], output_dir=str(tmp_path / "stopped"), save_steps=100)
    run.train()
    assert run.stopped and run.state.global_step == 2 and not whole.stopped
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["checkpoint-2"]
    resumed = trainer(output_dir=str(tmp_path / "stopped"))
    resumed.train(resume_from_checkpoint=True)
    assert not resumed.stopped and losses(resumed) == losses(whole)
    assert equal(whole.model.state_dict(), resumed.model.state_dict())


def test_signals_stop_training_and_interrupt_what_else_is_done(trainer):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = trainer([At(lambda: signal.raise_signal(signal.SIGTERM))])
    with stop_on_signals(run) as came:
        run.train()
        assert run.stopped and came == ["SIGTERM"]
        with pytest.raises(Stopped, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
    twice = trainer([At(lambda: [signal.raise_signal(signal.SIGINT) for _ in "ab"])])
    with pytest.raises(Stopped), stop_on_signals(twice):
        twice.train()
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals(run) as came:
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before[1])
    assert came == []
    with ThreadPoolExecutor() as threads:  # where signals do not come
        assert threads.submit(lambda: stop_on_signals(run).__enter__()).result() == []


# One folder


@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_folder_that_is_deleted_ends_the_run(trainer, tmp_path, save_steps):
    message = "output: '.*run' or ebft.lock in it was deleted while the run was going on"
    with pytest.raises(CheckpointError, match=message):
        trainer([At(lambda: shutil.rmtree(tmp_path / "run"))], save_steps=save_steps).train()
    assert not (tmp_path / "run").exists()


def test_two_runs_do_not_train_in_one_folder(trainer, tmp_path):
    other = trainer()
    found = []

    def start():
        code = f"from ebft_trainer.run_folder import owned\nwith owned({str(tmp_path / 'run')!r}): pass"
        command = [sys.executable, "-c", code]
        found.append(subprocess.run(command, env=environment(), capture_output=True, text=True).stderr)

    trainer([At(start)]).train()
    assert f"is in use by process {os.getpid()} on host " in found[0]
    other.train()


# Not finite


def poison(trainer: EBFTTrainer, *steps: int, by: float = math.inf, hidden: bool = False) -> None:
    """Make the loss of the second micro-batch of some steps, or with ``hidden`` only its gradient, not finite."""
    compute_loss, calls = trainer.compute_loss, []

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(_ctx, gradient):
            return gradient * by

    def poisoned(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        calls.append(trainer.state.global_step)
        if trainer.state.global_step not in steps or calls.count(trainer.state.global_step) != 2:
            return loss
        if hidden:
            return Poisoned.apply(loss)
        trainer._losses[-1] = loss.detach() * by
        return loss

    trainer.compute_loss = poisoned


class Weights(TrainerCallback):
    """A copy of the weights after each step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, *_args, **others):
        self.after.append(copy.deepcopy(others["model"].state_dict()))


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("by", [math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_step_that_is_not_finite_is_skipped_and_counted(trainer, hidden, by, max_grad_norm):
    weights = Weights()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": max_grad_norm, "save_strategy": "no"}
    run = trainer([weights], per_device_train_batch_size=1, logging_steps=4, **options)
    poison(run, 1, by=by, hidden=hidden)
    run.train()
    assert [equal(a, b) for a, b in zip(weights.after, weights.after[1:], strict=False)] == [True, False, False]
    (line,) = (line for line in run.state.log_history if "loss" in line)
    assert line["nonfinite_steps"] == 1
    reference = trainer(per_device_train_batch_size=1, **options)
    poison(reference, 1, by=by, hidden=hidden)
    reference.train()
    each = losses(reference)
    assert math.isnan(each[1]) and all(map(math.isfinite, (each[0], *each[2:])))
    assert line["loss"] == pytest.approx((each[0] + each[2] + each[3]) / 3)
    assert math.isfinite(run.state.log_history[-1]["train_loss"])


def test_too_many_steps_in_a_row_end_the_run_with_a_saved_state(trainer, tmp_path):
    weights = Weights()
    run = trainer([weights], max_steps=9, save_strategy="no", max_nonfinite_steps=3, gradient_accumulation_steps=2)
    poison(run, 0, 1, 3, 4, 5)
    with pytest.raises(
        FloatingPointError, match=r"of 3 steps in a row; the state before them is saved as checkpoint-6 in "
    ):
        run.train()
    assert checkpoints(tmp_path) == ["checkpoint-6"]
    assert equal(weights.after[2], weights.after[5])
    resumed = trainer([again := Weights()], max_steps=7, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert len(again.after) == 1 and all(value.isfinite().all() for value in again.after[0].values())


def test_a_step_that_cannot_be_skipped_ends_the_run(trainer):
    run = trainer()
    run.is_deepspeed_enabled = True
    run._losses = [torch.tensor(1.0), torch.tensor(math.inf)]
    with pytest.raises(FloatingPointError, match="loss: expected finite numbers, got others in step 0"):
        run._end_gradient(run.model)


def test_with_a_gradient_scaler_only_the_loss_is_judged(trainer):
    """The scaler looks for a scale by making gradients overflow, and skips those steps itself."""
    run = trainer()
    run.accelerator.scaler = torch.amp.GradScaler("cpu")
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    for loss, left in ((1.0, True), (math.nan, False)):
        run._losses = [torch.tensor(loss)]
        run._end_gradient(run.model)
        assert all((parameter.grad is not None) == left for parameter in run.model.parameters())
