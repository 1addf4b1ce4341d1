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

from ebft_trainer.hardware import GPUS as DATA_SHEETS

from ._attention_cost import ATTENTION_GOAL, KernelCost, attention_costs, mask_costs
from ._cases import GEOMETRY, SHAPES
from ._documents import DOCS, drift, table, write
from ._log_probs_cost import LOG_PROBS_GOAL, LOG_PROBS_MEMORY, RATES, ROWS, log_probs_costs
from ._memory_cost import MEMORY_GOAL, PASSES, MemoryCost, memory_cost
from ._targets import GPUS
from .shapes import ModelShape

COMMAND = "python -m bench.performance_model"
DOCUMENT = DOCS / "performance-model.md"
#: The GPU of the least times; for the one at hand ``python -m bench.gpu`` prints them beside what it measures.
H100, ARCH = DATA_SHEETS["h100"], "sm_90"


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
        gpu=H100.name,
        arch=ARCH,
        bf16=H100.rates[torch.bfloat16] / 1e12,
        bandwidth=H100.bandwidth / 1e12,
    )
    work = [(name, model) for name in sorted(PASSES, key=lambda name: "backward" not in name) for model in SHAPES]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        memory = dict(zip(work, pool.map(_memory_cost, work), strict=True))
    rows = GEOMETRY.layout()
    attention = {model: {arch: attention_costs(model, rows, gpu) for arch, gpu in GPUS.items()} for model in SHAPES}
    qwen = SHAPES[0]
    return "\n".join(
        [
            introduction,
            "## Attention kernels, one layer\n",
            _attention(attention),
            "## Scores of the forward pass by other means\n",
            _masks(),
            "## Memory-bound passes\n",
            _memory([[memory[name, model] for model in SHAPES] for name in PASSES]),
            f"## `linear_log_probs` of {ROWS} rows, forward and all gradients: {qwen.name}\n",
            _log_probs(qwen),
        ]
    )


def _memory_cost(work: tuple[str, ModelShape]) -> MemoryCost:
    torch.set_num_threads(1)
    return memory_cost(*work, GEOMETRY)


def _floor(**work: float) -> str:
    return f"{H100.microseconds(**work):.1f}"


def _attention(costs: dict[ModelShape, dict[str, list[KernelCost]]]) -> str:
    rows = []
    for model, by_arch in costs.items():
        heads = f"{model.heads}/{model.kv_heads} heads of {model.head_dim}"
        for i, cost in enumerate(by_arch[ARCH]):
            ratios = {arch: here[i].done / here[i].operations for arch, here in by_arch.items()}
            rows.append(
                (
                    f"`{cost.name}`",
                    f"{model.name}: {heads}",
                    f"{cost.operations / 1e9:.1f}",
                    f"{cost.moved / 1e6:.1f}",
                    f"{cost.loaded / 1e6:.0f}",
                    _floor(operations=cost.operations, moved=cost.moved),
                    *_on_h100_and_worst(ratios),
                )
            )
        # Of the five products of a backward pass the two kernels do two twice, so as not to keep the scores.
        ratios = {arch: (x[1].done + x[2].done) / (x[1].operations / 3 * 5) for arch, x in by_arch.items()}
        rows.append(("both backward kernels", f"{model.name}: {heads}", "", "", "", "", *_on_h100_and_worst(ratios)))
    header = ("kernel", "model", "GFLOP", "MB", "MB to and from caches", "least us", "done / needed", "at most")
    return table(header, rows)


def _on_h100_and_worst(ratios: dict[str, float]) -> tuple[str, str]:
    return f"{ratios[ARCH]:.3f}", f"{max(ratios.values()):.3f}"


def _masks() -> str:
    costs = mask_costs(GEOMETRY)
    return table(
        ("how", "rows", "times the needed"), [(x.how, x.rows, f"{x.pairs / costs[0].pairs:.2f}") for x in costs]
    )


def _memory(costs: list[list[MemoryCost]]) -> str:
    rows = []
    for of_models in costs:
        first = of_models[0]
        work = [{"moved": x.needed, "double_operations": x.double_operations} for x in of_models]
        rows.append(
            (
                first.name,
                ", ".join(f"`{kernel}`" for kernel in first.kernels),
                " / ".join(f"{x.needed / 1e6:.1f}" for x in of_models),
                " / ".join(_floor(**x) for x in work),
                f"{max(x.moved / x.needed for x in of_models):.3f}",
            )
        )
    names = " / ".join(model.name for model in SHAPES)
    return table(("pass", "kernels", f"MB needed, {names}", "least us", "moved / needed, at most"), rows)


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
* **Least us**: microseconds on an {gpu}, the larger of operations / {bf16:.0f} TFLOP/s and needed bytes /
  {bandwidth:.2f} TB/s. Softmax, launches and everything else that is neither are taken to be free.
* **Done / needed**: operations over the pairs that the tiles cover, counted exactly from the layout and the tile, on
  {arch}; **at most** on any architecture. Goal for the forward kernel: at most {attention_goal}.
* **Moved / needed**: what the kernels load and store, each time they do, counted while Triton's interpreter runs them:
  some of the programs where all move the same, all of them on short prompts where they do not. What a cache answers
  counts too. Goal: at most {memory_goal}. Two passes miss it, by what a cache answers: in the backward pass of a
  mean, each of the G rows that it was taken over reads the gradient of the feature; for position ids and key ranges,
  each row looks up its anchor and its document.
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
    is larger than the registers of an SM, so that each of the two is done in parts of 256 channels, and the
    logits are computed for each part. This loses in products more than it saves in bytes.
"""


if __name__ == "__main__":
    main()
