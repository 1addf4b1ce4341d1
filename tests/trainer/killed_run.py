"""A run that is killed again and again and resumed, next to one that is not: `python killed_run.py FOLDER`.

Every attempt is a fork, so that the imports are paid for once. Half of the attempts are killed at a file operation,
the others after a time. FOLDER/model is trained; FOLDER/report.json tells
what was found after each kill.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ebft_trainer import EBFTConfig, EBFTTrainer
from ebft_trainer.checkpoint import check_whole

STEPS = 10
KILLS = 6


class Losses(TrainerCallback):
    """One line for every step, on the disk at once."""

    def __init__(self, path: Path, begin: Callable[[], object]) -> None:
        self._file = path.open("a", buffering=1)
        self._begin = begin

    def on_train_begin(self, *_args: Any, **_others: Any) -> None:
        self._begin()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_others: Any) -> None:
        if "loss" in logs:
            self._file.write(json.dumps([state.global_step, logs["loss"], logs["entropy"], logs["grad_norm"]]) + "\n")


def train(folder: Path, run: Path, begin: Callable[[], object] = lambda: None) -> None:
    """Epochs of four steps with two micro-batches each, shuffled, a checkpoint after every step."""
    config = EBFTConfig(
        output_dir=str(run), context=4, stride=6, horizon=3, samples=3, temperature=1.0, max_steps=STEPS,
        per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, report_to="none", disable_tqdm=True, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    rows = [{"input_ids": torch.randint(0, 40, (n,), generator=generator)} for n in (24, 11, 17, 8, 24, 12, 9, 20)]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    losses = Losses(run.with_suffix(".jsonl"), begin)
    trainer = EBFTTrainer(model, config, train_dataset=rows, callbacks=[losses])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    torch.save(trainer.model.state_dict(), run.with_suffix(".pt"))


def forked(work: Callable[[], None]) -> int:
    """The exit status of ``work`` in a child process: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(operation: int, folder: Path, run: Path) -> None:
    """Train, and be killed before the n-th file operation on a checkpoint."""
    counted = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            # Deleting works relative to folders that are open.
            counted += str(arguments[0]).startswith(str(run)) or event in ("os.remove", "os.rmdir")
            if counted == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(folder, run)


def killed_after(seconds: float, folder: Path, run: Path) -> None:
    """Train, and be killed so long after the first step began, be it in the middle of a file."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    train(folder, run, lambda: signal.setitimer(signal.ITIMER_REAL, seconds))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    assert forked(lambda: train(folder, folder / "whole")) == 0
    step = (time.perf_counter() - started) / STEPS
    chance, run, report = random.Random(0), folder / "killed", []
    for attempt in range(KILLS):
        operation, seconds = chance.randrange(1, 120), chance.uniform(0, 3 * step)
        if attempt % 2:
            status = forked(partial(killed_after, seconds, folder, run))
        else:
            status = forked(partial(killed_at, operation, folder, run))
        checkpoints = sorted(run.glob("checkpoint-*"))
        for path in checkpoints:
            check_whole(path)
        lines = run.with_suffix(".jsonl").read_text().splitlines() if run.with_suffix(".jsonl").exists() else []
        last_step = max((json.loads(line)[0] for line in lines), default=0)
        newest = max((int(path.name.split("-")[1]) for path in checkpoints), default=0)
        report.append({"status": status, "newest": newest, "last_step": last_step})
    assert forked(lambda: train(folder, run)) == 0
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
