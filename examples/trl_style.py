"""The shape of a TRL script: rows as TRL has them, a config dataclass, a trainer.

    python examples/trl_style.py --model_name_or_path MODEL --dataset rows.jsonl --output_dir run --max_steps 100

A row is ``{"prompt": ..., "completion": ...}``, both strings or both lists of messages, or ``{"messages": [...]}``;
messages go through the tokenizer's chat template. Rollouts start inside completions and what the assistant says. The
data are a file, a folder or ``hub:NAME``, see docs/data.md; :func:`train_on_rows` takes rows from memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ebft_trainer import EBFTConfig, EBFTTrainer
from ebft_trainer.rows import build_rows
from ebft_trainer.sources import Document, documents_of, read_documents


@dataclass
class ScriptArguments:
    """What a script says beside its trainer's config."""

    model_name_or_path: str = field(metadata={"help": "folder, or name on the hub"})
    dataset: str = field(metadata={"help": "file, folder or hub:NAME"})
    max_length: int = field(default=512, metadata={"help": "tokens of a row; what is longer is cut off"})


def train(model_name: str, documents: Iterable[Document], config: EBFTConfig, *, max_length: int) -> EBFTTrainer:
    """Train on documents; the trainer afterwards."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    rows, left_out = build_rows(documents, tokenizer, config, length=max_length)
    print(f"{len(rows)} rows; {left_out} too short for a rollout")
    # Full weights are float32, whatever dtype the products are in (config.bf16): small steps are lost in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    trainer = EBFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(config.output_dir)
    return trainer


def train_on_rows(model_name: str, rows: Iterable[Mapping[str, Any]], config: EBFTConfig) -> EBFTTrainer:
    """The same with rows in memory: a ``datasets.Dataset``, or a list of dicts."""
    return train(model_name, documents_of(rows), config, max_length=512)


if __name__ == "__main__":
    script, config = HfArgumentParser((ScriptArguments, EBFTConfig)).parse_args_into_dataclasses()
    train(script.model_name_or_path, read_documents([script.dataset]), config, max_length=script.max_length)
