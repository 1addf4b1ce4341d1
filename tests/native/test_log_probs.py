"""The compiled softmax of log-probabilities: every instruction set and dtype, tiles of every width."""

from __future__ import annotations

import math

import pytest
import torch

from ebft_kernels import linear_log_probs, select_impl
from ebft_kernels.logprob import _native, _tiled
from ebft_kernels.testing import randn

from ..logprob import test_linear_log_probs as log_probs

DTYPES = log_probs.DTYPES
EPS = torch.finfo(torch.float64).eps
# Less than a vector, whole vectors and some more, more than a piece of 1024; with tiles of 64 columns a last one of 1.
VOCABULARIES = (1, 13, 31, 64, 65, 200, 2500)


def test_it_is_the_choice_on_the_cpu(compiled):  # noqa: ARG001
    assert all(select_impl("linear_log_probs", "cpu", dtype) == "native" for dtype in DTYPES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("head", log_probs.HEADS)
def test_agrees_with_one_softmax_per_row(head, with_bias):
    log_probs.test_agrees_with_one_softmax_per_row(with_bias, head, "native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", (log_probs.HEADS[2], log_probs.HEADS[-1]))
@pytest.mark.parametrize("tile_bytes", (1, 16 << 20))
def test_values_and_gradients(tile_bytes, head, dtype, monkeypatch):
    monkeypatch.setattr(_tiled, "CPU_TILE_BYTES", tile_bytes)
    for vocabulary in VOCABULARIES:
        # For several targets gradients that are 0, those of a vocabulary of one token, are 0 but for rounding.
        for several in (False, True)[: 1 + (vocabulary > 1)]:
            log_probs.assert_right(dtype, (150, 10, vocabulary), several=several, chunk_size=70, impl="native", **head)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("head", log_probs.EXTREME_HEADS)
def test_factors_that_half_precision_does_not_hold(head, dtype):
    log_probs.test_factors_that_half_precision_does_not_hold(head, dtype, "native")
    log_probs.test_gradients_whose_factor_half_precision_does_not_hold("native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("head", log_probs.HEADS)
def test_gradcheck(head):
    log_probs.test_gradcheck(head, "native")


@pytest.mark.usefixtures("isa")
def test_special_cases(monkeypatch):
    with monkeypatch.context() as patch:
        log_probs.test_tokens_that_are_ruled_out("native", patch)
    log_probs.test_a_vocabulary_of_one_token_is_certain("native")
    log_probs.test_huge_logits_do_not_overflow("native")
    for shape in ((), (6,), (2, 3), (0,), (2, 0)):
        log_probs.test_any_leading_shape_and_both_integer_types(shape, "native")
    for shape in ((), (4,), (2, 3, 2), (0,)):
        log_probs.test_targets_of_rows_have_any_shape(shape, "native")
    log_probs.test_one_target_for_each_row_is_the_default("native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_none(dtype):
    """NaN and infinity where PyTorch gives them."""
    hidden, weight, targets, bias = log_probs.inputs(4, 3, 70, dtype=dtype)
    bias.zero_()
    bias[5], targets[:] = math.inf, torch.tensor([0, 5, 5, 69])
    weight[5] = 0
    hidden[2, 1] = math.nan
    rows = [0, 1, 2]
    native, plain = (
        linear_log_probs(hidden[rows], weight, targets[rows], bias=bias, impl=impl) for impl in ("native", "torch")
    )
    assert torch.equal(native.isnan(), plain.isnan()) and native.isnan().any()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_blocks(dtype):
    """Of blocks that fill the rows, do not, are longer than they are, and are nothing but -inf."""
    for rows, vocabulary, size in ((3, 1, 4), (5, 12, 4), (2, 130, 64), (70, 200, 33), (2, 2500, 2048), (0, 9, 4)):
        logits = randn(rows, vocabulary, seed=vocabulary, dtype=dtype).mul_(3)
        if vocabulary >= 130:
            logits[1, :size] = -math.inf
        largest, total = _native.block_statistics(logits.mT.contiguous().mT, size)
        wide = torch.promote_types(dtype, torch.float32)
        assert largest.dtype == total.dtype == wide
        assert largest.shape == total.shape == (rows, math.ceil(vocabulary / size))
        for block, part in enumerate(logits.double().split(size, 1)):
            expected = part.amax(1).clamp_min(torch.finfo(wide).min)
            assert torch.equal(largest[:, block].double(), expected)
            sums = (part - expected[:, None]).exp().sum(1)
            # Up to 2048 summands between 0 and 1, each of them rounded, in vectors of at least 2 sums.
            assert ((total[:, block] - sums).abs() <= 16 * torch.finfo(wide).eps * sums).all()


def test_blocks_with_a_nan_say_so(compiled):  # noqa: ARG001
    logits = torch.zeros(2, 300)
    logits[1, 70] = math.nan
    _, total = _native.block_statistics(logits, 64)
    assert total[0].isfinite().all()
    assert total[1].isnan().tolist() == [False, True, False, False, False]


@pytest.mark.usefixtures("isa")
def test_results_do_not_depend_on_the_number_of_threads():
    hidden, weight, targets, _ = log_probs.inputs(300, 16, 2000, dtype=torch.float32)
    data, results = hidden @ weight.mT, []
    scored, upstream = _tiled._by_row(targets, None, 300), torch.linspace(-1, 1, 300)
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        statistics = torch.full((300,), -1e30), torch.zeros(300), torch.zeros(300)
        tile = _tiled.Tile(slice(0, 300), slice(0, 2000), data.clone(), scored, 1.5, 2.0)
        _native._add(tile, *statistics)
        _native._differentiate(tile, statistics[0], statistics[1].log(), upstream, upstream)
        results.append((*statistics, tile.data))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_results_with_several_targets_repeat_bitwise(compiled):  # noqa: ARG001
    log_probs.test_results_with_several_targets_repeat_bitwise("native")


@pytest.mark.parametrize("target", (-1, 70))
def test_a_target_outside_the_vocabulary_raises(target, compiled):  # noqa: ARG001
    hidden, weight, targets, _ = log_probs.inputs(4, 3, 70)
    targets[2] = target
    with pytest.raises(ValueError, match=f"targets: expected ids from 0 to 69, got {target}"):
        linear_log_probs(hidden, weight, targets, impl="native")


def test_what_the_module_refuses(compiled):
    data, rows = torch.zeros(2, 3), torch.zeros(2)
    targets, offsets = torch.zeros(2, dtype=torch.int64), torch.arange(3)
    integers = (data.data_ptr(), targets.data_ptr(), offsets.data_ptr())
    good = (0, 1, 1, (2, 3, 0, 2), *integers, 1.0, 0.0, *[rows.data_ptr()] * 4)
    compiled.softmax_gradient(*good)
    for position, value, message in (
        (2, 4, "dtype"),
        (3, (2, 3, 0), "sizes: expected rows"),
        (3, (2, 0, 0, 2), "at least one column"),
        *((address, 0, "address") for address in (4, 5, 6, 9, 10, 11, 12)),
        (8, -1.0, "softcap"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled.softmax_gradient(*good[:position], value, *good[position + 1 :])
    good = (0, 1, 1, (2, 3, 0, 2), *integers, 1.0, 0.0, *[rows.data_ptr()] * 3)
    compiled.softmax_add(*good)
    for address in (4, 5, 6, 9, 10, 11):
        with pytest.raises(ValueError, match="address"):
            compiled.softmax_add(*good[:address], 0, *good[address + 1 :])
    good = (0, 1, 1, (2, 3, 2), data.data_ptr(), *[torch.zeros(4).data_ptr()] * 2)
    with pytest.raises(ValueError, match="at least one column of a block"):
        compiled.softmax_blocks(*good[:3], (2, 3, 0), *good[4:])
    for address in (4, 5, 6):
        with pytest.raises(ValueError, match="address"):
            compiled.softmax_blocks(*good[:address], 0, *good[address + 1 :])
