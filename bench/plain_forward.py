"""What the registered attention costs a model that is called without a layout: nothing, it is to behave like sdpa.

    python -m bench.plain_forward [--model llama-256] [--batch 1] [--length 1024] [--threads 2]

The same weights, attention "sdpa" and "strided" in turn; everything else is as in any evaluation or pre-training step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import ebft_kernels.integrations.transformers  # noqa: F401 (registers "strided")

from .measure import in_turn, machine_line
from .shapes import MODELS, Geometry, ModelShape
from .step import Setup

IMPLEMENTATIONS = ("sdpa", "strided")
#: Spent on each kind of run: differences of a percent need many.
SECONDS = 15.0


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, geometry = MODELS[arguments.model], Geometry(batch=arguments.batch, length=arguments.length)
    print(f"{model.name}, B={geometry.batch} P={geometry.length}, float32. {machine_line(torch.device('cpu'))}\n")
    print(f"| | {' | '.join(IMPLEMENTATIONS)} | ratio |\n| --- |" + " ---: |" * (len(IMPLEMENTATIONS) + 1))
    for name, (plain, registered) in times(model, geometry).items():
        print(f"| {name} | {plain:.4f} s | {registered:.4f} s | {registered / plain:.3f} |")


def times(model: ModelShape, geometry: Geometry) -> dict[str, tuple[float, float]]:
    """Median seconds under "sdpa" and "strided" of a forward without gradients, the same with right padding, and a
    training step's forward and backward."""
    setup = Setup(model, geometry, torch.float32)
    kept = torch.ones_like(setup.prompt)
    kept[:, -geometry.length // 4 :] = 0
    work = {
        "forward": lambda: _forward(setup),
        "forward, padded": lambda: _forward(setup, kept),
        "forward + backward": lambda: _backward(setup),
    }
    found = {}
    for name, run in work.items():
        runs = {attention: _under(setup, attention, run) for attention in IMPLEMENTATIONS}
        medians = in_turn(runs, device=torch.device("cpu"), seconds=SECONDS, least=5, most=200)
        found[name] = tuple(medians[attention].median for attention in IMPLEMENTATIONS)
    return found


def ratios(model: ModelShape, geometry: Geometry) -> dict[str, float]:
    """Seconds under "strided" over those under "sdpa"."""
    return {name: registered / plain for name, (plain, registered) in times(model, geometry).items()}


def _under(setup: Setup, attention: str, run: Callable[[], None]) -> Callable[[], None]:
    def selected() -> None:
        setup.model.set_attn_implementation(attention)
        run()

    return selected


@torch.no_grad()
def _forward(setup: Setup, attention_mask: Tensor | None = None) -> None:
    setup.model(setup.prompt, attention_mask=attention_mask, use_cache=False)


def _backward(setup: Setup) -> None:
    setup.model.zero_grad(set_to_none=True)
    setup.model(setup.prompt, labels=setup.prompt, use_cache=False).loss.backward()


if __name__ == "__main__":
    main()
