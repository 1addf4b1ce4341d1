"""The CUDA kernels compiled for the CPU, callable like the compiled module ``ebft_kernels._C``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import StridedLayout

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("g++") or shutil.which("clang++")
# longjmp between fibers looks like a mistake to glibc's fortified one.
LENIENT = ["-Wno-unknown-pragmas", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", *LENIENT, f"-I{HERE}"]

I32, I64, F64, ADDRESS = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
BAD_ARGUMENT = -1
MOST_LAYERS = 64


class Status(ctypes.Structure):
    _fields_ = [("error", I32), ("message", ctypes.c_char * 252)]


class Features(ctypes.Structure):
    _fields_ = [
        ("anchors", I64 * 3),
        ("rollouts_per_anchor", I64),
        ("features", I64),
        ("rollouts", ADDRESS),
        ("rollout_strides", I64 * 4),
        ("targets", ADDRESS),
        ("target_strides", I64 * 3),
    ]


class Layer(ctypes.Structure):
    _fields_ = [("data", ADDRESS), ("batch_stride", I64), ("row_stride", I64)]


class Tokens(ctypes.Structure):
    _fields_ = [
        *((name, I64) for name in ("batch", "packed", "channels", "anchors", "samples", "steps")),
        *((name, ADDRESS) for name in ("rollout_rows", "target_rows", "counted")),
        *((name, I32) for name in ("pooling", "normalization", "layers")),
        ("layer", Layer * MOST_LAYERS),
    ]


class Layout(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("batch", "prompt", "anchors", "samples", "horizon")]


ARGUMENTS = {
    "ebft_cuda_feature_matching": [I32, ADDRESS, I64, I32, F64, F64, I32, *[ADDRESS] * 7],
    "ebft_cuda_mean_embedding_forward": [I32, ADDRESS, I32, *[ADDRESS] * 3],
    "ebft_cuda_mean_embedding_backward": [I32, ADDRESS, I32, *[ADDRESS] * 5],
    "ebft_cuda_pool_features": [I32, *[ADDRESS] * 4],
    "ebft_cuda_pool_features_backward": [I32, *[ADDRESS] * 7],
    "ebft_cuda_layout_geometry": [ADDRESS] * 8,
    "ebft_cuda_layout_mask": [*[ADDRESS] * 4, I32, *[ADDRESS] * 2],
    "emulation_run_broken": [I32, ADDRESS],
}


def build(folder: Path) -> ctypes.CDLL:
    """Compile all kernels and the emulation into a library in ``folder`` and load it."""
    sources = [*sorted(KERNELS.glob("*.cu")), HERE / "broken.cu", HERE / "emulation.cpp"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run([COMPILER, *FLAGS, "-O2", "-fPIC", "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libkernels.so"
    subprocess.run([COMPILER, "-shared", *objects, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name, types in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = Status, types
    return loaded


def raise_error(status: Status) -> None:
    """What the bindings make of a status: ValueError for an argument, else RuntimeError."""
    if status.error:
        raise (ValueError if status.error == BAD_ARGUMENT else RuntimeError)(status.message.decode())


def features(sizes: Any, rollouts: int, rollout_strides: Any, targets: int, target_strides: Any) -> Features:
    """``sizes`` [leading..., n, F], at most three leading axes, and strides in bytes of all axes but the last."""
    *leading, n, width = sizes
    missing = 3 - len(leading)

    def filled(values: Any, value: int) -> list[int]:
        return [value] * missing + list(values)

    return Features(
        (I64 * 3)(*filled(leading, 1)),
        n,
        width,
        rollouts,
        (I64 * 4)(*filled(rollout_strides, 0)),
        targets,
        (I64 * 3)(*filled(target_strides, 0)),
    )


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Emulated:
    """Functions with the signatures of the compiled module, a stream (0) in place of ``isa`` and ``threads``."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def feature_matching(self, stream, dtype, sizes, *rest) -> None:
        (*operands, groups), (whitening, alignment, diversity, estimator, *results) = rest[:5], rest[5:]
        x = features(sizes, *operands)
        n, anchors = x.rollouts_per_anchor, x.anchors[0] * x.anchors[1] * x.anchors[2]
        doubles = max(anchors * groups * (n + 1) ** 2, 1)  # bad sizes are for the kernels to refuse
        gram = torch.full((doubles,), torch.nan, dtype=torch.float64)
        options = (groups, whitening, alignment, diversity, estimator)
        raise_error(
            self.library.ebft_cuda_feature_matching(dtype, ctypes.byref(x), *options, address(gram), *results, stream)
        )

    def mean_embedding_forward(self, stream, dtype, sizes, *rest) -> None:
        *operands, unbiased, loss, difference = rest
        x = features(sizes, *operands)
        raise_error(
            self.library.ebft_cuda_mean_embedding_forward(dtype, ctypes.byref(x), unbiased, loss, difference, stream)
        )

    def mean_embedding_backward(
        self, stream, dtype, sizes, rollouts, strides, grad, difference, unbiased, *out
    ) -> None:
        x = features(sizes, rollouts, strides, 0, [0] * (len(sizes) - 2))
        raise_error(
            self.library.ebft_cuda_mean_embedding_backward(
                dtype, ctypes.byref(x), unbiased, grad, difference, *out, stream
            )
        )

    def pool_features(self, stream, dtype, *rest) -> None:
        *inputs, rollouts, targets = rest
        tokens = self._tokens(*inputs)
        raise_error(self.library.ebft_cuda_pool_features(dtype, ctypes.byref(tokens), rollouts, targets, stream))

    def pool_features_backward(self, stream, dtype, *rest) -> None:
        *inputs, grad_rollouts, grad_targets, grads = rest
        tokens = self._tokens(*inputs)
        begin, uses = uses_of(tokens)
        raise_error(
            self.library.ebft_cuda_pool_features_backward(
                dtype,
                ctypes.byref(tokens),
                address(begin),
                address(uses),
                grad_rollouts,
                grad_targets,
                (ADDRESS * len(grads))(*(grad[0] for grad in grads)),
                stream,
            )
        )

    @staticmethod
    def _tokens(sizes, layers, rollout_rows, target_rows, counted, pooling, normalization) -> Tokens:
        batch, packed, channels, anchors, samples, steps = sizes
        table = (Layer * MOST_LAYERS)(*(Layer(*layer) for layer in layers[:MOST_LAYERS]))
        sizes = (batch, packed, channels, anchors, samples, steps)
        return Tokens(*sizes, rollout_rows, target_rows, counted, pooling, normalization, len(layers), table)


def int64_array(at: int, count: int) -> Tensor:
    return torch.tensor((I64 * count).from_address(at)[:] if count else [], dtype=torch.int64)


def uses_of(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """What the backward pass of pooling takes: where the uses of each packed row begin, and their numbers."""
    targets = tokens.batch * tokens.anchors
    rows = []
    for at, items in ((tokens.rollout_rows, targets * tokens.samples), (tokens.target_rows, targets)):
        part = int64_array(at, items * tokens.steps)
        batch = torch.arange(tokens.batch).repeat_interleave(len(part) // max(tokens.batch, 1))
        rows.append(part + tokens.packed * batch)
    row = torch.cat(rows)
    begin = torch.zeros(tokens.batch * tokens.packed + 1, dtype=torch.int64)
    begin[1:] = torch.bincount(row, minlength=tokens.batch * tokens.packed).cumsum(0)
    return begin, row.argsort(stable=True)


def layout_struct(layout: StridedLayout) -> Layout:
    return Layout(layout.batch_size, layout.length, layout.num_anchors, layout.samples, layout.horizon)
