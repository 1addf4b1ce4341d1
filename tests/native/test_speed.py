"""Time of the compiled kernels beside plain PyTorch's and a plain copy of as many bytes, taken in turn.

On one thread and in processor time, which other processes disturb least. The goals are 2 times PyTorch for matching and
pooling and 1.3 times for the decoding step; the bounds leave room for a busy machine. What was measured is printed:
``pytest -s tests/native/test_speed.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, feature_matching, mean_embedding_loss, pool_features, strided_attention_step
from ebft_kernels.testing import attention_inputs, feature_inputs, randn

from ..attention.test_speed import cpu_seconds

DTYPES = (torch.float32, torch.bfloat16)
pytestmark = [pytest.mark.speed, pytest.mark.usefixtures("compiled", "_not_poisoned")]


@pytest.fixture
def _not_poisoned():
    torch.utils.deterministic.fill_uninitialized_memory = False


def layout(length: int = 1024) -> StridedLayout:
    return StridedLayout.strided(1, length, context=8, stride=8, horizon=8, samples=4)


def compare(name: str, run: Callable[[str], object], moved: int) -> tuple[float, float]:
    """Speed beside PyTorch's and beside a copy, of ``run(impl)``, which reads and writes ``moved`` bytes."""
    source = torch.ones(moved // 8)
    target = source.clone()
    # The shorter a run, the more of them: whether new memory is recycled or fresh differs from one to the next.
    rounds = max(25, 4_000_000_000 // moved)
    native, by_torch, copy = cpu_seconds(
        lambda: run("native"), lambda: run("torch"), lambda: target.copy_(source), rounds=rounds
    )
    print(
        f"\n{name}: {moved / 1e6:.0f} MB in {native * 1e3:.2f} ms, {moved / native / 1e9:.1f} GB/s, "
        f"{copy / native:.2f} of a copy, {by_torch / native:.2f} times PyTorch"
    )
    return by_torch / native, copy / native


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whitening", ("none", "sample"))
def test_matching(whitening, dtype):
    x, y = feature_inputs(8, 127, 4, 4608, dtype=dtype)
    beside_torch, beside_copy = compare(
        f"feature_matching, whitening {whitening}, {dtype}",
        lambda impl: feature_matching(x, y, whitening=whitening, impl=impl),
        x.nbytes + y.nbytes,
    )
    assert beside_torch > 2 and beside_copy > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss(dtype):
    x, y = feature_inputs(8, 127, 4, 4608, dtype=dtype)
    beside_torch, beside_copy = compare(
        f"mean_embedding_loss, {dtype}",
        lambda impl: mean_embedding_loss(x, y, impl=impl),
        x.nbytes + y.nbytes + 4 * y.numel(),
    )
    # Least of several runs on an AMD EPYC: 0.39 and, where 16 bits are widened, 0.24.
    assert beside_torch > 1.1 and beside_copy > (0.35 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pooling", "tokens", "least"), [("mean", 8, 1.6), ("last_token", 1, 1.1)])
def test_pooling(pooling, tokens, least, dtype):
    rows = layout()
    hidden = [randn(1, rows.packed_length, 1536, seed=layer, dtype=dtype) for layer in range(3)]
    vectors = rows.num_anchors * (rows.samples + 1) * 3 * 1536
    beside_torch, beside_copy = compare(
        f"pool_features, {pooling}, {dtype}",
        lambda impl: pool_features(hidden, rows, pooling=pooling, impl=impl),
        vectors * (tokens * dtype.itemsize + 4),
    )
    assert beside_torch > least and beside_copy > 0.15


@pytest.mark.parametrize("pooling", ("mean", "last_token"))
def test_gradient_of_pooling(pooling):
    """A gradient is a tensor as large as all hidden states, most of it new memory."""
    rows = layout()
    hidden = [randn(1, rows.packed_length, 1536, seed=layer).float().requires_grad_() for layer in range(3)]

    def prepared(impl: str) -> Callable[[], tuple[Tensor, ...]]:
        features = pool_features(hidden, rows, pooling=pooling, impl=impl)
        upstream = [torch.ones_like(x) for x in features]
        return lambda: torch.autograd.grad(features, hidden, upstream, retain_graph=True)

    runs = {impl: prepared(impl) for impl in ("native", "torch")}
    vectors = rows.num_anchors * (rows.samples + 1) * 3 * 1536
    moved = 4 * vectors * (1 + (8 if pooling == "mean" else 1)) + sum(x.nbytes for x in hidden)
    beside_torch, _ = compare(f"gradient of pool_features, {pooling}", lambda impl: runs[impl](), moved)
    assert beside_torch > 1.1


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "length"), [(4, 2, 64, 256), (8, 4, 32, 1024)])
def test_decoding_step(heads, kv_heads, head_dim, length):
    rows = layout(length)
    q, k, v = attention_inputs(rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    q = rows.step_rows(q.transpose(1, 2), 5).transpose(1, 2)
    native, by_torch = cpu_seconds(
        *(lambda impl=impl: strided_attention_step(q, k, v, rows, 5, impl=impl) for impl in ("native", "torch")),
        rounds=8,
    )
    print(f"\nstrided_attention_step: {native * 1e3:.2f} ms, {by_torch / native:.2f} times PyTorch")
    assert by_torch > 1.3 * native
