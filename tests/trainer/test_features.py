"""The feature network against ``output_hidden_states`` of the plain model, and what it must leave alone."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from ebft_kernels.integrations.transformers import decoder_layers
from ebft_kernels.testing import assert_within_budget
from ebft_trainer import features
from ebft_trainer.features import FeatureNetwork, layer_numbers

ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt_oss")
POOLINGS = ("last_token", "mean", "concat", "token")
NORMALIZATIONS = ("joint", "per_layer", "none")


@pytest.fixture
def batch(plain):
    """Layout, prompt and rollouts."""
    layout = plain.layouts["strided"]()
    return layout, plain.prompt_of(layout), plain.rollouts_of(layout)


def with_adapters(model, **options):
    """A PEFT model whose adapters change its outputs."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def assert_plain(plain, model, found, batch, layers, **options):
    """``found`` is what the plain model's hidden states give, to the error of float32."""
    layout, prompt, rollouts = batch
    eager = plain.features(model, prompt, rollouts, layout, layers, **options)
    truth = plain.features(plain.double(model), prompt, rollouts, layout, layers, **options)
    for name, x, e, t in zip(("rollouts", "targets"), found, eager, truth, strict=True):
        assert not x.requires_grad and x.isfinite().all()
        assert_within_budget(x[layout.valid], e[layout.valid], t[layout.valid], name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_are_those_of_the_plain_model(plain, name):
    layout = plain.layouts["uneven"]()
    batch = layout, plain.prompt_of(layout), plain.rollouts_of(layout)
    model = plain.build(name)
    found = FeatureNetwork(model)(layout.pack(*batch[1:]), layout)
    assert_plain(plain, model, found, batch, (1, 2, 3))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(plain, batch, pooling, normalize, masked):
    layout, prompt, rollouts = batch
    model = plain.build()
    mask = torch.rand(prompt.shape, generator=torch.Generator().manual_seed(2)) < 0.4 if masked else None
    if masked:
        assert not layout.windows(mask).any(-1).all(), "some window must have no counted token"
    options = {"pooling": pooling, "normalize": normalize}
    network = FeatureNetwork(model, (3, 1), **options)
    assert network.groups == (2 if normalize == "per_layer" else 1)
    packed = layout.pack(prompt, rollouts)
    found = network(packed, layout, mask)
    assert_plain(plain, model, found, batch, (3, 1), token_mask=mask, **options)
    other = FeatureNetwork(model, (3, 1), normalize=normalize)
    for x, y in zip(found, other(packed, layout, mask, pooling=pooling), strict=True):
        assert torch.equal(x, y), "the pooling of a call replaces the network's own"


@pytest.mark.parametrize("name", ("llama", "gemma2"))
@pytest.mark.parametrize("layers", ((0,), (4,), (0, 4, 2), (1.0,)))
def test_embeddings_and_the_last_layer(plain, batch, name, layers):
    """Layer 0 is what the first block is given, the last one is behind the final norm."""
    model = plain.build(name)
    network = FeatureNetwork(model, layers, normalize="none")
    found = network(batch[0].pack(*batch[1:]), batch[0])
    assert_plain(plain, model, found, batch, network.layers, normalize="none")


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    (
        (4, (0.25, 0.5, 0.75), (1, 2, 3)),
        (6, (0.25, 0.5, 0.75), (1, 3, 4)),
        (8, (0.25, 0.5, 0.75), (2, 4, 6)),
        (2, (0.25, 0.5, 1.0), (1, 1, 2)),
        (30, (0.1, 1), (3, 1)),
        (12, (0, 12, 5), (0, 12, 5)),
    ),
)
def test_depths_are_rounded_down(count, layers, expected):
    assert layer_numbers(layers, count) == expected


def test_only_the_layers_needed_run(plain, batch):
    model = plain.build()
    network = FeatureNetwork(model, (1, 2))
    calls = []

    def counted(kind):
        return lambda *_: calls.append(kind)

    for owner in (model, network._copy):
        for i, block in enumerate(decoder_layers(owner), 1):
            block.register_forward_hook(counted(i if owner is not model else "policy"))
        owner.model.norm.register_forward_hook(counted("norm"))
        owner.get_output_embeddings().register_forward_hook(counted("head"))
    network(batch[0].pack(*batch[1:]), batch[0])
    assert calls == [1, 2]


