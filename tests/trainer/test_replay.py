"""The policy's forward that is replayed from decoding, against the one that is computed."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from ebft_kernels.integrations.transformers import (
    ForwardRecording,
    StridedCache,
    decoder_layers,
    replay_obstacle,
    strided_attention_context,
)
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.replay import RecordedRollouts, recorded_rollouts
from ebft_trainer.rollout import sample_rollouts
from ebft_trainer.scoring import policy_log_probs
from ebft_trainer.step import ebft_step

from ..model_checks import assert_gradients_within_budget

EPS = torch.finfo(torch.float64).eps
REPLAYED = ("llama", "qwen2", "gemma2")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options(**changes) -> EBFTOptions:
    return EBFTOptions(**({"temperature": 0.8, "ce_coef": 0.3} | changes))


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both_ways(model, prompt, layout, *, mask=None, network=None, **changes):
    """A step that replays and one that computes: results and gradients of each."""
    network, found = network or FeatureNetwork(model), []
    for replay in (True, False):
        config = options(**changes, replay_rollouts=replay)
        step = ebft_step(model, network, prompt, layout, config, token_mask=mask, generator=generator())
        found.append((step, gradients(model, step.loss)))
    return found


def assert_same(replayed, computed) -> None:
    """Up to the rounding of float64, through all layers and as many summands as there are."""
    (step, found), (expected_step, expected) = replayed, computed
    assert torch.equal(step.rollouts, expected_step.rollouts)
    assert (step.log_probs - expected_step.log_probs).abs().max() <= 1e4 * EPS
    assert (step.loss - expected_step.loss).abs() <= 1e4 * EPS
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert (x - expected[name]).norm() <= 1e4 * EPS * expected[name].norm(), name
    assert any(x.norm() > 0 for x in expected.values())


class Products(TorchDispatchMode):
    """Counts multiplications in matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def drawn(model, prompt, layout, **changes):
    recorded = RecordedRollouts(model, layout)
    arguments = {"temperature": 0.8, "generator": generator()} | changes
    return recorded, *sample_rollouts(model, prompt, layout, recorded=recorded, **arguments)


@pytest.mark.parametrize("layout", ("strided", "uneven"))
@pytest.mark.parametrize("name", REPLAYED)
def test_gradients_are_those_of_the_computed_forward(plain, name, layout):
    layout = plain.layouts[layout]()
    model = plain.build(name, dtype=torch.float64).train()
    assert_same(*both_ways(model, plain.prompt_of(layout), layout))


@pytest.mark.parametrize(
    ("layout", "changes"),
    (
        ("strided", {"temperature": 0.0}),
        ("strided", {"top_k": 5}),
        ("uneven", {"top_p": 0.7, "ce_coef": 0.0}),
        ("uneven", {"vocabulary": 40}),
        ("strided", {"eos_token_ids": [3, 17, 22, 40, 41, 50]}),
        ("uneven", {"eos_token_ids": [3, 17, 22, 40, 41, 50], "entropy_coef": 0.1}),
        ("strided", {"pooling": "token", "whitening": "none"}),
    ),
)
def test_of_every_way_to_sample_and_score(plain, layout, changes):
    layout = plain.layouts[layout]()
    model, prompt = plain.build(dtype=torch.float64), plain.prompt_of(layout) % changes.get("vocabulary", 61)
    mask = torch.rand(prompt.shape, generator=generator(5)) < 0.7
    replayed, computed = both_ways(model, prompt, layout, mask=mask, **changes)
    assert_same(replayed, computed)
    if "eos_token_ids" in changes:
        assert 0 < replayed[0].metrics["eos_rate"] < 1


@pytest.mark.parametrize(("horizon", "samples"), ((1, 3), (2, 1), (5, 2)))
def test_horizons_and_samples(plain, horizon, samples):
    layout = plain.layouts["strided"]()
    layout = type(layout).strided(2, 24, context=6, stride=4, horizon=horizon, samples=samples)
    model = plain.build("gemma2", dtype=torch.float64)
    assert_same(*both_ways(model, plain.prompt_of(layout), layout, estimator="reinforce"))


def test_a_head_that_is_the_embedding(plain):
    layout = plain.layouts["strided"]()
    model = plain.build(dtype=torch.float64, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(*both_ways(model, plain.prompt_of(layout), layout))


@pytest.mark.parametrize("frozen", ("mlp", "self_attn", "embed", "layers"))
def test_parameters_that_are_frozen(plain, frozen):
    layout = plain.layouts["uneven"]()
    model = plain.build("qwen2", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    assert_same(*both_ways(model, plain.prompt_of(layout), layout))


def test_adapters(plain):
    layout = plain.layouts["strided"]()
    torch.manual_seed(1)
    base = plain.build(dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.train()
    assert replay_obstacle(model) == ""
    replayed, computed = both_ways(model, plain.prompt_of(layout), layout)
    assert all("lora_" in name for name in replayed[1])
    assert_same(replayed, computed)


@pytest.mark.parametrize("name", REPLAYED)
def test_nothing_is_multiplied_but_one_row_of_the_head(plain, name):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(name), plain.prompt_of(layout)
    recorded, tokens, log_probs = drawn(model, prompt, layout)
    with Products() as products:
        scored, _ = policy_log_probs(model, prompt, tokens, layout, temperature=0.8, recorded=recorded)
    head = model.get_output_embeddings().weight
    # And what rotary embeddings multiply positions with.
    assert products.count <= 2 * head.numel() + 2 * layout.position_ids.numel() * model.config.head_dim
    assert torch.equal(scored, log_probs) and scored.requires_grad
    again, expected = sample_rollouts(model, prompt, layout, temperature=0.8, generator=generator())
    assert torch.equal(tokens, again) and torch.equal(log_probs, expected), "nothing drawn depends on a recording"
    with pytest.raises(ValueError, match="recording: expected one that can be replayed: nothing is recorded"):
        policy_log_probs(model, prompt, tokens, layout, temperature=0.8, recorded=recorded)


@pytest.mark.parametrize("name", REPLAYED)
def test_float32_is_as_exact_as_the_computed_forward(plain, name):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(name), plain.prompt_of(layout)
    advantage = torch.randn(layout.batch_size, layout.num_anchors, layout.samples, 1, generator=generator(3))
    recorded, tokens, _ = drawn(model, prompt, layout)
    found = []
    for m, record in ((model, recorded), (model, None), (plain.double(model), None)):
        log_probs, of_prompt = policy_log_probs(
            m, prompt, tokens, layout, temperature=0.8, score_prompt=True, recorded=record
        )
        found.append(gradients(m, (log_probs * advantage).mean() - of_prompt.mean()))
    assert_gradients_within_budget(found[0], eager=found[1], truth=found[2])


@pytest.mark.parametrize("how", ("autocast", "bfloat16"))
def test_16_bits(plain, how):
    """The head is computed there, over hidden states that are replayed."""
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(dtype=torch.bfloat16 if how == "bfloat16" else torch.float32), plain.prompt_of(layout)
    advantage = torch.randn(layout.batch_size, layout.num_anchors, layout.samples, 1, generator=generator(3))
    found, scores = [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        recorded, tokens, _ = drawn(model, prompt, layout)
        for record in (recorded, None):
            log_probs, _ = policy_log_probs(model, prompt, tokens, layout, temperature=0.8, recorded=record)
            scores.append(log_probs)
    exact = plain.double(model)
    scores.append(policy_log_probs(exact, prompt, tokens, layout, temperature=0.8)[0])
    for m, log_probs in zip((model, model, exact), scores, strict=True):
        found.append(gradients(m, (log_probs * advantage).mean()))
    assert_gradients_within_budget(found[0], eager=found[1], truth=found[2])


def test_it_repeats_to_the_last_bit_and_accumulates(plain):
    layout = plain.layouts["uneven"]()
    model, prompt = plain.build("gemma2"), plain.prompt_of(layout)
    network = FeatureNetwork(model)

    def loss(seed):
        return ebft_step(model, network, prompt, layout, options(), generator=generator(seed)).loss

    alone = [gradients(model, loss(seed)) for seed in (1, 2, 1)]
    assert all(torch.equal(x, alone[2][name]) for name, x in alone[0].items())
    model.zero_grad()
    for seed in (1, 2):
        loss(seed).backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, alone[0][name] + alone[1][name]), name


def with_dropout(plain):
    model = plain.build().train()
    decoder_layers(model)[1].mlp.add_module("dropout", nn.Dropout(0.1))
    return model.train()


def with_lora_dropout(plain):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.2)
    return get_peft_model(plain.build(), config).train()


def built(name, **changes):
    """A model whose config has names of its own."""
    sizes = {"vocab_size": 61, "max_position_embeddings": 64, "eos_token_id": None, "bos_token_id": None}
    config = AutoConfig.for_model(name, **sizes, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def with_functional_dropout(_plain):
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    return built("opt", **sizes, dropout=0.3, attention_dropout=0.0, pad_token_id=None)


def with_other_layers(_plain):
    return built("gpt2", n_embd=32, n_layer=4, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def checkpointed(plain):
    model = plain.build().train()
    model.gradient_checkpointing_enable()
    return model


def hooked(plain):
    model = plain.build()
    decoder_layers(model)[2].mlp.down_proj.register_forward_hook(lambda *_: None)
    return model


def wrapped(plain):
    model = plain.build()
    layer = decoder_layers(model)[2].mlp.down_proj
    layer.forward = lambda x: nn.Linear.forward(layer, x)
    return model


def compiled(plain):
    model = plain.build()
    decoder_layers(model)[1].compile()
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    (
        (with_other_layers, "h.0.attn.c_attn: Conv1D multiplies with weights, and is no nn.Linear"),
        (lambda plain: plain.build("mixtral"), "multiplies with weights, and is no nn.Linear"),
        (lambda plain: plain.build("gpt_oss"), "multiplies with weights, and is no nn.Linear"),
        (with_dropout, r"layers.1.mlp.dropout: dropout in train mode \(p=0.1\)"),
        (with_lora_dropout, r"lora_dropout.default: dropout in train mode \(p=0.2\)"),
        (with_functional_dropout, r"noise or dropout \(dropout=0.3\) in train mode"),
        (checkpointed, "gradient checkpointing keeps no activations"),
        (hooked, "layers.2.mlp.down_proj: its forward is wrapped or hooked"),
        (wrapped, "layers.2.mlp.down_proj: its forward is wrapped or hooked"),
        (compiled, "the model is compiled"),
    ),
)
def test_what_is_not_known_is_computed(plain, caplog, build, reason):
    model, layout = build(plain), plain.layouts["strided"]()
    assert re.search(reason, replay_obstacle(model))
    found = []
    with caplog.at_level(logging.INFO, "ebft_trainer.replay"):
        for replay in (True, False):
            found.append(recorded_rollouts(model, layout, options(replay_rollouts=replay)))
    assert found == [None, None]
    first, second = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(f"the policy's forward is computed again: .*{reason}", first)
    assert second == "the policy's forward is computed again: replay_rollouts is off"


def test_what_happens_is_said_once(plain, caplog):
    model, layout = plain.build(), plain.layouts["strided"]()
    with caplog.at_level(logging.INFO, "ebft_trainer.replay"):
        for _ in range(2):
            both_ways(model, plain.prompt_of(layout), layout)
            both_ways(model, plain.prompt_of(layout), layout)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [
        "the policy's forward is replayed from decoding",
        "the policy's forward is computed again: replay_rollouts is off",
    ]


def test_a_layer_that_runs_twice_is_found_while_recording(plain, caplog):
    model, layout = plain.build(), plain.layouts["strided"]()
    layers = decoder_layers(model)
    layers[1].mlp = layers[0].mlp
    assert replay_obstacle(model) == ""
    with caplog.at_level(logging.INFO, "ebft_trainer.replay"):
        (replayed, found), (computed, expected) = both_ways(model, plain.prompt_of(layout), layout)
    assert "computed again: layers.0.mlp.gate_proj does not run once in each forward" in caplog.text
    assert torch.equal(replayed.loss, computed.loss)
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_bad_input(plain):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    recording, cache = ForwardRecording(model, layout), StridedCache(layout)

    def run(rows=layout, **arguments):
        with strided_attention_context(model, rows, **arguments) as kwargs:
            model(input_ids=prompt, **kwargs)

    with pytest.raises(TypeError, match="recording: expected a ForwardRecording, got int"):
        run(cache=cache, recording=3)
    other = plain.layouts["strided"]()
    with pytest.raises(ValueError, match="recording: expected one of this layout"):
        run(other, cache=StridedCache(other), recording=recording)
    with pytest.raises(ValueError, match="recording: expected one of this layout"):
        run(recording=recording)
    with pytest.raises(ValueError, match="step: expected less than 3 with a recording, got 3"):
        run(cache=cache, step=3, recording=recording)
    run(cache=cache, recording=recording)
    with pytest.raises(ValueError, match="can be replayed: layers.0.self_attn.q_proj ran in 1 of 4 forwards"):
        run(recording.layout, recording=recording)
    with pytest.raises(TypeError, match="layout: expected a StridedLayout, got int"):
        ForwardRecording(model, 3)
    assert not any("forward" in vars(module) for module in model.modules())
