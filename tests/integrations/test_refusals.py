"""Models that would give wrong numbers are refused before they do, naming architecture and feature."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebft_kernels.integrations import _model_check, _strided_attention
from ebft_kernels.integrations.transformers import check_length, check_model, strided_attention_context

STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}
STATIC = {
    "qwen3_next": ({}, "layers of type 'linear_attention'"),
    "bamba": (STATE_SPACE | {"attn_layer_indices": [1]}, "layers of type"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "ignores transformers' AttentionInterface"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "ignores transformers' AttentionInterface"),
    "llama4_text": ({"attention_chunk_size": 8, "num_local_experts": 2}, "chunked"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type 'conv'"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic' RoPE"),
    "phi3": ({"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 32}, "'longrope' RoPE"),
}


@pytest.mark.parametrize("name", ["gptj", "codegen"])
def test_what_transformers_learned_in_5_24_is_refused_or_right(tiny, name):
    """It uses the attention interface since then; that its logits are right has been measured where it is accepted."""
    support = check_model(tiny.build(name, **SMALL, rotary_dim=4))
    assert support.ok or "ignores transformers' AttentionInterface" in support.reason


@pytest.mark.parametrize("name", STATIC)
def test_refused_from_class_and_config(tiny, name):
    changes, feature = STATIC[name]
    model = tiny.build(name, **changes)
    support = check_model(model)
    assert not support.ok and support.architecture == name and feature in support.reason
    with pytest.raises(ValueError, match=f"^{name}: cannot be run strided: .*{feature}"):
        support.require()
    with (
        pytest.raises(ValueError, match=f"^{name}: cannot be run strided: .*{feature}"),
        strided_attention_context(model, tiny.strided_layout()),
    ):
        pass


def test_a_convolution_between_the_layers_is_refused(tiny):
    model = tiny.build("llama")
    model.model.layers[1].mlp.mix = nn.Conv1d(32, 32, 3)
    assert "a convolution over tokens (layers.1.mlp.mix)" in check_model(model).reason


class _Cumulative(nn.Module):
    """A layer that carries something from token to token in a way that no config tells."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.1 * x.cumsum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_dependence_between_tokens_is_measured(tiny, dtype):
    model = tiny.build("llama", dtype=dtype)
    model.model.layers[0].mlp = _Cumulative(model.model.layers[0].mlp)
    support = check_model(model)
    assert not support.ok and "ignores the layout" in support.reason


# What begins beyond the few tokens of the first measurement


class _CumulativeFrom(nn.Module):
    """A layer that carries something from token to token, from some row of the call on."""

    def __init__(self, inner: nn.Module, first: int) -> None:
        super().__init__()
        self.inner, self.first = inner, first

    def forward(self, x):
        late = torch.arange(x.shape[1], device=x.device)[:, None] >= self.first
        return self.inner(x) + 0.1 * (x * late).cumsum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_begins_beyond_the_short_measurement_is_measured_at_the_trained_length(tiny, dtype):
    model = tiny.build("llama", dtype=dtype)
    assert check_length(model, 60).ok
    model.model.layers[0].mlp = _CumulativeFrom(model.model.layers[0].mlp, 40)
    assert check_model(model).ok and check_length(model, 20).ok
    support = check_length(model, 60)
    assert not support.ok and support.architecture == "llama"
    assert "the logits of a packed forward over 60 tokens differ from those of plain forwards" in support.reason