def test_a_copy_holds_only_the_layers_needed(plain):
    model = plain.build()
    network = FeatureNetwork(model, (0.25, 2))
    copied, own = list(network.parameters()), {id(p) for p in model.parameters()}
    blocks = decoder_layers(model)
    expected = [model.get_input_embeddings().weight, *blocks[0].parameters(), *blocks[1].parameters()]
    expected.append(model.model.norm.weight)
    assert sum(p.numel() for p in copied) == sum(p.numel() for p in expected)
    assert not any(id(p) in own for p in copied)
    assert not any(p.requires_grad for p in copied)


def test_training_the_model_changes_no_feature(plain, batch):
    layout, packed = batch[0], batch[0].pack(*batch[1:])
    model = plain.build().train()
    modules, keys = [type(m) for m in model.modules()], list(model.state_dict())
    network = FeatureNetwork(model)
    before = network(packed, layout)
    assert [type(m) for m in model.modules()] == modules and list(model.state_dict()) == keys
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    network.train()
    assert not any(m.training for m in network.modules())
    with torch.enable_grad():
        after = network(packed, layout)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y) and not y.requires_grad


@pytest.mark.parametrize("train", (False, True))
def test_adapters_are_off_and_come_back(plain, batch, train):
    layout, packed = batch[0], batch[0].pack(*batch[1:])
    base = plain.build()
    expected = FeatureNetwork(base)(packed, layout)
    model = with_adapters(base, lora_dropout=0.5).train(train)
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    required, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    network = FeatureNetwork(model)
    assert not list(network.parameters()), "the weights are shared, and not the network's own"
    with torch.no_grad():
        outputs = model.eval()(batch[1]).logits
        model.train(train)
    for x, y in zip(expected, network(packed, layout), strict=True):
        assert torch.equal(x, y)
    assert [p.requires_grad for p in model.parameters()] == required
    assert [m.training for m in model.modules()] == modes
    with torch.no_grad():
        assert torch.equal(model.eval()(batch[1]).logits, outputs), "the adapters work again"


def test_adapters_of_the_transformers_model_itself(plain, batch):
    layout, packed = batch[0], batch[0].pack(*batch[1:])
    model = plain.build()
    expected = FeatureNetwork(model)(packed, layout)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with torch.no_grad():
        outputs = model.eval()(batch[1]).logits
    for x, y in zip(expected, FeatureNetwork(model)(packed, layout), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(model(batch[1]).logits, outputs)


def test_a_shared_model_is_used_as_it_is(plain, batch):
    layout, packed = batch[0], batch[0].pack(*batch[1:])
    model = plain.build().train()
    network = FeatureNetwork(model, share=True)
    for x, y in zip(FeatureNetwork(model)(packed, layout), network(packed, layout), strict=True):
        assert torch.equal(x, y)
    assert not list(network.parameters()) and all(m.training for m in model.modules())


def test_a_wrapped_model_is_copied_without_its_wrapper(plain, batch):
    layout, packed = batch[0], batch[0].pack(*batch[1:])

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **kwargs):
            return self.module(**kwargs)

    model = plain.build()
    expected = FeatureNetwork(model)(packed, layout)
    for wrapped in (Wrapper(model), torch.compile(model), Wrapper(torch.compile(model))):
        network = FeatureNetwork(wrapped)
        assert type(network._copy) is type(model)
        for x, y in zip(network(packed, layout), expected, strict=True):
            assert torch.equal(x, y)


def test_changing_one_rollout_changes_no_other_row(plain, batch):
    layout, prompt, rollouts = batch
    network = FeatureNetwork(plain.build(), pooling="concat")
    before, before_targets = network(layout.pack(prompt, rollouts), layout)
    rollouts[1, 2, 0] = (rollouts[1, 2, 0] + 1) % plain.vocabulary
    after, after_targets = network(layout.pack(prompt, rollouts), layout)
    changed = (before != after).any(-1)
    assert changed[1, 2, 0] and changed.sum() == 1
    assert torch.equal(before_targets, after_targets)


