"""What a stage is given, and how stages and their parts run: each in a process of its own, with an end to its time."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..measure import first_run, per_call
from ..shapes import MODELS, Geometry, ModelShape

#: One line of a stage's results.
Row = dict[str, Any]
#: Models at whose shapes kernels are checked and measured, in the order of their worth.
SHAPES = ("Qwen2.5-1.5B", "Llama-3.2-1B", "Llama-3.1-8B")


@dataclass(frozen=True)
class Job:
    """What a stage, or a part of one, is given.

    Attributes:
        folder: where all output goes.
        name: of the stage; its results are lines of ``NAME.jsonl`` there.
        rehearsal: whether there is no GPU and everything is tiny.
        deadline: of ``time.monotonic()``, when it is killed.
        part: of the stage.
    """

    folder: Path
    name: str
    rehearsal: bool
    deadline: float
    part: str = ""
    _told: set[str] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return torch.device("cpu") if self.rehearsal else torch.device("cuda", torch.cuda.current_device())

    @property
    def geometry(self) -> Geometry:
        """Batch and rollouts that kernels are measured at."""
        tiny = {"length": 12, "context": 4, "stride": 4, "horizon": 4, "samples": 2}
        return Geometry(batch=1, **tiny) if self.rehearsal else Geometry(batch=8)

    def models(self) -> Iterator[ModelShape]:
        """The shapes that kernels are measured at; a rehearsal has one, small."""
        if self.rehearsal:
            yield small(MODELS[SHAPES[0]])
        else:
            yield from (MODELS[name] for name in SHAPES)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def write(self, kind: str, **values: object) -> None:
        """One line of results, at once and whole: several parts write to the same file."""
        row = {"kind": kind} | ({"part": self.part} if self.part else {}) | values
        row = {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        line = json.dumps(row, default=str) + "\n"
        with open(self.folder / f"{self.name}.jsonl", "ab", buffering=0) as file:
            file.write(line.encode())

    def on_gpu(self, what: str) -> bool:
        """Whether this, which only a GPU can do, is done; in a rehearsal it is listed by this name."""
        if self.rehearsal and what not in self._told:
            self._told.add(what)
            self.write("only on a GPU", what=what)
        return not self.rehearsal

    @contextlib.contextmanager
    def attempt(self, what: str, *, needs: float = 0.0, **about: object) -> Iterator[bool]:
        """Inside, an exception costs only what is inside: it becomes a line of results, as does a lack of memory.

        Gives whether ``needs`` seconds are left; if not, that is a line of results too, and nothing should be done.
        """
        enough = self.rehearsal or self.left() > needs
        if not enough:
            self.write("skipped", what=what, why=f"{self.left():.0f} s were left, it needs {needs:.0f}", **about)
        try:
            yield enough
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                self.write("skipped", what=what, why="out of memory", **about)
            else:
                self.write("error", what=what, error=told(error), **about)
            traceback.print_exc()
            traceback.clear_frames(error.__traceback__)  # their tensors would be held until this frame is left
        finally:
            gc.collect()
            if not self.rehearsal:
                torch.cuda.empty_cache()

    def time(self, calls: Sequence[Callable[[], object]], *, once: bool = False) -> Row:
        """Seconds per call, memory of the first and how it was timed; with ``once`` they are called and that is all."""
        first = first_run(calls[0], self.device)
        found: Row = {"first_seconds": first.seconds, "peak_bytes": first.peak_bytes}
        if once:
            return found
        limits = {"seconds": 0.0, "least": 2} if self.rehearsal else {"seconds": 0.25}
        timing = per_call(calls, self.device, **limits)
        return found | timing.seconds._asdict() | {"how": timing.how}


def small(shape: ModelShape) -> ModelShape:
    """A model with as many queries per key, whose kernels an interpreter can run."""
    repeat = shape.heads // shape.kv_heads
    sizes = {"hidden": 32, "intermediate": 48, "layers": 4, "heads": repeat, "kv_heads": 1, "head_dim": 16, "vocab": 96}
    return shape._replace(**sizes)


class Ended(NamedTuple):
    """How a process ended: after ``seconds``, and "finished" or what else happened."""

    seconds: float
    how: str


class Task(NamedTuple):
    """What runs in a process of its own, for at most ``seconds``."""

    name: str
    run: Callable[[Job], None]
    seconds: float = float("inf")


def run_beside(job: Job, tasks: Sequence[Task], at_once: int) -> None:
    """Run tasks as parts of ``job``, at most so many at a time, and write down how each ended.

    To be called before this process has touched the GPU: a fork cannot use it otherwise.
    """
    waiting, running = list(tasks), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                task = waiting.pop(0)
                if job.left() <= 2:
                    job.write("part", part=task.name, seconds=0.0, how="not started: no time was left")
                    continue
                # Before the deadline of all, so that there is time to write down who was killed.
                deadline = min(job.deadline - 2, time.monotonic() + task.seconds)
                part = replace(job, part=task.name, deadline=deadline)
                running.append((part, start(part, task.run)))
            for entry in list(running):
                part, process = entry
                if process.is_alive() and part.left() > 0:
                    continue
                ended = finish(process, part, lambda process: process.kill())
                part.write("part", seconds=ended.seconds, how=ended.how)
                running.remove(entry)
            time.sleep(0.02)
    finally:
        for _, process in running:
            process.kill()


class Process(multiprocessing.get_context("fork").Process):
    """A fork that remembers when it was started."""

    started: float = 0.0


def start(job: Job, run: Callable[[Job], None], *, own_group: bool = False) -> Process:
    """Fork a process that runs ``run(job)`` and writes what it says to a log of the job's name.

    Args:
        own_group: whether it leads a process group, by which it can be killed with all of its own processes.
    """
    process = Process(target=_run, args=(job, run, own_group))
    process.started = time.monotonic()
    process.start()
    return process


def finish(process: Process, job: Job, kill: Callable[[Process], None]) -> Ended:
    """How a process ended, that is over or has no time left, in which case it is killed."""
    killed = process.is_alive()
    if killed:
        kill(process)
    process.join()
    code, seconds = process.exitcode, time.monotonic() - process.started
    if killed:
        return Ended(seconds, f"killed when its {job.deadline - process.started:.0f} s were over")
    if code == 0:
        return Ended(seconds, "finished")
    return Ended(seconds, f"died of {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}")


def kill_group(process: Process) -> None:
    """Kill a process that leads a group, with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.exitcode is None:
        process.kill()


def _run(job: Job, run: Callable[[Job], None], own_group: bool) -> None:
    if own_group:
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    log = os.open(job.folder / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    faulthandler.enable(file=2)
    try:
        run(job)
    except SystemExit:
        raise
    except BaseException as error:
        job.write("error", what=job.part or job.name, error=told(error))
        traceback.print_exc()
        sys.exit(1)


def told(error: BaseException) -> str:
    """An exception in one cell of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a results file; none if there is no such file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a process that was killed
            rows.append(json.loads(line))
    return rows
