"""The model card beside what was trained, and that what was trained is an ordinary model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ebft_trainer import EBFTConfig, EBFTTrainer
from ebft_trainer.card import changed_options, model_card

from .conftest import build


def head_of(text: str) -> dict:
    before, head, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.M)
    assert not before
    return yaml.safe_load(head)


@pytest.fixture
def trained(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = [{"input_ids": torch.arange(1, 25) + i} for i in range(3)]
    options = {"context": 4, "stride": 6, "horizon": 4, "samples": 2, "max_steps": 1, "learning_rate": 1e-3}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "hub_token": "secret", "report_to": "none"}
    config = EBFTConfig(output_dir=str(tmp_path / "run"), eval_on_start=True, use_cpu=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    trainer = EBFTTrainer(model, config, train_dataset=rows, eval_dataset=rows[:1], processing_class=tokenizer)
    trainer.train()
    return trainer


def test_what_is_saved_is_an_ordinary_model_with_a_card(trained, model_folder, tmp_path):
    folder = tmp_path / "model"
    trained.save_model(str(folder))
    saved, start = (json.loads((x / "config.json").read_text()) for x in (folder, model_folder))
    # The tokenizer's special tokens, which transformers' Trainer writes into the config.
    tokens = {name: getattr(trained.processing_class, name) for name in ("eos_token_id", "pad_token_id")}
    aligned = {**tokens, "transformers_version": ANY}
    assert {**start, **aligned} == saved
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), trained.model.parameters(), strict=True))
    text = (folder / "README.md").read_text()
    head = head_of(text)
    assert head["library_name"] == "transformers" and "ebft" in head["tags"] and "base_model" not in head
    evaluation = next(line for line in trained.state.log_history if "eval_loss" in line)
    assert f"{evaluation['eval_cross_entropy']:.4f}" in text and "2603.12248" in text and "`rl_coef = 1`" in text
    options = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert options["horizon"] == 4 and options["samples"] == 2 and options["learning_rate"] == 1e-3
    assert "secret" not in text and str(tmp_path) not in text


def test_the_hub_gets_the_card(trained, tmp_path, monkeypatch):
    """Nothing is sent anywhere: what would be is looked at."""

    def upload(**options):
        uploads.append((options["repo_id"], {path.name for path in Path(options["folder_path"]).iterdir()}))

    uploads = []
    monkeypatch.setattr(trained, "hub_model_id", "someone/tuned")
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: SimpleNamespace(upload_folder=upload))
    options = {"license": "apache-2.0", "dataset": "some/data", "tags": "code"}
    trained.push_to_hub(model_name="tuned", **options)
    text = (tmp_path / "run" / "README.md").read_text()
    head = head_of(text)
    assert head["license"] == "apache-2.0" and head["tags"][-1] == "code" and "# tuned\n" in text
    assert "`some/data`" in text
    assert uploads[0][0] == "someone/tuned" and {"README.md", "config.json", "model.safetensors"} <= uploads[0][1]


def test_a_readme_of_ones_own_stays(trained, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("mine\n")
    trained.save_model(str(folder))
    assert (folder / "README.md").read_text() == "mine\n"
    (folder / "README.md").unlink()
    trained.save_model(str(folder))
    (folder / "README.md").write_text((folder / "README.md").read_text() + "old\n")
    trained.save_model(str(folder))
    assert "old\n" not in (folder / "README.md").read_text()


def test_a_checkpoint_has_no_card(trained, tmp_path):
    trained.save_model(str(tmp_path / "checkpoint"), _internal_call=True)
    assert not (tmp_path / "checkpoint" / "README.md").exists()


def test_the_options_of_the_card_give_the_same_config():
    config = EBFTConfig(output_dir="a", use_cpu=True, objective="rlvr", verifier="exact_match", kl_coef=0.1)
    changed = changed_options(config)
    assert changed["verifier"] == "exact_match" and "output_dir" not in changed
    again = EBFTConfig(output_dir="b", **changed)
    assert changed_options(again) == changed


def test_hostile_names_stay_names():
    name = "x\n---\nlicense: mine | <script>`"
    text = model_card("tuned", EBFTConfig(output_dir="a", use_cpu=True), base_model=name, datasets=[name])
    assert head_of(text)["base_model"] == name and "license" not in head_of(text)


def test_adapters_say_so(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    rows = [{"input_ids": torch.arange(1, 25)}]
    options = {"context": 4, "stride": 6, "horizon": 4, "samples": 2, "max_steps": 1}
    trainer = EBFTTrainer(model, EBFTConfig(output_dir=str(tmp_path), use_cpu=True, **options), train_dataset=rows)
    trainer.save_model(str(tmp_path / "model"))
    assert head_of((tmp_path / "model" / "README.md").read_text())["library_name"] == "peft"
