"""A run to which one thing after the other happens, and one that is left alone: `python killed_run.py FOLDER N SEED`.

FOLDER/model is trained on FOLDER/text.txt by `ebft-train train --resume auto`. Of the N attempts, in turn, one is
killed at a file operation, one after a time, one finds files limited in size (a full disk), one gets SIGTERM, and one
finds another run started in its folder. Every attempt is a fork, so that the imports are paid for once.
FOLDER/report.json tells what was found after each.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ebft_trainer import cli
from ebft_trainer.checkpoint import check_whole
from ebft_trainer.monitor import JsonlLog, read_log

STEPS = 6
#: Micro-batches of two steps' epochs, shuffled, a checkpoint after every step.
OPTIONS = f"""--length 24 --context 4 --stride 6 --horizon 3 --samples 3 --temperature 1.0 --eval-fraction 0
--max-steps {STEPS} --per-device-train-batch-size 1 --gradient-accumulation-steps 2 --learning-rate 1e-2
--logging-steps 1 --save-steps 1 --save-total-limit 2 --report-to none --resume auto""".split()


def train(folder: Path, run: Path, begin: Callable[[], object] = lambda: None) -> None:
    """Start, or go on; ``begin`` is called when the first step begins."""

    class Log(JsonlLog):
        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            super().on_train_begin(*arguments, **others)
            begin()

    inputs = ["--model", folder / "model", "--data", folder / "text.txt", "--output", run]
    with mock.patch.object(cli, "JsonlLog", Log):
        cli.main(["train", *map(str, inputs), *OPTIONS])


def forked(work: Callable[[], None]) -> int:
    """The exit status of ``work`` in a child process: its code, or minus the signal that killed it."""
    child = os.fork()
    if not child:
        status = 99  # a traceback
        try:
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_an_operation(chance: random.Random, folder: Path, run: Path, _step: float) -> None:
    """Be killed before the n-th file operation in the folder of the run."""
    counted, operation = 0, chance.randrange(1, 200)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal counted
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
            # Deleting works relative to folders that are open.
            counted += str(arguments[0]).startswith(str(run)) or event in ("os.remove", "os.rmdir")
            if counted == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(folder, run)


def killed_after_a_time(chance: random.Random, folder: Path, run: Path, step: float) -> None:
    """Be killed so long after the first step began, be it in the middle of a file."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    seconds = chance.uniform(0.001, 3 * step)
    train(folder, run, lambda: signal.setitimer(signal.ITIMER_REAL, seconds))


def full_disk(chance: random.Random, folder: Path, run: Path, _step: float) -> None:
    """No file beyond a size: of the log, the weights, the optimizer's state or none."""
    size = int(10 ** chance.uniform(1, 6))
    train(folder, run, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def terminated(chance: random.Random, folder: Path, run: Path, step: float) -> None:
    """Get SIGTERM as by a scheduler, perhaps twice."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    seconds = chance.uniform(0.001, 3 * step)
    train(folder, run, lambda: signal.setitimer(signal.ITIMER_REAL, seconds, chance.choice((0, step))))


def two_at_once(_chance: random.Random, folder: Path, run: Path, _step: float) -> None:
    """Another one starts in the same folder while this one trains; it is refused, and this one goes on to be killed."""

    def other() -> None:
        assert forked(partial(train, folder, run)) == cli.BAD_INPUT
        os.kill(os.getpid(), signal.SIGKILL)

    train(folder, run, other)


#: What happens, and how an attempt may end; 0: it was at its end before.
FAULTS: dict[Callable[..., None], set[int]] = {
    killed_at_an_operation: {0, -signal.SIGKILL},
    killed_after_a_time: {0, -signal.SIGALRM},
    full_disk: {0, cli.BROKEN},
    terminated: {0, cli.STOPPED, -signal.SIGTERM},  # a second signal may come when all is done
    two_at_once: {-signal.SIGKILL},
}


def found(run: Path) -> dict[str, int]:
    """The newest checkpoint, all of which must be whole, and the last step that was logged."""
    checkpoints = sorted(run.glob("checkpoint-*"))
    for path in checkpoints:
        check_whole(path)
    newest = max((int(path.name.split("-")[1]) for path in checkpoints), default=0)
    return {"newest": newest, "last_step": max((line["step"] for line in read_log(run / "log.jsonl")), default=0)}


def main(folder: Path, attempts: int, seed: int) -> None:
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.perf_counter()
    train(folder, folder / "whole")  # in this process, which pays for everything that is done once
    step = (time.perf_counter() - started) / STEPS
    gc.freeze()  # Collecting what is here already is most of what an attempt would do.
    chance, run, report = random.Random(seed), folder / "killed", []
    for number in range(attempts):
        fault = list(FAULTS)[number % len(FAULTS)]
        status = forked(partial(fault, random.Random(chance.random()), folder, run, step))
        assert status in FAULTS[fault], (fault.__name__, status)
        report.append({"fault": fault.__name__, "status": status, **found(run)})
        if report[-1]["newest"] == STEPS and number < attempts - 1:
            forked(partial(cli.delete_run, run))  # begin anew: there is more to come
    assert forked(partial(train, folder, run)) == 0
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
