"""The model card of a trained model: what was trained, on what terms, with which options, and what came out."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .arguments import yaml_of
from .config import NO_OPTIONS, OF_THE_MACHINE, EBFTConfig, EBFTOptions

#: The terms of the loss, by the option that is their coefficient.
_TERMS = {
    "rl_coef": "feature matching: rollouts are rewarded for features near those of real text",
    "verifier_coef": "a verifiable reward of the same rollouts",
    "ce_coef": "cross-entropy of the real text",
    "kl_coef": "KL divergence from the model as it was at the start",
    "entropy_coef": "entropy of the rollouts, as a bonus",
}
_METRICS = {
    "cross_entropy": "cross-entropy, nats per token",
    "perplexity": "perplexity",
    "feature_matching_loss": "feature-matching loss",
    "alignment": "alignment",
    "verifier_reward": "verifier's reward",
}
# Where a run is, and how it is reported, which says nothing of the model.
_LEFT_OUT = {"output_dir", "logging_dir", "run_name", "report_to", *NO_OPTIONS, *OF_THE_MACHINE}
#: Which tells a card that was written here from any other.
_TAG = "ebft-kernels"


def model_card(
    name: str,
    config: EBFTConfig,
    *,
    base_model: str = "",
    library: str = "transformers",
    datasets: Sequence[str] = (),
    evaluations: Sequence[Mapping[str, float]] = (),
    steps: int = 0,
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """The text of README.md beside a model's weights, its head in YAML as the hub reads it.

    Args:
        name: of the model.
        config: what it was trained with.
        base_model: folder or hub name of what it was trained from; "": not known. Of a folder only its name is shown.
        library: "transformers", or "peft" for adapters.
        datasets: what it was trained on, as it was named.
        evaluations: the metrics of the first and the last evaluation, named ``eval_..`` or not; any number of them.
        steps: optimizer steps.
        parameters: further lines of the head, such as ``license`` and ``language``.
    """
    is_folder = Path(base_model).is_dir() if base_model else False
    shown = Path(base_model).resolve().name if is_folder else base_model
    head = {
        "library_name": library,
        **({"base_model": base_model} if base_model and not is_folder else {}),
        "pipeline_tag": "text-generation",
        **{name: value for name, value in (parameters or {}).items() if name != "tags"},
        "tags": ["ebft", "energy-based-fine-tuning", _TAG, *_listed((parameters or {}).get("tags"))],
    }
    terms = [
        f"* `{term} = {getattr(config, term):g}`: {what}" for term, what in _TERMS.items() if getattr(config, term)
    ]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        f"{f'`{shown}`' if shown else 'A causal language model'}, fine-tuned with ebft-kernels' trainer for "
        "Energy-Based Fine-Tuning ([arXiv:2603.12248](https://arxiv.org/abs/2603.12248)). Weights and config are those "
        "of an ordinary model: whatever loads the base model loads this one.",
        "## Objective\n\n" + "\n".join(terms),
        "## Training\n\n" + _table(["", ""], _facts(config, datasets, steps)),
    ]
    if measured := _measured(evaluations):
        parts.append("## Evaluation\n\n" + measured)
    parts += [
        "## Options\n\nEverything that is not the default; `ebft-train train --config` reads it.\n\n"
        f"```yaml\n{yaml_of(changed_options(config)).decode()}```",
        "## Citation\n\n"
        "Jelassi et al., *Matching Features, Not Tokens: Energy-Based Fine-Tuning of Language Models*, 2026, "
        "arXiv:2603.12248.",
    ]
    return "\n\n".join(parts) + "\n"


def _listed(given: str | Sequence[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def changed_options(config: EBFTConfig) -> dict[str, Any]:
    """The options that differ from their defaults, of types that YAML has; no secrets and no folders."""
    changed = {}
    told = config.to_dict()
    for option in dataclasses.fields(config):
        factory = option.default_factory
        default = option.default if factory is dataclasses.MISSING else factory()
        value = getattr(config, option.name)
        if option.init and option.name not in _LEFT_OUT and not option.name.endswith("_token"):
            plain = told.get(option.name, value)
            if value != default and isinstance(plain, (bool, int, float, str, list, dict)):
                changed[option.name] = plain
    return changed


def _facts(config: EBFTConfig, datasets: Sequence[str], steps: int) -> list[list[str]]:
    options = {x.name: getattr(config, x.name) for x in dataclasses.fields(EBFTOptions)}
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    layers = ", ".join(f"{x:g}" for x in options["feature_layers"])
    return [
        ["data", ", ".join(f"`{x}`" for x in datasets) or "not recorded"],
        ["optimizer steps x rows", f"{steps} x {rows}"],
        ["learning rate", f"{config.learning_rate:g}"],
        ["anchors", f"every {options['stride']} tokens from {options['context']}"],
        ["rollouts", f"{options['samples']} of {options['horizon']} tokens, temperature {options['temperature']:g}"],
        ["features", options["feature_map"] or f"layers {layers}, {options['pooling']}, {options['normalize']}"],
        ["whitening", options["whitening"]],
    ]


def _measured(evaluations: Sequence[Mapping[str, float]]) -> str:
    columns = [{k.removeprefix("eval_"): v for k, v in x.items()} for x in evaluations]
    names = ["before", "after"] if len(columns) == 2 else [f"evaluation {i + 1}" for i in range(len(columns))]
    lines = [
        [title, *(f"{x[key]:.4f}" if math.isfinite(x.get(key, math.nan)) else "-" for x in columns)]
        for key, title in _METRICS.items()
        if any(key in x for x in columns)
    ]
    return _table(["held-out text", *names], lines) if lines else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [list(header), ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def write_card(folder: str | os.PathLike[str], text: str) -> None:
    """Write README.md, unless there is one that was not written here."""
    path = Path(folder, "README.md")
    if not path.exists() or f"- {_TAG}\n" in path.read_text(encoding="utf-8", errors="replace"):
        path.write_text(text, encoding="utf-8")
