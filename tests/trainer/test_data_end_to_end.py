"""How rows are made does not change what is computed: packed, padded, streamed or resumed."""

from __future__ import annotations

import json

import pytest
import torch

from ebft_trainer import step
from ebft_trainer.config import EBFTConfig, EBFTOptions
from ebft_trainer.data import EBFTCollator
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rows import RowStream, cut_rows
from ebft_trainer.sources import Source
from ebft_trainer.step import ebft_step
from ebft_trainer.trainer import EBFTTrainer

GEOMETRY = {"context": 4, "stride": 3, "horizon": 3, "samples": 3}
#: Two full rows of 40; one of the documents is too short for a rollout.
LENGTHS = (13, 11, 16, 9, 6, 25)


def documents(vocabulary: int, *, masked: bool) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": torch.randint(vocabulary, (n,), generator=generator)} for n in LENGTHS]
    for row in rows if masked else ():
        position = torch.arange(len(row["input_ids"]))
        row["completion_mask"] = (position >= 5) & (position % 8 != 7)
    return rows


def fixed_rollouts(vocabulary: int):
    """In place of `sample_rollouts`: valid anchors get the same random tokens wherever they stand."""

    def sample(_model, _prompt, layout, **_options):
        shape = (layout.batch_size, layout.num_anchors, layout.samples, layout.horizon)
        valid = (layout.num_valid, layout.samples, layout.horizon)
        rollouts = torch.zeros(shape, dtype=torch.long)
        rollouts[layout.valid] = torch.randint(vocabulary, valid, generator=torch.Generator().manual_seed(5))
        return rollouts, torch.zeros(shape, dtype=torch.float64)

    return sample


def results(plain, name: str, rows: list[dict], **options) -> dict[str, torch.Tensor]:
    """Everything that one step computes, of valid anchors in order, and the gradients of its loss."""
    options = EBFTOptions(**GEOMETRY, ce_coef=0.5, **options)
    model = plain.build(name, dtype=torch.float64)
    network = FeatureNetwork(plain.build(name, seed=7), pooling=options.pooling).to(torch.float64)
    batch = EBFTCollator(options, pad_token_id=11)(rows)
    layout, mask = batch["layout"], batch.get("completion_mask")
    result = ebft_step(model, network, batch["input_ids"], layout, options, token_mask=mask)
    result.loss.backward()
    rollout, target = network(layout.pack(batch["input_ids"], result.rollouts), layout, mask)
    found = {"rollouts": result.rollouts, "log_probs": result.log_probs, "features": rollout, "target": target}
    found = {name: x[layout.valid] for name, x in (found | result.match._asdict()).items()}
    found |= {name: x for name, x in result.metrics.items() if "seconds" not in name and name != "tokens"}
    found["loss"] = result.loss.detach()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_results(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"temperature": 0.0}),
        ("llama", {"temperature": 0.7, "pooling": "mean"}),
        ("gemma2", {"temperature": 1.0}),
    ],
)
def test_packed_rows_give_what_separate_rows_give(plain, monkeypatch, name, options, masked):
    """Rollouts (greedy, or the same random ones), log-probabilities, features, rewards, losses and gradients."""
    if options["temperature"]:
        monkeypatch.setattr(step, "sample_rollouts", fixed_rollouts(plain.vocabulary))
    rows = documents(plain.vocabulary, masked=masked)
    packed = list(cut_rows(rows, sum(LENGTHS) // 2, pack=True))
    assert len(packed) == 2
    expected = results(plain, name, rows, **options)
    assert len(expected["log_probs"]) > 10
    assert_same_results(results(plain, name, packed, **options), expected)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_give_what_unpadded_rows_give(plain, side):
    rows = documents(plain.vocabulary, masked=True)
    padded = []
    for row in rows:
        left, right = {"left": (30, 0), "right": (0, 30), "both": (3, 5)}[side]
        row = {**row, "attention_mask": torch.ones(len(row["input_ids"]), dtype=torch.long)}
        filled = {"input_ids": 8, "completion_mask": True, "attention_mask": 0}
        padded.append(
            {
                column: torch.nn.functional.pad(values, (left, right), value=filled[column])
                for column, values in row.items()
            }
        )
    assert_same_results(
        results(plain, "llama", padded, temperature=0.0), results(plain, "llama", rows, temperature=0.0)
    )


# Streams in the trainer


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)

    def make(**options) -> EBFTConfig:
        usual = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        return EBFTConfig(**(GEOMETRY | usual | options))

    return make


@pytest.fixture
def stream(tmp_path, byte_tokenizer):
    """Fewer rows than the trainer asks for: the stream starts anew in between."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} and " * 4}) + "\n" for i in range(7)))
    return RowStream(Source([path]), byte_tokenizer, EBFTOptions(**GEOMETRY), length=16, shuffle_buffer=5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_is_bitwise_the_uninterrupted_one(plain, config, stream, tmp_path, workers):
    def trainer() -> EBFTTrainer:
        model = plain.build(vocab_size=257)
        return EBFTTrainer(model, config(dataloader_num_workers=workers), train_dataset=stream)

    whole, resumed = trainer(), trainer()
    whole.train()
    assert whole.state.global_step == 6
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.state.log_history[4]["reward"] == resumed.state.log_history[4]["reward"]


def test_a_stream_needs_a_number_of_steps(plain, config, stream):
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        EBFTTrainer(plain.build(vocab_size=257), config(max_steps=-1), train_dataset=stream)


def test_token_ids_that_the_model_does_not_have_are_refused(plain, config, stream):
    rows = [{"input_ids": [1] * 12}, {"input_ids": [1] * 11 + [plain.vocabulary]}]
    message = f"token ids from 0 to {plain.vocabulary - 1}, got {plain.vocabulary}"
    with pytest.raises(ValueError, match=f"train_dataset: row 1: input_ids: expected {message}"):
        EBFTTrainer(plain.build(), config(), train_dataset=rows)
    with pytest.raises(ValueError, match="input_ids: expected token ids from 0 to 39"):
        EBFTTrainer(plain.build(vocab_size=40), config(), train_dataset=stream).train()
