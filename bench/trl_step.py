"""What TRL's trainers gain from `patch_trl`: loss and backward pass of one batch by TRL itself and patched, in turn.

    python -m bench.trl_step [--model llama-256] [--vocab 32768] [--batch 2] [--prompt 128] [--completion 32]

A random model, float32, prompts and completions of equal lengths. The logits that plain cross-entropy would need are a
third contestant. Losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ebft_kernels.integrations.trl import patch_trl
from ebft_trainer.demo_model import MODEL_FOLDER

from .measure import in_turn, machine_line
from .shapes import MODELS, Geometry, ModelShape
from .step import Setup

SECONDS = 10.0
PATCHED, TRL, LOGITS = "patch_trl", "TRL", "all logits"


def main() -> None:
    """Parse the command line, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-256")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = MODELS[arguments.model]._replace(vocab=arguments.vocab)
    sizes = arguments.batch, arguments.prompt, arguments.completion
    print(
        f"{shape.name}, V={shape.vocab}, {sizes[0]} rows of {sizes[1]} + {sizes[2]} tokens, float32. "
        f"{machine_line(torch.device('cpu'))}\n"
    )
    found = times(shape, *sizes)
    print("| " + " | ".join(["", *found, *(f"{name} / {PATCHED}" for name in found if name != PATCHED)]) + " |")
    print("| --- |" + " ---: |" * (2 * len(found) - 1))
    ratios = [f"{seconds / found[PATCHED]:.2f}" for name, seconds in found.items() if name != PATCHED]
    print("| SFT, loss + backward | " + " | ".join([*(f"{x:.4f} s" for x in found.values()), *ratios]) + " |")


def times(
    shape: ModelShape, batch: int, prompt: int, completion: int, *, seconds: float | None = None
) -> dict[str, float]:
    """Median seconds of a loss and its backward pass."""
    with tempfile.TemporaryDirectory() as folder:
        model = Setup(shape, Geometry(batch=batch, length=prompt + completion), torch.float32).model
        trainers = {name: _trainer(model, folder) for name in (TRL, PATCHED)}
        patch_trl(trainers[PATCHED])
        tokens = torch.randint(3, shape.vocab, (batch, prompt + completion), generator=torch.Generator().manual_seed(0))
        labels = tokens.clone()
        labels[:, :prompt] = -100
        runs: dict[str, Callable[[], Tensor]] = {
            PATCHED: lambda: _by(trainers[PATCHED], tokens, labels),
            TRL: lambda: _by(trainers[TRL], tokens, labels),
            LOGITS: lambda: _by_logits(trainers[TRL].model, tokens, labels),
        }
        losses, gradients = [], []
        for name, run in runs.items():
            losses.append(run())
            model = trainers[PATCHED if name == PATCHED else TRL].model
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        torch.testing.assert_close(losses[:2], [losses[2]] * 2)
        torch.testing.assert_close(gradients[:2], [gradients[2]] * 2, rtol=1e-3, atol=1e-6)
        medians = in_turn(runs, device=torch.device("cpu"), seconds=SECONDS if seconds is None else seconds, least=5)
    return {name: medians[name].median for name in runs}


def _by(trainer: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    trainer.model.zero_grad(set_to_none=True)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.detach()


def _by_logits(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach()


def _trainer(model: nn.Module, folder: str) -> Any:
    """TRL's `SFTTrainer` of a copy of ``model``, in train mode."""
    config = SFTConfig(output_dir=folder, max_steps=1, report_to="none", use_cpu=True, bf16=False)
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    trainer = SFTTrainer(copy.deepcopy(model), config, train_dataset=rows, processing_class=tokenizer)
    trainer.model.train()
    return trainer


if __name__ == "__main__":
    main()
