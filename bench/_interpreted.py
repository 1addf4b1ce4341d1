"""Bytes and products of kernels, counted while Triton's interpreter runs them on the CPU."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from ._targets import Gpu, standing_in


@dataclass
class Traffic:
    """What one kernel did in all its launches.

    Attributes:
        loaded: bytes that its unmasked loads asked for, each time they did.
        stored: bytes that its unmasked stores wrote.
        products: floating-point operations of its ``tl.dot`` calls, two per multiply-add.
        launches: how often it was launched.
    """

    loaded: int = 0
    stored: int = 0
    products: int = 0
    launches: int = 0

    def add(self, launch: Traffic, scale: float) -> None:
        """Count one more launch, of which 1 / ``scale`` was run."""
        self.launches += 1
        for name in ("loaded", "stored", "products"):
            setattr(self, name, getattr(self, name) + round(getattr(launch, name) * scale))

    @property
    def bytes(self) -> int:
        """Loaded and stored."""
        return self.loaded + self.stored


@contextlib.contextmanager
def counting(gpu: Gpu, *, sample: int | None = None) -> Iterator[dict[str, Traffic]]:
    """Inside, kernels run in the interpreter with the tiles that ``gpu`` would get; gives the counts by kernel name.

    Needs ``TRITON_INTERPRET=1`` since before the kernels were imported. With ``sample`` only so many programs of a
    launch are run and their counts scaled up: for kernels whose programs all do the same.
    """
    import numpy
    from triton.runtime.interpreter import interpreter_builder as builder

    traffic: dict[str, Traffic] = defaultdict(Traffic)
    current = Traffic()
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def counted_load(ptrs, mask, *rest):
        current.loaded += int(mask.data.sum()) * _bytes(ptrs)
        return load(ptrs, mask, *rest)

    def counted_store(ptrs, value, mask, *rest):
        current.stored += int(mask.data.sum()) * _bytes(ptrs)
        return store(ptrs, value, mask, *rest)

    def counted_dot(a, b, *rest):
        *batch, rows, inner = a.data.shape
        current.products += 2 * rows * inner * b.data.shape[-1] * (batch[0] if batch else 1)
        return dot(a, b, *rest)

    def launcher(kernel, grid, args, options):
        nonlocal current
        current = Traffic()
        some = min(sample or grid[0], grid[0])
        kernel[(some, *grid[1:])](*args, **options)
        traffic[kernel.__name__].add(current, grid[0] / some)

    replaced = {"create_masked_load": counted_load, "create_masked_store": counted_store, "create_dot": counted_dot}
    builder.__dict__.update(replaced)
    try:
        # The inputs hold anything, and so do the results.
        with standing_in(gpu, launcher), numpy.errstate(all="ignore"):
            yield traffic
    finally:
        for name in replaced:
            del builder.__dict__[name]


def _bytes(pointers) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)
