"""Gradients under what trainers do to models: checkpointing, adapters, wrappers, experts' losses, train mode."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from ebft_kernels.integrations import transformers as strided
from ebft_kernels.integrations.transformers import (
    StridedCache,
    apply_head,
    check_model,
    decoder_layers,
    hidden_states,
    output_head,
    strided_attention_context,
)
from ebft_kernels.testing import assert_within_budget


@pytest.fixture
def layout(tiny):
    return tiny.strided_layout()


@pytest.fixture
def tokens(tiny, layout):
    return tiny.tokens_of(layout)


def gradients(model, tokens, layout):
    """Gradients of a loss whose backward pass runs after the context was left."""
    model.zero_grad()
    hidden = hidden_states(model, tokens, layout)
    weight = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of_head(model, tokens, layout):
    """From two tensors that are made of the hidden state and the head's weight."""
    rows, logits = apply_head(model, tokens, layout, lambda hidden, head: (hidden[:, 3], head.logits(hidden)))
    return logits.square().mean() + rows.sum()


def head_gradients(model, tokens, layout):
    model.zero_grad()
    loss_of_head(model, tokens, layout).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2", "gpt_neox", "gpt_oss", "gemma2", "stablelm"])
def test_gradient_checkpointing_changes_nothing(tiny, layout, tokens, name, reentrant):
    model = tiny.build(name).train()
    expected = gradients(model, tokens, layout)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(gradients(model, tokens, layout), expected)
    assert model.config._attn_implementation == "eager"
    gc.collect()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_checkpointed_forwards_and_a_plain_one_before_the_backward_pass(tiny, layout, tokens):
    """As with gradient accumulation over two layouts, with an evaluation in between."""
    model = tiny.build("llama").train()
    other = tiny.uneven_layout()

    def loss():
        first = hidden_states(model, tokens, layout).square().mean()
        second = hidden_states(model, tiny.tokens_of(other), other).square().mean()
        plain = model(input_ids=tokens[:, :8]).logits.square().mean()
        return first + second + plain

    def backward():
        model.zero_grad()
        loss().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(backward(), expected)


def test_a_cache_under_checkpointing_in_train_mode_is_refused(tiny, layout):
    model = tiny.build("llama").train()
    model.gradient_checkpointing_enable()
    with (
        pytest.raises(ValueError, match="cache: gradient checkpointing in train mode"),
        strided_attention_context(model, layout, cache=StridedCache(layout)),
    ):
        pass
    with strided_attention_context(model.eval(), layout, cache=StridedCache(layout)):
        pass


@torch.no_grad()
def test_train_mode_without_dropout_is_eval_mode(tiny, layout, tokens):
    model = tiny.build("qwen3")
    evaluated = hidden_states(model, tokens, layout)
    assert torch.equal(hidden_states(model.train(), tokens, layout), evaluated)


def test_the_head_runs_on_one_row(tiny, layout, tokens):
    model = tiny.build("llama")
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    hidden = hidden_states(model, tokens, layout)
    assert rows == [1] and hidden.shape == (2, layout.packed_length, 32)


def test_hidden_states_of_the_cached_phases(tiny, layout, tokens):
    model, cache = tiny.build("llama"), StridedCache(layout)
    packed = hidden_states(model, tokens, layout)
    truth = hidden_states(tiny.build("llama", dtype=torch.float64), tokens, layout)
    prompt = hidden_states(model, tokens[:, : layout.length], layout, cache=cache)
    assert_within_budget(prompt, packed[:, : layout.length], truth[:, : layout.length])
    for step in range(layout.horizon):
        hidden = hidden_states(model, layout.step_rows(tokens, step), layout, cache=cache, step=step)
        assert_within_budget(hidden, layout.step_rows(packed, step), layout.step_rows(truth, step))


class _Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, **kwargs):
        self.calls += 1
        return self.module(**kwargs)


def test_the_forward_goes_through_the_wrapper(tiny, layout, tokens):
    model = tiny.build("llama")
    wrapper = _Wrapper(model)
    assert torch.equal(hidden_states(wrapper, tokens, layout), hidden_states(model, tokens, layout))
    assert wrapper.calls == 1
    assert check_model(wrapper).ok and wrapper.calls > 1
    assert output_head(wrapper).weight is model.lm_head.weight
    assert decoder_layers(wrapper) is model.model.layers


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_distributed_data_parallel(tiny, layout, tokens):
    """All parameters take part, the head too, whose logits are computed in the wrapper's forward."""

    def step(model):
        model.zero_grad()
        loss_of_head(model, tokens, layout).backward()
        return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}

    model = tiny.build("llama").train()
    expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(step(nn.parallel.DistributedDataParallel(model)), expected)


