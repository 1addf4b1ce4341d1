"""What accelerators' data sheets promise, for the plan and for `bench`, and what part of it a training step reaches."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """One processor and its memory.

    Attributes:
        name: of the product.
        memory: bytes.
        rates: dtype -> operations per second of dense matrix products; float64: of the ordinary units.
        bandwidth: bytes per second of the main memory.
        seconds_per_op: that a fast host needs to start one op.
        overlaps: whether the host prepares the next op while the device runs this one.
    """

    name: str
    memory: float
    rates: dict[torch.dtype, float]
    bandwidth: float
    seconds_per_op: float
    overlaps: bool = True

    def microseconds(self, *, operations: float = 0, double_operations: float = 0, moved: float = 0) -> float:
        """The least time for ``operations`` in bfloat16, some in float64 and ``moved`` bytes, all overlapped."""
        in_double = double_operations and double_operations / self.rates[torch.float64]
        return 1e6 * max(operations / self.rates[torch.bfloat16], in_double, moved / self.bandwidth)


def _gpu(name: str, gigabytes: float, bandwidth: float, half: float, single: float, double: float = 0) -> Device:
    rates = {torch.bfloat16: half, torch.float16: half, torch.float32: single, torch.float64: double}
    rates = {dtype: rate * 1e12 for dtype, rate in rates.items() if rate}
    return Device(name, gigabytes * 1e9, rates, bandwidth * 1e9, seconds_per_op=7e-6)


#: NVIDIA A100, H100, H200, HGX B200, L40S data sheets and Ada white paper (dense: half of the rates "with sparsity"),
#: AMD MI300X data sheet. GB, GB/s, TFLOP/s of 16-bit products with float32 sums, of float32 without TF32, of float64.
GPUS = {
    "a100": _gpu("A100 80GB SXM", 80, 2039, 312, 19.5, 9.7),
    "h100": _gpu("H100 SXM", 80, 3350, 989, 67, 34),
    "h200": _gpu("H200", 141, 4800, 989, 67, 34),
    "b200": _gpu("B200", 180, 8000, 2250, 75, 37),
    "l40s": _gpu("L40S", 48, 864, 362, 91.6),
    "rtx4090": _gpu("RTX 4090", 24, 1008, 165, 82.6),
    "mi300x": _gpu("MI300X", 192, 5300, 1307, 163.4, 81.7),
}


class Efficiency(NamedTuple):
    """What part of a device's promises is reached: assumed, not measured.

    Attributes:
        products: of the rate of matrix products.
        bandwidth: of the memory's bandwidth.
        starts: time that the host needs for an op of a model in eager mode, in units of the device's.
    """

    products: float
    bandwidth: float
    starts: float


#: The two ends of a predicted time.
FAST, SLOW = Efficiency(0.7, 0.9, 1.0), Efficiency(0.3, 0.5, 4.0)


def device(name: str) -> Device:
    """The GPU of that name, or for "cpu" this machine, by a short matrix product, a copy and calls of a tiny layer.

    Raises:
        ValueError: an unknown name.
    """
    if name == "cpu":
        return _this_cpu()
    if name not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, cpu; got {name!r}")
    return GPUS[name]


def _this_cpu() -> Device:
    a, b, c = torch.ones(1024, 1024), torch.ones(1 << 24), torch.ones(1 << 24)
    rate = 2 * 1024**3 / _seconds(lambda: a @ a)
    bandwidth = 2 * b.nbytes / _seconds(lambda: b.copy_(c))
    layer, x = torch.nn.Linear(8, 8), torch.ones(1, 8)
    with torch.no_grad():
        per_op = 2 * _seconds(lambda: [layer(x) for _ in range(100)]) / 100
    # bfloat16 and float16 are computed at about this rate too unless the processor has units for them.
    rates = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), rate)
    name = f"this machine's CPU with {torch.get_num_threads()} threads"
    return Device(
        name, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rates, bandwidth, per_op, overlaps=False
    )


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        runs.append(time.perf_counter() - start)
    return min(runs)
