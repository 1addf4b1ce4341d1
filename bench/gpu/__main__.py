"""Check and measure on one GPU whatever only a GPU can tell, in less than eight minutes.

    python -m bench.gpu --output DIR [--minutes 8] [--only kernels ...] [--rehearse]

Stages, in the order of their worth, each in a process of its own and killed when its time is over:

    machine   what is there, and two ceilings: a large copy, a large matrix product
    right     self-test, the ops' tests on CUDA tensors, every kernel at the shapes of models against float64
    kernels   every kernel timed, beside FlexAttention, SDPA, fused losses, the ceilings and the performance model
    step      whole training steps, beside the published algorithm and the plan; where their time goes
    tiles     EBFT_KERNELS_AUTOTUNE over the short lists of tiles, as a patch

Each writes DIR/STAGE.jsonl line by line and DIR/STAGE.log. At the end, also when it is stopped by a signal, there are
DIR/report.md, DIR/results.json and a short table on the standard output. It needs no network and changes no setting of
the GPU. ``--rehearse`` runs the same code without one: tiny shapes, Triton's interpreter, the host's clock; what it
cannot run it names. The exit code is 0 if every stage ended by itself and no check failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .job import Ended, Job, finish, kill_group, read_rows, start

#: Kept for the report at the end.
_REPORT_SECONDS = 6.0


def _stage(name: str) -> Callable[[Job], None]:
    """Imported in the stage's own process: what it imports may touch the GPU, after which a fork cannot use it."""
    return lambda job: importlib.import_module(f"{__package__}.{name}").run(job)


#: Stage -> its share of the time, and what it runs. What a stage leaves over goes to those after it.
STAGES: dict[str, tuple[float, Callable[[Job], None]]] = {
    name: (share, _stage(name))
    for name, share in (("machine", 5.0), ("right", 36.0), ("kernels", 24.0), ("step", 27.0), ("tiles", 8.0))
}


class _Stopped(BaseException):
    """A signal asked for the end."""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run the stages, report; gives the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, help="for everything together (8; to rehearse 30)")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), metavar="STAGE", help="these stages alone")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    given = parser.parse_args(arguments)
    if given.rehearse and os.environ.get("TRITON_INTERPRET") != "1":  # Triton looks at it once, when it is imported
        command = [sys.executable, "-m", __package__, *(sys.argv[1:] if arguments is None else arguments)]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    minutes = given.minutes or (30.0 if given.rehearse else 8.0)
    deadline = time.monotonic() + 60 * minutes - _REPORT_SECONDS
    _prepare(given)
    if not given.rehearse and (reason := _why_no_gpu(given.output)):
        parser.error(f"expected a GPU that torch can use ({reason}); --rehearse runs without one")
    ended: dict[str, Ended] = {}
    stopped = ""
    try:
        with _signals_raise():
            names = [name for name in STAGES if not given.only or name in given.only]
            for name, end in run_stages(names, given.output, deadline, rehearsal=given.rehearse):
                ended[name] = end
                print(f"{name}: {end.how} after {end.seconds:.0f} s", file=sys.stderr, flush=True)
    except _Stopped as signalled:
        stopped = str(signalled)
        print(f"stopped by {stopped}", file=sys.stderr)
    from .report import write_report  # what it imports is not for the processes above

    passed = write_report(given.output, ended, rehearsal=given.rehearse, stopped=stopped)
    for name in ("cache", "build"):
        shutil.rmtree(given.output / name, ignore_errors=True)
    return 0 if passed else 1


def _prepare(given: argparse.Namespace) -> None:
    """The folder, empty of earlier results, and the environment of all processes."""
    given.output.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.jsonl", "*.log", "report.md", "results.json"):
        for path in given.output.glob(pattern):
            path.unlink()
    root = Path(__file__).resolve().parents[2]
    for folder in (root / "python", root):
        sys.path.insert(0, str(folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the other check leaves nothing that a fork could use
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):  # shared by the stages
        os.environ[name] = str((given.output / "cache" / name.split("_")[0].lower()).resolve())


def _why_no_gpu(folder: Path) -> str:
    """Why a fork of a fork cannot use a GPU; "" if it can.

    Asked in such a process: once this one has looked, or has imported something that does, its forks cannot use what
    was found, and all the time would be lost.
    """

    def touch(_job: Job) -> None:
        torch.zeros(1, device="cuda").sum().item()

    def look(job: Job) -> None:
        importlib.import_module(f"{__package__}.right")
        process = start(job, touch)
        process.join()
        sys.exit(process.exitcode)

    job = Job(folder, "look", False, time.monotonic() + 60)
    process = start(job, look, own_group=True)
    process.join(60)
    how = finish(process, job, kill_group).how
    reasons = [row["error"] for row in read_rows(folder / "look.jsonl")]
    for path in folder.glob("look.*"):
        path.unlink()
    return "" if how == "finished" else "; ".join(reasons) or how


def run_stages(names: list[str], folder: Path, deadline: float, *, rehearsal: bool) -> Iterator[tuple[str, Ended]]:
    """Run the stages one after the other, each for its share of what is left; name and end of each."""
    for index, name in enumerate(names):
        share = STAGES[name][0] / sum(STAGES[x][0] for x in names[index:])
        left = deadline - time.monotonic()
        job = Job(folder, name, rehearsal, time.monotonic() + max(share * left, 0))
        process = start(job, STAGES[name][1], own_group=True)
        try:
            while process.is_alive() and job.left() > 0:
                time.sleep(0.02)
            ended = finish(process, job, kill_group)
        finally:
            kill_group(process)  # also what a stage that is over has left behind
        yield name, ended


@contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(number: int, _frame: object) -> None:
        raise _Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
