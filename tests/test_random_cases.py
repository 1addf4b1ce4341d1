"""Every op on inputs drawn at random against plain loops in float64: options, odd sizes, ragged rows, documents,
anchors that are not valid, strides.

``--fuzz-examples N`` draws N cases of each test; which ones depends on nothing but N and the test.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ebft_kernels import (
    StridedLayout,
    feature_matching,
    linear_log_probs,
    mean_embedding_loss,
    pool_features,
    strided_attention,
    strided_attention_step,
)
from ebft_kernels.matching.api import ESTIMATORS, REDUCTIONS
from ebft_kernels.pooling.api import NORMALIZATIONS, POOLINGS
from ebft_kernels.testing import randn

from .matching.test_feature_matching import brute_force as match_by_loops
from .op_checks import impls_here

IMPLS = impls_here("strided_attention")  # the same for all ops on a CPU
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fuzz(share: float = 1.0) -> Callable:
    """A test that draws cases: ``share`` of as many as ``--fuzz-examples`` says."""

    def decorate(test: Callable) -> Callable:
        def run(fuzz_examples: int, **parameters: object) -> None:
            cases = settings(
                max_examples=max(1, round(share * fuzz_examples)),
                derandomize=True,
                database=None,
                deadline=None,
                phases=(Phase.generate,),  # to make a failure smaller takes minutes: draw fewer, or by hand
                suppress_health_check=list(HealthCheck),
            )
            cases(given(data=st.data())(lambda data: test(data, **parameters)))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        names = ["fuzz_examples", *list(inspect.signature(test).parameters)[1:]]
        run.__signature__ = inspect.Signature([inspect.Parameter(x, inspect.Parameter.KEYWORD_ONLY) for x in names])
        return pytest.mark.timeout(0)(run)

    return decorate


def sizes(most: int, least: int = 1) -> st.SearchStrategy[int]:
    return st.integers(least, most)


@st.composite
def layouts(draw: st.DrawFn) -> StridedLayout:
    """Strided or anchors anywhere; padding and documents in some."""
    batch, length = draw(sizes(2)), draw(sizes(14, 2))
    horizon, samples = draw(sizes(min(4, length - 1))), draw(sizes(2))
    lengths = documents = None
    if draw(st.booleans()):
        lengths = torch.tensor(draw(st.lists(sizes(length, 0), min_size=batch, max_size=batch)))
    if draw(st.booleans()):
        breaks = draw(
            st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch)
        )
        documents = torch.tensor(breaks).long().cumsum(1)
    options = {"horizon": horizon, "samples": samples, "lengths": lengths, "document_ids": documents}
    if draw(st.booleans()):
        context = draw(sizes(length - horizon))
        return StridedLayout.strided(batch, length, context=context, stride=draw(sizes(5)), **options)
    rows = [sorted(draw(st.sets(sizes(length), min_size=1, max_size=3))) for _ in range(batch)]
    width = max(map(len, rows))
    return StridedLayout.from_anchors(torch.tensor([x + [-1] * (width - len(x)) for x in rows]), length, **options)


def tensor(draw: st.DrawFn, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard-normal numbers: contiguous, every other of more, transposed, or expanded along one axis."""
    kind = draw(st.sampled_from(("plain", "plain", "sliced", "transposed", "expanded")))
    seed, axis = draw(sizes(2**31 - 1, 0)), draw(sizes(len(shape) - 1, 0))
    drawn = list(shape)
    if kind == "sliced":
        drawn[axis] *= 2
    if kind == "expanded":
        drawn[axis] = 1
    if kind == "transposed":
        return randn(*reversed(shape), seed=seed, dtype=dtype).permute(*reversed(range(len(shape))))
    x = randn(*drawn, seed=seed, dtype=dtype)
    if kind == "sliced":
        x = x[(*(slice(None),) * axis, slice(1, None, 2))]
    return x.expand(*shape)