def test_no_hidden_state_outlives_the_next_layer(plain, batch, monkeypatch):
    alive, seen = [], []

    def pool(hidden, *args, **kwargs):
        alive.append([ref() is not None for ref in seen])
        seen.append(weakref.ref(hidden[0]))
        return features_pool(hidden, *args, **kwargs)

    features_pool = features.pool_features
    monkeypatch.setattr(features, "pool_features", pool)
    FeatureNetwork(plain.build(), (1, 3, 4))(batch[0].pack(*batch[1:]), batch[0])
    # At layer 3 the output of layer 1 is gone; at the final norm the output of layer 3 is.
    assert alive == [[], [False], [False, False]]


def test_autocast(plain, batch):
    layout, prompt, rollouts = batch
    model = plain.build()
    with torch.autocast("cpu", torch.bfloat16):
        found = FeatureNetwork(model)(layout.pack(prompt, rollouts), layout)
        eager = plain.features(model, prompt, rollouts, layout, (1, 2, 3))
    truth = plain.features(plain.double(model), prompt, rollouts, layout, (1, 2, 3))
    for x, e, t in zip(found, eager, truth, strict=True):
        assert x.dtype == torch.float32
        assert_within_budget(x, e, t)


def test_a_bfloat16_model_gives_float32_features(plain, batch):
    network = FeatureNetwork(plain.build(dtype=torch.bfloat16))
    assert all(x.dtype == torch.float32 for x in network(batch[0].pack(*batch[1:]), batch[0]))


def test_a_model_from_a_folder_is_the_same(plain, batch, tmp_path):
    layout, packed = batch[0], batch[0].pack(*batch[1:])
    model = plain.build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for x, y in zip(FeatureNetwork(model)(packed, layout), FeatureNetwork(loaded)(packed, layout), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    (
        ((), ValueError, "layers: expected at least one depth or layer number, got none"),
        (0.5, TypeError, "layers: expected a sequence of depths or layer numbers, got 0.5"),
        ("half", TypeError, "layers: expected a sequence"),
        ((True,), TypeError, "layers: expected depths .* got True"),
        (("0.5",), TypeError, "layers: expected depths .* got '0.5'"),
        ((0.0,), ValueError, "layers: expected depths above 0 up to 1.0, got 0.0"),
        ((1.5,), ValueError, "layers: expected depths above 0 up to 1.0, got 1.5"),
        ((5,), ValueError, "layers: expected layer numbers from 0 to 4, the model's last, got 5"),
        ((-1,), ValueError, "layers: expected layer numbers from 0 to 4, the model's last, got -1"),
    ),
)
def test_bad_layers(plain, layers, error, message):
    with pytest.raises(error, match=message):
        FeatureNetwork(plain.build(), layers)


def test_bad_input(plain, batch):
    model, layout = plain.build(), batch[0]
    packed = layout.pack(*batch[1:])
    with pytest.raises(ValueError, match="pooling: expected one of 'last_token', 'mean', 'concat', 'token'; got 'max'"):
        FeatureNetwork(model, pooling="max")
    with pytest.raises(ValueError, match="normalize: expected one of 'joint', 'per_layer', 'none'; got 'l1'"):
        FeatureNetwork(model, normalize="l1")
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        FeatureNetwork(torch.nn.Linear(2, 2))
    network = FeatureNetwork(model)
    with pytest.raises(ValueError, match="pooling: expected one of"):
        network(packed, layout, pooling="max")
    with pytest.raises(ValueError, match=r"packed: expected shape \[B=2, S=72\], got \[2, 71\]"):
        network(packed[:, 1:], layout)
    with pytest.raises(TypeError, match="token_mask: expected dtype bool"):
        network(packed, layout, torch.ones(batch[1].shape))
    with pytest.raises(TypeError, match="layout: expected a StridedLayout, got NoneType"):
        network(packed, None)


def test_what_cannot_be_sharded(plain):
    """What can is tested in `test_ranks.py`."""
    with pytest.raises(ValueError, match="shard: expected several processes .*, got one without a group"):
        FeatureNetwork(plain.build()).shard()
    with pytest.raises(
        ValueError, match="shard: expected a feature network with weights of its own, got one that shares"
    ):
        FeatureNetwork(plain.build(), share=True).shard()
