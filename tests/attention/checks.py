"""What the tests of all implementations of strided attention share: inputs, yardsticks and the error budget."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ebft_kernels import StridedLayout, strided_attention
from ebft_kernels.testing import LAYOUTS, assert_within_budget, attention_inputs, eager_attention, randn

from ..op_checks import results_and_gradients

SIZES = ("heads", "kv_heads", "head_dim", "value_dim")


def attend_inputs(layout: StridedLayout, variant: dict, dtype: torch.dtype, **sizes: int) -> tuple[list[Tensor], dict]:
    """q, k, v and, where the variant has them, sinks, all of which require a gradient; and the remaining options."""
    options = dict(variant)
    sizes |= {name: options.pop(name) for name in SIZES if name in options}
    tensors = list(attention_inputs(layout, dtype=dtype, **sizes))
    if options.pop("sinks", False):
        tensors.append(randn(tensors[0].shape[1], seed=3, dtype=dtype))
    return [x.requires_grad_() for x in tensors], options


def attend(tensors: list[Tensor], layout: StridedLayout, **options: object) -> Tensor:
    q, k, v, *sinks = tensors
    return strided_attention(q, k, v, layout, sinks=sinks[0] if sinks else None, **options)


def yardsticks(
    tensors: list[Tensor],
    layout: StridedLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    block: str = "causal",
) -> list[list[Tensor]]:
    """Output and gradients of eager PyTorch, written in all ways that there are."""
    q, k, v, *sinks = tensors
    inputs = (q, k, v, layout.dense_mask(window, block=block))
    options = {"scale": q.shape[-1] ** -0.5 if scale is None else scale, "softcap": softcap}
    results = [
        results_and_gradients(eager_attention(*inputs, sinks=x, how=how, **options), tensors)
        for x in (sinks or [None])
        for how in ("normalize first", "normalize last")
    ]
    # Of kernels that keep no weights only the gradients may round like this.
    out = eager_attention(*inputs, sinks=sinks[0] if sinks else None, how="recomputed", **options)
    results.append([results[0][0], *results_and_gradients(out, tensors)[1:]])
    if softcap is None:  # fused, and without a gradient of the sinks, which PyTorch's fused kernel has not
        out = eager_attention(*inputs, sinks=sinks[0].detach() if sinks else None, how="fused", **options)
        results.append([*results_and_gradients(out, tensors[:3]), *results[0][4:]])
    return results


def assert_as_exact_as_eager(actual: Tensor, eager: list[Tensor], truth: Tensor, name: str) -> None:
    """Within the budget of the eager way that is furthest from the truth; half of its digits at least are right."""
    half = torch.finfo(actual.dtype).eps ** 0.5 * max(1.0, float(truth.abs().max())) if truth.numel() else 0.0
    assert all(((x - truth).abs() <= half).all() for x in eager), name
    worst = max(eager, key=lambda x: float((x.double() - truth).abs().max())) if truth.numel() else truth
    assert_within_budget(actual, worst, truth, name)


def assert_variant_within_budget(
    variant: dict, dtype: torch.dtype, impl: str, names: Iterable[str], **sizes: int
) -> None:
    """Output and all gradients, of all layouts together: the largest error of one small tensor is a matter of luck."""
    results: dict[str, list[list[Tensor]]] = {}
    for name in names:
        layout = LAYOUTS[name]()
        coarse, options = attend_inputs(layout, variant, min(dtype, torch.float32, key=lambda x: x.itemsize), **sizes)
        tensors = [x.detach().to(dtype).requires_grad_() for x in coarse]
        exact = [x.detach().double().requires_grad_() for x in coarse]
        actual = results_and_gradients(attend(tensors, layout, impl=impl, **options), tensors)
        assert all(x.dtype == dtype for x in actual)
        truth = results_and_gradients(attend(exact, layout, impl="reference", **options), exact)
        # For float64, whose truth is no more exact than itself, the error of eager float32 stands for that of float64.
        finer = 1.5 * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if dtype == torch.float64 else 1
        ways = yardsticks(coarse, layout, **options)
        eager = [[y + finer * (x - y) for x, y in zip(way, truth, strict=True)] for way in ways]
        runs = [actual, truth, *eager]
        for of, *one_result in zip(("output", "q", "k", "v", "sinks"), *runs, strict=False):
            results.setdefault(of, []).append([x.flatten() for x in one_result])
    for of, rows in results.items():
        actual, truth, *eager = (torch.cat(column) for column in zip(*rows, strict=True))
        assert_as_exact_as_eager(actual, eager, truth, f"{variant}, {of}")
