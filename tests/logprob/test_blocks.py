"""Softmax statistics of blocks of logits against those of each block alone."""

from __future__ import annotations

import math

import pytest
import torch

from ebft_kernels import _dispatch
from ebft_kernels.logprob._blocks import block_statistics
from ebft_kernels.testing import randn

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def assert_right(dtype: torch.dtype) -> None:
    """Largest logit and sum of exponentials of blocks that fill the rows, do not, and are longer than they are."""
    for rows, vocabulary, size in ((3, 1, 4), (5, 12, 4), (2, 130, 64), (70, 200, 33), (2, 2500, 2048), (0, 9, 4)):
        logits = randn(rows, vocabulary, seed=vocabulary, dtype=dtype).mul_(3)
        if vocabulary >= 130:
            logits[1, :size] = -math.inf
        largest, total = block_statistics(logits, size)
        wide = torch.promote_types(dtype, torch.float32)
        assert largest.dtype == total.dtype == wide
        assert largest.shape == total.shape == (rows, math.ceil(vocabulary / size))
        for block, part in enumerate(logits.double().split(size, 1)):
            expected = part.amax(1).clamp_min(torch.finfo(wide).min)
            assert torch.equal(largest[:, block].double(), expected)
            sums = (part - expected[:, None]).exp().sum(1)
            # Up to 2048 rounded summands between 0 and 1, each with a few units in its last place.
            assert ((total[:, block] - sums).abs() <= 16 * torch.finfo(wide).eps * sums).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_pytorch(dtype, monkeypatch):
    monkeypatch.setattr(_dispatch, "why_not", lambda _op, impl, *_rest: "" if impl == "torch" else "not asked for")
    assert_right(dtype)


def test_what_is_not_a_number_shows():
    logits = torch.zeros(2, 300)
    logits[1, 70] = math.nan
    _, total = block_statistics(logits, 64)
    assert total[0].isfinite().all()
    assert total[1].isnan().tolist() == [False, True, False, False, False]
