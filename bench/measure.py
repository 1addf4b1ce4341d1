"""How everything here is timed: contestants in turn in one process, medians with their spread, peak extra memory."""

from __future__ import annotations

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
    """Median, 20th and 80th percentile of the runs of one contestant, and its first run (compilation included)."""

    median: float
    p20: float
    p80: float
    first: float


def in_turn(
    contestants: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    seconds: float = 2.0,
    least: int = 3,
    most: int = 50,
) -> dict[str, Seconds]:
    """Time the contestants in turn, so that all of them see the same machine.

    Each round runs every contestant once. The first round is warm-up and reported apart; then at least ``least`` rounds
    are counted, and on up to ``most`` until ``seconds`` have passed.
    """
    first = {name: _once(run, device) for name, run in contestants.items()}
    runs: dict[str, list[float]] = {name: [] for name in contestants}
    start = time.perf_counter()
    for count in range(most):
        if count >= least and time.perf_counter() - start > seconds:
            break
        for name, run in contestants.items():
            runs[name].append(_once(run, device))
    return {name: Seconds(*_quantiles(values), first[name]) for name, values in runs.items()}


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), low, high


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most memory that ``run`` holds at a time beyond what is held before it.

    On the CPU that is the resident memory of the process: what an earlier run left with the allocator counts as held,
    so that the first call for a contestant should be in a process that has not run anything larger.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = resident_bytes("VmRSS")
    reset_peak_resident()
    run()
    return max(0, resident_bytes("VmHWM") - before)


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
