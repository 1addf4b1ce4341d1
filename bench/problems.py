"""What is compared: for each op and shape the same inputs, everyone who computes it, and the work that it takes.

A contestant works on its own form of the inputs (the authors' order of rows, say). Bringing them into that form and the
results back is not timed, but differentiable: so one check covers results and gradients of everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ebft_kernels
from ebft_kernels import StridedLayout, available_impls
from ebft_kernels.testing import attention_inputs, eager_attention, error_budget, feature_inputs, randn

from . import floors
from .baselines import attention, features
from .floors import Pairs, Work
from .shapes import Geometry, ModelShape, visible_pairs

Tensors = tuple[Tensor, ...]
#: Name of the row with the time of a problem's unavoidable work, and of contestants that targets speak of.
FLOOR = "floor"
SDPA, SDPA_PER_SAMPLE, FLEX = "SDPA, dense mask", "SDPA, dense mask, one row per sample", "FlexAttention, packed"
#: First word of the names of this library's contestants; the second is the implementation.
OURS = "ebft"
DIRECTIONS = ("forward", "backward", "forward+backward")


class Contestant(NamedTuple):
    """One way to compute something.

    Attributes:
        run: timed; from prepared inputs to results.
        prepare: from the problem's inputs to what ``run`` takes.
        finish: from what ``run`` gives to the problem's results.
        differentiable: whether it has a backward pass here.
        exact: whether it computes the same thing as the others; a floor does not and is not checked.
    """

    run: Callable[..., object]
    prepare: Callable[[Tensors], Tensors] = lambda inputs: inputs
    finish: Callable[[object], Tensors] = lambda results: results if isinstance(results, tuple) else (results,)
    differentiable: bool = True
    exact: bool = True


class Problem(NamedTuple):
    """One op at one shape.

    Attributes:
        op: its public name.
        shape: the shape in words.
        inputs: floating tensors, which gradients are asked for.
        contestants: by name; this library's are named ``ebft <impl>``.
        oracle: float64 inputs -> results.
        eager: ways to write it in plain PyTorch, in the inputs' dtype. They round differently; the worst of them sets
            the error budget.
        unit: "FLOP" or "B".
        work: operations or bytes of the forward pass that no one can avoid.
        work_backward: likewise of the backward pass; 0: there is none.
        formula: of ``work``, in words.
        floor: from a direction, one of ``DIRECTIONS``, to that work done bare; see `bench.floors`.
    """

    op: str
    shape: str
    inputs: Tensors
    contestants: dict[str, Contestant]
    oracle: Callable[[Tensors], Tensors]
    eager: tuple[Callable[[Tensors], Tensors], ...]
    unit: str
    work: int
    work_backward: int
    formula: str
    floor: Callable[[str], Work]

    def work_of(self, direction: str) -> int:
        """Operations or bytes of one of ``DIRECTIONS``."""
        return self.work * (direction != "backward") + self.work_backward * (direction != "forward")


def attention_contestants(layout: StridedLayout, dtype: torch.dtype) -> dict[str, Contestant]:
    """Everyone who computes strided attention of q, k and v in packed order."""
    device, mask, reference_mask = layout.device, layout.dense_mask(), attention.reference_mask(layout)
    on_cpu = device.type == "cpu"
    in_reference_order = {
        "prepare": lambda inputs: tuple(attention.to_reference_order(layout, x) for x in inputs),
        "finish": lambda out: (attention.from_reference_order(layout, out),),
    }

    def flex(block_mask, **options) -> Contestant:
        made: list = []

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            made or made.append(block_mask(layout))
            return attention.compiled_flex()(q, k, v, block_mask=made[0], enable_gqa=True)

        return Contestant(run, differentiable=not on_cpu, **options)  # FlexAttention has no backward pass on a CPU

    contestants = {
        f"{OURS} {impl}": Contestant(
            lambda q, k, v, impl=impl: ebft_kernels.strided_attention(q, k, v, layout, impl=impl)
        )
        for impl in _impls("strided_attention", device, dtype)
    }
    return contestants | {
        "eager, dense mask": Contestant(lambda q, k, v: attention.eager(q, k, v, mask)),
        SDPA: Contestant(lambda q, k, v: attention.sdpa(q, k, v, mask)),
        SDPA_PER_SAMPLE: Contestant(lambda q, k, v: attention.sdpa(q, k, v, reference_mask), **in_reference_order),
        FLEX: flex(attention.flex_packed_mask),
        "FlexAttention, one row per sample": flex(attention.flex_reference_mask, **in_reference_order),
        "causal SDPA, prompt alone (no rollouts)": Contestant(
            lambda q, k, v: attention.sdpa_prompt(q, k, v, layout.length), exact=False
        ),
    }


def attention_problem(model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Problem:
    """One layer's strided attention."""
    layout = geometry.layout().to(device)
    mask, scale = layout.dense_mask(), model.head_dim**-0.5
    pairs = visible_pairs(layout)
    work = pairs * model.heads * 4 * model.head_dim
    return Problem(
        op="strided_attention",
        shape=f"{model.name}, {geometry}",
        inputs=attention_inputs(
            layout, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=dtype
        ),
        contestants=attention_contestants(layout, dtype),
        oracle=lambda inputs: (eager_attention(*inputs, mask, scale=scale),),
        eager=_attention_yardsticks(mask, scale),
        unit="FLOP",
        work=work,
        work_backward=work * 5 // 2,
        formula="4 D H visible pairs; backward 2.5 times that",
        floor=lambda direction: floors.attention(
            [Pairs.of(layout)], **_heads(model, dtype, device), **_passes(direction)
        ),
    )


