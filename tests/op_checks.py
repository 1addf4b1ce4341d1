"""What the tests of several ops share: where they run, compilation without graph breaks, time ratios in one process.

conftest.py imports this to say where, before Triton may be imported: what imports Triton is imported when it is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Type of the device that the tests of the ops run on, and whether Triton's kernels are interpreted there: from
#: pytest's ``--device``, before any of them is imported.
DEVICE = "cpu"
INTERPRETED = True


def impls_here(op: str) -> tuple[str, ...]:
    """Implementations of ``op`` that run where the tests do, in every dtype; Triton's kernels have their own tests."""
    from ebft_kernels import available_impls

    return tuple(impl for impl in available_impls(op, DEVICE) if impl != "triton")


def short_dtypes() -> tuple[torch.dtype, ...]:
    """16-bit dtypes that Triton is right about where the tests run; its interpreter is wrong about bfloat16."""
    return (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)


def seeded(draw: Callable[..., Tensor], *args: Any, seed: int, **options: Any) -> Tensor:
    """``draw(*args)``, such as ``torch.rand``: numbers that depend on the seed alone, drawn on the CPU and moved."""
    x = draw(*args, generator=torch.Generator().manual_seed(seed), device="cpu", **options)
    return x.to(torch.get_default_device())


def assert_compiles(function: Callable[..., Any], calls: Iterable[Sequence[Any]], *, graphs: int) -> None:
    """Compile ``function`` without graph breaks, make all calls, expect the eager results and that many graphs.

    Gradients with respect to all leaves that require one are compared too.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

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
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    upstream = [torch.randn(x.shape, **options).to(x) for x in differentiable]
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
