"""The vocabulary head as numbers: logits into memory that is there are the same logits."""

from __future__ import annotations

import pytest
import torch

from ebft_kernels.integrations.transformers import OutputHead
from ebft_kernels.testing import randn


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize(("scale", "softcap"), ((1.0, None), (0.5, None), (2.0, 3.0)))
def test_logits_into_memory_that_is_there(scale, softcap, with_bias, dtype):
    weight, hidden = randn(31, 8, seed=1, dtype=dtype), randn(5, 8, seed=2, dtype=torch.float32)
    head = OutputHead(weight, randn(31, seed=3, dtype=dtype) if with_bias else None, scale, softcap)
    memory = torch.full((5, 31), float("nan"), dtype=dtype)
    expected, found = head.logits(hidden), head.logits(hidden, memory)
    assert found.dtype == dtype and (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    assert found.data_ptr() == memory.data_ptr()
    cooled = head.at_temperature(0.6)
    for logits in (cooled.logits(hidden), cooled.logits(hidden, memory)):
        difference = (logits - expected / 0.6).abs().max()
        assert difference <= 4 * torch.finfo(dtype).eps * expected.abs().max() / 0.6


def test_autocast_decides_about_the_dtype():
    head = OutputHead(randn(31, 8, seed=1, dtype=torch.float32), None, 1.0, None)
    hidden, memory = randn(5, 8, seed=2, dtype=torch.float32), torch.empty(5, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.logits(hidden, memory).dtype == torch.bfloat16
        assert torch.equal(head.logits(hidden, memory), head.logits(hidden))
