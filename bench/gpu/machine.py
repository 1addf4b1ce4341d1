"""What is measured on, and its two ceilings: a large copy and a large matrix product."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time

import torch

import ebft_kernels

from ..measure import cache_bytes, per_call, side_stream, synchronize
from .job import Job

#: What is asked of nvidia-smi, which changes nothing by it.
QUERY = (
    "name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,"
    "power.limit,temperature.gpu"
)
_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "cut-cross-entropy", "pytest", "pybind11")


def run(job: Job) -> None:
    """Name everything, then measure the ceilings."""
    for name, value in _facts(job).items():
        job.write("fact", name=name, value=value)
    device = job.device
    with side_stream(device):
        for size in (1 << 16,) if job.rehearsal else (2 << 30, 128 << 20):
            with job.attempt(f"copy of {size >> 20} MiB"):
                _copy(job, device, size)
        with job.attempt("matrix product"):
            _product(job, device, 64 if job.rehearsal else 8192)
    if job.on_gpu("clocks under load"):
        job.write("fact", name="nvidia-smi after the product", value=_output("nvidia-smi", f"--query-gpu={QUERY}"))


def _facts(job: Job) -> dict[str, str]:
    facts = {
        "nvidia-smi": _output("nvidia-smi", f"--query-gpu={QUERY}"),
        "nvcc": (_output("nvcc", "--version").splitlines() or ["not on PATH"])[-1],
        "CPU": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "torch's CUDA": str(torch.version.cuda),
    }
    for package in _PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    if job.on_gpu("properties of the GPU"):
        facts["GPU"] = torch.cuda.get_device_name(job.device)
        facts["properties"] = str(torch.cuda.get_device_properties(job.device))
        facts["GPUs"] = str(torch.cuda.device_count())
    return facts | {f"build_info: {name}": value for name, value in ebft_kernels.build_info().items()}


def _output(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        return ""
    arguments += ("--format=csv",) * (program == "nvidia-smi")
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def _copy(job: Job, device: torch.device, size: int) -> None:
    """Bytes read and bytes written count, both."""
    sets = max(1, -(-2 * cache_bytes(device) // size))
    pairs = [[torch.zeros(size // 4, device=device) for _ in range(2)] for _ in range(sets)]
    calls = [lambda a=a, b=b: a.copy_(b) for a, b in pairs]
    timing = per_call(calls, device, **({"seconds": 0.0, "least": 2} if job.rehearsal else {}))
    rate = 2 * size / timing.seconds.median
    job.write("ceiling", name="copy", size=size, rate=rate, how=timing.how, **timing.seconds._asdict())


def _product(job: Job, device: torch.device, size: int) -> None:
    """Of random numbers: zeros would need less power and so allow higher clocks."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    start = time.perf_counter()
    while time.perf_counter() - start < (0.0 if job.rehearsal else 1.0):  # until it is as warm as in training
        torch.mm(a, b, out=out)
        synchronize(device)
    limits = {"seconds": 0.0, "least": 2} if job.rehearsal else {"seconds": 1.0}
    timing = per_call([lambda: torch.mm(a, b, out=out)], device, **limits)
    rate = 2 * size**3 / timing.seconds.median
    job.write("ceiling", name="matmul", size=size, rate=rate, how=timing.how, **timing.seconds._asdict())
