"""Time against PyTorch's attention over the rows that the authors run, with one copy of the prompt per sample."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ebft_kernels import StridedLayout, strided_attention
from ebft_kernels.testing import attention_inputs

from ..op_checks import results_and_gradients

pytestmark = pytest.mark.speed


def cpu_seconds(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Least processor time of each function on one thread, which other processes disturb least; taken in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = [float("inf")] * len(functions)
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            seconds[i] = min(seconds[i], time.process_time() - start)
    torch.set_num_threads(threads)
    return seconds


def in_reference_order(layout: StridedLayout, x: Tensor) -> Tensor:
    """[1, H, S, D] -> [n, H, P + A*G, D]."""
    return layout.to_reference_order(x.transpose(1, 2)).transpose(1, 2)


def test_four_times_faster_than_dense_attention():
    layout = StridedLayout.strided(1, 1024, context=8, stride=8, horizon=8, samples=4)
    packed = [x.requires_grad_() for x in attention_inputs(layout, heads=8, kv_heads=8, head_dim=64)]
    dense = [in_reference_order(layout, x.detach()).contiguous().requires_grad_() for x in packed]
    index = layout.to_reference_order(torch.arange(layout.packed_length)[None])  # [n, P + A*G]
    mask = layout.dense_mask()[0, 0][index[:, :, None], index[:, None]][:, None]
    results = {}

    def run(name: str, attend: Callable[[], Tensor], leaves: list[Tensor]) -> None:
        results[name] = results_and_gradients(attend(), leaves)[0]

    ours, theirs = cpu_seconds(
        lambda: run("ours", lambda: strided_attention(*packed, layout), packed),
        lambda: run("theirs", lambda: scaled_dot_product_attention(*dense, attn_mask=mask), dense),
        rounds=2,
    )
    difference = (in_reference_order(layout, results["ours"]) - results["theirs"]).abs().max()
    assert difference < 100 * torch.finfo(torch.float32).eps  # the same numbers, or the times would mean nothing
    assert theirs > 4 * ours