def _attention_yardsticks(mask: Tensor, scale: float) -> tuple[Callable[[Tensors], Tensors], ...]:
    return tuple(
        lambda inputs, how=how: (eager_attention(*inputs, mask, scale=scale, how=how),)
        for how in ("normalize first", "normalize last", "fused")
    )


def attention_step_problem(model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Problem:
    """One layer's attention of the last decoding step."""
    layout = geometry.layout().to(device)
    step = geometry.horizon - 1
    mask = layout.dense_mask()[:, :, layout.length + step :: layout.horizon].contiguous()  # [B, 1, A*n, S]
    q, k, v = attention_inputs(layout, heads=model.heads, kv_heads=model.kv_heads, head_dim=model.head_dim, dtype=dtype)
    q = layout.step_rows(q.transpose(1, 2), step).transpose(1, 2).contiguous()
    contestants = {
        f"{OURS} {impl}": Contestant(
            lambda q, k, v, impl=impl: ebft_kernels.strided_attention_step(q, k, v, layout, step, impl=impl),
            differentiable=False,
        )
        for impl in _impls("strided_attention_step", device, dtype)
    }
    contestants["eager, dense mask"] = Contestant(lambda q, k, v: attention.eager(q, k, v, mask), differentiable=False)
    contestants[SDPA] = Contestant(lambda q, k, v: attention.sdpa(q, k, v, mask), differentiable=False)
    pairs = int(mask.sum())
    return Problem(
        op="strided_attention_step",
        shape=f"{model.name}, {geometry}, step {step}",
        inputs=(q, k, v),
        contestants=contestants,
        oracle=lambda inputs: (eager_attention(*inputs, mask, scale=model.head_dim**-0.5),),
        eager=_attention_yardsticks(mask, model.head_dim**-0.5),
        unit="FLOP",
        work=pairs * model.heads * 4 * model.head_dim,
        work_backward=0,
        formula="4 D H visible pairs",
        floor=lambda _: floors.attention([Pairs.of_step(layout, step)], **_heads(model, dtype, device)),
    )


def pooling_problem(model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Problem:
    """Last-token features of the tapped layers."""
    layout = geometry.layout().to(device)
    size = (layout.batch_size, layout.packed_length, model.hidden)
    inputs = tuple(randn(*size, seed=layer, dtype=dtype, device=device) for layer in range(model.tapped))
    contestants = {
        f"{OURS} {impl}": Contestant(lambda *hidden, impl=impl: ebft_kernels.pool_features(hidden, layout, impl=impl))
        for impl in _impls("pool_features", device, dtype)
    }
    contestants["plain PyTorch"] = Contestant(lambda *hidden: features.pool_last_token(list(hidden), layout))
    vectors = layout.batch_size * layout.num_anchors * (layout.samples + 1)
    read = vectors * model.features * inputs[0].element_size()
    written = vectors * model.features * torch.promote_types(dtype, torch.float32).itemsize
    return Problem(
        op="pool_features",
        shape=f"{model.name}, {geometry}, last token, {model.tapped} layers",
        inputs=inputs,
        contestants=contestants,
        oracle=lambda inputs: features.pool_last_token(list(inputs), layout),
        eager=(lambda inputs: features.pool_last_token(list(inputs), layout),),
        unit="B",
        work=read + written,
        work_backward=read + written + sum(x.nbytes for x in inputs),
        formula="rows read once, features written once; backward: both read, every gradient written",
        floor=_bytes((read, written), (read + written, sum(x.nbytes for x in inputs)), device),
    )


def loss_problem(model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Problem:
    """Mean-embedding squared error."""
    layout = geometry.layout()
    inputs = feature_inputs(
        layout.batch_size, layout.num_anchors, layout.samples, model.features, dtype=dtype, device=device
    )
    contestants = {
        f"{OURS} {impl}": Contestant(lambda x, y, impl=impl: ebft_kernels.mean_embedding_loss(x, y, impl=impl))
        for impl in _impls("mean_embedding_loss", device, dtype)
    }
    contestants["plain PyTorch"] = Contestant(features.mean_embedding_loss)
    read = sum(x.nbytes for x in inputs)
    return Problem(
        op="mean_embedding_loss",
        shape=f"{model.name}, {geometry}, F={model.features}",
        inputs=inputs,
        contestants=contestants,
        oracle=lambda inputs: (features.mean_embedding_loss(*inputs),),
        eager=(lambda inputs: (features.mean_embedding_loss(*inputs),),),
        unit="B",
        work=read,
        work_backward=2 * read,
        formula="features read once; backward: read once, gradients written once",
        floor=_bytes((read, 0), (read, read), device),
    )


def matching_problem(model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Problem:
    """Losses, whitened rewards and advantages of all rollouts."""
    layout = geometry.layout()
    inputs = feature_inputs(
        layout.batch_size, layout.num_anchors, layout.samples, model.features, dtype=dtype, device=device
    )
    contestants = {
        f"{OURS} {impl}": Contestant(
            lambda x, y, impl=impl: ebft_kernels.feature_matching(x, y, whitening="sample", impl=impl),
            differentiable=False,
        )
        for impl in _impls("feature_matching", device, dtype)
    }
    contestants["batched SVD"] = Contestant(features.match_by_batched_svd, differentiable=False)
    contestants["SVD loop over anchors"] = Contestant(features.match_by_svd_loop, differentiable=False)
    read = sum(x.nbytes for x in inputs)
    return Problem(
        op="feature_matching",
        shape=f"{model.name}, {geometry}, F={model.features}, whitening sample",
        inputs=inputs,
        contestants=contestants,
        oracle=lambda inputs: tuple(features.match_by_batched_svd(*inputs)),
        eager=(lambda inputs: tuple(features.match_by_batched_svd(*inputs)),),
        unit="B",
        work=read,
        work_backward=0,
        formula="features read once",
        floor=_bytes((read, 0), (0, 0), device),
    )


def log_probs_problem(model: ModelShape, geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Problem:
    """Log-probabilities of as many rows as the prompt has tokens."""
    rows = geometry.batch * geometry.length
    hidden = randn(rows, model.hidden, seed=0, dtype=dtype, device=device)
    weight = randn(model.vocab, model.hidden, seed=1, dtype=dtype, device=device) * model.hidden**-0.5
    targets = torch.arange(rows, device=device) * 7919 % model.vocab
    contestants = {
        f"{OURS} {impl}": Contestant(lambda h, w, impl=impl: ebft_kernels.linear_log_probs(h, w, targets, impl=impl))
        for impl in _impls("linear_log_probs", device, dtype)
    }
    contestants["full logits"] = Contestant(lambda h, w: features.full_log_probs(h, w, targets))
    work = 2 * rows * model.vocab * model.hidden
    return Problem(
        op="linear_log_probs",
        shape=f"{model.name}, T={rows} C={model.hidden} V={model.vocab}",
        inputs=(hidden, weight),
        contestants=contestants,
        oracle=lambda inputs: (features.full_log_probs(*inputs, targets),),
        eager=(lambda inputs: (features.full_log_probs(*inputs, targets),),),
        unit="FLOP",
        work=work,
        work_backward=2 * work,
        formula="2 T C V; backward twice that (recomputing the logits is not counted)",
        floor=lambda direction: floors.linear([(weight, rows)], **_passes(direction)),
    )


def _heads(model: ModelShape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "dtype": dtype,
        "device": device,
    }


def _passes(direction: str) -> dict[str, bool]:
    return {"forward": direction != "backward", "backward": direction != "forward"}


def _bytes(forward: tuple[int, int], backward: tuple[int, int], device: torch.device) -> Callable[[str], Work]:
    """The floor of an op that reads and writes so many bytes in each pass."""

    def floor(direction: str) -> Work:
        passes = [forward] * (direction != "backward") + [backward] * (direction != "forward")
        works = [floors.copied(read, written, device) for read, written in passes]
        return lambda: [work() for work in works]

    return floor


PROBLEMS: dict[str, Callable[[ModelShape, Geometry, torch.dtype, torch.device], Problem]] = {
    "strided_attention": attention_problem,
    "strided_attention_step": attention_step_problem,
    "pool_features": pooling_problem,
    "mean_embedding_loss": loss_problem,
    "feature_matching": matching_problem,
    "linear_log_probs": log_probs_problem,
}


def errors(problem: Problem) -> dict[str, str]:
    """For each contestant that is to compute the problem's numbers: "" or what is wrong with its results or gradients.

    The limit is :func:`ebft_kernels.testing.error_budget`, for every result and gradient apart.
    """
    truth = _evaluate(problem.oracle, tuple(x.double() for x in problem.inputs), problem)
    eager = [_evaluate(function, problem.inputs, problem) for function in problem.eager]
    found = {}
    for name, contestant in problem.contestants.items():
        if not contestant.exact:
            continue
        try:
            actual = _evaluate(
                lambda inputs, c=contestant: c.finish(c.run(*c.prepare(inputs))),
                problem.inputs,
                problem,
                differentiable=contestant.differentiable,
            )
        except Exception as error:  # whatever it is, it is not a result; the others go on
            found[name] = f"{type(error).__name__}: {error}"
            continue
        found[name] = _first_error(actual, eager, truth)
    return found


def _evaluate(
    function: Callable[[Tensors], Tensors], inputs: Tensors, problem: Problem, *, differentiable: bool = True
) -> list[Tensor]:
    """Results and, if there is a backward pass, gradients for a fixed random upstream gradient."""
    inputs = tuple(x.detach().requires_grad_(differentiable and problem.work_backward > 0) for x in inputs)
    results = function(inputs)
    if not inputs[0].requires_grad:
        return list(results)
    upstream = [randn(*x.shape, seed=20 + i, dtype=x.dtype, device=x.device) for i, x in enumerate(results)]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, inputs, upstream)]


def _first_error(actual: Sequence[Tensor], eager: Sequence[Sequence[Tensor]], truth: Sequence[Tensor]) -> str:
    for index, tensor in enumerate(actual):
        error = float((tensor.double() - truth[index]).abs().max())
        budget = max(error_budget(way[index], truth[index], tensor.dtype) for way in eager)
        if not error <= budget:
            return f"tensor {index}: error {error:.1e} exceeds the budget {budget:.1e}"
    return ""


def _impls(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Implementations worth timing: not the reference, not kernels in an interpreter, none that refuses the dtype."""
    found = [impl for impl in available_impls(op, device) if impl != "reference"]
    if device.type == "cpu":
        found = [impl for impl in found if impl != "triton"]
    return [impl for impl in found if dtype != torch.float64 or impl == "torch"]
