"""Adapters: what is trained, shared, saved, resumed and refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from ebft_kernels import StridedLayout
from ebft_trainer import cli
from ebft_trainer.config import EBFTConfig, EBFTOptions
from ebft_trainer.features import FeatureNetwork, StartingAdapters
from ebft_trainer.scoring import reference_log_probs
from ebft_trainer.step import ebft_step
from ebft_trainer.trainer import EBFTTrainer

peft = pytest.importorskip("peft")

ROWS = [{"input_ids": ids} for ids in torch.randint(0, 40, (16, 24), generator=torch.Generator().manual_seed(1))]


def adapted(model, **options):
    torch.manual_seed(5)
    usual = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**(usual | options)))


@pytest.fixture
def config(tmp_path):
    def make(**options) -> EBFTConfig:
        usual = {
            **{"context": 4, "stride": 6, "horizon": 3, "samples": 3, "output_dir": str(tmp_path / "run")},
            **{"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2},
            **{"save_steps": 2, "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            "dataloader_pin_memory": False,
        }
        return EBFTConfig(**(usual | options))

    return make


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)


def test_the_feature_network_is_the_model_itself(plain, config):
    model = adapted(plain.build())
    trainer = EBFTTrainer(model, config(), train_dataset=ROWS)
    network = trainer.feature_network
    assert not [*network.parameters(), *network.buffers(), *network.children()]
    calls = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    # In each step the prompt, two decoding steps, the features, and the policy.
    assert calls == [False, False, False, False, True] * 4
    assert {p.requires_grad for name, p in model.named_parameters() if "lora_" in name} == {True}
    assert {p.requires_grad for name, p in model.named_parameters() if "lora_" not in name} == {False}


def test_a_checkpoint_holds_adapters_only_and_resumes_bitwise(plain, config, tmp_path):
    whole = EBFTTrainer(adapted(plain.build()), config(), train_dataset=ROWS)
    whole.train()
    files = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    resumed = EBFTTrainer(adapted(plain.build()), config(), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def trained_before(model):
    """A model with adapters that change what it says, and a head that was trained with them."""
    torch.manual_seed(5)
    options = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(**options, modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.3)
    return model


@pytest.mark.parametrize("bf16", (False, True))
def test_the_divergence_of_adapters_that_were_trained_before_starts_at_0(plain, config, bf16):
    """The kind: a frozen model made by switching adapters off is not the model that training starts from."""
    model = trained_before(plain.build())
    # A replayed forward rounds as decoding did, not as the frozen model's forward does.
    options = {"kl_coef": 0.5, "bf16": bf16, "learning_rate": 3e-2, "replay_rollouts": False}
    trainer = EBFTTrainer(model, config(**options), train_dataset=ROWS)
    start = copy.deepcopy(model)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["loss/kl"] == 0 and lines[-1]["loss/kl"] > 1e-4
    # After training too it is the model of the start, and the trained weights are back after it was asked.
    prompt, layout = ROWS[0]["input_ids"][None], StridedLayout.strided(1, 24, context=4, stride=6, horizon=3, samples=3)
    rollouts = plain.rollouts_of(layout)
    weights = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        expected = reference_log_probs(start, start, prompt, rollouts, layout)
    found = reference_log_probs(model, trainer.reference_model, prompt, rollouts, layout)
    assert torch.equal(found, expected)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not torch.allclose(reference_log_probs(model, model, prompt, rollouts, layout), expected, atol=1e-3)


def test_the_divergence_from_the_model_without_adapters_is_an_option(plain, config, monkeypatch):
    trainer = EBFTTrainer(
        trained_before(plain.build()), config(kl_coef=0.5, kl_reference="base", max_steps=1), train_dataset=ROWS
    )
    assert trainer.reference_model is None
    trainer.train()
    assert trainer.state.log_history[0]["loss/kl"] > 1e-2
    monkeypatch.setattr("ebft_trainer.set_up.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="kl_reference: expected 'base' with ZeRO-3, which spreads .*, got 'start'"):
        EBFTTrainer(trained_before(plain.build()), config(kl_coef=0.5), train_dataset=ROWS)


def test_a_resumed_run_keeps_its_reference(plain, config, tmp_path):
    whole = EBFTTrainer(trained_before(plain.build()), config(kl_coef=0.5), train_dataset=ROWS)
    whole.train()
    resumed = EBFTTrainer(trained_before(plain.build()), config(kl_coef=0.5), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_starting_adapters_in_sharded_weights_and_of_another_model(plain, tmp_path):
    """FSDP2 puts other parameters, spread over the ranks, in the place of those that were copied."""
    model = trained_before(plain.build())
    start = StartingAdapters(model)
    first = {name: x.detach().clone() for name, x in model.named_parameters()}
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in model.get_base_model().model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with torch.no_grad():
            for x in model.parameters():
                x.mul_(2.0)
        with start.put_back(model):
            for name, x in model.named_parameters():
                assert torch.equal(x.full_tensor(), first[name] * (1 if x.requires_grad else 2)), name
        assert all(torch.equal(x.full_tensor(), 2 * first[name]) for name, x in model.named_parameters())
    finally:
        torch.distributed.destroy_process_group()
    other = adapted(plain.build())
    with pytest.raises(ValueError, match="model: expected the trained weights of the start, got a change of"):
        with start.put_back(other):
            pass


# An adapter loaded for inference: PEFT freezes it, and the backward pass has nothing to do


def test_a_model_without_anything_to_train_is_refused_at_set_up(plain, config, tmp_path):
    adapted(plain.build()).save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(plain.build(), tmp_path / "adapter")
    message = "model: expected weights to train, got none with requires_grad; .*is_trainable=True"
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(frozen, config(), train_dataset=ROWS)
    EBFTTrainer(frozen, config(), eval_dataset=ROWS[:2]).evaluate()
    trainable = peft.PeftModel.from_pretrained(plain.build(), tmp_path / "adapter", is_trainable=True)
    EBFTTrainer(trainable, config(max_steps=1), train_dataset=ROWS).train()


def test_on_the_command_line(model_folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(40)), encoding="utf-8")
    options = "--length 48 --context 4 --stride 6 --horizon 3 --samples 2 --eval-rows 4 --max-steps 2 --save-steps 2"
    options += " --eval-fraction 0.2 --learning-rate 1e-2"
    arguments = ["train", "--model", model_folder, "--data", text, "--output", tmp_path / "run", *options.split()]
    cli.main([str(x) for x in (*arguments, "--lora-rank", 2)])
    run = json.loads((tmp_path / "run" / "ebft.json").read_text())
    assert run["lora"] == {"rank": 2, "alpha": None}
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4)
    cli.main(
        ["evaluate", "--model", str(tmp_path / "run" / "model"), "--data", str(text), "--eval-rows", "4"]
        + ["--length", "48", "--context", "4", "--stride", "6", "--horizon", "3", "--output", str(tmp_path / "e.json")]
    )
    evaluated = json.loads((tmp_path / "e.json").read_text())
    assert evaluated["feature_model"] == str(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    trained = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "model")
    with trained.disable_adapter():
        before = trained(torch.arange(20)[None]).logits
    assert (trained(torch.arange(20)[None]).logits - before).abs().max() > 1e-3

    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="lora_rank: needs the package peft, which is not installed"):
        cli.with_adapters(base, 2)


@pytest.mark.parametrize(
    ("rank", "alpha", "message"),
    [
        (None, 2.0, "lora_rank: expected at least 1, got None"),
        (0, None, "lora_rank: expected at least 1, got 0"),
        (2, 0.0, "lora_alpha: expected a number above 0, got 0.0"),
    ],
)
def test_bad_options(plain, rank, alpha, message):
    with pytest.raises(ValueError, match=message):
        cli.with_adapters(plain.build(), rank, alpha)


def test_an_adapter_on_the_head_is_refused_at_set_up(plain, config):
    with pytest.raises(ValueError, match="llama: its vocabulary head is a PEFT adapter layer, not one weight matrix"):
        EBFTTrainer(adapted(plain.build(), target_modules=["lm_head"]), config(), train_dataset=ROWS)


def test_a_quantized_head_is_refused_at_set_up(plain, config):
    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(61, 32, dtype=torch.uint8), requires_grad=False)

        def forward(self, hidden):
            return hidden @ self.weight.to(hidden.dtype).mT

    model = plain.build()
    model.lm_head = Quantized()
    with pytest.raises(ValueError, match=r"llama: its vocabulary head is quantized \(torch.uint8\)"):
        EBFTTrainer(model, config(), train_dataset=ROWS)


@pytest.fixture
def four_bits(plain, tmp_path):
    """A model in 4 bits without adapters, as it is loaded from a folder; bitsandbytes is optional."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    plain.build(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "model")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=options, device_map={"": "cpu"}
    )
    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_a_model_in_four_bits(four_bits, config):
    trainer = EBFTTrainer(adapted(four_bits), config(max_steps=2), train_dataset=ROWS)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["grad_norm"] > 0 and line["log_prob_gap"] < 1e-4 for line in lines) and len(lines) == 2
    assert {p.requires_grad for name, p in four_bits.named_parameters() if "lora_" not in name} == {False}


