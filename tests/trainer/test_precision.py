"""Weights that cannot hold the steps that are taken: a warning with the remedy, and a measurement that shows it.

The kind: a setting under which training runs, logs finite numbers and changes nothing.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from ebft_trainer.config import EBFTConfig
from ebft_trainer.monitor import FEW_MOVED, warnings_of
from ebft_trainer.precision import WeightsMoved, check_dtypes
from ebft_trainer.trainer import EBFTTrainer

ROWS = [{"input_ids": ids} for ids in torch.randint(0, 40, (8, 24), generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def trained(plain, tmp_path, monkeypatch, caplog):
    """Trains a tiny model of a dtype; gives log lines, weights before and after, and warnings."""
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)

    def train(dtype: torch.dtype, **options):
        usual = {"context": 4, "stride": 6, "horizon": 3, "samples": 3, "max_steps": 1, "logging_steps": 1}
        usual |= {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        usual |= {"use_cpu": True, "dataloader_pin_memory": False, "output_dir": str(tmp_path / "run")}
        model = plain.build(dtype=dtype)
        before = copy.deepcopy(model.state_dict())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = EBFTTrainer(model, EBFTConfig(**(usual | options)), train_dataset=ROWS)
            trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return lines, before, trainer.model, caplog.text

    return train


def share_moved(before, model) -> float:
    """Of the weights with a gradient, counted one by one."""
    pairs = [(x, before[name]) for name, x in model.named_parameters()]
    # Rows of the embedding whose token did not occur have no gradient, and Adam leaves them alone.
    counted = [torch.ones_like(x, dtype=torch.bool) for x, _ in pairs]
    ids = torch.cat([row["input_ids"] for row in ROWS])
    used = {name: mask for (name, _), mask in zip(model.named_parameters(), counted, strict=True)}
    used["model.embed_tokens.weight"][:] = torch.isin(torch.arange(61), ids)[:, None]
    moved = sum(int(((x != y) & mask).sum()) for (x, y), mask in zip(pairs, counted, strict=True))
    return moved / sum(int(mask.sum()) for mask in counted)


def test_the_default_learning_rate_is_lost_in_bfloat16_weights_and_said_so(trained):
    (line,), before, model, text = trained(torch.bfloat16)
    assert "100 % of the weights that are trained are in bfloat16" in text and "dtype=torch.float32" in text
    assert "bf16=True" in text
    assert line["weights_moved"] == pytest.approx(share_moved(before, model), abs=0.02) and line["weights_moved"] < 0.05
    assert "of the weights moved in the first step: their precision cannot hold" in text


@pytest.mark.parametrize("bf16", (False, True))
def test_float32_weights_move(trained, bf16):
    (line,), before, model, text = trained(torch.float32, bf16=bf16)
    assert "weights" not in text
    assert line["weights_moved"] > 0.99 and share_moved(before, model) > 0.95


def test_it_is_measured_once_after_the_warm_up_and_not_where_a_run_is_resumed(trained, tmp_path, plain):
    options = {"max_steps": 6, "warmup_steps": 4, "save_strategy": "steps", "save_steps": 4}
    lines, *_ = trained(torch.float32, **options)
    # Learning rates of 0, 1/4, 1/2 of the full one.
    assert [i for i, line in enumerate(lines) if "weights_moved" in line] == [2]
    again = EBFTTrainer(plain.build(), EBFTConfig(**_options(tmp_path, **options)), train_dataset=ROWS)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [i for i, line in enumerate(again.state.log_history) if "weights_moved" in line] == [2]


def _options(tmp_path, **changes):
    usual = {"context": 4, "stride": 6, "horizon": 3, "samples": 3, "logging_steps": 1, "use_cpu": True}
    usual |= {"per_device_train_batch_size": 2, "report_to": "none", "disable_tqdm": True}
    return usual | {"dataloader_pin_memory": False, "output_dir": str(tmp_path / "run")} | changes


def test_the_sample_of_a_large_tensor_stands_for_all_of_it():
    """A tensor of which half moves, beside a small one that moves: shares count entries, not samples."""
    large, small = torch.nn.Parameter(torch.ones(3, 40_000)), torch.nn.Parameter(torch.ones(7))
    model = torch.nn.ParameterList([large, small])
    for x in model:
        x.grad = torch.ones_like(x)
    optimizer = torch.optim.SGD(model, lr=1.0)
    measure, state = WeightsMoved(), type("State", (), {"global_step": 0})
    arguments = type("Arguments", (), {"learning_rate": 1.0, "adam_epsilon": 1e-8})
    measure.on_train_begin(arguments, state, None)
    measure.on_pre_optimizer_step(arguments, state, None, model=model, optimizer=optimizer)
    with torch.no_grad():
        large[:, ::2] += 1
        small += 1
    measure.on_optimizer_step(arguments, state, None, optimizer=optimizer)
    assert measure.take()["weights_moved"] == pytest.approx(60_007 / 120_007, abs=0.02)
    assert measure.take() == {}


def test_few_moved_weights_are_warned_of_once():
    history = [{"step": 1, "weights_moved": FEW_MOVED / 2}, {"step": 2}]
    (warned,) = warnings_of(history, 4)
    assert warned.step == 1 and "only 25.0% of the weights moved in the first step" in warned.text
    assert not warnings_of([{"step": 1, "weights_moved": 0.99}], 4)


def test_what_is_frozen_or_has_float32_copies_may_be_in_16_bits(plain, caplog):
    model = plain.build(dtype=torch.bfloat16)
    check_dtypes(model, fp16=False, masters=True)
    for name, x in model.named_parameters():
        x.requires_grad_("lm_head" in name)
    model.lm_head.float()
    check_dtypes(model, fp16=False, masters=False)
    assert not caplog.records
    with pytest.raises(ValueError, match="fp16: expected float32 weights to train, got float16"):
        check_dtypes(plain.build(dtype=torch.float16), fp16=True, masters=False)
    check_dtypes(plain.build(dtype=torch.float16), fp16=False, masters=False)
    assert "are in float16" in caplog.text
