"""The method's options and the trainer's configuration."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.utils import is_in_notebook

from ebft_kernels._checks import INT_LIMIT, check_option, check_positive
from ebft_kernels.matching.api import ESTIMATORS, WHITENINGS
from ebft_kernels.pooling.modes import NORMALIZATIONS, POOLINGS

#: What each objective trains: the coefficients that are not given.
OBJECTIVES = {
    "ebft": {"rl_coef": 1.0, "verifier_coef": 0.0, "ce_coef": 0.0},
    "sft": {"rl_coef": 0.0, "verifier_coef": 0.0, "ce_coef": 1.0},
    "rlvr": {"rl_coef": 0.0, "verifier_coef": 1.0, "ce_coef": 0.0},
}
#: Training arguments that transformers takes as they come, to fail in the middle or to read them as another number.
_AT_LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "save_total_limit": 1,
}
_ABOVE_ZERO = ("logging_steps", "eval_steps", "save_steps")
KL_ESTIMATORS = ("k1", "k2", "k3")
KL_REFERENCES = ("start", "base")

_OWN_EVALUATION = "evaluation is the trainer's own, and in the precision that is trained in"
#: Training arguments of transformers that would be accepted and not do what they say, and why.
_WITHOUT_EFFECT = {
    "auto_find_batch_size": "it starts anew from weights that are trained already, with fewer rows per step",
    **dict.fromkeys(
        (
            *("batch_eval_metrics", "bf16_full_eval", "eval_accumulation_steps", "eval_do_concat_batches"),
            *("eval_use_gather_object", "fp16_full_eval", "include_for_metrics", "label_names", "prediction_loss_only"),
        ),
        _OWN_EVALUATION,
    ),
}
#: Training arguments that are no options of `ebft-train train`, and why.
NO_OPTIONS = {
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
    "resume_from_checkpoint": "--resume on the command line goes on from a run's last checkpoint",
    "eval_on_start": "a run that has held-out rows starts with an evaluation",
    "local_rank": "torchrun and accelerate say it",
    "parallelism_config": "it is made in Python",
}
#: Training arguments that hold for one machine.
OF_THE_MACHINE = ("use_cpu", "dataloader_pin_memory", "disable_tqdm")


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    metadata = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class EBFTOptions:
    """Everything that Energy-Based Fine-Tuning (arXiv:2603.12248) adds to a training run; defaults are the authors'.

    ``objective`` is a choice of defaults for ``rl_coef``, ``verifier_coef`` and ``ce_coef`` (`OBJECTIVES`) and nothing
    else: a coefficient that is given stays as it is, so that objectives mix. After construction all three are numbers.

    Raises:
        ValueError, TypeError: an option out of range, unknown or of another type; the message names it.
    """

    objective: str = option(
        "ebft",
        "what is trained where no coefficient says otherwise: ebft: feature matching; sft: cross-entropy on the real "
        "text; rlvr: a verifier's reward",
        list(OBJECTIVES),
    )
    context: int = option(8, "prompt tokens before the first anchor; at least 1")
    stride: int = option(8, "tokens from one anchor to the next")
    horizon: int = option(8, "tokens per rollout")
    samples: int = option(4, "rollouts per anchor")
    temperature: float = option(0.6, "sampling temperature, also of the scoring; 0: greedy, scored at 1")
    top_p: float = option(1.0, "sample from the smallest set of tokens with at least this probability")
    top_k: int = option(0, "sample from this many most likely tokens; 0: all")
    cuda_graphs: bool = option(
        False, "replay rollouts' decoding steps as CUDA graphs, whose memory stays in use; needs replay_rollouts=False"
    )
    eos_token_ids: list[int] | None = option(
        None,
        "tokens that end a rollout; default: the model's own and the tokenizer's; an empty list: rollouts never end",
    )
    vocabulary: int | None = option(
        None,
        "sample and score token ids below this only; default: those of the tokenizer where there is one, else all that "
        "the model's head has rows for",
    )
    feature_map: str | None = option(
        None,
        "module:factory of the features to compare in, called with model, tokenizer and options; default: hidden "
        "states of the frozen model",
    )
    feature_layers: list[float] = option(
        [0.25, 0.5, 0.75], "layers whose hidden states are features: depths (0.25, 1.0) or layer numbers (1, 2)"
    )
    pooling: str = option("last_token", "how the tokens of a window become one feature", POOLINGS)
    normalize: str = option("joint", "L2 norm 1 of all layers together, of each layer, or not", NORMALIZATIONS)
    whitening: str = option(
        "sample", "whitening of an anchor's rollouts: sample as the authors' code, feature as the paper", WHITENINGS
    )
    alignment_coef: float = option(1.0, "weight of the alignment with the real text in the reward")
    diversity_coef: float = option(1.0, "weight of the penalty for rollouts that resemble each other")
    verifier: str | None = option(
        None,
        "reward of a rollout: exact_match, parses_as_python, char_f_score, or module:function of three texts (prompt, "
        "completion, target)",
    )
    rl_coef: float | None = option(None, "weight of the feature-matching policy loss; default: 1 for ebft, else 0")
    verifier_coef: float | None = option(None, "weight of the verifier's policy loss; default: 1 for rlvr, else 0")
    ce_coef: float | None = option(
        None, "weight of the plain cross-entropy on the real text; default: 1 for sft, else 0"
    )
    estimator: str = option("rloo", "how a reward becomes an advantage", ESTIMATORS)
    kl_coef: float = option(0.0, "weight of the KL divergence of the policy from the frozen model; 0: not computed")
    kl_estimator: str = option(
        "k2",
        "k1: gradient of the divergence of whole rollouts; k2: of each next token's; k3: of each next token's in the "
        "other direction, KL(frozen model || policy)",
        KL_ESTIMATORS,
    )
    entropy_coef: float = option(0.0, "weight of the rollouts' entropy, which is rewarded")
    replay_rollouts: bool = option(
        True, "score rollouts by what was computed when they were drawn, where the model is made of known modules"
    )

    def __post_init__(self) -> None:
        for name, value in OBJECTIVES.get(self.objective, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.validate()

    def validate(self) -> None:
        """Check every option; called at construction."""
        for name in ("context", "stride", "horizon", "samples"):
            _check_int(name, getattr(self, name), 1)
        _check_int("top_k", self.top_k, 0)
        if self.vocabulary is not None:
            _check_int("vocabulary", self.vocabulary, 1)
        _check_number("temperature", self.temperature, "a number of at least 0", lambda x: x >= 0)
        if self.temperature:
            check_positive("temperature", self.temperature)
        _check_number("top_p", self.top_p, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        for option in fields(EBFTOptions):
            if "choices" in option.metadata:
                check_option(option.name, getattr(self, option.name), option.metadata["choices"])
        for option in fields(EBFTOptions):
            if option.name.endswith("_coef"):
                _check_number(option.name, getattr(self, option.name), "a number of at least 0", lambda x: x >= 0)
        if not (self.rl_coef or self.verifier_coef or self.ce_coef):
            raise ValueError(
                "rl_coef, verifier_coef, ce_coef: expected at least one above 0, got none: nothing would be trained"
            )
        for name in ("kl_coef", "entropy_coef"):
            if getattr(self, name) and not self.temperature:
                raise ValueError(
                    f"{name}: expected 0 with temperature 0, got {getattr(self, name)}: greedy rollouts are no samples"
                )
        for name in ("feature_map", "verifier"):
            _check_name(name, getattr(self, name))
        _check_token_ids(self.eos_token_ids)
        for name in ("replay_rollouts", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.cuda_graphs and self.replay_rollouts:
            raise ValueError(
                "cuda_graphs: expected False with replay_rollouts, got True: a graph keeps no record of it"
            )
        if self.estimator == "group_norm" and self.samples < 2:
            raise ValueError(
                f"samples: expected at least 2 with estimator 'group_norm', got {self.samples}: no spread in one reward"
            )
        _check_layers(self.feature_layers)


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")
    if value >= INT_LIMIT:
        raise ValueError(f"{name}: expected less than 2^31, got {value}")


def _check_number(name: str, value: Any, expected: str, accepts: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not (math.isfinite(value) and accepts(value)):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_name(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected a name such as 'module:function', got {value!r}")


def _check_token_ids(ids: Any) -> None:
    if ids is None:
        return
    if not isinstance(ids, list) or any(not isinstance(x, int) or isinstance(x, bool) for x in ids):
        raise TypeError(f"eos_token_ids: expected a list of token ids, got {ids!r}")
    if any(x < 0 for x in ids):
        raise ValueError(f"eos_token_ids: expected token ids of at least 0, got {ids}")


def _check_layers(layers: Any) -> None:
    # How many layers there are is the feature network's to know.
    expected = "feature_layers: expected depths above 0 up to 1.0 (floats) or layer numbers from 0 (ints)"
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(f"{expected}, got {layers!r}")
    for layer in layers:
        if not isinstance(layer, (int, float)) or isinstance(layer, bool):
            raise TypeError(f"{expected}, got {layer!r}")
        if not (layer >= 0 if isinstance(layer, int) else 0 < layer <= 1):
            raise ValueError(f"{expected}, got {layer!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"feature_layers: expected each layer once, got {list(layers)}")


@dataclass
class EBFTConfig(EBFTOptions, TrainingArguments):
    """`transformers.TrainingArguments`, the method's options, and what evaluation and recovery need; nothing else.

    Five defaults differ from transformers': the learning rate is the authors' (for models of a billion parameters
    and more); data columns are never dropped by their name (no model's forward knows ``completion_mask``); a log line
    comes every 10 steps, since a step does the work of several; a loss that is not finite is logged as it is, where
    transformers would show the average of earlier ones and wait for the device at every step to do so; progress bars
    are for terminals and notebooks, elsewhere there is one line for each log line.

    Raises:
        ValueError, TypeError: as `EBFTOptions`; or a setting of transformers that would change what the model
            computes between sampling and scoring, or that this trainer's loss cannot honour.
    """

    learning_rate: float = option(1e-6, "initial learning rate; the authors' default for models of 1B parameters")
    remove_unused_columns: bool = option(False, "must stay False: the trainer reads columns that no model knows")
    logging_steps: float = option(10, "log every so many optimizer steps")
    logging_nan_inf_filter: bool = option(False, "log an average of earlier losses in place of NaN")
    eval_rows: int = option(64, "evaluate on this many rows, chosen once with eval_seed")
    log_completions: bool = option(
        False, "at each evaluation show what the model writes where it matches worst and best: terminal, file, report"
    )
    grad_norm_terms: bool = option(
        False, "log the gradient norm of each term of the loss; one more backward pass per term, for logged steps only"
    )
    kl_reference: str = option(
        "start",
        "frozen model of kl_coef: start: the model as it was given, adapters that were trained before included; base: "
        "a PEFT model without its adapters",
        KL_REFERENCES,
    )
    eval_seed: int = option(0, "seed of the evaluation's rows and rollouts, apart from the training seed")
    pad_to_multiple_of: int = option(1, "round the length of a batch up to a multiple, so that few shapes occur")
    shard_feature_network: bool = option(False, "spread the frozen feature network over all ranks with FSDP2")
    max_nonfinite_steps: int = option(5, "stop after so many steps in a row without a finite loss and gradient")

    def __post_init__(self) -> None:
        EBFTOptions.__post_init__(self)
        if self.disable_tqdm is None and not _shows_bars():
            self.disable_tqdm = True
        TrainingArguments.__post_init__(self)
        self._check_schedule()
        # Batches hold a StridedLayout, which one rank cannot broadcast to the others: each reads its own share.
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config: expected dispatch_batches False, got True: each rank reads its own rows"
            )
        self.accelerator_config.dispatch_batches = False

    def validate(self) -> None:
        """Check every option that this class or `EBFTOptions` adds or constrains."""
        EBFTOptions.validate(self)
        _check_int("eval_rows", self.eval_rows, 1)
        _check_int("eval_seed", self.eval_seed, 0)
        _check_int("max_nonfinite_steps", self.max_nonfinite_steps, 1)
        _check_int("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        check_option("kl_reference", self.kl_reference, KL_REFERENCES)
        self._check_training_arguments()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False, got True: completion_mask would be dropped")
        for option in fields(TrainingArguments):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            value = getattr(self, option.name)
            if option.name in _WITHOUT_EFFECT and value != default:
                why = _WITHOUT_EFFECT[option.name]
                raise ValueError(f"{option.name}: expected {default!r}, got {value!r}: {why}")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: expected 0, got {self.label_smoothing_factor}: the loss has no labels"
            )
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha: expected None, got {self.neftune_noise_alpha}: rollouts would be scored under "
                "other embeddings than they were sampled from"
            )
        if self.push_to_hub and "checkpoint" in str(getattr(self.hub_strategy, "value", self.hub_strategy)):
            raise ValueError(
                f"hub_strategy: expected end or every_save, got {self.hub_strategy}: a checkpoint is renamed when it "
                "is complete, while transformers would still upload it"
            )

    def _check_schedule(self) -> None:
        """By making one: that is when it says what it lacks."""
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        try:
            get_scheduler(name, optimizer, 0, 1, self.lr_scheduler_kwargs or {})
        except (ValueError, TypeError) as error:
            raise ValueError(f"lr_scheduler_type: cannot make {name!r}: {error}") from None

    def _check_training_arguments(self) -> None:
        for name, value in ((x.name, getattr(self, x.name)) for x in fields(TrainingArguments)):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value}")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not float(value) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps: expected at least 1, or -1 for whole epochs, got {self.max_steps}")
        if self.max_steps < 1 and not self.num_train_epochs > 0:
            raise ValueError(
                f"num_train_epochs: expected a number above 0 without max_steps, got {self.num_train_epochs}"
            )


def _shows_bars() -> bool:
    """Whether progress bars are drawn, not written one below the other into a file."""
    return is_in_notebook() or (sys.stdout.isatty() and sys.stderr.isatty())


def options_of(config: EBFTOptions) -> EBFTOptions:
    """The method's options alone, without the training arguments around them."""
    return EBFTOptions(**{option.name: getattr(config, option.name) for option in fields(EBFTOptions)})


def checkpointing_field() -> str:
    """What this version of transformers calls the field that turns gradient checkpointing on."""
    names = {option.name for option in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def device_arguments() -> dict[str, bool]:
    """Training arguments for this machine: without an accelerator bf16 must be told, and pinned memory only warns."""
    accelerated = torch.accelerator.is_available()
    return {"use_cpu": not accelerated, "dataloader_pin_memory": accelerated}
