"""What one decoding step of all rollouts launches on a GPU, counted without one.

    python -m bench.decoding_launches [--top-p 0.9]

Runs a step of a model of Qwen2.5-1.5B's shape on torch's meta device at the documents' batch, and counts each op that
computes something as one launch, and each Triton kernel. Replayed as a CUDA graph a step is one launch.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from ebft_kernels.integrations.transformers import OutputHead, StridedCache, hidden_states
from ebft_trainer import rollout

from ._cases import GEOMETRY, SHAPES
from ._targets import GPUS, standing_in
from .step import model_config


class Launches(TorchDispatchMode):
    """Counts the ops that are neither views nor mere memory."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one op and count it."""
        if not op.is_view and "empty" not in op.name() and op.name() not in ("aten::detach", "aten::_unsafe_view"):
            self.counts[op.name()] += 1
        return op(*args, **(kwargs or {}))


@torch.no_grad()
def launches(**options: float) -> dict[str, Counter[str]]:
    """Launches of one decoding step: those of the model's layers, and those of its head and of drawing the tokens.

    Args:
        options: of the sampler: temperature, top_p, top_k.
    """
    shape = SHAPES[0]
    config = model_config(shape, GEOMETRY.length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    layout = GEOMETRY.layout().to("meta")
    rollouts = layout.num_anchors * layout.samples
    tokens = [torch.zeros(layout.batch_size, x, dtype=torch.int64, device="meta") for x in (layout.length, rollouts)]
    cache = StridedCache(layout)
    hidden_states(model, tokens[0], layout, cache=cache)
    with Launches() as in_layers:
        rows = hidden_states(model, tokens[1], layout, cache=cache, step=1)
    sampler = rollout.Sampler(**({"temperature": 0.6, "top_p": 1.0, "top_k": 0} | options))
    uniform = torch.empty(layout.batch_size * rollouts, 1, dtype=torch.float64, device="meta")
    drawing = Launches()
    # The meta device stands for a GPU: kernels draw there, and autocast, which it does not know, is off.
    with (
        mock.patch.object(rollout, "draws_by", lambda *_: "triton"),
        mock.patch.object(torch, "is_autocast_enabled", lambda *_: False),
        standing_in(GPUS["sm_90"], lambda kernel, *_: drawing.counts.update([kernel.__name__])),
        drawing,
    ):
        sampler.draw_rows(rows, OutputHead(model.lm_head.weight, None, 1.0, None), uniform)
    return {"layers": in_layers.counts, "head and draw": drawing.counts}


def main() -> None:
    """Parse the command line, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-p", type=float, default=1.0)
    for part, counts in launches(top_p=parser.parse_args().top_p).items():
        print(f"{part}: {counts.total()}")
        for name, count in counts.most_common():
            print(f"  {count:5} {name}")


if __name__ == "__main__":
    main()
