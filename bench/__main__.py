"""Every op against everything else that computes it, on this machine.

    python -m bench                                    # a selection that takes minutes on a CPU
    python -m bench --op strided_attention --model Qwen2.5-1.5B --length 1024 --batch 8 --dtype bfloat16 --device cuda

Everyone is first checked, results and gradients, against float64 at a short length; who is wrong gets no time. Then all
are timed in turn in one process. Writes results.json, results.md and results.png to the output folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ebft_kernels import select_impl
from ebft_kernels.testing import randn

from .measure import first_run, in_turn, machine_line
from .problems import DIRECTIONS, FLOOR, PROBLEMS, Contestant, Problem, errors
from .report import Row, markdown, plot, write_json
from .shapes import MODELS, Geometry, ModelShape

#: The prompt length and vocabulary at which results are checked.
GATE_LENGTH, GATE_VOCAB = 72, 4096


def main() -> None:
    """Parse the command line, check, time, write."""
    arguments = _parser().parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    geometry = Geometry(batch=arguments.batch, length=arguments.length, samples=arguments.samples)
    machine = f"{machine_line(device)}, {arguments.dtype}"
    print(machine)
    rows: list[Row] = []
    for op in arguments.op or PROBLEMS:
        print(f"{op}: impl='auto' takes {select_impl(op, device, dtype)!r}", flush=True)
        for name in arguments.model or ("llama-256",):
            wrong = gate(op, MODELS[name], geometry, dtype, device)
            problem = PROBLEMS[op](MODELS[name], geometry, dtype, device)
            rows += measure(problem, wrong, device, arguments.direction)
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = markdown(machine, rows)
    print(text)
    write_json(arguments.output / "results.json", machine, rows)
    (arguments.output / "results.md").write_text(text)
    plot(arguments.output / "results.png", machine, rows)
    print(f"wrote results.json, results.md and results.png to {arguments.output}")


def gate(op: str, model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """What is wrong with each contestant's results and gradients at a short length; "" where nothing is."""
    model = model._replace(vocab=min(model.vocab, GATE_VOCAB))
    return errors(PROBLEMS[op](model, geometry._replace(batch=2, length=GATE_LENGTH), dtype, device))


def measure(
    problem: Problem, wrong: dict[str, str], device: torch.device, directions: list[str] | None = None
) -> Iterator[Row]:
    """Time everyone who is not in ``wrong`` with a reason, in each direction that the problem has."""
    for direction in directions or DIRECTIONS:
        if direction != "forward" and not problem.work_backward:
            continue
        work = {
            "forward": problem.work,
            "backward": problem.work_backward,
            "forward+backward": problem.work + problem.work_backward,
        }[direction]
        entries = {
            name: contestant
            for name, contestant in problem.contestants.items()
            if contestant.differentiable or direction == "forward"
        }
        runs = {
            name: _prepared(contestant, problem.inputs, direction)
            for name, contestant in entries.items()
            if not wrong.get(name)
        }
        firsts = {name: first_run(run, device) for name, run in runs.items()}
        times = in_turn(runs | {FLOOR: problem.floor(direction)}, device=device)
        about = {"op": problem.op, "shape": problem.shape, "direction": direction}
        about |= {"unit": problem.unit, "formula": problem.formula}
        for name in entries:
            same = about | {"contestant": name}
            if name not in runs:
                yield Row(**same, error=wrong[name])
                continue
            rate = work / times[name].median if entries[name].exact else None
            first = firsts[name]
            yield Row(**same, **times[name]._asdict(), first=first.seconds, peak_bytes=first.peak_bytes, rate=rate)
        yield Row(**about, contestant=FLOOR, **times[FLOOR]._asdict(), rate=work / times[FLOOR].median)


def _prepared(contestant: Contestant, inputs: tuple[Tensor, ...], direction: str) -> Callable[[], object]:
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
    upstream = [randn(*x.shape, seed=i, dtype=x.dtype, device=x.device) for i, x in enumerate(first)]
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
