"""Every speed target of the project: what is wanted, what this machine gives, whether that is met.

    python -m bench.targets [--group step] [--group attention] [--rounds 3] [--threads 2]

Whole steps are those of `bench.step`: P = 1024, c = s = G = 8, n = 4, B = 1, a random Llama with hidden 256. A step of
the published algorithm takes minutes: for a quick look at a change, ask for the other groups or for ``--rounds 1``.
Groups "memory" need no quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ebft_kernels import select_impl

from . import plain_forward, problems, step
from .__main__ import gate, measure
from .measure import machine_line
from .shapes import MODELS, Geometry
from .step import FLOOR, OURS, PUBLISHED, Setup

MODEL, GEOMETRY = MODELS["llama-256"], Geometry()
CPU = torch.device("cpu")


class Target(NamedTuple):
    """One line of the table: a ratio that should be at least, or at most, ``wanted``."""

    name: str
    wanted: float
    at_least: bool
    measured: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        digits = 3 if abs(self.wanted - 1) < 0.1 else 2
        cells = (
            self.name,
            f"{sign} {self.wanted:.{digits}f}",
            f"{self.measured:.{digits}f}",
            "yes" if self.met else "no",
        )
        return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line, measure, print one line per target as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=list(GROUPS), help="default: all; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of whole steps")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{machine_line(CPU)}\n\n| target | wanted | measured | met |\n| --- | ---: | ---: | --- |")
    details = []
    for group in arguments.group or GROUPS:
        for line in GROUPS[group](arguments.rounds):
            if isinstance(line, Target):
                print(line, flush=True)
            else:
                details.append(line)
    print(*("\n" + text for text in details), sep="\n", end="")


def floor_targets(rounds: int) -> Iterator[Target]:
    """Our step against its bare products."""
    seconds = Setup(MODEL, GEOMETRY, torch.float32).time([OURS], rounds)
    yield Target("step / floor", 1.4, False, _total(seconds[OURS]) / _total(seconds[FLOOR]))


def step_targets(rounds: int, vocab: int = 8192) -> Iterator[Target | str]:
    """Our step against the published algorithm's, and against its bare products; at last the table behind it."""
    seconds = Setup(MODEL._replace(vocab=vocab), GEOMETRY, torch.float32).time([OURS, PUBLISHED], rounds)
    ours, published, floor = (seconds[name] for name in (OURS, PUBLISHED, FLOOR))
    yield Target(f"step, V={vocab}: published / ours", 15, True, _total(published) / _total(ours))
    yield Target(f"step, V={vocab}: ours / floor", 1.4, False, _total(ours) / _total(floor))
    for phases, wanted in ((("rollout",), 20), (("features",), 8), (("matching",), 20), (("policy", "backward"), 14)):
        ratio = sum(published[p] for p in phases) / sum(ours[p] for p in phases)
        yield Target(f"step, V={vocab}, {' + '.join(phases)}: published / ours", wanted, True, ratio)
    yield f"V={vocab}:\n\n{step.table(seconds, {})}\n"


def memory_targets(_rounds: int, vocab: int = 8192) -> Iterator[Target]:
    """Peak memory of one step above the loaded models, each in a process of its own."""
    options = ["--vocab", str(vocab), "--threads", str(torch.get_num_threads())]
    published, ours = (step.peak_in_own_process(name, options) for name in (PUBLISHED, OURS))
    sizes = f"{published / 2**20:.0f} / {ours / 2**20:.0f} MiB"
    yield Target(f"step, V={vocab}: peak memory, published / ours, {sizes}", 6, True, published / ours)


def attention_targets(_rounds: int) -> Iterator[Target]:
    """One layer's attention, forward and backward, the model's heads of 32 and heads of 64."""
    op = "strided_attention"
    for head_dim in (32, 64):
        model = MODEL._replace(head_dim=head_dim)
        ours, dense = f"{problems.OURS} {select_impl(op, CPU, torch.float32)}", problems.SDPA_PER_SAMPLE
        passed = gate(op, model, GEOMETRY, torch.float32, CPU, only=(ours, dense))
        problem = problems.attention_problem(model, GEOMETRY, torch.float32, CPU)
        chosen = problem._replace(contestants={name: problem.contestants[name] for name in (ours, dense)})
        rows = measure(chosen, passed, CPU, ["forward+backward"])
        median = {row.contestant: row.median for row in rows}
        shape = f"attention, {model.heads}/{model.kv_heads} heads of {head_dim}"
        yield Target(f"{shape}: dense-mask SDPA / ours", 5, True, median[dense] / median[ours])
        yield Target(f"{shape}: ours / bare products", 2, False, median[ours] / median[problems.FLOOR])


def bfloat16_targets(rounds: int) -> Iterator[Target]:
    """Our own step in both dtypes, in turn."""
    setups = [Setup(MODEL, GEOMETRY, dtype) for dtype in (torch.float32, torch.bfloat16)]
    runs = [[_total(setup.run(OURS)[1]) for setup in setups] for _ in range(rounds + 1)][1:]
    wide, narrow = (statistics.median(x) for x in zip(*runs, strict=True))
    yield Target("step: float32 / bfloat16", 1.5, True, wide / narrow)


def plain_forward_targets(_rounds: int) -> Iterator[Target]:
    """The model without a layout."""
    for name, ratio in plain_forward.ratios(MODEL, GEOMETRY).items():
        yield Target(f'plain {name}: "strided" / "sdpa"', 1.03, False, ratio)


def _total(phases: dict[str, float]) -> float:
    return sum(phases.values())


#: Groups of targets by name, each a function of the rounds; what is no target is printed below the table.
GROUPS: dict[str, Callable[[int], Iterator[Target | str]]] = {
    "floor": floor_targets,
    "attention": attention_targets,
    "bfloat16": bfloat16_targets,
    "plain forward": plain_forward_targets,
    "step": step_targets,
    "memory": memory_targets,
    "step, V=32768": lambda rounds: step_targets(rounds, 32768),
    "memory, V=32768": lambda rounds: memory_targets(rounds, 32768),
}

if __name__ == "__main__":
    main()