def test_gradients_of_a_model_in_four_bits_are_those_of_its_weights(four_bits, plain):
    """After rollouts too: bitsandbytes packs weights for inference in the first call in eval mode."""
    from bitsandbytes.functional import dequantize_4bit

    whole = plain.build(hidden_size=64, intermediate_size=128, head_dim=16)
    weights = {
        name: dequantize_4bit(x.data, x.quant_state) if hasattr(x, "quant_state") else x.data
        for name, x in four_bits.named_parameters()
    }
    whole.load_state_dict(weights, strict=False)
    layout = StridedLayout.strided(1, 24, context=4, stride=6, horizon=3, samples=3)
    tokens, options = ROWS[0]["input_ids"][None], EBFTOptions(ce_coef=1.0)
    found = []
    for base in (four_bits, whole):
        model = adapted(base)
        for name, x in model.named_parameters():  # B starts as zeros, which would hide the gradient of A
            if "lora_B" in name:
                torch.nn.init.normal_(x, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        network = FeatureNetwork(model)
        for _ in range(2):
            model.zero_grad()
            generator = torch.Generator().manual_seed(0)
            ebft_step(model, network, tokens, layout, options, generator=generator).loss.backward()
        found.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, grad in found[1].items():
        assert (found[0][name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


def test_weights_that_are_packed_already_are_refused(four_bits, config):
    layer = next(m for m in four_bits.modules() if hasattr(m, "support_avx512bf16_for_cpu"))
    layer.support_avx512bf16_for_cpu = layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="model: expected 4-bit weights that have a gradient, got '.*' packed for inf"):
        EBFTTrainer(adapted(four_bits), config(), train_dataset=ROWS)
