"""The Triton softmax of log-probabilities, compiled or in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from ebft_kernels import linear_log_probs, select_impl
from ebft_kernels.logprob import _tiled
from ebft_kernels.testing import assert_within_budget, randn

from ..op_checks import results_and_gradients, short_dtypes
from . import test_linear_log_probs as log_probs

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("device")
DTYPES = (torch.float32, *short_dtypes())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", log_probs.HEADS)
@pytest.mark.parametrize("several", (False, True))
def test_values_and_gradients(several, head, dtype):
    """Less than a block, several, a last one of one column; whole tiles of rows and a smaller last one."""
    for chunk_size, vocabulary in ((None, 200), (16, 129)):
        sizes = (24, 48, vocabulary)
        log_probs.assert_right(dtype, sizes, several=several, chunk_size=chunk_size, impl="triton", **head)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", log_probs.EXTREME_HEADS)
def test_factors_that_half_precision_does_not_hold(head, dtype):
    log_probs.test_factors_that_half_precision_does_not_hold(head, dtype, "triton")
    log_probs.test_gradients_whose_factor_half_precision_does_not_hold("triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("several", (False, True))
def test_tiles_of_rows_and_columns(several, dtype, monkeypatch):
    log_probs.small_tiles(monkeypatch, 7)
    log_probs.assert_right(dtype, (24, 48, 150), several=several, impl="triton", **log_probs.HEADS[-1])


def test_tokens_that_are_ruled_out(monkeypatch):
    """A bias of -inf fills the first and the last tile."""
    hidden, weight, targets, bias = log_probs.inputs(13, 10, 200, dtype=torch.float32)
    allowed, targets = slice(70, 120), targets % 50
    exact = hidden.double().requires_grad_()
    truth = linear_log_probs(exact, weight[allowed].double(), targets, bias=bias[allowed].double())
    leaf = hidden.clone().requires_grad_()
    plain = log_probs.eager(leaf, weight[allowed], targets, bias[allowed])
    expected = [results_and_gradients(x, [y]) for x, y in ((plain, leaf), (truth, exact))]
    bias[:70] = bias[120:] = -math.inf
    log_probs.small_tiles(monkeypatch, 5)
    actual = results_and_gradients(linear_log_probs(leaf, weight, targets + 70, bias=bias, impl="triton"), [leaf])
    for tensors in zip(actual, *expected, strict=True):
        assert_within_budget(*tensors)


@pytest.mark.parametrize("vocabulary", (1, 70))
def test_what_is_not_a_number_stays_none(vocabulary):
    """NaN and infinity where PyTorch gives them, in the first block and in the last."""
    hidden, weight, targets, bias = log_probs.inputs(4, 3, vocabulary, dtype=torch.float32)
    for column in (0, vocabulary - 1):
        offset = bias.zero_().clone()
        offset[column], targets[:] = math.inf, torch.tensor([0, column, vocabulary - 1, 0])
        scaled = weight.clone()
        scaled[column] = 0
        broken = hidden.clone()
        broken[2, 1] = math.nan
        triton, plain = (
            linear_log_probs(broken, scaled, targets, bias=offset, impl=impl) for impl in ("triton", "torch")
        )
        assert torch.equal(triton.isnan(), plain.isnan()) and triton[2].isnan()


def test_huge_logits_do_not_overflow():
    log_probs.test_huge_logits_do_not_overflow("triton")


@pytest.mark.parametrize("shape", ((), (2, 3), (0,)))
def test_any_leading_shape(shape):
    hidden, weight, _, _ = log_probs.inputs(math.prod(shape), dtype=torch.float32)
    leaf = hidden.view(*shape, 10).requires_grad_()
    result = linear_log_probs(leaf, weight, torch.zeros(shape, dtype=torch.int32), impl="triton")
    assert result.shape == shape and result.dtype == torch.float32
    result.sum().backward()
    assert leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all()


def test_no_rows_give_gradients_of_zeros():
    hidden, weight, targets, bias = log_probs.inputs(0, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    grads = torch.autograd.grad(linear_log_probs(hidden, weight, targets, bias=bias, impl="triton").sum(), leaves)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, leaves, strict=True))


def test_strided_inputs():
    hidden, weight, targets, bias = log_probs.inputs(26, 20, 62, dtype=torch.float32)
    views = [hidden[::2, 1::2], weight.mT.contiguous().mT[1::2, ::2], bias[::2]]
    results = []
    for tensors in (views, [v.contiguous() for v in views]):
        leaves = [t.detach().requires_grad_() for t in tensors]
        result = linear_log_probs(*leaves[:2], (targets // 2)[::2], bias=leaves[2], chunk_size=5, impl="triton")
        results.append(results_and_gradients(result, leaves))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 100 * torch.finfo(torch.float32).eps * b.abs().max()


def test_results_repeat_bitwise():
    """Also with many equal targets of a row."""
    hidden, weight, _, bias = log_probs.inputs(3, 8, 90, dtype=torch.float32)
    rows, targets = torch.arange(60) % 2, torch.arange(60) % 5
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    first, second = (
        results_and_gradients(linear_log_probs(*leaves[:2], targets, rows=rows, bias=bias, impl="triton"), leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "wrong"), (("targets", 31), ("targets", -1), ("rows", 13)))
def test_what_is_out_of_range_raises(name, wrong):
    hidden, weight, targets, _ = log_probs.inputs(dtype=torch.float32)
    arguments = {"targets": targets, "rows": torch.arange(13)}
    arguments[name][4] = wrong
    with pytest.raises(ValueError, match=f"{name}: expected .* from 0 to (30|12), got {wrong}"):
        linear_log_probs(hidden, weight, **arguments, impl="triton")


def test_float64_is_for_others():
    hidden, weight, targets, _ = log_probs.inputs()
    with pytest.raises(ValueError, match="impl: linear_log_probs has no implementation 'triton' on .* .it computes in"):
        linear_log_probs(hidden, weight, targets, impl="triton")
    assert select_impl("linear_log_probs", "cpu", torch.float32) != "triton", "nobody wants the interpreter by default"


@pytest.mark.parametrize("needs", ((True, False), (False, True)))
def test_a_frozen_weight_costs_no_products(needs):
    """Backward: the logits again, and one product for each gradient that is needed."""
    from ebft_kernels.logprob import _triton

    hidden, weight, targets, _ = log_probs.inputs(6, 8, 40, dtype=torch.float32)
    arguments = hidden, weight, targets, None, None
    options = (1.0, None, 1.0, None)
    statistics = _triton.forward(*arguments, *options)
    with log_probs.Products() as products:
        _triton.backward(*statistics, *arguments, [*needs, False], *options)
    assert products.shapes == [(6, 40), (6, 8) if needs[0] else (40, 8)]


def test_tiles_on_a_gpu():
    """Few and large: all rows together, so that what lies in the weight's order is read and written once per pass."""
    rows, columns = _tiled.tile_shape(4064, 151936, 4, None, "cuda")
    assert rows == 4064 and columns % _tiled.COLUMNS == 0 and -(-151936 // columns) == 5
    assert 2 * rows * columns + 4064 * 1536 * (4 + 2) < 600e6, "16 bits of a tile, the gradient of hidden, a summand"
    assert _tiled.tile_shape(100_000, 151936, 4, None, "cuda") == (_tiled.ROWS, 4096)
    assert _tiled.tile_shape(16, 151936, 4, None, "cuda") == (16, 151936)
    assert _tiled.tile_shape(4064, 151936, 4, 100, "cuda") == (100, 151936)


def test_rows_of_a_tile_begin_where_16_bytes_can_be_read():
    hidden, weight = randn(5, 8, seed=0, dtype=torch.float16), randn(33, 8, seed=1, dtype=torch.float16)
    targets = _tiled._by_row(torch.zeros(5, dtype=torch.int64), None, 5)
    (tile,) = _tiled._tiles(hidden, weight, targets, None, 1.0, None, 1.0, (5, 33), 64)
    assert tile.data.shape == (5, 33) and tile.data.stride() == (64, 1)
    assert torch.equal(tile.data, hidden @ weight.mT)
