"""Models of `ebft-train`, from the options that name them."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .config import option

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class ModelArguments:
    """The model that is loaded."""

    model: str = option(MISSING, "model folder or hub name")
    dtype: str = option("float32", "of the weights", DTYPES)


@dataclass(kw_only=True)
class AdapterArguments:
    """What of the model is trained."""

    lora_rank: int | None = option(None, "train LoRA adapters of this rank, not the weights")
    lora_alpha: float | None = option(None, "scale of the adapters; default: twice the rank")


def load_model(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and tokenizer of a folder or hub name; code that comes with them is never run.

    Raises:
        ValueError: there is none, or it is not a causal language model; the message names the argument.
    """
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model: expected a model folder or hub name, got {name!r}, which does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        expected = "files such as tokenizer.json beside the weights"
        raise ValueError(f"model: no tokenizer can be loaded from {name!r}, expected {expected}: {error}") from None
    try:
        weights = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
        return AutoModelForCausalLM.from_pretrained(name, **weights), tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model: cannot load {name!r}: {error}") from None


def model_and_tokenizer(arguments: ModelArguments, chat_template: str | None) -> tuple[Any, Any]:
    """Of ``--model``, with the template that the file ``chat_template`` holds."""
    template = Path(chat_template).read_text(encoding="utf-8") if chat_template else None
    model, tokenizer = load_model(arguments.model, arguments.dtype)
    if template is not None:
        tokenizer.chat_template = template
    return model, tokenizer


def with_adapters(model: Any, rank: int | None, alpha: float | None = None) -> Any:
    """A PEFT model with LoRA adapters on every linear layer but the head.

    Raises:
        ValueError: a rank below 1 or none, an alpha that is not above 0, or peft is not installed.
    """
    if rank is None or rank < 1:
        raise ValueError(f"lora_rank: expected at least 1, got {rank}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha: expected a number above 0, got {alpha}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("lora_rank: needs the package peft, which is not installed") from None
    alpha = 2 * rank if alpha is None else alpha
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)
