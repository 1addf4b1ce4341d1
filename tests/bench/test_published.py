"""The published algorithm as the benchmark runs it: the same numbers as the library's step."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.baselines.published import dense_mask, published_step
from ebft_kernels import StridedLayout
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.step import ebft_step


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).double().eval()


def test_its_mask_is_that_of_the_layout_in_reference_order():
    layout = StridedLayout.strided(1, 17, context=3, stride=4, horizon=5, samples=2)
    order = layout.to_reference_order(torch.arange(layout.packed_length)[None])[0]
    expected = layout.dense_mask()[0, 0][order][:, order]
    assert torch.equal(dense_mask(layout.anchors[0].tolist(), layout.length, layout.horizon), expected)


@pytest.mark.parametrize("samples", (1, 2, 4))
def test_its_numbers_and_gradients_are_those_of_the_library(model, samples):
    options = EBFTOptions(samples=samples, ce_coef=0.3, whitening="sample", eos_token_ids=[])
    layout = StridedLayout.strided(2, 30, context=3, stride=4, horizon=5, samples=samples)
    prompt = torch.randint(53, (2, 30), generator=torch.Generator().manual_seed(2))
    runs = (
        lambda rng: published_step(model, model, prompt, layout, options, generator=rng),
        lambda rng: ebft_step(model, FeatureNetwork(model), prompt, layout, options, generator=rng),
    )
    steps, gradients = [], []
    for run in runs:
        model.zero_grad()
        steps.append(run(torch.Generator().manual_seed(3)))
        steps[-1].loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    published, ours = steps
    assert torch.equal(published.rollouts, ours.rollouts)
    for name in ("log_probs", "loss"):
        torch.testing.assert_close(getattr(published, name), getattr(ours, name))
    for name, actual, expected in zip(published.match._fields, published.match, ours.match, strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(*gradients)
