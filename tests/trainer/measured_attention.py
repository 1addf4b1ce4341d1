"""Run in a process of its own: what compiled attention takes besides its inputs and outputs, for `test_plan.py`.

Prints bytes, measured and as the plan has them, of the forward and of the backward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import reset_peak_resident, resident_bytes
from ebft_kernels import StridedLayout
from ebft_kernels.attention.api import _backward_op, _forward_op
from ebft_trainer.dry_run import _attention, _attention_backward


def main() -> dict[str, list[int]]:
    layout = StridedLayout.strided(2, 4096, context=8, stride=1024, horizon=8, samples=1)
    q, k, v = (torch.randn(2, heads, layout.packed_length, 32) for heads in (4, 2, 2))
    options = (*layout.key_ranges, layout.length, layout.samples, layout.horizon, 0.2, None, None, False, "native")
    taken, (out, lse) = besides_results(lambda: _forward_op(q, k, v, None, *options))
    sizes = {"forward": [taken, _attention(True, q, k, v, None, *options)]}
    grad = torch.randn_like(out)
    inputs = (q, k, v, None, out, lse)
    taken, _ = besides_results(lambda: _backward_op(grad, *inputs, *options))
    sizes["backward"] = [taken, _attention_backward(True, grad, *inputs, *options)]
    return sizes


def besides_results(work: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    before = resident_bytes("VmRSS")
    reset_peak_resident()
    results = work()
    return resident_bytes("VmHWM") - before - sum(x.nbytes for x in results), results


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(json.dumps(main()))