def leaves_of(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Leaves with the same numbers: in ``dtype``, or with the same strides too."""
    return [(x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_() for x in tensors]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, roundings: int, terms: int, name: str) -> None:
    """Within some roundings to ``dtype`` and sums of ``terms`` numbers in float32 at least, beside the largest one."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    if not actual.numel():
        return
    actual, expected = actual.detach(), expected.detach()
    largest = max(1.0, float(expected.abs().max()))
    error = float((actual.double() - expected.double()).abs().max())
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert error <= (roundings * torch.finfo(dtype).eps + 4 * terms * sums) * largest, (name, error, largest)


def gradients(results: list[Tensor], leaves: list[Tensor], seed: int) -> list[Tensor]:
    """Gradients of the leaves for the same upstream gradients, whatever the dtype of the results."""
    upstream = [randn(*x.shape, seed=seed + i).bfloat16().to(x.dtype) for i, x in enumerate(results)]
    return list(torch.autograd.grad(results, leaves, upstream, materialize_grads=True, allow_unused=True))


def plain_attention(q, k, v, seen, *, scale, softcap, sinks) -> Tensor:
    """Head by head, each a matrix of scores in which ``seen`` [B, S', S] tells what counts; differentiable."""
    repeat, out = q.shape[1] // k.shape[1], []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        scores = scale * q[b, h] @ k[b, h // repeat].nan_to_num().T
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[b], -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[h].expand(len(scores), 1)], 1)
        weights = torch.softmax(scores, 1)[:, : k.shape[2]]
        out.append(weights @ v[b, h // repeat].nan_to_num())
    return torch.stack(out).view(*q.shape[:3], v.shape[3])


def seen_by_rules(layout: StridedLayout, window: int | None, block: str) -> Tensor:
    """[B, S, S] bool, from what the documentation says, token by token."""
    prompt = range(layout.length)
    tokens = list(itertools.product(range(layout.num_anchors), range(layout.samples), range(layout.horizon)))
    starts, anchors = layout.prompt_start.tolist(), layout.anchors.tolist()

    def sees(b: int, row: int, key: int) -> bool:
        if row < layout.length:
            return starts[b][row] <= key <= row and (window is None or row - key < window)
        a, j, g = tokens[row - layout.length]
        anchor = max(anchors[b][a], 0)
        if key < layout.length:
            inside = starts[b][max(anchor - 1, 0)] <= key < anchor
            return inside and (window is None or anchor + g - key < window)
        other, sample, step = tokens[key - layout.length]
        return (other, sample) == (a, j) and (block == "full" or step <= g) and (window is None or g - step < window)

    rows = range(len(prompt) + len(tokens))
    return torch.tensor([[[sees(b, row, key) for key in rows] for row in rows] for b in range(layout.batch_size)])


def draw_attention(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], most: int = 40) -> tuple:
    layout = draw(layouts())
    kv_heads, repeat = draw(sizes(2)), draw(sizes(3))
    size, value_size = draw(st.sampled_from((1, 3, 8, 17, most))), draw(st.sampled_from((1, 5, 16)))
    dtype, batch, rows = draw(st.sampled_from(dtypes)), layout.batch_size, layout.packed_length
    q = tensor(draw, batch, kv_heads * repeat, rows, size, dtype=dtype)
    k = tensor(draw, batch, kv_heads, rows, size, dtype=dtype)
    v = tensor(draw, batch, kv_heads, rows, draw(st.sampled_from((size, value_size))), dtype=dtype)
    options = {
        "scale": draw(st.sampled_from((size**-0.5, 0.3, 1.0 / size))),
        "softcap": draw(st.sampled_from((None, 2.0, 30.0))),
        "window": draw(st.sampled_from((None, 1, 4, 100))),
    }
    sinks = tensor(draw, kv_heads * repeat, dtype=torch.float32) if draw(st.booleans()) else None
    return layout, q, k, v, options, sinks


def check_attention(data, impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    layout, q, k, v, options, sinks = draw_attention(data.draw, dtypes)
    block = data.draw(st.sampled_from(("causal", "full")))
    inputs = [x for x in (q, k, v, sinks) if x is not None]
    leaves, exact = leaves_of(inputs), leaves_of(inputs, torch.float64)
    out = strided_attention(
        *leaves[:3], layout, sinks=leaves[3] if len(leaves) > 3 else None, block=block, impl=impl, **options
    )
    seen = seen_by_rules(layout, options.pop("window"), block)
    truth = plain_attention(*exact[:3], seen, sinks=exact[3] if len(exact) > 3 else None, **options)
    terms = q.shape[3] + layout.length + layout.horizon
    close(out, truth, q.dtype, 4, terms, "out")
    rows = terms * q.shape[1] // k.shape[1] * 4
    both = [gradients([x], y, 3) for x, y in ((out, leaves), (truth, exact))]
    for name, a, b in zip(("q", "k", "v", "sinks")[: len(leaves)], *both, strict=True):
        coarser = max(a.dtype, q.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        close(a, b, coarser, 32, rows, f"gradient of {name}")


@pytest.mark.parametrize("impl", IMPLS)
@fuzz()
def test_strided_attention(data, impl):
    check_attention(data, impl, DTYPES)


@fuzz(0.1)
def test_strided_attention_in_triton(data):
    check_attention(data, "triton", (torch.float32, torch.float16))


@pytest.mark.parametrize("impl", IMPLS)
@fuzz()
def test_strided_attention_step(data, impl):
    """What has not been written yet is NaN."""
    layout, q, k, v, options, sinks = draw_attention(data.draw, DTYPES)
    step = data.draw(sizes(layout.horizon - 1, 0))
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x[:, :, layout.length :].unflatten(2, (-1, layout.horizon))[:, :, :, step + 1 :] = math.nan
    rows = slice(layout.length + step, None, layout.horizon)
    out = strided_attention_step(q[:, :, rows], k, v, layout, step, sinks=sinks, impl=impl, **options)
    seen = seen_by_rules(layout, options.pop("window"), "causal")[:, rows]
    exact = [x.double() for x in (q[:, :, rows], k, v)]
    truth = plain_attention(*exact, seen, sinks=None if sinks is None else sinks.double(), **options)
    close(out, truth, q.dtype, 4, q.shape[3] + layout.length + layout.horizon, "out")


def plain_pooling(tokens: list[list[Tensor]], counted: list[bool], pooling: str, normalize: str) -> Tensor:
    """The feature of one rollout or window: ``tokens[g][l]`` is the hidden state [C] of token g at layer l."""

    def unit(x: Tensor) -> Tensor:
        return x / x.norm().clamp_min(1e-12)

    whole = [torch.stack(layers) for layers in tokens]  # G x [L, C]
    if normalize == "joint":
        whole = [unit(x) for x in whole]
    if normalize == "per_layer":
        whole = [torch.stack([unit(layer) for layer in x]) for x in whole]
    whole = torch.stack([x if counts else 0 * x for x, counts in zip(whole, counted, strict=True)])  # [G, L, C]
    if pooling == "mean":
        return whole.mean(0).flatten()
    if pooling == "token":
        return whole.flatten(1)
    if pooling == "concat":
        return whole.transpose(0, 1).flatten()
    return whole[max((g for g, counts in enumerate(counted) if counts), default=0)].flatten()


def check_pooling(data, impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    draw, layout = data.draw, data.draw(layouts())
    layers, channels, dtype = draw(sizes(3)), draw(st.sampled_from((1, 3, 8, 33))), draw(st.sampled_from(dtypes))
    pooling, normalize = draw(st.sampled_from(list(POOLINGS))), draw(st.sampled_from(NORMALIZATIONS))
    hidden = [tensor(draw, layout.batch_size, layout.packed_length, channels, dtype=dtype) for _ in range(layers)]
    mask = None
    if draw(st.booleans()):
        mask = randn(layout.batch_size, layout.length, seed=draw(sizes(1000, 0))) < 0.4
    leaves, exact = leaves_of(hidden), leaves_of(hidden, torch.float64)
    results = pool_features(leaves, layout, pooling=pooling, normalize=normalize, token_mask=mask, impl=impl)
    counted = layout.windows(torch.ones(layout.batch_size, layout.length, dtype=torch.bool) if mask is None else mask)
    in_rollouts = [layout.rollouts(x) for x in exact]
    in_windows = [layout.windows(x) for x in exact]
    rollouts, targets = [], []
    for b, a in itertools.product(range(layout.batch_size), range(layout.num_anchors)):
        flags = counted[b, a].tolist()
        for j in range(layout.samples):
            tokens = [[x[b, a, j, g] for x in in_rollouts] for g in range(layout.horizon)]
            rollouts.append(plain_pooling(tokens, flags, pooling, normalize))
        tokens = [[x[b, a, g] for x in in_windows] for g in range(layout.horizon)]
        targets.append(plain_pooling(tokens, flags, pooling, normalize))
    truth = [torch.stack(x).view(y.shape) for x, y in zip((rollouts, targets), results, strict=True)]
    sums = torch.promote_types(dtype, torch.float32)
    for name, a, b in zip(("rollouts", "targets"), results, truth, strict=True):
        assert a.dtype == sums
        close(a, b, sums, 4, layers * channels + layout.horizon, name)
    shared = layout.samples + layout.num_anchors
    for a, b in zip(*(gradients(list(r), x, 5) for r, x in ((results, leaves), (truth, exact))), strict=True):
        close(a, b, dtype, 4, layers * channels + 8 * shared, "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@fuzz()
def test_pool_features(data, impl):
    check_pooling(data, impl, DTYPES)


@fuzz(0.1)
def test_pool_features_in_triton(data):
    check_pooling(data, "triton", (torch.float32, torch.float16))


def draw_features(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], groups: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, anchors, n = draw(sizes(3)), draw(sizes(3)), draw(sizes(6))
    count, dtype = groups * draw(st.sampled_from((1, 4, 7, 40))), draw(st.sampled_from(dtypes))
    x = tensor(draw, batch, anchors, n, count, dtype=dtype)
    y = tensor(draw, batch, anchors, count, dtype=dtype)
    valid = randn(batch, anchors, seed=draw(sizes(1000, 0))) < 0.5 if draw(st.booleans()) else None
    return x, y, valid


def check_loss(data, impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    x, y, valid = draw_features(data.draw, dtypes)
    n = x.shape[2]
    unbiased = n > 1 and data.draw(st.booleans())
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    leaves, exact = leaves_of([x, y]), leaves_of([x, y], torch.float64)
    loss = mean_embedding_loss(*leaves, valid=valid, unbiased=unbiased, reduction=reduction, impl=impl)
    each = []
    for b, a in itertools.product(range(x.shape[0]), range(x.shape[1])):
        rows, target = exact[0][b, a], exact[1][b, a]
        pairs = [rows[j] @ rows[k] for j in range(n) for k in range(n) if not (unbiased and j == k)]
        one = sum(pairs) / len(pairs) - 2 * sum(row @ target for row in rows) / n + target @ target
        each.append(one if valid is None or valid[b, a] else 0 * one)
    truth = torch.stack(each).view(x.shape[:2])
    if reduction != "none":
        count = truth.numel() if valid is None else max(int(valid.sum()), 1)
        truth = truth.sum() / (count if reduction == "mean" else 1)
    sums = torch.promote_types(x.dtype, torch.float32)
    squares = 1 + float(x.double().square().sum(-1).amax() + y.double().square().sum(-1).amax())
    close(loss / squares, truth / squares, sums, 8, 8 * x.shape[3] + truth.numel(), "loss")
    for a, b in zip(*(gradients([r], z, 5) for r, z in ((loss, leaves), (truth, exact))), strict=True):
        close(a, b, x.dtype, 4, 8 * n, "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@fuzz()
def test_mean_embedding_loss(data, impl):
    check_loss(data, impl, DTYPES)


@fuzz(0.1)
def test_mean_embedding_loss_in_triton(data):
    check_loss(data, "triton", (torch.float32, torch.float16))


def check_matching(data, impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    draw, groups = data.draw, data.draw(sizes(3))
    x, y, valid = draw_features(draw, dtypes, groups)
    whitening, estimator = draw(st.sampled_from(("none", "sample", "feature"))), draw(st.sampled_from(ESTIMATORS))
    coefs = draw(st.sampled_from((0.0, 1.0, 0.5))), draw(st.sampled_from((0.0, 1.0, -2.0)))
    result = feature_matching(
        x,
        y,
        whitening=whitening,
        alignment_coef=coefs[0],
        diversity_coef=coefs[1],
        estimator=estimator,
        groups=groups,
        valid=valid,
        impl=impl,
    )
    sums = torch.promote_types(x.dtype, torch.float32)
    for b, a in itertools.product(range(x.shape[0]), range(x.shape[1])):
        actual = [z[b, a] for z in result]
        if valid is not None and not valid[b, a]:
            assert not any(z.any() for z in actual)
            continue
        expected, condition = match_by_loops(x[b, a], y[b, a], whitening, coefs, estimator, groups)
        if condition > 1e6:  # near the cut-off: which directions are kept is a matter of rounding
            continue
        for name, one, other in zip(result._fields, actual, expected, strict=True):
            other = torch.as_tensor(other, dtype=torch.float64)
            scale = max(1.0, float(other.abs().max()))
            if estimator == "group_norm" and name == "advantage":
                continue  # divided by a spread that may be rounding alone; a test of its own has that
            tolerance = (x.shape[3] + 16) * 4 * torch.finfo(sums).eps * scale + 1e-9 * condition * scale
            assert (one.double() - other).abs().max() <= tolerance, (name, one, other, condition)


@pytest.mark.parametrize("impl", IMPLS)
@fuzz()
def test_feature_matching(data, impl):
    check_matching(data, impl, DTYPES)


@fuzz(0.1)
def test_feature_matching_in_triton(data):
    check_matching(data, "triton", (torch.float32, torch.float16))


def check_log_probs(data, impl: str, dtypes: tuple[torch.dtype, ...]) -> None:
    draw = data.draw
    rows, channels, vocabulary = (
        draw(sizes(9)),
        draw(st.sampled_from((1, 4, 17))),
        draw(st.sampled_from((1, 2, 31, 70))),
    )
    dtype = draw(st.sampled_from(dtypes))
    hidden = tensor(draw, rows, channels, dtype=dtype)
    weight = tensor(draw, vocabulary, channels, dtype=dtype)
    bias = tensor(draw, vocabulary, dtype=dtype) if draw(st.booleans()) else None
    several = draw(st.booleans())
    count = draw(sizes(12, 0)) if several else rows
    generator = torch.Generator().manual_seed(draw(sizes(1000, 0)))
    targets = torch.randint(vocabulary, (count,), generator=generator)
    index = torch.randint(rows, (count,), generator=generator) if several else None
    options = {
        "temperature": draw(st.sampled_from((1.0, 0.6, 3.0))),
        "softcap": draw(st.sampled_from((None, 2.0, 50.0, 1e8))),
        "scale": draw(st.sampled_from((1.0, 0.25, -1.0, 0.0))),
    }
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    leaves, exact = leaves_of(inputs), leaves_of(inputs, torch.float64)
    log_probs = linear_log_probs(
        *leaves[:2],
        targets,
        rows=index,
        bias=leaves[2] if bias is not None else None,
        chunk_size=draw(st.sampled_from((None, 1, 4))),
        impl=impl,
        **options,
    )
    truth = []
    for t in range(count):
        h = exact[0][t if index is None else index[t]]
        logits = options["scale"] * (exact[1] @ h + (0 if bias is None else exact[2]))
        if options["softcap"] is not None:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        logits = logits / options["temperature"]
        truth.append(logits[targets[t]] - logits.logsumexp(0))
    truth = torch.stack(truth) if truth else 0 * exact[0].sum() + exact[0].new_zeros(0)
    # The logits of 16-bit inputs are rounded to their dtype, and so is what their gradients are made of.
    size = 4 * channels**0.5 / options["temperature"] + 4
    close(log_probs / size, truth / size, dtype, 4, channels + vocabulary, "log-probabilities")
    assert log_probs.dtype == torch.promote_types(dtype, torch.float32)
    for a, b in zip(*(gradients([r], x, 5) for r, x in ((log_probs, leaves), (truth, exact))), strict=True):
        close(a / size, b / size, dtype, 16, 4 * (channels + count), "gradient")


@pytest.mark.parametrize("impl", IMPLS)
@fuzz()
def test_linear_log_probs(data, impl):
    check_log_probs(data, impl, DTYPES)


@fuzz(0.1)
def test_linear_log_probs_in_triton(data):
    check_log_probs(data, "triton", (torch.float32, torch.float16))
