"""What the tests of several ops share: compilation without graph breaks and time ratios within one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves

from ebft_kernels import available_impls


def cpu_impls(op: str) -> tuple[str, ...]:
    """Implementations of ``op`` that run on this CPU; kernels in an interpreter have tests of their own."""
    return tuple(impl for impl in available_impls(op, "cpu") if impl != "triton")


def assert_compiles(function: Callable[..., Any], calls: Iterable[Sequence[Any]], *, graphs: int) -> None:
    """Compile ``function`` without graph breaks, make all calls, expect the eager results and that many graphs.

    Gradients with respect to all leaves that require one are compared too.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for arguments in calls:
        leaves = [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
        expected, actual = (results_and_gradients(f(*arguments), leaves) for f in (function, compiled))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)
    torch._dynamo.reset()
    assert counter.frame_count == graphs


def results_and_gradients(results: Any, leaves: Sequence[Tensor], *, seed: int = 7) -> list[Tensor]:
    """All result tensors and the gradients of ``leaves`` for random upstream gradients; zeros for unused leaves."""
    tensors = tree_leaves(results)
    differentiable = [x for x in tensors if x.requires_grad]
    if not leaves:
        assert not differentiable
        return tensors
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in differentiable]
    grads = torch.autograd.grad(differentiable, leaves, upstream, materialize_grads=True)
    return [*(x.detach() for x in tensors), *grads]


def fastest(*functions: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of the fastest call of each function, the functions taken in turn so that all see the same machine."""
    seconds = [float("inf")] * len(functions)
    for _ in range(rounds + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds
