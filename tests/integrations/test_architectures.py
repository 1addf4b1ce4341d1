"""Every supported architecture against ordinary eager forwards over each prefix and rollout alone.

The float64 models are held to the error that the plain model makes in float32: most architectures compute softmax,
norms and rotary angles in float32 whatever their dtype.
"""

from __future__ import annotations

import pytest
import torch

from ebft_kernels.integrations.transformers import (
    StridedCache,
    check_model,
    decoder_layers,
    hidden_states,
    output_head,
    strided_attention_context,
)
from ebft_kernels.testing import assert_within_budget, error_budget, randn


def packed_logits(model, tokens, layout):
    with strided_attention_context(model, layout) as kwargs:
        return model(input_ids=tokens, **kwargs).logits


def cached_logits(model, tokens, layout):
    """The same rows from a prompt pass and one forward per step."""
    cache = StridedCache(layout)
    with strided_attention_context(model, layout, cache=cache) as kwargs:
        prompt = model(input_ids=tokens[:, : layout.length], **kwargs).logits
    steps = []
    for step in range(layout.horizon):
        with strided_attention_context(model, layout, cache=cache, step=step) as kwargs:
            steps.append(model(input_ids=layout.step_rows(tokens, step), **kwargs).logits)
    return torch.cat([prompt, torch.stack(steps, 2).flatten(1, 2)], 1)


def policy_loss(rows, predictors, tokens, layout):
    """Next-token cross-entropy of the prompt plus randomly weighted log-probabilities of the rollouts."""
    prompt = rows[:, : layout.length - 1].log_softmax(-1)
    prompt = prompt.gather(-1, tokens[:, 1 : layout.length, None]).squeeze(-1)
    rollouts = predictors.log_softmax(-1).gather(-1, layout.rollouts(tokens)[..., None]).squeeze(-1)
    weights = randn(*rollouts.shape, seed=7, dtype=rollouts.dtype)
    return (weights * rollouts).sum() - prompt.mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@torch.no_grad()
def test_packed_logits_equal_plain_forwards(case):
    packed = packed_logits(case.exact, case.tokens, case.layout)
    assert_within_budget(packed.float(), case.eager[0], case.truth[0], "float64 logits")
    packed = packed_logits(case.single, case.tokens, case.layout)
    assert_within_budget(packed, case.eager[0], case.truth[0], "float32 logits")
    predictors = case.layout.predictors(packed)
    assert_within_budget(predictors, case.eager[1], case.truth[1], "float32 logits of the predicting rows")


@torch.no_grad()
def test_cached_decoding_equals_plain_forwards(case):
    cached = cached_logits(case.exact, case.tokens, case.layout)
    assert_within_budget(cached.float(), case.eager[0], case.truth[0], "float64 logits")
    cached = cached_logits(case.single, case.tokens, case.layout)
    assert_within_budget(cached, case.eager[0], case.truth[0], "float32 logits")


def test_gradients_equal_those_of_plain_forwards(case, tiny):
    """Through hidden_states and output_head, as a trainer goes."""
    tokens, layout = case.tokens, case.layout
    plain = {
        model: gradients(model, policy_loss(*tiny.plain_logits(model, tokens, layout), tokens, layout))
        for model in (case.exact, case.single)
    }
    logits = output_head(case.exact).logits(hidden_states(case.exact, tokens, layout))
    packed = gradients(case.exact, policy_loss(logits, layout.predictors(logits), tokens, layout))
    truth = plain[case.exact]
    assert packed.keys() == truth.keys()
    for name, eager in plain[case.single].items():
        error = (packed[name] - truth[name]).abs().max()
        assert error <= error_budget(eager, truth[name], torch.float32), name


@torch.no_grad()
def test_the_output_head_gives_the_logits(case):
    head = output_head(case.exact)
    logits = head.logits(hidden_states(case.exact, case.tokens, case.layout))
    expected = packed_logits(case.exact, case.tokens, case.layout)
    rounding = torch.finfo(torch.float64).eps * expected.abs().max()
    assert (logits - expected).abs().max() <= 4 * rounding
    assert head.weight is case.exact.get_output_embeddings().weight


def test_decoder_layers_are_the_blocks_in_order(case):
    layers = decoder_layers(case.single)
    assert len(layers) == case.single.config.num_hidden_layers
    order = []
    handles = [layer.register_forward_pre_hook(lambda module, _: order.append(module)) for layer in layers]
    case.single(input_ids=case.tokens[:, :3])
    for handle in handles:
        handle.remove()
    assert order == list(layers)


def test_the_check_accepts_the_model_and_leaves_it_as_it_was(case):
    model = case.single.train()
    layers = decoder_layers(model)
    layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, setting = torch.get_rng_state(), model.config._attn_implementation
    config = model.config.to_dict()
    support = check_model(model)
    assert support == (True, "", model.config.model_type)
    support.require()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == setting == "eager"
    assert model.config.to_dict() == config
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2", "gpt_oss", "gemma2"])
@torch.no_grad()
def test_documents_padding_and_anchors_anywhere(name, tiny):
    layout = tiny.uneven_layout()
    tokens = tiny.tokens_of(layout)
    exact, single = tiny.build(name, dtype=torch.float64), tiny.build(name)
    truth, eager = tiny.plain_logits(exact, tokens, layout), tiny.plain_logits(single, tokens, layout)
    defined = truth[0].isfinite()
    assert 0 < defined.sum() < defined.numel()
    for run in (packed_logits, cached_logits):
        logits = run(single, tokens, layout)
        assert logits.isfinite().all()
        assert_within_budget(logits[defined], eager[0][defined], truth[0][defined], f"{run.__name__}")
    valid = layout.valid
    predictors = layout.predictors(logits)
    assert_within_budget(predictors[valid], eager[1][valid], truth[1][valid], "predicting rows")


@pytest.mark.parametrize("window", (2**31, 2**32 + 3, 2**63 - 1))
@torch.no_grad()
def test_a_window_longer_than_every_sequence_is_no_window(window, tiny):
    """A window that 32 bits cut to 3 would hide tokens."""
    layout = tiny.strided_layout()
    tokens = tiny.tokens_of(layout)
    windowed, plain = tiny.build("mistral", sliding_window=window), tiny.build("mistral")
    assert check_model(windowed).ok
    for run in (packed_logits, cached_logits):
        assert torch.equal(run(windowed, tokens, layout), run(plain, tokens, layout))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_bfloat16(name, tiny):
    layout = tiny.strided_layout()
    tokens = tiny.tokens_of(layout)
    half = tiny.build(name, dtype=torch.bfloat16)
    truth = tiny.plain_logits(tiny.build(name, dtype=torch.bfloat16).double(), tokens, layout)[0]
    eager = tiny.plain_logits(half, tokens, layout)[0]
    for run in (packed_logits, cached_logits):
        logits = run(half, tokens, layout)
        assert logits.dtype == torch.bfloat16
        assert_within_budget(logits, eager, truth, run.__name__)
    assert check_model(half).ok


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_autocast(name, tiny):
    """Under autocast rotary embeddings promote q and k to float32 and leave v in bfloat16."""
    layout = tiny.strided_layout()
    tokens = tiny.tokens_of(layout)
    model, exact = tiny.build(name), tiny.build(name, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = tiny.plain_logits(exact, tokens, layout)[0]
        # torch's own attention is what a plain call under autocast runs.
        model.set_attn_implementation("sdpa")
        with torch.autocast("cpu", torch.bfloat16):
            eager = tiny.plain_logits(model, tokens, layout)[0]
            for run in (packed_logits, cached_logits):
                assert_within_budget(run(model, tokens, layout), eager, truth, run.__name__)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = hidden_states(model, tokens, layout)
    hidden.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_changing_one_rollout_changes_no_other_row(case):
    layout = case.layout
    changed = case.tokens.clone()
    layout.rollouts(changed)[0, 1, 0, 0] += 1
    with torch.no_grad():
        before = packed_logits(case.exact, case.tokens, layout)
        after = packed_logits(case.exact, changed, layout)
    differs = (before != after).any(-1)
    own = torch.zeros_like(differs)
    layout.rollouts(own)[0, 1, 0] = True
    assert torch.equal(differs, own)
