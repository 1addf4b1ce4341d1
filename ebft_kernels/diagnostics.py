"""What is installed here, what would run, and whether it computes the right numbers on this machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native, _triton
from ._dispatch import OPS, select_impl, why_not
from ._self_test import Case, cases
from .testing import LAYOUTS, error_budget


def build_info() -> dict[str, str]:
    """Versions, device, what was compiled and which kernels can run or why not, and for each op the implementation that
    ``impl="auto"`` takes and the others."""
    device = _default_device()
    info = {
        "ebft-kernels": _version("ebft-kernels") or "not installed (imported from a source folder)",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": _native.build_info(),
        "triton": _version("triton") or "not installed",
        "threads": str(torch.get_num_threads()),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "target": _target(device),
    }
    for op, (_, impls) in OPS.items():
        chosen = select_impl(op, device, torch.float32)
        missing = [impl for impl in impls if why_not(op, impl, device)]
        others = [impl for impl in impls if impl not in (chosen, *missing)]
        info[op] = f"{chosen} on {device.type}; also there: {', '.join(others)}"
        info[op] += f"; not there: {', '.join(missing)}" if missing else ""
    return info


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _target(device: torch.device) -> str:
    reason = _triton.why_not(device.type)
    if reason:
        return f"no Triton kernels: {reason}"
    arch, processors, shared_memory = _triton.target_of(device)
    return f"{arch}, {processors} processors, {shared_memory >> 10} KiB of shared memory per program"


class SelfTestResult(NamedTuple):
    """One implementation of one op in one case: the result that is closest to, or furthest beyond, what is allowed.

    Attributes:
        op, impl, dtype, case: what was called.
        result: which of its results, or gradients.
        error: its largest error against float64.
        budget: what that may be.
        problem: what else went wrong: an exception, or other numbers in a second run.
    """

    op: str
    impl: str
    dtype: str
    case: str
    result: str = ""
    error: float = float("nan")
    budget: float = 0.0
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the budget (NaN is not) and nothing else went wrong."""
        return self.error <= self.budget and not self.problem


def self_test(*, device: torch.device | str | None = None, verbose: bool = True) -> bool:
    """Run every implementation of every op that can run on ``device`` against the float64 reference.

    Takes seconds, on a GPU under a minute, most of it for compiling kernels: there in float32 and bfloat16, else in
    float32. Every call is made twice and must give the same bits.

    Args:
        device: where to run; default: the accelerator if there is one, else the CPU.
        verbose: print a table, and which implementations could not run and why.

    Returns:
        Whether all errors, forward and backward, are within :func:`ebft_kernels.testing.error_budget`.
    """
    device = _default_device() if device is None else torch.device(device)
    start = time.perf_counter()
    with torch.device("cpu"):  # whatever torch's default device is
        results = [result for case in cases(large=device.type != "cpu") for result in _compare(case, device)]
        for impl in ("triton", "native"):
            if not why_not("layout", impl, device):
                results += [_compare_layout(impl, name, device) for name in ("odd", "documents")]
    if verbose:
        _print(results, device, time.perf_counter() - start)
    return all(result.passed for result in results)


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _print(results: list[SelfTestResult], device: torch.device, seconds: float) -> None:
    print(f"{'op':<24}{'impl':<11}{'dtype':<10}{'case':<30}{'result':<28}{'error':>9}{'allowed':>10}   on {device}")
    for r in results:
        verdict = "" if r.passed else f"   WRONG {r.problem}"
        print(f"{r.op:<24}{r.impl:<11}{r.dtype:<10}{r.case:<30}{r.result:<28}{r.error:>9.1e}{r.budget:>10.1e}{verdict}")
    for op, (_, impls) in OPS.items():
        for impl in impls:
            if reason := why_not(op, impl, device):
                print(f"{op:<24}{impl:<11}not run: {reason}")
    wrong = sum(not result.passed for result in results)
    print(f"{len(results)} cases, {wrong or 'none'} wrong, {seconds:.0f} s")


def _compare(case: Case, device: torch.device) -> Iterator[SelfTestResult]:
    """All implementations see the same numbers: float32 ones, rounded to the dtype under test."""
    for dtype in _dtypes(case, device):
        inputs = {name: x.to(dtype) for name, x in case.inputs().items()}
        truth = case.run({name: x.double().requires_grad_() for name, x in inputs.items()}, "reference")
        if case.eager is None:
            yardsticks = [case.run(_fresh(inputs, torch.device("cpu")), "reference")]
        else:
            yardsticks = [eager(_fresh(inputs, torch.device("cpu"))) for eager in case.eager]
        op = case.op if case.op in OPS else "pool_features"
        for impl in OPS[op][1]:
            if not why_not(op, impl, device, dtype, case.sizes):
                result = SelfTestResult(case.op, impl, str(dtype).removeprefix("torch."), case.name)
                try:
                    first = case.run(_fresh(inputs, device), impl)
                    interpreted = impl == "triton" and device.type == "cpu"  # slow, and the same by construction
                    second = first if interpreted else case.run(_fresh(inputs, device), impl)
                    yield result._replace(**_worst(first, second, yardsticks, truth))
                except Exception as error:  # one broken kernel must not hide what the others do
                    yield result._replace(problem=f"{type(error).__name__}: {error}")


def _compare_layout(impl: str, name: str, device: torch.device) -> SelfTestResult:
    """A layout's large tensors as kernels write them on a GPU, and as PyTorch does on the CPU; all are integers."""
    result = SelfTestResult("layout", impl, "integers", name, "mask, positions, ranges")
    rows = LAYOUTS[name]()
    expected = [rows.dense_mask(), rows.position_ids, *rows.key_ranges]
    try:
        kernels = importlib.import_module(f"ebft_kernels._layout_{impl}")
        anchors, prompt_start = (x.to(device) for x in (rows.anchors, rows.prompt_start))
        position_ids, ranges = kernels.geometry(anchors, prompt_start, rows.horizon, rows.samples)
        sizes = {"length": rows.length, "horizon": rows.horizon, "full": False}
        actual = [kernels.dense_mask(*ranges, **sizes), position_ids, *ranges]
        wrong = sum(int((x.cpu() != y).sum()) for x, y in zip(actual, expected, strict=True))
    except Exception as error:  # as above
        return result._replace(problem=f"{type(error).__name__}: {error}")
    return result._replace(error=float(wrong), budget=0.0)


def _dtypes(case: Case, device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32, torch.bfloat16) if case.short and device.type != "cpu" else (torch.float32,)


def _fresh(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device, copy=True).requires_grad_() for name, x in inputs.items()}


def _worst(
    first: dict[str, Tensor], second: dict[str, Tensor], yardsticks: list[dict[str, Tensor]], truth: dict[str, Tensor]
) -> dict[str, object]:
    """Name, error and budget of the result that comes closest to its budget, and what else is wrong."""
    rows = []
    for name, actual in first.items():
        error = float((actual.cpu().double() - truth[name]).abs().max())
        budget = max(error_budget(eager[name], truth[name], actual.dtype) for eager in yardsticks)
        rows.append({"result": name, "error": error, "budget": budget})
    repeated = all(torch.equal(first[name], second[name]) for name in first)
    worst = max(rows, key=lambda row: _exceeds(row["error"], row["budget"]))
    return worst | {"problem": "" if repeated or worst["error"] != worst["error"] else "in a second run: other numbers"}


def _exceeds(error: float, budget: float) -> float:
    """How much of the budget an error takes; infinite for NaN, which compares as false with everything."""
    if error != error:
        return float("inf")
    return error / budget if budget else error and float("inf")
