"""Every op on realistic sizes, as a user calls it: what the tools compile, count and time.

On a CPU nobody looks at the numbers, so the tensors are left uninitialised and cost no memory until they are read. On a
GPU, where the rows' layout is, they are random.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import ebft_kernels
from ebft_kernels import StridedLayout
from ebft_kernels.logprob._draw import draw_tokens

from .shapes import MODELS, Geometry, ModelShape

#: What every document assumes: the method's own settings at this prompt length and batch size.
GEOMETRY = Geometry(batch=8, length=1024)
#: The models that the documents speak of.
SHAPES = tuple(MODELS[name] for name in ("Qwen2.5-1.5B", "Llama-3.2-1B", "Llama-3.1-8B"))


class Call(NamedTuple):
    """One op with its inputs.

    Attributes:
        forward: runs it; gives its outputs.
        differentiable: whether they have gradients.
    """

    forward: Callable[[], tuple[Tensor, ...]]
    differentiable: bool = True

    def run(self) -> None:
        """Forward and, where there is one, backward."""
        outputs = self.forward()
        if self.differentiable:
            self.backward(outputs)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """From arbitrary gradients of the outputs."""
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def attention(model: ModelShape, rows: StridedLayout, dtype: torch.dtype, **options: object) -> Call:
    """``strided_attention`` over packed rows."""
    q, k, v = _heads(model, rows, dtype)
    return Call(lambda: (ebft_kernels.strided_attention(q, k, v, rows, impl="triton", **options),))


def attention_step(model: ModelShape, rows: StridedLayout, dtype: torch.dtype, step: int | None = None) -> Call:
    """One decoding step, the last one if no other is given."""
    step = rows.horizon - 1 if step is None else step
    with torch.no_grad():
        q, k, v = _heads(model, rows, dtype)
        q = rows.step_rows(q.transpose(1, 2), step).transpose(1, 2).contiguous()
    return Call(lambda: (ebft_kernels.strided_attention_step(q, k, v, rows, step, impl="triton"),), False)


def pooling(model: ModelShape, rows: StridedLayout, dtype: torch.dtype, mode: str = "last_token") -> Call:
    """``pool_features`` of the tapped layers."""
    hidden_states = _hidden_states(model, rows, dtype)
    return Call(lambda: ebft_kernels.pool_features(hidden_states, rows, pooling=mode, impl="triton"))


def loss(model: ModelShape, rows: StridedLayout, unbiased: bool = False) -> Call:
    """``mean_embedding_loss`` of float32 features."""
    features = _features(model, rows)
    options = {"unbiased": unbiased, "reduction": "none", "impl": "triton"}
    return Call(lambda: (ebft_kernels.mean_embedding_loss(*features, **options),))


def matching(model: ModelShape, rows: StridedLayout, whitening: str = "sample") -> Call:
    """``feature_matching`` of float32 features."""
    features = _features(model, rows)
    return Call(lambda: ebft_kernels.feature_matching(*features, whitening=whitening, impl="triton"), False)


def log_probs(rows: int, channels: int, vocabulary: int, dtype: torch.dtype, **options: object) -> Call:
    """``linear_log_probs`` with one target for each row. Its matrix products are PyTorch's, and run."""
    hidden, weight = (torch.empty(x, channels, dtype=dtype, requires_grad=True) for x in (rows, vocabulary))
    targets = torch.zeros(rows, dtype=torch.int64)
    return Call(lambda: (ebft_kernels.linear_log_probs(hidden, weight, targets, impl="triton", **options),))


def draw(rows: int, vocabulary: int, dtype: torch.dtype, **options: object) -> Call:
    """One token drawn from each row of logits."""
    logits = torch.empty(rows, vocabulary, dtype=dtype)
    uniform = torch.zeros(rows, 1, dtype=torch.float64)
    return Call(lambda: draw_tokens(logits, uniform, impl="triton", **options), False)


def dense_mask(_model: ModelShape, rows: StridedLayout) -> Call:
    """The dense mask of a layout, as its method writes it on a GPU."""
    sizes = {"length": rows.length, "horizon": rows.horizon, "full": False}
    return Call(lambda: (_layout_kernels().dense_mask(*rows.key_ranges, **sizes),), False)


def geometry(_model: ModelShape, rows: StridedLayout) -> Call:
    """Position ids and key ranges of a layout, as it writes them on a GPU when it is made."""
    return Call(lambda: _layout_kernels().geometry(rows.anchors, rows.prompt_start, rows.horizon, rows.samples), False)


def _layout_kernels() -> ModuleType:
    """Imported on use: whether kernels are interpreted is decided when they are imported."""
    return importlib.import_module("ebft_kernels._layout_triton")


def _heads(model: ModelShape, rows: StridedLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    size = (rows.packed_length, model.head_dim)
    return tuple(
        _numbers(rows, rows.batch_size, heads, *size, dtype=dtype)
        for heads in (model.heads, model.kv_heads, model.kv_heads)
    )


def _hidden_states(model: ModelShape, rows: StridedLayout, dtype: torch.dtype) -> list[Tensor]:
    size = (rows.batch_size, rows.packed_length, model.hidden)
    return [_numbers(rows, *size, dtype=dtype) for _ in range(model.tapped)]


def _features(model: ModelShape, rows: StridedLayout) -> tuple[Tensor, Tensor]:
    size = (rows.batch_size, rows.num_anchors)
    return (
        _numbers(rows, *size, rows.samples, model.features),
        _numbers(rows, *size, model.features),
    )


def _numbers(rows: StridedLayout, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    make = torch.empty if rows.device.type == "cpu" else torch.randn
    return make(size, dtype=dtype, device=rows.device, requires_grad=True)


def leaves(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The tensors that gradients end in, found by following the outputs' graph."""
    found, seen, stack = [], set(), [out.grad_fn for out in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return found