@pytest.mark.parametrize("op", ["strided_attention", "strided_attention_step"])
def test_a_window_that_is_wrong_only_where_it_matters_is_measured(tiny, monkeypatch, op):
    """In the packed forward and in cached decoding; as of a window that is lost in a narrow integer."""
    model = tiny.build("mistral", sliding_window=40)
    original = getattr(_strided_attention, op)
    monkeypatch.setattr(_strided_attention, op, lambda *args, **options: original(*args, **options | {"window": 30}))
    assert check_model(model).ok
    what = {"strided_attention": "a packed forward", "strided_attention_step": "cached decoding"}[op]
    assert f"{what} over 60 tokens" in check_length(model, 60).reason
    assert "failed with IndexError" in check_length(tiny.build("gpt2"), 2000).reason
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        check_length(model, 0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2", "mistral_window", "deepseek_v3"])
def test_right_models_pass_at_any_length_and_stay_as_they_are(tiny, name, monkeypatch):
    monkeypatch.setattr(_model_check, "_PIECE", 16)
    model = tiny.build(name).train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    state = torch.random.get_rng_state()
    for length in (1, 9, 47, 48):
        assert check_length(model, length) == (True, "", model.config.model_type)
    assert model.training and model.config._attn_implementation == "eager"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_the_measurement_at_a_length_holds_no_scores_of_all_pairs(tiny, monkeypatch):
    """Eager attention would have heads x length x length of them."""
    monkeypatch.setattr(_model_check, "_PIECE", 64)
    model, length = tiny.build("gemma2"), 1000

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.numel = max(self.numel, *sizes, 0)
            return out

    with Largest() as largest:
        assert check_length(model, length).ok
    assert largest.numel < 4 * 64 * 1.1 * length < 4 * length * length / 10


# Weights that are not numbers: nothing is known of the layout then


@pytest.mark.parametrize(("name", "value"), [("model.layers.1.mlp.up_proj.weight", "nan"), ("lm_head.weight", "inf")])
def test_weights_that_are_not_finite_are_named(tiny, name, value):
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_parameter(name)[3, 5] = float(value)
        model.model.norm.weight[0] = float("nan")
    first = min(name, "model.norm.weight", key=[name for name, _ in model.named_parameters()].index)
    with pytest.raises(
        ValueError, match=f"llama: .*its weights are not finite: NaN or infinity in {first} and 1 other"
    ):
        check_model(model).require()
    model = tiny.build("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    assert "its logits are not finite for ordinary tokens, though its weights are" in check_model(model).reason


def test_a_model_that_adds_its_own_bias_is_refused(tiny):
    """Doge turns the mask into a learned bias; it is constant in a random model, so that no number would tell."""
    support = check_model(tiny.build("doge"))
    assert not support.ok and support.architecture == "doge"


def test_a_sliding_window_that_stays_in_the_mask_is_refused(tiny):
    support = check_model(tiny.build("phimoe", sliding_window=40, num_local_experts=2))
    assert not support.ok and "sliding window of layer 0 does not reach" in support.reason
    assert check_model(tiny.build("phimoe", sliding_window=None, num_local_experts=2)).ok


def test_attention_dropout_is_refused_for_training(tiny):
    model = tiny.build("llama", attention_dropout=0.1)
    layout = tiny.strided_layout()
    support = check_model(model)
    assert not support.ok and "attention_dropout=0.1" in support.reason
    assert check_model(model, training=False).ok
    with strided_attention_context(model, layout) as kwargs:
        model(input_ids=tiny.tokens_of(layout), **kwargs)
        model.train()
        with pytest.raises(ValueError, match="llama: attention dropout 0.1"):
            model(input_ids=tiny.tokens_of(layout), **kwargs)


def test_a_model_that_fails_is_reported(tiny):
    model = tiny.build("llama")
    model.model.layers[1].self_attn.is_causal = False
    support = check_model(model)
    assert not support.ok and "attention that is not causal" in support.reason


def test_an_encoder_is_refused(tiny):
    assert not check_model(tiny.build("bert", is_decoder=False, num_attention_heads=4)).ok


@pytest.mark.parametrize("feature", ["position_bias", "indices", "head_mask", "cu_seq_lens_q", "something_new"])
def test_an_unknown_keyword_is_refused_unless_it_is_off(tiny, feature):
    layout = tiny.strided_layout()
    call = _strided_attention.StridedCall(layout, None, frozenset())
    module = nn.Module()
    module.config = SimpleNamespace(model_type="made_up")
    q = torch.randn(2, 2, layout.packed_length, 8)
    arguments = {"strided_layout": call, "use_cache": False, "position_ids": layout.position_ids}
    out, weights = _strided_attention.strided_attention_forward(module, q, q, q, None, **arguments, **{feature: None})
    assert out.shape == (2, layout.packed_length, 2, 8) and out.is_contiguous() and weights is None
    with pytest.raises(ValueError, match=f"made_up: its attention asks for '{feature}'"):
        _strided_attention.strided_attention_forward(module, q, q, q, None, **arguments, **{feature: torch.ones(1)})


def test_a_mask_beside_the_layout_is_refused(tiny):
    """An architecture that builds a bias of its own puts it where the mask belongs."""
    layout = tiny.strided_layout()
    model = tiny.build("llama")
    with strided_attention_context(model, layout) as kwargs:
        own = torch.zeros(2, 1, layout.packed_length, layout.packed_length)
        with pytest.raises(ValueError, match="llama: its attention adds a mask or bias of its own"):
            model(input_ids=tiny.tokens_of(layout), **kwargs | {"attention_mask": own})


def test_prompt_learning_is_refused(tiny):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny.build("llama"), config)
    support = check_model(model)
    assert support.architecture == "llama" and "PEFT prompt learning" in support.reason
