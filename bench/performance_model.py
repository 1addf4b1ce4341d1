"""What each Triton kernel must do, what it does, and how long a GPU needs for that at the least. Nothing is measured.

    python -m bench.performance_model [--check]

Writes docs/performance-model.md; with ``--check`` fails if the document is not what the code gives. Operations of the
attention kernels are counted exactly from the layout and the tiles that the kernels would get; bytes of the
memory-bound kernels are counted while Triton's interpreter runs them on shorter prompts, and scaled.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from ._attention_cost import ATTENTION_GOAL, KernelCost, attention_costs, mask_costs
from ._cases import GEOMETRY, SHAPES
from ._datasheets import ACCELERATORS
from ._documents import DOCS, drift, table, write
from ._log_probs_cost import LOG_PROBS_GOAL, LOG_PROBS_MEMORY, RATES, ROWS, log_probs_costs
from ._memory_cost import MEMORY_GOAL, PASSES, MemoryCost, memory_cost
from ._targets import GPUS
from .shapes import ModelShape

COMMAND = "python -m bench.performance_model"
DOCUMENT = DOCS / "performance-model.md"


def main() -> None:
    """Parse the command line, count, write or check the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the document instead of writing it")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton looks at it once, when it is imported
        command = [sys.executable, "-m", "bench.performance_model", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    text = document()
    if arguments.check:
        sys.exit("\n".join(drift(DOCUMENT, text, COMMAND)) or 0)
    write(DOCUMENT, text)


def document() -> str:
    """The whole document."""
    introduction = _INTRODUCTION.format(
        command=COMMAND,
        setting=GEOMETRY,
        attention_goal=ATTENTION_GOAL,
        memory_goal=MEMORY_GOAL,
        product_rate=RATES[0] / 1e12,
        copy_rate=RATES[1] / 1e12,
        log_probs_goal=LOG_PROBS_GOAL,
        log_probs_memory=LOG_PROBS_MEMORY / 1e6,
    )
    work = [(name, model) for name in sorted(PASSES, key=lambda name: "backward" not in name) for model in SHAPES]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        memory = dict(zip(work, pool.map(_memory_cost, work), strict=True))
    models = [_model(model, [memory[name, model] for name in PASSES]) for model in SHAPES]
    return "\n".join([introduction, _datasheets(), *models])


def _memory_cost(work: tuple[str, ModelShape]) -> MemoryCost:
    torch.set_num_threads(1)
    return memory_cost(*work, GEOMETRY)


def _datasheets() -> str:
    rows = [
        (x.name, x.arch, f"{x.bf16 / 1e12:.0f}", f"{x.fp64 / 1e12:.1f}", f"{x.bandwidth / 1e12:.2f}")
        for x in ACCELERATORS
    ]
    return table(("product", "kernels of", "bf16 TFLOP/s", "float64 TFLOP/s", "TB/s"), rows)


def _model(model: ModelShape, memory: list[MemoryCost]) -> str:
    rows = GEOMETRY.layout()
    by_arch = {arch: attention_costs(model, rows, gpu) for arch, gpu in GPUS.items()}
    sizes = f"hidden {model.hidden}, {model.layers} layers, {model.heads}/{model.kv_heads} heads of {model.head_dim}"
    return "\n".join(
        [
            f"## {model.name} ({sizes})\n",
            "### Attention kernels, one layer: what is needed, and the least time for it in microseconds\n",
            _needed(by_arch["sm_90"]),
            "### Operations done over operations needed, by architecture\n",
            _ratios(by_arch),
            "### Scores of the forward pass by other means\n",
            _masks(model),
            "### Memory-bound passes: bytes needed and moved, and the least time in microseconds\n",
            _memory(memory),
            f"### `linear_log_probs` of {ROWS} rows, forward and all gradients, on an H100\n",
            _log_probs(model),
        ]
    )


def _floor(**work: float) -> list[str]:
    return [f"{x.microseconds(**work):.1f}" for x in ACCELERATORS]


def _needed(costs: list[KernelCost]) -> str:
    rows = [
        (
            f"`{cost.name}`",
            f"{cost.operations / 1e9:.1f}",
            f"{cost.moved / 1e6:.1f}",
            f"{cost.loaded / 1e6:.0f}",
            *_floor(operations=cost.operations, moved=cost.moved),
        )
        for cost in costs
    ]
    return table(("kernel", "GFLOP", "MB", "MB to and from caches", *(x.name for x in ACCELERATORS)), rows)


def _ratios(by_arch: dict[str, list[KernelCost]]) -> str:
    names = [cost.name for cost in by_arch["sm_90"]]
    rows = [
        (f"`{name}`", *(f"{costs[i].done / costs[i].operations:.3f}" for costs in by_arch.values()))
        for i, name in enumerate(names)
    ]
    # Of the five products of a backward pass the two kernels do two twice, so as not to keep the scores.
    whole = [(costs[1].done + costs[2].done) / (costs[1].operations / 3 * 5) for costs in by_arch.values()]
    return table(("kernel", *by_arch), [*rows, ("both backward kernels", *(f"{x:.3f}" for x in whole))])


def _masks(model: ModelShape) -> str:
    costs = mask_costs(GEOMETRY)
    operations = [4 * model.head_dim * model.heads * GEOMETRY.batch * cost.pairs for cost in costs]
    rows = [
        (cost.how, cost.rows, f"{work / 1e9:.1f}", f"{cost.pairs / costs[0].pairs:.2f}", *_floor(operations=work))
        for cost, work in zip(costs, operations, strict=True)
    ]
    return table(("how", "rows", "GFLOP", "times the needed", *(x.name for x in ACCELERATORS)), rows)


def _memory(costs: list[MemoryCost]) -> str:
    rows = [
        (
            cost.name,
            ", ".join(f"`{kernel}`" for kernel in cost.kernels),
            f"{cost.needed / 1e6:.1f}",
            f"{cost.moved / 1e6:.1f}",
            f"{cost.moved / cost.needed:.3f}",
            *_floor(moved=cost.needed, double_operations=cost.double_operations),
        )
        for cost in costs
    ]
    return table(("pass", "kernels", "MB needed", "MB moved", "ratio", *(x.name for x in ACCELERATORS)), rows)


def _log_probs(model: ModelShape) -> str:
    costs = log_probs_costs(model)
    rows = [
        (
            cost.how,
            cost.products,
            f"{1e3 * cost.operations / RATES[0]:.1f}",
            f"{cost.logits / 1e9:.1f}",
            f"{cost.gradients / 1e9:.1f}",
            f"{1e3 * cost.seconds:.1f}",
            f"{cost.seconds / costs[1].seconds:.2f}",
            f"{cost.memory / 1e6:.0f}",
        )
        for cost in costs
    ]
    header = ("how", "products", "ms of products", "GB of logits", "GB of gradients", "ms", "ratio", "MB held")
    return table(header, rows)


_INTRODUCTION = """\
# Performance model

Computed, not measured. Written by `{command}` on a machine without a GPU; a test fails when it
is not what the code gives. Nothing here is a claim about how fast a kernel runs. It says what its task needs at the
least, how much more than that the kernel does, and how long a data sheet's rates allow the needed part to take.

Everything is for one layer at {setting}, bfloat16 (features float32), the prompt of every row full.

* **GFLOP**: of the matrix products, two per multiply-add, over the (query, key) pairs that may attend: two products per
  pair in the forward pass and in a decoding step (the last one of a rollout is shown), three for dQ, four for dK, dV.
* **MB**: inputs and outputs, each once. **MB to and from caches**: what the programs of the kernel ask for, on sm_90.
* **Operations done**: over the pairs that the tiles cover, which are counted exactly from the layout and the tile that
  the architecture gets. Goal for the forward kernel: at most {attention_goal}.
* **MB moved**: what the kernels load and store, each time they do, counted while Triton's interpreter runs them: some
  of the programs where all move the same, all of them on short prompts where they do not. What a cache answers counts
  too. Goal: at most {memory_goal} of the needed. Two passes miss it, by what a cache answers: in the backward pass of a
  mean, each of the G rows that it was taken over reads the gradient of the feature; for position ids and key ranges,
  each row looks up its anchor and its document.
* **Least time**: the larger of operations / rate and needed bytes / bandwidth, for dense products without sparsity.
  Softmax, launches and everything else that is neither are taken to be free.
* **By other means**: the method's published code repeats the prompt for each sample and orders rollout tokens by (step,
  anchor); FlexAttention computes every 128 x 128 block that holds a pair, a dense mask every pair.
* **`linear_log_probs`**: all products at {product_rate:.0f} TFLOP/s and, after them, passes at {copy_rate:.1f} TB/s,
  what one H100 did in large bf16 products and copies. **GB of logits**: written by a product and read again, or
  overwritten by their gradient. **GB of gradients**: written, and where several tiles add to one, their sums in
  float32. What products read is left out. Goal: at most {log_probs_goal} times the four products of a computation that
  does not keep the logits, and {log_probs_memory:.0f} MB besides inputs and outputs.
  * "large tiles, one kernel per pass" is `impl="triton"`: all rows, and as many columns as fit, so that every block of
    the weight gradient is written once. The logits are bfloat16, as a product in bfloat16 gives them anywhere.
  * "tiles of all columns" reads and writes a weight gradient in float32 for each.
  * "logits in registers", without atomic additions: the accumulator of a gradient, 128 rows of all channels in float32,
    is larger than the registers of a processor, so that each of the two is done in parts of 256 channels, and the
    logits are computed for each part. This loses in products more than it saves in bytes.
"""


if __name__ == "__main__":
    main()
