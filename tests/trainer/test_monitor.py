"""What a run tells: log file, warnings, gradient norms and calibration; and that the page names every metric."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ebft_kernels import StridedLayout
from ebft_trainer.calibration import BINS, calibration_error, calibration_sums
from ebft_trainer.checkpoint import CheckpointError
from ebft_trainer.config import EBFTConfig
from ebft_trainer.monitor import WINDOW, JsonlLog, gradient_norms, read_log, warnings_of
from ebft_trainer.trainer import EBFTTrainer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"


def rows_of(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 40, (24,), generator=generator)} for _ in range(count)]


def every_term() -> dict[str, float]:
    return {"rl_coef": 1.0, "verifier_coef": 0.5, "ce_coef": 0.5, "kl_coef": 0.1, "entropy_coef": 0.1}


def mean_token(_prompt, rollouts, _layout, **_masks) -> torch.Tensor:
    return rollouts.float().mean(-1)


@pytest.fixture
def trainer(plain, tmp_path, monkeypatch):
    """Makes trainers of a tiny model that write to a log file."""
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)

    def make(**options) -> EBFTTrainer:
        usual = {"context": 4, "stride": 6, "horizon": 3, "samples": 3, "max_steps": 4, "logging_steps": 2}
        usual |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
        usual |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
        usual |= {"dataloader_pin_memory": False, "output_dir": str(tmp_path / "run")}
        log = JsonlLog(tmp_path / "log.jsonl")
        config = EBFTConfig(**usual | options)
        rows = rows_of(16)
        verifier = mean_token if config.verifier_coef else None
        data = {"train_dataset": rows, "eval_dataset": rows[:3]}
        return EBFTTrainer(plain.build(), config, **data, verifier=verifier, callbacks=[log])

    return make


def test_the_page_names_every_metric_and_no_other(trainer, tmp_path):
    run = trainer(**every_term(), grad_norm_terms=True, eos_token_ids=[3])
    run.evaluate()
    run.train()
    # See test_router_loss.py and test_tokens.py.
    of_other_models = {"loss/router", "grad_norm/router", "masked_token_ids"}
    logged = {name for line in read_log(tmp_path / "log.jsonl") for name in line}
    logged = {re.sub(r"_h\d+$", "_hG", name) for name in logged} - {"step"}
    tables = re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(encoding="utf-8").split("## Training metrics")[1], re.M)
    named = re.findall(r"`(.+?)`", " ".join(tables))
    assert len(named) == len(set(named))
    assert set(named) == logged | of_other_models


def test_the_log_file_is_what_the_trainer_logs(trainer, tmp_path):
    run = trainer()
    run.evaluate()
    run.train()
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 4]
    assert lines[1:] == json.loads(json.dumps(run.state.log_history))[-3:]


def test_a_resumed_run_cuts_the_log(trainer, tmp_path):
    run = trainer(save_strategy="steps", save_steps=2)
    run.train()
    path = tmp_path / "log.jsonl"
    before = read_log(path)
    assert [line["step"] for line in before] == [2, 4, 4]
    with path.open("a") as file:
        file.write('{"step": 4, "half a li')
    again = trainer(save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    after = read_log(path)
    assert [line["step"] for line in after] == [2, 4, 4]
    assert after[0] == before[0] and after[1]["reward"] == before[1]["reward"]
    assert path.read_text().endswith("}\n")


def test_a_new_run_begins_an_empty_log(trainer, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 7}\n')
    run = trainer()
    run.evaluate()
    run.train()
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [0, 2, 4, 4]


def test_numbers_that_are_not_finite_and_other_processes(tmp_path):
    log, path = JsonlLog(tmp_path / "log.jsonl"), tmp_path / "log.jsonl"
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    log.on_log(None, state, None, {"loss": math.nan, "reward": math.inf, "entropy": 1.5})
    assert path.read_text() == '{"step": 3, "loss": null, "reward": null, "entropy": 1.5}\n'
    other = SimpleNamespace(is_world_process_zero=False, global_step=4)
    log.on_log(None, other, None, {"loss": 1.0})
    log.on_train_begin(None, other, None)
    assert len(read_log(path)) == 1


def test_a_broken_log_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_log(path) == []
    path.write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log.jsonl: line 2: expected a JSON object of numbers, got 'nothing': Expec"):
        read_log(path)
    path.write_text('{"step": 1, "loss": NaN, "reward": null, "half')
    assert read_log(path) == []


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b"[1]", "list"),
        (b"{}", "'step': 'None'"),
        (b'{"step": true}', "'step': 'True'"),
        (b'{"step": 1.5}', "'step': '1.5'"),
        (b'{"step": -1}', "'step': '-1'"),
        (b'{"step": "<script>"}', "'step': '<script>'"),
        (b'{"step": 1, "loss": "<script>"}', "'loss': '<script>'"),
        (b'{"step": 1, "loss": [2]}', r"'loss': '\[2\]'"),
        (b'{"step": 1, "loss": true}', "'loss': 'True'"),
        (b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", "'loss': '1000"),
        (b'{"step": 1, "loss": 1' + b"0" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, r"'\[.*: too deeply nested"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_whatever_is_no_line_of_a_log_is_refused(tmp_path, line, got):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    message = f"log.jsonl: line 2: expected a JSON object of numbers, got {got}"
    with pytest.raises(ValueError, match=message) as raised:
        read_log(path)
    assert "\n" not in str(raised.value)


def test_a_log_that_is_deleted_in_training_is_not_begun_anew(tmp_path):
    log, path = JsonlLog(tmp_path / "log.jsonl"), tmp_path / "log.jsonl"
    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    log.on_log(None, state, None, {"eval_loss": 1.0, "best": True, "note": "no number"})
    log.on_train_begin(None, state, None)
    assert path.read_text() == '{"step": 0, "eval_loss": 1.0, "best": 1}\n'
    path.unlink()
    with pytest.raises(CheckpointError, match="output: cannot write '.*log.jsonl': No such file or directory"):
        log.on_log(None, state, None, {"loss": 1.0})
    assert not path.exists()


def lines(metric: str, *values: float | None) -> list[dict]:
    return [{"step": 10 * number, metric: value} for number, value in enumerate(values, 1)]


@pytest.mark.parametrize("metric", ["reward_std", "verifier_reward_std"])
def test_a_collapse_is_warned_of_once_it_has_lasted(metric):
    good, bad = 0.5, 1e-6
    assert warnings_of(lines(metric, *[bad] * (WINDOW - 1), good, *[bad] * (WINDOW - 1)), 4) == []
    (warned,) = warnings_of(lines(metric, good, *[bad] * 3 * WINDOW), 4)
    assert warned.step == 10 * (WINDOW + 1) and f"rewards have collapsed: {metric} 1e-06" in warned.text
    assert "raise temperature" in warned.text
    # With one rollout per anchor there is never any spread between an anchor's rollouts.
    assert warnings_of(lines(metric, *[0.0] * WINDOW), 1) == []


def test_duplicates_are_judged_by_how_many_there_can_be():
    assert len(warnings_of(lines("duplicate_rate", *[0.74] * WINDOW), 4)) == 1
    assert warnings_of(lines("duplicate_rate", *[0.74] * WINDOW), 16) == []
    assert warnings_of(lines("duplicate_rate", *[0.0] * WINDOW), 1) == []


def test_skipped_steps_are_warned_of_at_once():
    assert warnings_of(lines("nonfinite_steps", 0, 0), 4) == []
    (warned,) = warnings_of(lines("nonfinite_steps", 0, 2, 1), 4)
    assert warned.step == 20 and warned.text.startswith("2 steps since the last line") and "skipped" in warned.text


def test_the_trainer_warns(trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="ebft_trainer.monitor"):
        trainer(temperature=0.0, logging_steps=1, max_steps=WINDOW + 2).train()
    messages = [record.getMessage() for record in caplog.records if record.name == "ebft_trainer.monitor"]
    assert len(messages) == 2
    assert all(message.startswith(f"step {WINDOW}: ") for message in messages)


def test_gradient_norms_of_terms_are_those_of_separate_backward_passes(trainer):
    run = trainer(**every_term())
    parameters = list(run.model.parameters())
    batch = run.data_collator(rows_of(2))
    _, outputs = run.compute_loss(run.model, batch, return_outputs=True)
    terms = outputs["step"].terms
    norms = gradient_norms(terms, parameters)
    assert set(norms) == {f"grad_norm/{name}" for name in ("rl", "verifier", "ce", "kl", "entropy")}
    assert all(x.grad is None for x in parameters)
    assert sum(terms.values()) == outputs["step"].loss
    for name, term in terms.items():
        run.model.zero_grad()
        term.backward(retain_graph=True)
        expected = torch.stack([x.grad.norm() for x in parameters if x.grad is not None]).norm()
        torch.testing.assert_close(norms[f"grad_norm/{name}"], expected)


def test_gradient_norms_do_not_change_training_and_are_logged_with_the_step(trainer, tmp_path):
    states = []
    for asked in (False, True):
        run = trainer(ce_coef=0.5, grad_norm_terms=asked, output_dir=str(tmp_path / str(asked)))
        run.train()
        states.append(run.model.state_dict())
        logged = [line for line in run.state.log_history if "loss" in line]
        assert all(("grad_norm/rl" in line) == asked for line in logged)
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items())


def test_gradient_norms_are_refused_where_gradients_are_sharded(trainer, monkeypatch):
    def sharded(self) -> None:
        original(self)
        self.is_fsdp_enabled = True

    original = EBFTTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(EBFTTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="grad_norm_terms: expected False with FSDP or DeepSpeed"):
        trainer(grad_norm_terms=True)


@pytest.mark.parametrize("masked", [False, True])
def test_calibration_error_is_that_of_the_plain_model(plain, masked):
    model = plain.build().eval().requires_grad_(False)
    layout = plain.layouts["uneven"]()
    prompt = plain.prompt_of(layout)
    mask = torch.rand(prompt.shape, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    confidences, right = [], []
    for b, length in enumerate(layout.lengths.tolist()):
        starts = layout.prompt_start[b, :length].unique().tolist()
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            logits = model(input_ids=prompt[b : b + 1, start:end], use_cache=False).logits[0, :-1]
            confidence, guess = logits.softmax(-1).max(-1)
            counted = slice(None) if mask is None else mask[b, start + 1 : end]
            confidences.append(confidence[counted])
            right.append((guess == prompt[b, start + 1 : end])[counted].float())
    confidences, right = torch.cat(confidences), torch.cat(right)
    bins = [(confidences > k / BINS) & (confidences <= (k + 1) / BINS) for k in range(BINS)]
    expected = sum(abs(confidences[x].mean() - right[x].mean()) * x.sum() / len(right) for x in bins if x.any())
    sums = calibration_sums(model, prompt, layout, token_mask=mask)
    assert sums[:BINS].sum() == len(right)
    assert calibration_error(sums) == pytest.approx(float(expected), rel=1e-4)


def test_calibration_of_nothing_is_no_error(plain):
    layout = StridedLayout.strided(1, 12, context=4, stride=4, horizon=4, samples=1)
    nothing = torch.zeros(1, 12, dtype=torch.bool)
    sums = calibration_sums(plain.build().eval(), plain.prompt_of(layout), layout, token_mask=nothing)
    assert calibration_error(sums) == 0
