"""What Python takes per call of each op before its kernels are launched, with a launcher that does nothing.

    python -m bench.launch_overhead [--profile NAME]

"module" is the function that prepares and launches the kernels, outputs allocated; "public" is the public function, or
its backward pass, around it: argument checks, choice of the implementation, torch.library and autograd.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import importlib
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import _cases
from ._targets import GPUS, standing_in
from .shapes import Geometry

#: Goal of every function that launches kernels.
GOAL_MICROSECONDS = 60.0

_GEOMETRY = Geometry(batch=2, length=32, samples=2)
_MODEL = _cases.SHAPES[0]._replace(hidden=16, heads=4, kv_heads=2, head_dim=16)

# Name -> the op, and the module and function that launch its kernels, forward and backward.
_CALLS: dict[str, tuple[Callable[[], _cases.Call], tuple[str, ...]]] = {
    "strided_attention": (
        lambda: _cases.attention(_MODEL, _GEOMETRY.layout(), torch.bfloat16),
        ("attention._triton.forward", "attention._triton.backward"),
    ),
    "strided_attention_step": (
        lambda: _cases.attention_step(_MODEL, _GEOMETRY.layout(), torch.bfloat16),
        ("attention._triton.step",),
    ),
    "pool_features": (
        lambda: _cases.pooling(_MODEL, _GEOMETRY.layout(), torch.bfloat16),
        ("pooling._triton.forward", "pooling._triton.backward"),
    ),
    "mean_embedding_loss": (
        lambda: _cases.loss(_MODEL, _GEOMETRY.layout()),
        ("matching._triton.mean_embedding_forward", "matching._triton.mean_embedding_backward"),
    ),
    "dense_mask": (lambda: _cases.dense_mask(_MODEL, _GEOMETRY.layout()), ("_layout_triton.dense_mask",)),
    "geometry": (lambda: _cases.geometry(_MODEL, _GEOMETRY.layout()), ("_layout_triton.geometry",)),
    "feature_matching": (lambda: _cases.matching(_MODEL, _GEOMETRY.layout()), ("matching._triton.forward",)),
}


class Overhead(NamedTuple):
    """Microseconds per call of one pass of an op; ``call`` makes one call of the module's function."""

    name: str
    module: float
    public: float
    call: Callable[[], object]


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--profile", metavar="NAME", help='where the time goes, for example "strided_attention backward"'
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'microseconds per call':<36}{'module':>8}{'public':>8}")
    for one in overheads():
        print(f"{one.name:<36}{one.module:>8.0f}{one.public:>8.0f}")
        if one.name == arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda call=one.call: [call() for _ in range(1000)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def overheads(rounds: int = 5) -> Iterator[Overhead]:
    """All passes, one after the other. What torch fills new tensors with, in tests, is no part of it."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with standing_in(GPUS["sm_90"], lambda *_: None):
            for name, (make, functions) in _CALLS.items():
                yield from _passes(name, make(), functions, rounds)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled


def _passes(name: str, call: _cases.Call, functions: tuple[str, ...], rounds: int) -> Iterator[Overhead]:
    forward = _recorded(functions[0], call.forward)
    public = _microseconds(call.forward, rounds)
    yield Overhead(f"{name} forward", _microseconds(forward, rounds), public, forward)
    if call.differentiable:
        outputs = call.forward()
        inputs = [torch.empty_like(out) for out in outputs]
        leaves = _cases.leaves(outputs)
        run = lambda: torch.autograd.grad(outputs, leaves, inputs, retain_graph=True)  # noqa: E731
        backward = _recorded(functions[1], run)
        yield Overhead(f"{name} backward", _microseconds(backward, rounds), _microseconds(run, rounds), backward)


def _recorded(function: str, run: Callable[[], object]) -> Callable[[], object]:
    """A call of the module's ``function`` with the arguments that it gets while ``run`` runs."""
    folder, name = function.rsplit(".", 1)
    module = importlib.import_module(f"ebft_kernels.{folder}")
    original, calls = getattr(module, name), []

    def recorder(*args, **options):
        calls.append((args, options))
        return original(*args, **options)

    setattr(module, name, recorder)
    try:
        run()
    finally:
        setattr(module, name, original)
    ((args, options),) = calls
    return lambda: original(*args, **options)


def _microseconds(call: Callable[[], object], rounds: int) -> float:
    """The best round's median: what the call takes when nothing else is on the machine's mind."""
    medians = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            seconds = []
            for _ in range(60):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            medians.append(statistics.median(seconds))
    finally:
        gc.enable()
    return 1e6 * min(medians)


if __name__ == "__main__":
    main()
