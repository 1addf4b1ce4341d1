"""What the context selects and restores, and what happens to forwards that carry no layout."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from ebft_kernels import StridedLayout
from ebft_kernels.integrations.transformers import (
    StridedCache,
    hidden_states,
    strided_arguments,
    strided_attention_context,
)


@pytest.fixture
def layout(tiny):
    return tiny.strided_layout()


@pytest.fixture
def tokens(tiny, layout):
    return tiny.tokens_of(layout)


def test_the_function_is_registered_when_the_module_is_imported_and_not_before():
    code = (
        "import sys, ebft_kernels; assert 'transformers' not in sys.modules;"
        "from transformers import AttentionInterface as A; assert 'strided' not in A();"
        "import ebft_kernels.integrations.transformers; assert 'strided' in A()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("setting", ["eager", "sdpa", "strided"])
def test_the_setting_comes_back(tiny, layout, setting):
    model = tiny.build("llama")
    model.set_attn_implementation(setting)
    with strided_attention_context(model, layout):
        assert model.config._attn_implementation == "strided"
        with strided_attention_context(model, layout.without_last_step()):
            assert model.config._attn_implementation == "strided"
        assert model.config._attn_implementation == "strided"
    assert model.config._attn_implementation == setting
    with pytest.raises(RuntimeError, match="stop"), strided_attention_context(model, layout):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == setting


def test_only_the_decoder_of_a_multimodal_model_is_switched(tiny, layout, tokens):
    text = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": tiny.window}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=66)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with strided_attention_context(model, layout) as kwargs:
        assert model.config.text_config._attn_implementation == "strided"
        assert model.config.vision_config._attn_implementation == "sdpa"
        packed = model(input_ids=tokens, **kwargs).logits
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    tiny.assert_plain_logits(packed, model, tokens, layout)


def test_layers_with_a_config_of_their_own_are_switched_too(tiny, layout, tokens):
    model = tiny.build("llama")
    with torch.no_grad():
        expected = hidden_states(model, tokens, layout)
        # A fresh copy, so that nothing is known of the model yet.
        model = copy.deepcopy(model)
        attention = model.model.layers[1].self_attn
        attention.config = copy.deepcopy(attention.config)
        assert torch.equal(hidden_states(model, tokens, layout), expected)
    assert attention.config._attn_implementation == "eager"


def test_plain_calls_outside_the_context_do_not_change(tiny, layout, tokens):
    model = tiny.build("mistral_window")
    prompt = tokens[:, : layout.length]

    def plain_calls():
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
        return model(input_ids=prompt, labels=prompt).loss, generated

    before = plain_calls()
    with torch.no_grad(), strided_attention_context(model, layout) as kwargs:
        model(input_ids=tokens, **kwargs)
    for old, new in zip(before, plain_calls(), strict=True):
        assert torch.equal(old, new)


def test_a_forward_inside_the_context_without_its_arguments_is_refused(tiny, layout, tokens):
    model = tiny.build("llama")
    with strided_attention_context(model, layout), pytest.raises(ValueError, match="llama: the layout did not reach"):
        model(input_ids=tokens)


def test_each_of_the_two_carriers_is_enough(tiny, layout, tokens):
    model = tiny.build("llama")
    with torch.no_grad(), strided_attention_context(model, layout) as kwargs:
        both = model(input_ids=tokens, **kwargs).logits
        keyword = model(input_ids=tokens, **kwargs | {"attention_mask": kwargs["attention_mask"].clone()}).logits
        mask = model(input_ids=tokens, **{k: v for k, v in kwargs.items() if k != "strided_layout"}).logits
    assert torch.equal(both, keyword) and torch.equal(both, mask)


def test_a_lost_layout_is_an_error_in_any_attention(tiny, layout, tokens):
    model = tiny.build("llama")
    with strided_attention_context(model, layout) as kwargs:
        lost = kwargs | {"attention_mask": kwargs["attention_mask"].clone()}
        del lost["strided_layout"]
        with pytest.raises(ValueError, match="llama: the layout did not reach"):
            model(input_ids=tokens, **lost)
    for setting in ("eager", "sdpa", "strided"):
        model.set_attn_implementation(setting)
        with pytest.raises((RuntimeError, ValueError)):
            model(input_ids=tokens, **lost)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2", "gemma3_text"])
@torch.no_grad()
def test_a_model_left_at_strided_runs_plain_calls_as_sdpa(tiny, name):
    prompt = tiny.tokens_of(tiny.strided_layout())[:, :9]
    padding = torch.ones_like(prompt)
    padding[0, :3] = 0
    results = []
    for setting in ("sdpa", "strided"):
        model = tiny.build(name)
        model.set_attn_implementation(setting)
        padded = model(input_ids=prompt, attention_mask=padding).logits
        generated = model.generate(prompt, attention_mask=padding, max_new_tokens=4, do_sample=False)
        results.append((model(input_ids=prompt).logits, padded, generated))
    for sdpa, strided in zip(*results, strict=True):
        assert torch.equal(sdpa, strided)


@pytest.mark.parametrize(("name", "feature"), [("gemma2", "softcap"), ("gpt_oss", "sinks")])
def test_a_model_left_at_strided_refuses_plain_calls_that_sdpa_gets_wrong(tiny, name, feature):
    model = tiny.build(name)
    model.set_attn_implementation("strided")
    with pytest.raises(ValueError, match=feature):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_model_set_to_strided_by_its_user(tiny, layout, tokens, name, checkpointing):
    """`set_attn_implementation` and the arguments alone: the numbers and gradients of the context."""
    found = []
    for by_user in (False, True):
        model = tiny.build(name)
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable()
        if by_user:
            model.set_attn_implementation("strided")
            logits = model(input_ids=tokens, **strided_arguments(model, layout)).logits
        else:
            with strided_attention_context(model, layout) as kwargs:
                logits = model(input_ids=tokens, **kwargs).logits
        logits.square().sum().backward()
        found.append((logits.detach(), {parameter: p.grad for parameter, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(grad, found[1][1][parameter]) for parameter, grad in found[0][1].items())
    assert model.config._attn_implementation == "strided"


@pytest.mark.parametrize("setting", ["eager", "sdpa"])
def test_arguments_for_a_model_at_another_setting_are_refused(tiny, layout, setting):
    model = tiny.build("llama")
    model.set_attn_implementation(setting)
    message = f"llama: expected attn_implementation 'strided', got '{setting}': call model.set_attn_implementation"
    with pytest.raises(ValueError, match=message):
        strided_arguments(model, layout)
    model.set_attn_implementation("strided")
    with pytest.raises(TypeError, match="layout: expected a StridedLayout, got int"):
        strided_arguments(model, 3)
    with strided_attention_context(model, layout), pytest.raises(ValueError, match="the layout did not reach"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_entering_does_not_read_weights_or_walk_modules(tiny, layout, monkeypatch):
    model, cache = tiny.build("llama"), StridedCache(layout)
    with strided_attention_context(model, layout, cache=cache, step=0):
        pass
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("walked the modules"))
    for step in range(layout.horizon):
        with strided_attention_context(model, layout, cache=cache, step=step) as kwargs:
            assert kwargs["position_ids"].data_ptr() == layout.step_rows(layout.position_ids, step).data_ptr()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": 0}, ValueError, "step: expected None without a cache, got 0"),
        ({"cache": "other"}, ValueError, "cache: expected the cache of this layout"),
        ({"cache": object()}, TypeError, "cache: expected a StridedCache, got object"),
        ({"cache": "own", "step": 3}, ValueError, "step: expected less than horizon = 3, got 3"),
        ({"cache": "own", "step": -1}, ValueError, "step: expected at least 0, got -1"),
        ({"cache": "own", "step": 0.5}, TypeError, "step: expected an int, got float"),
    ],
)
def test_bad_arguments(tiny, layout, options, error, message):
    if options.get("cache") == "own":
        options = options | {"cache": StridedCache(layout)}
    if options.get("cache") == "other":
        options = options | {"cache": StridedCache(tiny.strided_layout())}
    with pytest.raises(error, match=message), strided_attention_context(tiny.build("llama"), layout, **options):
        pass


def test_what_is_no_model_or_no_layout_is_named(tiny, layout):
    with pytest.raises(TypeError, match="model: expected a transformers model or a wrapper of one, got Linear"):
        hidden_states(nn.Linear(2, 2), torch.ones(1, 2), layout)
    with (
        pytest.raises(TypeError, match="layout: expected a StridedLayout, got int"),
        strided_attention_context(tiny.build("llama"), 3),
    ):
        pass


def test_a_cache_needs_its_context_and_the_prompt_pass(tiny, layout, tokens):
    model, cache = tiny.build("llama"), StridedCache(layout)
    with pytest.raises(RuntimeError, match="only inside strided_attention_context"):
        model(input_ids=tokens[:, : layout.length], past_key_values=cache)
    with (
        strided_attention_context(model, layout, cache=cache, step=0) as kwargs,
        pytest.raises(RuntimeError, match="the prompt pass must come before"),
    ):
        model(input_ids=layout.step_rows(tokens, 0), **kwargs)


@torch.no_grad()
def test_a_cache_can_be_used_again(tiny, layout, tokens):
    """A second prompt pass overwrites the first; one buffer of the packed length per layer, allocated once."""
    model, cache = tiny.build("mistral_window"), StridedCache(layout)
    results, buffers = [], []
    for prompt in (tokens[:, : layout.length], tokens[:, : layout.length].flip(1), tokens[:, : layout.length]):
        with strided_attention_context(model, layout, cache=cache) as kwargs:
            model(input_ids=prompt, **kwargs)
        with strided_attention_context(model, layout, cache=cache, step=0) as kwargs:
            results.append(model(input_ids=layout.step_rows(tokens, 0), **kwargs).logits)
        buffers.append([layer.keys.data_ptr() for layer in cache.layers])
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    assert buffers[0] == buffers[1] == buffers[2]
    assert all(layer.keys.shape == (2, 2, layout.packed_length, 8) for layer in cache.layers)


def test_a_cache_is_freed_with_its_last_reference(tiny, layout, tokens):
    """Without waiting for a garbage collection: the training pass that follows needs the memory."""
    model, cache = tiny.build("llama"), StridedCache(layout)
    with torch.no_grad():
        hidden_states(model, tokens[:, : layout.length], layout, cache=cache)
    buffer = weakref.ref(cache.layers[0].keys)
    gc.disable()
    try:
        del cache
        assert buffer() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_a_horizon_of_one_leaves_a_policy_pass_over_the_prompt_alone(tiny):
    layout = StridedLayout.strided(2, 10, context=4, stride=3, horizon=1, samples=2)
    tokens = tiny.tokens_of(layout)
    model = tiny.build("llama")
    short = layout.without_last_step()
    hidden = hidden_states(model, tokens[:, : layout.length], short)
    whole = hidden_states(model, tokens, layout)
    torch.testing.assert_close(layout.predictors(hidden), layout.predictors(whole))
