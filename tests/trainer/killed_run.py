"""A run that is killed again and again and resumed, next to one that is not: `python killed_run.py FOLDER`.

Every attempt is a fork, so that the imports are paid for once. Half of the attempts are killed at a file operation,
counted from the start of the attempt, the others after a time. FOLDER/model is trained; FOLDER/report.json tells
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
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ebft_trainer import EBFTConfig, EBFTTrainer
from ebft_trainer.checkpoint import check_whole

STEPS = 10
KILLS = 10


class Losses(TrainerCallback):
    """One line for every step, on the disk at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_others: Any) -> None:
        if "loss" in logs:
            self._file.write(json.dumps([state.global_step, logs["loss"], logs["entropy"], logs["grad_norm"]]) + "\n")


def train(folder: Path, run: Path) -> None:
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
    losses = Losses(run.with_suffix(".jsonl"))
    trainer = EBFTTrainer(model, config, train_dataset=rows, callbacks=[losses])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
    torch.save(trainer.model.state_dict(), run.with_suffix(".pt"))


def forked(work: Callable[[], None], kill_after: float | None = None) -> int:
    """The exit status of ``work`` in a child process: 0, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(operation: int, run: Path) -> None:
    """Kill this process before its n-th file operation on a checkpoint of ``run``."""
    counted = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            # Deleting works relative to folders that are open.
            counted += str(arguments[0]).startswith(str(run)) or event in ("os.remove", "os.rmdir")
            if counted == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    assert forked(lambda: train(folder, folder / "whole")) == 0
    duration = time.perf_counter() - started
    chance, run, report = random.Random(0), folder / "killed", []
    for attempt in range(KILLS):
        if attempt % 2:
            status = forked(lambda: train(folder, run), kill_after=chance.uniform(0.2, 0.7) * duration)
        else:
            operation = chance.randrange(1, 150)
            status = forked(lambda operation=operation: (kill_at(operation, run), train(folder, run)))
        checkpoints = sorted(path.name for path in run.glob("checkpoint-*"))
        for name in checkpoints:
            check_whole(run / name)
        lines = run.with_suffix(".jsonl").read_text().splitlines() if run.with_suffix(".jsonl").exists() else []
        last_step = max((json.loads(line)[0] for line in lines), default=0)
        report.append({"status": status, "checkpoints": checkpoints, "last_step": last_step})
    assert forked(lambda: train(folder, run)) == 0
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
