"""Every op in every implementation, forward, backward and both apart, for pytest-benchmark.

    python -m pytest bench/suites [--model llama-256] [--length 1024] [--benchmark-json FILE] [--benchmark-compare]

For following one machine over time: who else computes the same, memory and plots are ``python -m bench``'s. Results are
checked against float64 first; a wrong implementation fails and gets no time. ``extra_info`` holds the shape, the rate
with its formula, and how many times the floor the median is.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from bench.__main__ import gate, prepared
from bench.measure import timed
from bench.problems import DIRECTIONS, OURS, PROBLEMS, Problem
from ebft_kernels import available_impls

DIFFERENTIABLE = {"strided_attention", "pool_features", "mean_embedding_loss", "linear_log_probs"}
IMPLS = ("torch", "native", "triton")
CASES = [
    pytest.param(op, impl, direction, id=f"{op}-{impl}-{direction}")
    for op in PROBLEMS
    for direction in DIRECTIONS
    if direction == "forward" or op in DIFFERENTIABLE
    for impl in IMPLS
]


@pytest.fixture(scope="module")
def problems(shape: tuple) -> Callable[[str], tuple[Problem, dict[str, str]]]:
    """An op's problem and what is wrong with each contestant, made once."""
    made: dict[str, tuple[Problem, dict[str, str]]] = {}

    def problem(op: str) -> tuple[Problem, dict[str, str]]:
        if op not in made:
            made[op] = PROBLEMS[op](*shape), gate(op, *shape, only=OURS).wrong
        return made[op]

    return problem


@pytest.mark.parametrize(("op", "impl", "direction"), CASES)
def test_op(benchmark: Callable, shape: tuple, problems: Callable, op: str, impl: str, direction: str) -> None:
    """Time one implementation."""
    device = shape[-1]
    problem, wrong = problems(op)
    name = f"{OURS} {impl}"
    if name not in problem.contestants:
        pytest.skip(f"{impl!r} is not timed on {device.type}: there are {', '.join(available_impls(op, device))}")
    assert not wrong[name], wrong[name]
    run = prepared(problem.contestants[name], problem.inputs, direction)
    floor = problem.floor(direction)

    def synchronised() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.group = f"{op} {direction}"
    benchmark(synchronised)
    if benchmark.stats is None:  # --benchmark-disable: each once, untimed
        return
    floors = statistics.median(timed(floor, device) for _ in range(5))
    benchmark.extra_info |= {"shape": problem.shape, "formula": problem.formula}
    benchmark.extra_info["times the floor"] = benchmark.stats["median"] / floors
    benchmark.extra_info[f"G{problem.unit}/s"] = problem.work_of(direction) / benchmark.stats["median"] / 1e9
