"""What every Triton and every CUDA kernel becomes on each supported architecture, compiled here without a GPU.

    python -m bench.compiled_kernels [--check] [--details FILE] [--arch sm_90] [--workers 2]

Runs the ops themselves with the tiles that they would choose on each architecture, reads the compiled kernels, and
those that pip built from csrc/cuda, and writes docs/compiled-kernels.md: for each kernel and architecture the worst of
all cases. With ``--details`` every case, with its tile and instructions, goes to FILE. With ``--check`` the document is
not written, and it is an error if it is not what comes out. What it says of CUDA kernels is not compared where they
were not built, or not by the CUDA that it names.
Either way it fails if a kernel spills registers, needs more shared memory than there is, multiplies 16-bit matrices
without tensor cores, or does not access memory 16 bytes at a time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from ebft_kernels import _native
from ebft_kernels._tiles import declines

from . import _cases, _cuda_kernels
from ._binaries import TENSOR_INSTRUCTIONS, WIDE_LOADS, WIDE_STORES, read_binary
from ._documents import DOCS, drift, table, write
from ._targets import GPUS, KIB, compiling, programs_in_flight

COMMAND = "python -m bench.compiled_kernels"
DOCUMENT = DOCS / "compiled-kernels.md"


def _calls() -> dict[str, Callable[[], _cases.Call]]:
    """What is compiled, most expensive first."""
    small, one = _cases.GEOMETRY._replace(batch=2), _cases.GEOMETRY._replace(batch=1)
    qwen, llama, _ = _cases.SHAPES
    wide = qwen._replace(heads=8, kv_heads=4, head_dim=256)
    one_group = qwen._replace(heads=6, kv_heads=1)  # too little for any GPU, unless it is split along the keys
    bfloat16, float32 = torch.bfloat16, torch.float32
    attention, step = _cases.attention, _cases.attention_step
    calls = {
        "bf16 D=128": lambda: attention(qwen, small.layout(), bfloat16),
        "bf16 D=64": lambda: attention(llama, small.layout(), bfloat16),
        "bf16 D=256": lambda: attention(wide, small.layout(), bfloat16),
        "fp32 D=64": lambda: attention(llama, small.layout(), float32),
        "step bf16 D=128": lambda: step(qwen, _cases.GEOMETRY.layout(), bfloat16),
        "step bf16 D=128, split": lambda: step(one_group, one.layout(), bfloat16),
        "step bf16 D=64": lambda: step(llama, _cases.GEOMETRY.layout(), bfloat16),
        "pool bf16 last_token": lambda: _cases.pooling(qwen, small.layout(), bfloat16),
        "pool bf16 mean": lambda: _cases.pooling(qwen, small.layout(), bfloat16, "mean"),
        "loss fp32": lambda: _cases.loss(qwen, small.layout()),
        "loss fp32 unbiased": lambda: _cases.loss(qwen, small.layout(), unbiased=True),
        "match fp32 sample": lambda: _cases.matching(qwen, small.layout(), "sample"),
        "match fp32 feature": lambda: _cases.matching(qwen, small.layout(), "feature"),
        "match fp32 none": lambda: _cases.matching(qwen, small.layout(), "none"),
        "match fp32 n=16": lambda: _cases.matching(qwen, small._replace(samples=16).layout(), "sample"),
        "log-probs bf16": lambda: _cases.log_probs(2, 64, 1000, bfloat16),
        "log-probs fp32": lambda: _cases.log_probs(2, 64, 1000, float32),
        "log-probs bf16 softcap": lambda: _cases.log_probs(2, 64, 1000, bfloat16, softcap=30.0),
        "draw bf16": lambda: _cases.draw(2, 151936, bfloat16),
        "draw fp32": lambda: _cases.draw(2, 151936, float32),
        "draw bf16 top_k": lambda: _cases.draw(2, 151936, bfloat16, top_k=50),
        "draw bf16 top_p": lambda: _cases.draw(2, 151936, bfloat16, top_p=0.9),
        "draw fp32 top_k top_p": lambda: _cases.draw(2, 151936, float32, top_k=50, top_p=0.9),
        "mask": lambda: _cases.dense_mask(qwen, small.layout()),
        "mask, short rows": lambda: _cases.dense_mask(qwen, small._replace(length=64).layout()),
        "geometry": lambda: _cases.geometry(qwen, small.layout()),
        "match fp32 n=17": lambda: _cases.matching(qwen, small._replace(samples=17).layout(), "none"),
    }
    declined = {f"match fp32 n={n}" for n in (16, 17) if declines("feature_matching", {"n": n})}  # by an older Triton
    return {name: call for name, call in calls.items() if name not in declined}


#: Kernels whose time goes into matrix products: how they load and store is of no account.
COMPUTING = tuple(f"strided_attention_{name}_kernel" for name in ("fwd", "dq", "dkdv", "step"))
#: Other kernels that need not load, or store, 16 bytes at a time, and why.
NARROW: dict[tuple[str, str], str] = {
    ("strided_attention_prepare_kernel", "stores"): "one number per row",
    ("strided_attention_combine_kernel", "stores"): "half as many bytes of bfloat16 as it loads of float32",
    ("match_fwd_kernel", "stores"): "a handful of numbers per anchor",
    ("gram_kernel", "stores"): "one small matrix per anchor",
    ("softmax_add_kernel", "stores"): "two numbers per row, and one per target",
    ("draw_blocks_kernel", "stores"): "two numbers per block of 128 logits",
    ("draw_kernel", "loads"): "one block of 128 logits, and two numbers for each of the others",
    ("draw_kernel", "stores"): "two numbers per token",
    ("draw_cut_kernel", "stores"): "two numbers per token, and a short list of blocks",
    ("dense_mask_kernel", "loads"): "it reads the ranges of one or two rows per tile",
    ("geometry_kernel", "loads"): "it looks up one anchor and one document per row",
}


class Row(NamedTuple):
    """One kernel of one case on one architecture."""

    arch: str
    kernel: str
    case: str
    fingerprint: str
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    programs: int
    instructions: str
    problems: tuple[str, ...]


def main() -> None:
    """Parse the command line, compile, write or check the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    parser.add_argument("--details", type=Path, metavar="FILE", help="write there what every single case becomes")
    parser.add_argument("--arch", choices=GPUS, help="compile for this one only and print its table")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile (default: 2)")
    arguments = parser.parse_args()
    archs = [arguments.arch] if arguments.arch else list(GPUS)
    rows = _compile(archs, arguments.workers)
    complaints = [f"{row.arch} {row.kernel} ({row.case}): {problem}" for row in rows for problem in row.problems]
    cuda = _cuda_kernels.read_all()
    complaints += [f"{row.arch} {row.name} ({row.arguments}): {x}" for row in cuda for x in _cuda_kernels.problems(row)]
    details = _details(archs, rows, cuda)
    if arguments.details:
        write(arguments.details, details)
    if arguments.arch:
        print(details)
    elif arguments.check:
        complaints += drift(DOCUMENT, _document(rows, cuda, check=True), COMMAND)
    else:
        write(DOCUMENT, _document(rows, cuda, check=False))
    sys.exit("\n".join(complaints) or 0)


