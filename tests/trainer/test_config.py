"""Options: defaults, every error, and what transformers' parser makes of them."""

from __future__ import annotations

import logging
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import HfArgumentParser, TrainingArguments

from ebft_trainer.config import EBFTConfig, EBFTOptions, options_of


def test_the_defaults_are_those_of_the_authors():
    options = EBFTOptions()
    assert (options.context, options.stride, options.horizon, options.samples) == (8, 8, 8, 4)
    assert (options.temperature, options.top_p, options.top_k) == (0.6, 1.0, 0)
    assert options.feature_layers == [0.25, 0.5, 0.75]
    assert (options.pooling, options.normalize, options.whitening) == ("last_token", "joint", "sample")
    assert (options.alignment_coef, options.diversity_coef, options.rl_coef, options.ce_coef) == (1, 1, 1, 0)
    assert options.estimator == "rloo"
    assert (options.objective, options.verifier_coef, options.kl_coef, options.entropy_coef) == ("ebft", 0, 0, 0)
    assert (options.eos_token_ids, options.feature_map, options.verifier) == (None, None, None)


@pytest.mark.parametrize(
    ("given", "expected"),
    (
        ({}, (1.0, 0.0, 0.0)),
        ({"objective": "sft"}, (0.0, 0.0, 1.0)),
        ({"objective": "rlvr"}, (0.0, 1.0, 0.0)),
        ({"objective": "rlvr", "ce_coef": 0.1, "rl_coef": 0.5}, (0.5, 1.0, 0.1)),
        ({"objective": "sft", "ce_coef": 2.0}, (0.0, 0.0, 2.0)),
        ({"objective": "ebft", "rl_coef": 0.0, "ce_coef": 1.0}, (0.0, 0.0, 1.0)),
    ),
)
def test_an_objective_is_a_choice_of_defaults(given, expected, tmp_path):
    for options in (EBFTOptions(**given), EBFTConfig(output_dir=str(tmp_path), **given)):
        assert (options.rl_coef, options.verifier_coef, options.ce_coef) == expected
        assert options_of(options) == EBFTOptions(**vars(EBFTOptions(**given)))


