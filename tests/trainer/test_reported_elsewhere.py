"""Faults that users of neighbouring projects reported, by kind: what is right here, and what is refused."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch.utils.data import SequentialSampler

from ebft_kernels import StridedLayout
from ebft_kernels.integrations.transformers import check_train_mode
from ebft_trainer.config import EBFTConfig, EBFTOptions, checkpointing_field
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.scoring import scored_prompt_tokens
from ebft_trainer.step import ebft_step
from ebft_trainer.trainer import EBFTTrainer

GEOMETRY = {"context": 4, "stride": 6, "horizon": 3, "samples": 3}
ROWS = [{"input_ids": ids} for ids in torch.randint(0, 40, (16, 24), generator=torch.Generator().manual_seed(1))]
IDS = torch.stack([row["input_ids"] for row in ROWS[:2]])
CHECKPOINTING = checkpointing_field()


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer_callback.PrinterCallback.on_log", lambda *_args, **_kwargs: None)

    def make(**options) -> EBFTConfig:
        usual = {
            **{"output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 2},
            **{"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True},
            **{"dataloader_pin_memory": False, "learning_rate": 1e-2},
        }
        return EBFTConfig(**(GEOMETRY | usual | options))

    return make


def adapted(model, **options):
    usual = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(**(usual | options)))


def layout_of_rows() -> StridedLayout:
    return StridedLayout.strided(2, 24, **GEOMETRY)


# Tied embeddings with trained copies of one of them or of both, or of some of their rows: which head is it?


@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize(
    "trained",
    (
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 2, 3]},
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [3, 4]}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ),
    ids=lambda x: "-".join(map(str, x)),
)
def test_the_head_of_a_peft_model_is_the_one_that_it_computes_with(plain, tied, trained):
    model = adapted(plain.build(tie_word_embeddings=tied), **trained)
    with torch.no_grad():
        for number, x in enumerate(x for x in model.parameters() if x.requires_grad):
            x += 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
    result = ebft_step(model, None, IDS, layout_of_rows(), EBFTOptions(objective="sft"))
    result.loss.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    expected = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys() and len(found) > 8
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


# Reentrant checkpointing of frozen layers: without a gradient at their input adapters get none, and nothing says so


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("where", ("arguments", "model"))
def test_checkpointing_leaves_no_adapter_without_a_gradient(plain, config, reentrant, where):
    base, options = plain.build(), {}
    if where == "arguments":
        options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if where == "model":
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = adapted(base, target_modules="all-linear")
        before = {name: x.detach().clone() for name, x in model.named_parameters() if x.requires_grad}
        EBFTTrainer(model, config(**options), train_dataset=ROWS).train()
    stuck = [name for name, x in model.named_parameters() if x.requires_grad and torch.equal(x, before[name])]
    assert len(before) == 56 and not stuck


# Merged adapters: switching them off for the frozen model takes them out of some layers and leaves the others


def test_merged_adapters_are_refused(plain, config):
    model = adapted(plain.build())
    model.merge_adapter()
    message = "model: expected adapters beside the weights, got '.*q_proj' merged; call unmerge_adapter"
    for objective in ("ebft", "sft"):
        with pytest.raises(ValueError, match=message):
            EBFTTrainer(model, config(objective=objective), train_dataset=ROWS)
    with pytest.raises(ValueError, match=message):
        FeatureNetwork(model)
    model.unmerge_adapter()
    EBFTTrainer(model, config(), train_dataset=ROWS)


# A frozen model that is not: the policy itself, its base with the adapters in it, biases trained beneath adapters


def test_a_frozen_model_that_shares_trained_weights_is_refused(plain, config):
    model = plain.build()
    message = "reference_model: expected a model of its own, got one that shares the weights that are trained"
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(model, config(kl_coef=0.5), train_dataset=ROWS, reference_model=model)
    tuned = adapted(plain.build())
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(tuned, config(kl_coef=0.5), train_dataset=ROWS, reference_model=tuned.get_base_model())
    network = FeatureNetwork(model, share=True)
    message = "feature_network: expected a frozen network, got one that shares the weights that are trained"
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(model, config(), train_dataset=ROWS, feature_network=network)
    EBFTTrainer(model, config(), eval_dataset=ROWS[:2], feature_network=network)
    EBFTTrainer(plain.build(), config(), train_dataset=ROWS, feature_network=network)


@pytest.mark.parametrize("bias", ("lora_only", "all", "none"))
def test_trained_weights_beneath_adapters_are_refused_where_the_model_without_adapters_counts(plain, config, bias):
    model = adapted(plain.build("qwen2"), bias=bias)
    if bias == "none":
        FeatureNetwork(model)
        model.get_input_embeddings().weight.requires_grad_(True)
    message = (
        "model: expected the weights beneath the adapters to be frozen, got '.*(bias|embed_tokens.weight)' trained"
    )
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(model, config(), train_dataset=ROWS)
    options = config(objective="sft", kl_coef=0.1, kl_reference="base")
    with pytest.raises(ValueError, match=message):
        EBFTTrainer(model, options, train_dataset=ROWS)
    trainer = EBFTTrainer(model, config(objective="sft", kl_coef=0.1, replay_rollouts=False), train_dataset=ROWS)
    trainer.train()
    assert trainer.state.log_history[0]["loss/kl"] == 0
    assert {name for name, x in model.named_parameters() if x.requires_grad and "lora" not in name}


def test_a_reference_that_was_trained_in_another_precision_computes_in_the_policys(plain, config, monkeypatch):
    """accelerate leaves its autocast in the forward of a model that it has prepared."""
    earlier = plain.build()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    EBFTTrainer(earlier, config(bf16=True, learning_rate=0.0), train_dataset=ROWS).train()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    trainer = EBFTTrainer(
        plain.build(), config(kl_coef=0.5, replay_rollouts=False), train_dataset=ROWS, reference_model=earlier
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss/kl"] == 0


# Dropout: rollouts are sampled without it and scored with it, so that a model differs from itself


def with_dropout(plain, kind: str):
    if kind == "lora":
        # It changes nothing at first, where the adapter's second matrix is 0.
        return adapted(
            plain.build(), lora_dropout=0.3, init_lora_weights=True
        ), "dropout (.*lora_dropout.default, p=0.3)"
    model = plain.build()
    layer = model.model.layers[1].mlp
    original = layer.forward
    layer.forward = lambda x: torch.nn.functional.dropout(original(x), 0.1, layer.training)
    model.config.made_up_dropout = 0.1
    return model, "noise or dropout (made_up_dropout=0.1)"


@pytest.mark.parametrize("kind", ("lora", "function"))
def test_what_is_drawn_in_train_mode_is_refused_where_there_are_rollouts(plain, config, kind):
    model, what = with_dropout(plain, kind)
    message = (
        f"llama: cannot be run strided: {what.replace('(', '[(]').replace(')', '[)]')} would be drawn where rollouts"
    )
    for options in ({}, {"objective": "sft", "kl_coef": 0.1}, {"objective": "sft", "entropy_coef": 0.1}):
        with pytest.raises(ValueError, match=message):
            EBFTTrainer(model, config(**options), train_dataset=ROWS)
    EBFTTrainer(model, config(), eval_dataset=ROWS[:2]).evaluate()
    EBFTTrainer(model, config(objective="sft"), train_dataset=ROWS).train()


@pytest.mark.parametrize("name", ("llama", "gemma2", "mixtral"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_model_without_dropout_is_the_same_in_both_modes(plain, name, dtype):
    options = {"num_local_experts": 4, "num_experts_per_tok": 2} if name == "mixtral" else {}
    model = plain.build(name, dtype=dtype, **options).train()
    state = torch.random.get_rng_state()
    assert check_train_mode(model) == (True, "", name)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    if name == "mixtral":
        for layer in model.model.layers:
            layer.mlp.jitter_noise = 0.5
        assert not check_train_mode(model).ok


# Options that are accepted and do nothing, or not what they say


@pytest.mark.parametrize(
    ("option", "value"),
    (
        ("auto_find_batch_size", True),
        ("bf16_full_eval", True),
        ("fp16_full_eval", True),
        ("eval_accumulation_steps", 2),
        ("include_for_metrics", ["inputs"]),
        ("label_names", ["labels"]),
        ("prediction_loss_only", True),
    ),
)
def test_options_without_effect_are_refused(config, option, value):
    with pytest.raises(ValueError, match=rf"{option}: expected .*, got .*: (evaluation is|it starts anew)"):
        config(**{option: value})


def test_batches_are_not_dispatched_from_one_rank(config):
    with pytest.raises(ValueError, match="accelerator_config: expected dispatch_batches False, got True"):
        config(accelerator_config={"dispatch_batches": True})


def test_compiling_the_model_is_honoured_and_changes_no_number(plain, config):
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = EBFTTrainer(plain.build(), config(**options), train_dataset=ROWS)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Settings that stay changed: the cache switched off in what is saved, the attention of a run that was interrupted


def test_the_models_settings_are_as_they_were(plain, config):
    model = plain.build()
    generation = model.generation_config.to_dict()
    assert model.config.use_cache
    EBFTTrainer(model, config(**{CHECKPOINTING: True}), train_dataset=ROWS).train()
    assert model.config.use_cache and model.generation_config.to_dict() == generation
    model.config.use_cache = False
    EBFTTrainer(model, config(use_cache=True), train_dataset=ROWS)
    assert model.config.use_cache

    def interrupt(*_):
        raise KeyboardInterrupt

    model, network, layout = plain.build(), FeatureNetwork(plain.build()), layout_of_rows()
    handle = model.model.layers[2].register_forward_hook(interrupt)
    for objective in ("ebft", "sft"):
        with pytest.raises(KeyboardInterrupt):
            ebft_step(model.train(), network, IDS, layout, EBFTOptions(objective=objective))
        assert model.config._attn_implementation == "eager" and all(module.training for module in model.modules())
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# The last step of an epoch has fewer micro-batches: its loss is not to be divided by the usual number


def test_a_short_last_step_of_an_epoch_has_the_gradient_of_its_rows(plain, config, monkeypatch):
    monkeypatch.setattr(
        EBFTTrainer, "_get_train_sampler", lambda self, *_args, **_kwargs: SequentialSampler(self.train_dataset)
    )
    options = {"max_steps": -1, "num_train_epochs": 1, "temperature": 0.0, "estimator": "reinforce", "ce_coef": 0.3}
    options |= {"max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.0, "per_device_train_batch_size": 1}

    def gradients(rows, accumulate):
        trainer = EBFTTrainer(
            plain.build(), config(**options, gradient_accumulation_steps=accumulate), train_dataset=rows
        )
        seen = []
        trainer.create_optimizer()
        parameters = list(trainer.model.parameters())
        trainer.optimizer.register_step_pre_hook(
            lambda *_args, **_kwargs: seen.append(torch.cat([x.grad.flatten() for x in parameters]))
        )
        trainer.train()
        return seen

    with_short_end, alone = gradients(ROWS[:5], 4), gradients(ROWS[4:5], 1)
    assert len(with_short_end) == 2 and len(alone) == 1
    torch.testing.assert_close(with_short_end[1], alone[0])


# A schedule that stops with skipped steps never ends


def test_the_schedule_goes_on_over_a_skipped_step(plain, config):
    class Breaks(EBFTTrainer):
        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            return loss * float("inf") if self.state.global_step == 1 else loss

    trainer = Breaks(plain.build(), config(max_steps=4, lr_scheduler_type="linear"), train_dataset=ROWS)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["nonfinite_steps"] for line in lines] == [0, 1, 0, 0]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


# Padding and end are one token: the end is no padding, and counts


def test_the_end_of_a_text_counts_where_it_is_the_padding_token_too(plain, config, byte_tokenizer):
    end = byte_tokenizer.eos_token_id
    assert byte_tokenizer.pad_token_id == end
    rows = [{"input_ids": [*row["input_ids"][:n].tolist(), end]} for row, n in zip(ROWS, (23, 12), strict=False)]
    trainer = EBFTTrainer(
        plain.build(vocab_size=257), config(objective="sft"), train_dataset=rows, processing_class=byte_tokenizer
    )
    batch = trainer.data_collator(rows)
    assert scored_prompt_tokens(batch["layout"]).sum(1).tolist() == [23, 12]
    trainer.train()
    model = plain.build(vocab_size=257)
    nats = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        nats.append(torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.cat(nats).mean().item(), rel=1e-5)


# The first line of a log is special, and lacks what the others have


def test_gradient_norms_are_there_on_every_log_line(plain, config):
    options = config(max_steps=4, grad_norm_terms=True, logging_first_step=True, logging_steps=2)
    trainer = EBFTTrainer(plain.build(), options, train_dataset=ROWS)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4] and all("grad_norm/rl" in line for line in lines)
