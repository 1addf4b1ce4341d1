"""Every example runs at toy size, and does what it says."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_kernels import StridedLayout
from ebft_trainer import EBFTConfig, EBFTOptions, FeatureNetwork, cli, ebft_step
from ebft_trainer.config import device_arguments
from ebft_trainer.rows import build_rows
from ebft_trainer.sources import documents_of

from ..trainer.conftest import build, byte_tokenizer, model_folder  # noqa: F401 (fixtures)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = "--length 48 --context 4 --stride 6 --horizon 4 --samples 3 --eval-rows 2 --max-steps 2 --learning-rate 1e-3"
SMALL += " --per-device-train-batch-size 2 --logging-steps 1 --eval-fraction 0.2"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(model_folder, tmp_path, monkeypatch):  # noqa: F811
    """Runs ``ebft-train train`` in the folder of the examples; the log of the run."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return (x + [{i}])\n\n" for i in range(40)), encoding="utf-8")

    def run(*more: str) -> dict:
        arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *SMALL.split()]
        cli.main([str(argument) for argument in (*arguments, *more)])
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return run


def test_a_custom_feature_map(train):
    results = train("--feature-map", "feature_map_ngrams:build")
    lines = [line for line in results["log"] if "loss" in line]
    assert len(lines) == 2 and all(0 <= line["feature_matching_loss"] <= 4 for line in lines)
    assert 0 <= results["after"]["eval_feature_matching_loss_h1"] <= 4


def test_ngrams_are_counted():
    counts = load("feature_map_ngrams").NGramCounts(order=2, buckets=4096)
    layout = StridedLayout.from_anchors(torch.tensor([[2]]), 6, horizon=3, samples=4)
    prompt = torch.tensor([[9, 9, 1, 2, 3, 9]])
    rollouts = torch.tensor([[[[1, 2, 3], [3, 2, 1], [7, 7, 7], [1, 2, 8]]]])
    found, target = counts(layout.pack(prompt, rollouts), layout)
    # Five n-grams in common, three, none, and of those of (1, 2, 8) three: 1, 2 and 12.
    products = (found[0, 0] @ target[0, 0]).tolist()
    assert products == pytest.approx([1.0, 3 / 5, 0.0, 3 / 5], abs=1e-6)
    mask = torch.tensor([[[[True, True, True], [True, False, False], [False] * 3, [True, True, False]]]])
    found, _ = counts(layout.pack(prompt, rollouts), layout, rollout_mask=mask)
    assert found[0, 0].square().sum(-1).tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0])
    assert (found[0, 0, 1] > 0).sum() == 1 and (found[0, 0, 3] > 0).sum() == 3
    _, masked = counts(layout.pack(prompt, rollouts), layout, torch.arange(6)[None] < 4)
    assert torch.equal(masked[0, 0], found[0, 0, 3])


def test_a_custom_verifier(train):
    results = train("--objective", "rlvr", "--verifier", "verifier_brackets:balanced", "--temperature", "1.0")
    lines = [line for line in results["log"] if "loss" in line]
    assert len(lines) == 2 and all(0 <= line["verifier_reward"] <= 1 and "loss/verifier" in line for line in lines)
    assert 0 <= results["after"]["eval_verifier_reward"] <= 1
    balanced = load("verifier_brackets").balanced
    for text, expected in (("f(x)", 1.0), ("(]", 0.0), ("([)]", 0.5), ("(()", 2 / 3), ("x", 0.0), ("[{}])", 4 / 5)):
        assert balanced("", text, "") == pytest.approx(expected)


def test_the_plain_loop_is_the_method():
    loop = load("plain_loop")
    prompts = torch.randint(0, 61, (2, 1, 32), generator=torch.Generator().manual_seed(0))
    model, other = build(), build()
    torch.manual_seed(0)
    losses = loop.train(model, prompts, learning_rate=1e-3)
    torch.manual_seed(0)
    phi, optimizer = FeatureNetwork(other), torch.optim.AdamW(other.parameters(), lr=1e-3)
    for prompt, loss in zip(prompts, losses, strict=True):
        layout = StridedLayout.strided(1, 32, context=8, stride=8, horizon=8, samples=4)
        step = ebft_step(other, phi, prompt, layout, EBFTOptions())
        assert step.metrics["feature_matching_loss"] == pytest.approx(loss, rel=1e-5)
        step.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_the_plain_loop_runs_from_the_command_line(model_folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("x = 1\n" * 60, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["plain_loop.py", str(model_folder), str(text)])
    runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])) == 1