@pytest.mark.parametrize("whole", ["model", "model, head", "model, head and norm"])
@pytest.mark.usefixtures("one_rank")
def test_a_sharded_head(tiny, layout, tokens, whole):
    """Its weight is gathered for its own forward, freed after it, and gathered again for the backward pass."""
    expected = head_gradients(tiny.build("llama").train(), tokens, layout)
    model = tiny.build("llama").train()
    for layer in decoder_layers(model):
        fully_shard(layer)
    if "head" in whole:
        fully_shard([model.model.norm, model.lm_head] if "norm" in whole else model.lm_head, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)
    for _ in range(2):
        with torch.no_grad():
            apply_head(model, tokens, layout, lambda hidden, head: (head.logits(hidden),))
        found = head_gradients(model, tokens, layout)
        assert_same({name: grad.full_tensor() for name, grad in found.items()}, expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.usefixtures("one_rank")
def test_fully_sharded(tiny, layout, tokens, reentrant):
    expected = gradients(tiny.build("llama").train(), tokens, layout)
    model = tiny.build("llama").train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    assert check_model(model).ok
    if reentrant and strided._checkpoints_hooks():
        with pytest.raises(ValueError, match="llama: gradient checkpointing under FSDP2: expected use_reentrant=False"):
            gradients(model, tokens, layout)
        return
    found = gradients(model, tokens, layout)
    assert_same({name: grad.full_tensor() for name, grad in found.items()}, expected)
    with pytest.raises(ValueError, match="llama: its vocabulary head is sharded over ranks"):
        output_head(model)


@pytest.mark.usefixtures("one_rank")
def test_reentrant_checkpointing_that_would_lose_gradients_is_refused(tiny, layout, tokens, monkeypatch):
    """As with older versions of transformers."""
    monkeypatch.setattr(strided, "_checkpoints_hooks", lambda: True)
    for reentrant in (False, True):
        model = tiny.build("llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        gradients(model, tokens, layout)
        for layer in decoder_layers(model):
            fully_shard(layer)
        fully_shard(model)
        if not reentrant:
            gradients(model, tokens, layout)
            continue
        with pytest.raises(ValueError, match="llama: gradient checkpointing under FSDP2: expected use_reentrant=False"):
            gradients(model, tokens, layout)


def test_a_compiled_model(tiny, layout, tokens):
    """No graph break."""
    torch.compiler.reset()
    model = tiny.build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), strided_attention_context(compiled, layout) as kwargs:
        found = compiled(input_ids=tokens, **kwargs).logits
        assert torch.equal(found, model(input_ids=tokens, **kwargs).logits)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_load_balancing_loss_of_experts(tiny, layout, tokens, name):
    """It reads the attention mask, and counts all packed rows."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    changes = experts if name == "qwen3_moe" else {}
    model = tiny.build(name, output_router_logits=True, **changes)
    plain = tiny.build(name, output_router_logits=False, **changes)
    with strided_attention_context(model, layout) as kwargs:
        output = model(input_ids=tokens, **kwargs)
    tiny.assert_plain_logits(output.logits, plain, tokens, layout)
    assert output.aux_loss.isfinite()
    assert check_model(model).ok


@pytest.fixture
def lora(tiny):
    """A function that gives a model whose adapters are not zero."""
    peft = pytest.importorskip("peft")

    def wrap(name, **options):
        options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        model = peft.get_peft_model(tiny.build(name), peft.LoraConfig(**options))
        generator = torch.Generator().manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return wrap


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora(tiny, lora, layout, tokens, name, reentrant):
    model = lora(name)
    assert check_model(model).ok
    plain, _ = tiny.plain_logits(model, tokens, layout)
    logits = output_head(model).logits(hidden_states(model, tokens, layout))
    tiny.assert_plain_logits(logits, model, tokens, layout)
    with model.disable_adapter():
        base, _ = tiny.plain_logits(model, tokens, layout)
        logits = output_head(model).logits(hidden_states(model, tokens, layout))
        tiny.assert_plain_logits(logits, model, tokens, layout)
        assert check_model(model).ok
    assert (base - plain).abs().max() > 0.1
    model.train()
    expected = gradients(model, tokens, layout)
    assert all("lora" in parameter for parameter in expected)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_same(gradients(model, tokens, layout), expected)


def test_a_head_with_an_adapter_is_refused_and_a_trained_copy_is_used(lora):
    with pytest.raises(ValueError, match="llama: its vocabulary head is a PEFT adapter layer"):
        output_head(lora("llama", target_modules=["lm_head", "q_proj"]))
    model = lora("llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    copy = model.get_base_model().lm_head.modules_to_save["default"]
    with torch.no_grad():
        copy.weight.mul_(2)
    assert output_head(model).weight is copy.weight
    with model.disable_adapter():
        assert output_head(model).weight is model.get_base_model().lm_head.original_module.weight


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [("llama", 1.0, None), ("granite", 1 / 3, None), ("cohere", 0.3, None), ("gemma2", 1.0, 3.0), ("phi", 1.0, None)],
)
def test_scale_softcap_and_bias_of_the_head(tiny, name, scale, softcap):
    model = tiny.build(name)
    head = output_head(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    assert (head.bias is not None) == (name == "phi")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "phi", "gpt_oss"])
def test_the_head_is_applied_inside_the_forward(tiny, layout, tokens, name):
    """The same numbers and gradients as outside of it, whatever the model does to its logits afterwards."""
    model = tiny.build(name).train()
    found = head_gradients(model, tokens, layout)
    found = {name: gradient.clone() for name, gradient in found.items()}
    model.zero_grad()
    hidden = hidden_states(model, tokens, layout)
    (output_head(model).logits(hidden).square().mean() + hidden[:, 3].sum()).backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_a_head_that_is_not_run_once_is_refused(tiny, layout, tokens):
    class Twice(_Wrapper):
        def forward(self, **kwargs):
            self.module(**kwargs)
            return self.module(**kwargs)

    model = tiny.build("llama")
    with pytest.raises(ValueError, match="llama: expected one call of its vocabulary head, saw 2"):
        output_head(Twice(model))
    output_head(model)
    with pytest.raises(RuntimeError, match="llama: expected one call of its vocabulary head, saw 2"):
        apply_head(Twice(model), tokens, layout, lambda hidden, _head: (hidden,))


def test_a_head_that_does_more_is_refused(tiny):
    model = tiny.build("llama")
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits * 1.001)
    with pytest.raises(ValueError, match="llama: its logits are not softcap"):
        output_head(model)
