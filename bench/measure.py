"""How everything here is timed: contestants in turn in one process, medians with their spread, peak extra memory.

On a GPU the host takes longer to launch a small op than the op takes. There what is short is recorded once as a CUDA
graph, whose replay costs the host nothing, and events around it are what counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

#: Rewritten before each run on an accelerator, so that nothing is found in its last-level cache by luck.
_FLUSH_BYTES = 256 << 20
#: Seconds from which a run is long enough for the host to stay ahead of the device.
_LONG = 5e-3
#: Calls in one graph, at least: starting it takes about as long as a short kernel.
_CALLS = 10


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
    on up to ``most`` until ``seconds`` have passed. On a GPU, within :func:`side_stream`, what is short is replayed.
    """
    contestants = {name: _replayed_if_short(run, timed(run, device), device) for name, run in contestants.items()}
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()  # also keeps it busy while the host launches
    return _between_events(run, device)


def _replayed_if_short(run: Callable[[], object], seconds: float, device: torch.device) -> Callable[[], object]:
    on_side_stream = device.type == "cuda" and torch.cuda.current_stream() != torch.cuda.default_stream()
    return (recorded(run, device) or run) if on_side_stream and seconds < _LONG else run


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Inside, work for a GPU goes to a stream of its own, on which it can be recorded.

    A backward pass runs on the stream of its forward pass, so both belong inside.
    """
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def recorded(run: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """The replay of ``run`` as a CUDA graph; None where there is no GPU, or ``run`` waits for it, which no graph can.

    To be called within :func:`side_stream`, after a run that compiled whatever there is to compile.
    """
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            run()
    except Exception:  # of whatever kind: it cannot be recorded
        torch.cuda.synchronize(device)
        return None
    return graph.replay


class PerCall(NamedTuple):
    """Seconds of one call, and how they were measured: "graph", "events" or, without a GPU, "clock"."""

    seconds: Seconds
    how: str


def per_call(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 0.4,
    least: int = 5,
    most: int = 200,
) -> PerCall:
    """Time calls that do the same on inputs of their own, one after the other: nobody's are in a cache.

    At least ``least`` and at most ``most`` runs over all of the calls, until ``seconds`` have passed; a fifth of that
    is warm-up.
    """
    for call in calls:
        call()
    alone = timed(calls[0], device)
    repeats = max(1, -(-_CALLS // len(calls))) if alone < _LONG and device.type == "cuda" else 1
    count = repeats * len(calls)

    def every() -> None:
        for call in itertools.chain.from_iterable(itertools.repeat(calls, repeats)):
            call()

    replay = recorded(every, device) if alone < _LONG else None
    how = "clock" if device.type != "cuda" else "events" if replay is None else "graph"
    runs: list[float] = []
    start = time.perf_counter()
    for limit in (seconds / 5, seconds) if seconds else (0.0,):
        runs.clear()
        while len(runs) < most and (len(runs) < least or time.perf_counter() - start < limit):
            runs.append(_between_events(replay or every, device) / count)
    return PerCall(Seconds(*_quantiles(runs)), how)


def _between_events(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def cache_bytes(device: torch.device) -> int:
    """Of a GPU's last-level cache; on a CPU none that anything here depends on."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


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


def synchronize(device: torch.device) -> None:
    """Wait for all that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