def test_the_config_adds_fields_to_training_arguments_and_changes_five_defaults(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    config, plain = EBFTConfig(output_dir=str(tmp_path)), TrainingArguments(output_dir=str(tmp_path))
    added = {f.name for f in fields(EBFTConfig)} - {f.name for f in fields(TrainingArguments)}
    assert added == {f.name for f in fields(EBFTOptions)} | {
        *("eval_rows", "eval_seed", "grad_norm_terms", "kl_reference", "max_nonfinite_steps", "pad_to_multiple_of"),
        "log_completions",
        "shard_feature_network",
    }
    changed = {f.name for f in fields(plain) if getattr(config, f.name) != getattr(plain, f.name)}
    changed -= {"logging_dir", "accelerator_config"}
    rare = {"logging_nan_inf_filter", "disable_tqdm"}
    assert changed == {"learning_rate", "remove_unused_columns", "logging_steps"} | rare
    assert config.learning_rate == 1e-6
    assert config.accelerator_config.dispatch_batches is False


def test_progress_bars_are_for_terminals(tmp_path, monkeypatch):
    """A bar that is drawn anew would be a line for every refresh in a file."""
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    for shown in (True, False):
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(f"sys.{stream}", SimpleNamespace(isatty=lambda shown=shown: shown))
        assert EBFTConfig(output_dir=str(tmp_path)).disable_tqdm is not shown
        assert EBFTConfig(output_dir=str(tmp_path), disable_tqdm=False).disable_tqdm is False


def test_every_added_field_has_a_help_text():
    for option in fields(EBFTConfig):
        assert option.metadata.get("help") or option.name in {f.name for f in fields(TrainingArguments)}, option.name


def test_the_parser_of_transformers_reads_it(tmp_path):
    line = f"--output_dir {tmp_path} --feature_layers 0.5 1.0 --pooling mean --samples 2 --learning_rate 1e-4"
    line += " --objective rlvr --verifier exact_match --ce_coef 0.5 --eos_token_ids 2 3"
    (config,) = HfArgumentParser(EBFTConfig).parse_args_into_dataclasses(line.split())
    assert (config.feature_layers, config.pooling, config.samples) == ([0.5, 1.0], "mean", 2)
    assert config.learning_rate == 1e-4
    given = {"objective": "rlvr", "verifier": "exact_match", "ce_coef": 0.5, "eos_token_ids": [2, 3]}
    assert options_of(config) == EBFTOptions(feature_layers=[0.5, 1.0], pooling="mean", samples=2, **given)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 0}, ValueError, "context: expected at least 1, got 0"),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"horizon": 2.0}, TypeError, "horizon: expected an int, got 2.0"),
        ({"samples": True}, TypeError, "samples: expected an int, got True"),
        ({"top_k": -1}, ValueError, "top_k: expected at least 0, got -1"),
        ({"top_k": 2**32}, ValueError, r"top_k: expected less than 2\^31, got 4294967296"),
        ({"temperature": 1e-40}, ValueError, "temperature: expected what float32 can hold"),
        ({"temperature": -0.1}, ValueError, "temperature: expected a number of at least 0, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a number of at least 0, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number of at least 0, got 'hot'"),
        ({"top_p": 0}, ValueError, "top_p: expected a number above 0, at most 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p: expected a number above 0, at most 1, got 1.5"),
        ({"ce_coef": -1.0}, ValueError, "ce_coef: expected a number of at least 0, got -1.0"),
        ({"rl_coef": 0}, ValueError, "rl_coef, verifier_coef, ce_coef: expected at least one above 0"),
        ({"objective": "dpo"}, ValueError, "objective: expected one of 'ebft', 'sft', 'rlvr'; got 'dpo'"),
        ({"verifier_coef": -1.0}, ValueError, "verifier_coef: expected a number of at least 0, got -1.0"),
        ({"kl_coef": float("nan")}, ValueError, "kl_coef: expected a number of at least 0, got nan"),
        ({"entropy_coef": "much"}, TypeError, "entropy_coef: expected a number of at least 0, got 'much'"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator: expected one of 'k1', 'k2', 'k3'; got 'k4'"),
        (
            {"kl_coef": 0.1, "temperature": 0.0},
            ValueError,
            "kl_coef: expected 0 with temperature 0, got 0.1: greedy rollouts are no samples",
        ),
        ({"entropy_coef": 0.1, "temperature": 0}, ValueError, "entropy_coef: expected 0 with temperature 0, got 0.1"),
        ({"verifier": len}, TypeError, "verifier: expected a name such as 'module:function', got <built-in"),
        ({"feature_map": 3}, TypeError, "feature_map: expected a name such as 'module:function', got 3"),
        ({"eos_token_ids": 2}, TypeError, "eos_token_ids: expected a list of token ids, got 2"),
        ({"eos_token_ids": [True]}, TypeError, r"eos_token_ids: expected a list of token ids, got \[True\]"),
        ({"replay_rollouts": 1}, TypeError, "replay_rollouts: expected True or False, got 1"),
        ({"cuda_graphs": 1}, TypeError, "cuda_graphs: expected True or False, got 1"),
        ({"cuda_graphs": True}, ValueError, "cuda_graphs: expected False with replay_rollouts, got True"),
        ({"eos_token_ids": [2, -1]}, ValueError, r"eos_token_ids: expected token ids of at least 0, got \[2, -1\]"),
        ({"pooling": "max"}, ValueError, "pooling: expected one of 'last_token', .*; got 'max'"),
        ({"normalize": "l2"}, ValueError, "normalize: expected one of 'joint', .*; got 'l2'"),
        ({"whitening": "zca"}, ValueError, "whitening: expected one of 'none', .*; got 'zca'"),
        ({"estimator": "ppo"}, ValueError, "estimator: expected one of 'rloo', .*; got 'ppo'"),
        ({"estimator": "group_norm", "samples": 1}, ValueError, "samples: expected at least 2 with estimator"),
        ({"feature_layers": 0.5}, TypeError, "feature_layers: expected depths .*, got 0.5"),
        ({"feature_layers": "0.5"}, TypeError, "feature_layers: expected depths .*, got '0.5'"),
        ({"feature_layers": []}, TypeError, r"feature_layers: expected depths .*, got \[\]"),
        ({"feature_layers": [None]}, TypeError, "feature_layers: expected depths .*, got None"),
        ({"feature_layers": [1.5]}, ValueError, "feature_layers: expected depths .*, got 1.5"),
        ({"feature_layers": [0.0]}, ValueError, "feature_layers: expected depths .*, got 0.0"),
        ({"feature_layers": [-1]}, ValueError, "feature_layers: expected depths .*, got -1"),
        ({"feature_layers": [2, 2]}, ValueError, r"feature_layers: expected each layer once, got \[2, 2\]"),
    ],
)
def test_errors_of_the_method(options, error, message):
    with pytest.raises(error, match=message):
        EBFTOptions(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "horizon: expected at least 1, got 0"),
        ({"eval_rows": 0}, ValueError, "eval_rows: expected at least 1, got 0"),
        ({"max_nonfinite_steps": 0}, ValueError, "max_nonfinite_steps: expected at least 1, got 0"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of: expected at least 1, got 0"),
        (
            {"push_to_hub": True, "hub_strategy": "all_checkpoints"},
            ValueError,
            "hub_strategy: expected end or every_save, got all_checkpoints",
        ),
        ({"eval_seed": -1}, ValueError, "eval_seed: expected at least 0, got -1"),
        ({"remove_unused_columns": True}, ValueError, "remove_unused_columns: expected False, got True"),
        ({"label_smoothing_factor": 0.1}, ValueError, "label_smoothing_factor: expected 0, got 0.1"),
        ({"neftune_noise_alpha": 5.0}, ValueError, "neftune_noise_alpha: expected None, got 5.0"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_errors_of_the_config(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        EBFTConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    (
        ("learning_rate", math.nan, "a finite number"),
        ("max_grad_norm", math.inf, "a finite number"),
        ("adam_beta1", math.nan, "a finite number"),
        ("learning_rate", -1.0, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_grad_norm", -1.0, "at least 0"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_eval_batch_size", -1, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("save_total_limit", 0, "at least 1"),
        ("logging_steps", -1, "a number above 0"),
        ("eval_steps", 0, "a number above 0"),
        ("save_steps", 0, "a number above 0"),
        ("max_steps", 0, "at least 1, or -1 for whole epochs"),
        ("num_train_epochs", 0.0, "a number above 0 without max_steps"),
        ("stride", 2**31, "less than 2\\^31"),
    ),
)
def test_training_arguments_that_would_fail_later_are_refused(tmp_path, name, value, expected):
    with pytest.raises(ValueError, match=f"{name}: expected {expected}, got {value}"):
        EBFTConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize("name", ("cosine_with_min_lr", "warmup_stable_decay"))
def test_a_schedule_that_cannot_be_made_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"lr_scheduler_type: cannot make '{name}': "):
        EBFTConfig(output_dir=str(tmp_path), lr_scheduler_type=name)
    EBFTConfig(output_dir=str(tmp_path), lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.1})
