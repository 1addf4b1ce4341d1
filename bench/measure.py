"""How everything here is timed: contestants in turn in one process, medians with their spread, peak extra memory."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

#: Rewritten before each run on an accelerator, so that nothing is found in its last-level cache by luck.
_FLUSH_BYTES = 256 << 20


class Seconds(NamedTuple):
    """Median, 20th and 80th percentile of the runs of one contestant."""

    median: float
    p20: float
    p80: float


def in_turn(
    contestants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    seconds: float = 2.0,
    least: int = 3,
    most: int = 50,
) -> dict[str, Seconds]:
    """Time the contestants in turn, so that all of them see the same machine.

    Each round runs every contestant once. The first round is warm-up; then at least ``least`` rounds are counted, and
    on up to ``most`` until ``seconds`` have passed.
    """
    for run in contestants.values():
        timed(run, device)
    runs: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    for count in range(most):
        if count >= least and time.perf_counter() - start > seconds:
            break
        for name, run in contestants.items():
            runs[name].append(timed(run, device))
    return {name: Seconds(*_quantiles(values)) for name, values in runs.items()}


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run; on a GPU by events, with its last-level cache overwritten before."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()  # also keeps it busy while the host launches
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class FirstRun(NamedTuple):
    """Seconds of a first run, compilation included, and the most memory that it held beyond what was held before."""

    seconds: float
    peak_bytes: int


def first_run(run: Callable[[], object], device: torch.device) -> FirstRun:
    """Run once. Memory on the CPU is the resident memory of the process: an upper bound, read after giving back all
    that the allocator kept of earlier runs."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return FirstRun(time.perf_counter() - start, torch.cuda.max_memory_allocated(device) - before)
    _give_back()
    reset_peak_resident()
    before = resident_bytes("VmRSS")
    seconds = timed(run, device)
    return FirstRun(seconds, resident_bytes("VmHWM") - before)


def _give_back() -> None:
    """Have the C library return what it holds of freed memory, where it knows how."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak since the last reset) of this process; Linux only."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak_resident() -> None:
    """Start a new ``VmHWM``."""
    Path("/proc/self/clear_refs").write_text("5")


def machine_line(device: torch.device) -> str:
    """Processor, threads and versions: what a number without it is worthless without."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu = Path("/proc/cpuinfo")
        lines = cpu.read_text().splitlines() if cpu.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}"