def test_the_loop_is_short():
    assert (
        len((EXAMPLES / "plain_loop.py").read_text().split("def train")[1].split("if __name__")[0].splitlines()) <= 30
    )


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant: {% endif %}"
QUESTION, ANSWER = "What is two and two, my friend?", "It is four, as everybody knows."
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
TRL_ROWS = {
    "text": {"prompt": QUESTION, "completion": " " + ANSWER},
    "messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "conversation": {"messages": [USER, ASSISTANT]},
}


@pytest.fixture
def chat_folder(model_folder):  # noqa: F811
    """The tiny model with a chat template beside it."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model_folder)
    return model_folder


@pytest.mark.parametrize("kind", TRL_ROWS)
def test_rows_as_trl_has_them(kind, chat_folder, tmp_path):
    config = EBFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        context=4,
        stride=6,
        horizon=4,
        samples=3,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        **device_arguments(),
    )
    before = AutoModelForCausalLM.from_pretrained(chat_folder).state_dict()
    rows = Dataset.from_list([TRL_ROWS[kind]] * 4)
    trainer = load("trl_style").train_on_rows(str(chat_folder), rows, config)
    ids, mask = (trainer.train_dataset[0][name] for name in ("input_ids", "completion_mask"))
    counted = trainer.processing_class.decode(ids[mask])
    assert counted.startswith(ANSWER if kind != "text" else " " + ANSWER)
    assert QUESTION in trainer.processing_class.decode(ids[~mask])
    assert len([line for line in trainer.state.log_history if "feature_matching_loss" in line]) == 2
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert all((after[name] != x).any() for name, x in before.items() if x.ndim == 2)


def test_a_trl_script_from_the_command_line(chat_folder, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(TRL_ROWS["conversation"]) for _ in range(4)), encoding="utf-8")
    options = f"--model_name_or_path {chat_folder} --dataset {rows} --output_dir {tmp_path / 'run'} --max_length 96"
    options += " --max_steps 1 --context 4 --horizon 4 --samples 3 --save_strategy no --report_to none --use_cpu True"
    monkeypatch.setattr(sys, "argv", ["trl_style.py", *options.split()])
    runpy.run_path(str(EXAMPLES / "trl_style.py"), run_name="__main__")
    assert "4 rows; 0 too short" in capsys.readouterr().out and (tmp_path / "run" / "model.safetensors").is_file()


def test_rows_in_memory_that_are_no_documents():
    good = {"text": "one"}
    assert [document.text for document in documents_of([good])] == ["one"]
    with pytest.raises(TypeError, match="data: expected a mapping of columns, got str in rows, row 1"):
        list(documents_of([good, "two"]))
    with pytest.raises(ValueError, match="data: expected an object with .* got 'question' in chats, row 0"):
        list(documents_of([{"question": "x"}], where="chats"))


@pytest.mark.parametrize("kind", ("text", "messages"))
def test_the_tokens_that_count_are_those_of_trl(kind, chat_folder, tmp_path):
    trl = pytest.importorskip("trl", reason="of the dev extra where Python is 3.11 or newer, as trl needs it to be")
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    (row,), _ = build_rows(documents_of([TRL_ROWS[kind]]), tokenizer, EBFTOptions(context=4, horizon=4), length=256)
    config = trl.SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    model, rows = AutoModelForCausalLM.from_pretrained(chat_folder), Dataset.from_list([TRL_ROWS[kind]] * 4)
    trainer = trl.SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"][0].tolist() == row["input_ids"].tolist()
    assert (batch["labels"][0] != -100).tolist() == row["completion_mask"].tolist()