def _compile(archs: list[str], workers: int) -> list[Row]:
    """The rows of all architectures in the order of the document, each distinct compiled kernel once."""
    work = [(arch, case) for case in _calls() for arch in archs]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # whatever a cache holds from before would hide what is compiled now
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = dict(zip(work, pool.map(_compile_case, work), strict=True))
    rows: dict[tuple[str, str, str], Row] = {}
    for arch in archs:
        for case in _calls():
            for row in found[arch, case]:
                rows.setdefault((arch, row.kernel, row.fingerprint), row)
    return list(rows.values())


def _compile_case(work: tuple[str, str]) -> list[Row]:
    arch, case = work
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        call = _calls()[case]()
        with compiling(GPUS[arch]) as launches:
            call.run()
    except Exception as error:  # the other kernels are worth knowing about all the same
        problem = f"does not compile: {type(error).__name__}: {str(error).splitlines()[-1]}"
        return [Row(arch, "-", case, "", "", 0, 0, 0, 0, 0, 0, "", (problem,))]
    rows = [_row(arch, case, launch) for launch in launches]
    print(f"{arch} {case}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return rows


def _row(arch: str, case: str, launch) -> Row:
    gpu, binary, tile = GPUS[arch], read_binary(launch.compiled), launch.tile
    programs = programs_in_flight(
        gpu,
        registers=binary.registers,
        warps=tile.num_warps,
        shared=binary.shared,
        tensor_columns=binary.tensor_columns,
    )
    return Row(
        arch=arch,
        kernel=launch.kernel,
        case=case,
        fingerprint=launch.compiled.hash,
        tile=" ".join(f"{name}={value}" for name, value in tile.sizes.items()),
        warps=tile.num_warps,
        stages=tile.num_stages,
        registers=binary.registers,
        spilled=binary.spilled,
        shared=binary.shared,
        programs=programs,
        instructions=", ".join(f"{name} {count}" for name, count in sorted(binary.instructions.items())),
        problems=tuple(_problems(gpu, launch.kernel, binary)),
    )


def _problems(gpu, kernel: str, binary) -> Iterator[str]:
    if binary.spilled:
        yield f"spills {binary.spilled} {'registers' if gpu.is_amd else 'bytes per thread'}"
    if binary.shared > gpu.shared_limit:
        yield f"needs {binary.shared} bytes of shared memory, there are {gpu.shared_limit}"
    if binary.multiplies_16_bit and not binary.has(TENSOR_INSTRUCTIONS):
        yield "multiplies 16-bit matrices without tensor cores"
    for access, wanted in (("loads", WIDE_LOADS), ("stores", WIDE_STORES)):
        if kernel not in COMPUTING and (kernel, access) not in NARROW and not binary.has(wanted):
            yield f"has no 16-byte {access}"


def _document(rows: list[Row], cuda: list[_cuda_kernels.Kernel], *, check: bool) -> str:
    """The summary. With ``check`` it says of CUDA kernels what it says now, where these here are not comparable."""
    import triton

    worst = _worst((row.kernel, row.arch, row.registers, row.shared, row.programs) for row in rows)
    parts = [
        _INTRODUCTION.format(command=COMMAND, triton=triton.__version__),
        table(("architecture", "tiles as for", "shared memory per program", "warps", "programs"), _limits()),
        _TRITON,
        table(
            ("kernel", *GPUS), ((f"`{kernel}`", *(cells.get(arch, "-") for arch in GPUS)) for kernel, cells in worst)
        ),
    ]
    committed = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    _, heading, rest = committed.partition(_CUDA_HEADING)
    compiler = _cuda_kernels.compiler()
    if not compiler or (check and f"compiled by {compiler}." not in rest):
        reason = compiler or f"there are none: {_native.build_info()}"
        print(f"not compared with what the document says of CUDA kernels: {reason}", file=sys.stderr)
        return "\n".join([*parts, heading + rest])
    worst = _worst((row.name, row.arch, row.registers, row.shared, row.programs) for row in cuda)
    lines = ((f"`{kernel}`", *(cells[arch] for arch in _cuda_kernels.ARCHS)) for kernel, cells in worst)
    parts += [_CUDA.format(heading=_CUDA_HEADING, compiler=compiler), table(("kernel", *_cuda_kernels.ARCHS), lines)]
    return "\n".join(parts)


def _limits() -> list[tuple[object, ...]]:
    return [(gpu.arch, gpu.name, f"{gpu.shared_limit // KIB} KiB", gpu.warps, gpu.programs) for gpu in GPUS.values()]


def _worst(figures: Iterable[tuple[str, str, int, int, int]]) -> list[tuple[str, dict[str, str]]]:
    """By kernel and architecture: most registers, most KiB of shared memory, fewest programs in flight."""
    found: dict[str, dict[str, tuple[int, int, int]]] = {}
    for kernel, arch, registers, shared, programs in figures:
        old = found.setdefault(kernel, {}).get(arch, (0, 0, programs))
        found[kernel][arch] = (max(old[0], registers), max(old[1], shared), min(old[2], programs))
    return [
        (kernel, {arch: f"{r} / {-(-s // KIB)} / {p}" for arch, (r, s, p) in cells.items()})
        for kernel, cells in found.items()
    ]


def _details(archs: list[str], rows: list[Row], cuda: list[_cuda_kernels.Kernel]) -> str:
    """Every case on every one of ``archs``."""
    header = ("kernel", "case", "tile", "warps / stages", "registers", "spills", "shared", "programs", "instructions")
    parts = [_LEGEND]
    for arch in archs:
        lines = [
            (
                f"`{row.kernel}`",
                row.case,
                row.tile,
                f"{row.warps} / {row.stages}",
                row.registers,
                row.spilled,
                row.shared,
                row.programs,
                row.instructions,
            )
            for row in rows
            if row.arch == arch
        ]
        parts += [f"## {arch}\n", table(header, lines)]
        if any(kernel.arch == arch for kernel in cuda):
            parts += [f"## CUDA on {arch}\n", _cuda_kernels.details([x for x in cuda if x.arch == arch])]
    return "\n".join(parts)


_INTRODUCTION = """\
# Compiled kernels

After this page you know that every kernel compiles for your GPU, and what limits it there. Written by
`{command}` with Triton {triton}; a test fails when it is not what the code gives.
The ops were called as a user calls them, each kernel was compiled with the tile that is chosen on the architecture, and
nothing was run: there are no times here. `--details FILE` writes every case with its tile and instructions.

On every architecture, in every case: **no register is spilled, shared memory is within the limit, 16-bit matrices are
multiplied by tensor cores, memory-bound kernels load and store 16 bytes at a time** (exceptions, with reasons: `NARROW`
in `bench/compiled_kernels.py`). The tool, and so the test, fails if one is not so.
"""

_TRITON = """\
# Triton kernels

Registers per thread / KiB of shared memory per program / programs that one SM keeps in flight: the worst of all cases.
"""

_LEGEND = """\
# Compiled kernels, every case

* **registers**: per thread; on gfx942 vector registers per lane, of both kinds.
* **spills**: bytes per thread (gfx942: registers) that went to memory for want of registers. Must be 0.
* **shared**: bytes of shared memory per program. Must be within the architecture's limit.
* **programs**: how many one SM keeps in flight, the least of what these allow (all rounded down):
  NVIDIA: 4 * (16384 / (32 * registers, up to a multiple of 256)) / warps; the SM's warps / warps; its shared
  memory / (shared + 1 KiB, up to a multiple of 128); 512 / columns of tensor memory; its programs.
  gfx942: 4 * min(8, 512 / (registers, up to a multiple of 8)) / warps; 64 KiB / shared; its programs.
* **instructions**: how often they stand in the code (loops count once). HMMA, HGMMA, UTCHMMA and MFMA are the matrix
  units' instructions and must be there wherever 16-bit matrices are multiplied. LDG is a load from global memory,
  LDGSTS one that goes straight to shared memory, STG a store; 128 means 16 bytes per thread.
* CUDA kernels: **case** is the type of the elements; for `gram_kernel` also how many rows a thread takes at a time, and
  whether these are tiles of more. **warps** are of a block; where rows are short there are fewer. **spills** are bytes
  of stack per thread, spilled or not. **shared** is static: at its launch `match_kernel` asks for 8 (3n^2 + 5n) bytes
  more for each anchor of a block, at most 48 KiB, and `pool_fwd_kernel` for 8 (L + 1) bytes for each token of a
  feature; **programs** leaves that out.
"""

_CUDA_HEADING = "# CUDA kernels"

_CUDA = """\
{heading}

Those of csrc/cuda in `ebft_kernels._cuda`, as pip built it, compiled by {compiler}. The same three figures, the worst
of all types of elements; static shared memory only.
"""


if __name__ == "__main__":
    main()
