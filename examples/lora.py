"""LoRA: train adapters only, compare in the same model with the adapters off, save, load and merge.

    python examples/lora.py MODEL TEXT OUTPUT [MAX_STEPS]

MODEL is a folder or hub name, TEXT a text file, OUTPUT a new folder. Nothing of the base model is copied: the feature
network is the model itself without its adapters.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_trainer import EBFTConfig, EBFTTrainer
from ebft_trainer.config import device_arguments
from ebft_trainer.rows import build_rows
from ebft_trainer.sources import read_documents


def main(model_name: str, text: str, output: str, max_steps: int = 200) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_name), lora)
    model.print_trainable_parameters()

    config = EBFTConfig(
        output_dir=output,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        save_steps=50,
        report_to="none",
        **device_arguments(),
    )
    rows, _ = build_rows(read_documents([text]), tokenizer, config, length=256)
    trainer = EBFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(f"{output}/adapters")

    base = AutoModelForCausalLM.from_pretrained(model_name)
    merged = PeftModel.from_pretrained(base, f"{output}/adapters").merge_and_unload()
    merged.save_pretrained(f"{output}/merged")
    tokenizer.save_pretrained(f"{output}/merged")
    print(f"adapters: {Path(output, 'adapters')}, whole model: {Path(output, 'merged')}")


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:5]))
