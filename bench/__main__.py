"""Every op against everything else that computes it, on this machine.

    python -m bench                                    # a selection that takes minutes on a CPU
    python -m bench --op strided_attention --model Qwen2.5-1.5B --length 1024 --batch 8 --dtype bfloat16 --device cuda

Everyone is first checked, results and gradients, against float64 at a short length, and on a GPU at one of many tiles
with heads of 128 and at the timed shape, where it fits into memory; who is wrong gets no time. Then all are timed in
turn in one process, beside the floor (bench/floors.py). "cold" is the first forward of the process, at the short
length, with nothing found that was compiled earlier. On a GPU, times are between events, its cache is overwritten
before each run, and what is short is replayed as a CUDA graph, without the host's time. Writes results.json, results.md
and results.png to the output folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ebft_kernels import select_impl
from ebft_kernels._dispatch import OPS, why_not

from .measure import first_run, in_turn, machine_line, side_stream
from .problems import DIRECTIONS, FLOOR, PROBLEMS, Contestant, Problem, errors
from .report import Row, markdown, plot, write_json
from .shapes import MODELS, Geometry, ModelShape

#: The prompt length and vocabulary at which results are checked.
GATE_LENGTH, GATE_VOCAB = 72, 4096
#: On a GPU also: a pipeline of several stages is in its steady state after some tiles only.
STEADY_LENGTH, STEADY_HEAD_DIM = 1088, 128


def main() -> None:
    """Parse the command line, check, time, write."""
    arguments = _parser().parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    geometry = Geometry(batch=arguments.batch, length=arguments.length, samples=arguments.samples)
    machine = f"{machine_line(device)}, {arguments.dtype}"
    rows: list[Row] = []
    choices = {op: choice(op, device, dtype) for op in arguments.op or PROBLEMS}
    with compiling_anew(), side_stream(device):
        for op in choices:
            print(choices[op], file=sys.stderr, flush=True)
            for name in arguments.model or ("llama-256",):
                passed = gate(op, MODELS[name], geometry, dtype, device)
                problem = PROBLEMS[op](MODELS[name], geometry, dtype, device)
                rows += measure(problem, passed, device, arguments.direction)
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = markdown(machine, choices, rows)
    print(text)
    write_json(arguments.output / "results.json", machine, choices, rows)
    (arguments.output / "results.md").write_text(text)
    plot(arguments.output / "results.png", machine, rows)
    print(f"wrote results.json, results.md and results.png to {arguments.output}", file=sys.stderr)


def choice(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation the library takes by itself, and why none that it would rather take."""
    chosen, (_, impls) = select_impl(op, device, dtype), OPS[op]
    reasons = {impl: why_not(op, impl, device, dtype) for impl in impls[: impls.index(chosen)]}
    told = "; ".join(f"not {impl!r}: {reason}" for impl, reason in reasons.items() if reason)
    return f"{op}: impl='auto' takes {chosen!r}" + (f" ({told})" if told else "")


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Inside, nothing that Triton or Inductor compiled in an earlier process is found."""
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, dict.fromkeys(names, folder)):
        yield


class Gate(NamedTuple):
    """What was seen at a short length, by contestant.

    Attributes:
        wrong: what is wrong with results or gradients; "" where nothing is.
        cold: seconds of the first forward in the process, compilation included.
    """

    wrong: dict[str, str]
    cold: dict[str, float]


def gate(
    op: str,
    model: ModelShape,
    geometry: Geometry,
    dtype: torch.dtype,
    device: torch.device,
    *,
    only: str | tuple[str, ...] = "",
) -> Gate:
    """Run everyone once and check them; ``only`` those whose name starts with this, or with one of these."""

    def entered(model: ModelShape, geometry: Geometry) -> Problem:
        problem = PROBLEMS[op](model, geometry, dtype, device)
        return problem._replace(contestants={k: v for k, v in problem.contestants.items() if k.startswith(only)})

    small = model._replace(vocab=min(model.vocab, GATE_VOCAB))
    problem = entered(small, geometry._replace(batch=2, length=GATE_LENGTH))
    cold = {}
    for name, contestant in problem.contestants.items():
        with contextlib.suppress(Exception):  # what it is, the check below tells
            cold[name] = first_run(prepared(contestant, problem.inputs, "forward"), device).seconds
    wrong = errors(problem)
    for larger in (steady(small, geometry), (model, geometry)) if device.type == "cuda" else ():
        try:
            found = errors(entered(*larger))
        except torch.OutOfMemoryError:
            print(f"{op}: not checked at {larger[1]}: its float64 results do not fit into memory", file=sys.stderr)
            continue
        for name, error in found.items():
            if not error.startswith("OutOfMemoryError"):  # beside what it is checked with
                wrong[name] = wrong[name] or error
    return Gate(wrong, cold)


def steady(model: ModelShape, geometry: Geometry) -> tuple[ModelShape, Geometry]:
    """One group of heads of at least 128 over a prompt of many tiles, whatever is timed."""
    one_group = {"heads": model.heads // model.kv_heads, "kv_heads": 1}
    model = model._replace(**one_group, head_dim=max(model.head_dim, STEADY_HEAD_DIM))
    return model, geometry._replace(batch=1, length=STEADY_LENGTH)


def measure(
    problem: Problem, gate: Gate, device: torch.device, directions: Sequence[str] | None = None
) -> Iterator[Row]:
    """Time everyone whom the gate lets pass, in each direction that the problem has."""
    for direction in directions or DIRECTIONS:
        if direction != "forward" and not problem.work_backward:
            continue
        entries = {
            name: contestant
            for name, contestant in problem.contestants.items()
            if contestant.differentiable or direction == "forward"
        }
        runs = {
            name: prepared(contestant, problem.inputs, direction)
            for name, contestant in entries.items()
            if not gate.wrong.get(name)
        }
        firsts = {name: first_run(run, device) for name, run in runs.items()}
        times = in_turn(runs | {FLOOR: problem.floor(direction)}, device=device)
        rates = {name: problem.work_of(direction) / time.median for name, time in times.items()}
        about = {"op": problem.op, "shape": problem.shape, "direction": direction}
        about |= {"unit": problem.unit, "formula": problem.formula}
        for name in entries:
            same = about | {"contestant": name}
            if name not in runs:
                yield Row(**same, error=gate.wrong[name])
                continue
            same |= {"cold": gate.cold.get(name), "peak_bytes": firsts[name].peak_bytes}
            yield Row(**same, **times[name]._asdict(), rate=rates[name] if entries[name].exact else None)
        yield Row(**about, contestant=FLOOR, **times[FLOOR]._asdict(), rate=rates[FLOOR])


def prepared(contestant: Contestant, inputs: tuple[Tensor, ...], direction: str) -> Callable[[], object]:
    """What is timed: no preparation, and for ``"backward"`` no forward pass."""
    with torch.no_grad():
        inputs = contestant.prepare(inputs)
    inputs = tuple(x.detach().requires_grad_(direction != "forward") for x in inputs)
    if direction == "forward":
        return torch.no_grad()(lambda: contestant.run(*inputs))

    def results() -> tuple[Tensor, ...]:
        out = contestant.run(*inputs)
        return out if isinstance(out, tuple) else (out,)

    first = results()
    upstream = [torch.randn_like(x) for x in first]
    if direction == "backward":
        return lambda kept=first: torch.autograd.grad(kept, inputs, upstream, retain_graph=True)
    return lambda: torch.autograd.grad(results(), inputs, upstream)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", action="append", choices=list(PROBLEMS), help="default: all; may be repeated")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: llama-256; may be repeated")
    parser.add_argument("--direction", action="append", choices=DIRECTIONS, help="default: all; may be repeated")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024, help="prompt tokens P")
    parser.add_argument("--samples", type=int, default=4, help="rollouts per anchor n")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's choice")
    parser.add_argument("--output", type=Path, default=Path("bench-output"))
    return parser


if __name__ == "__main__":
    main()
