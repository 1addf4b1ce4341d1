"""Features of decoded text, and the choice of a feature map by name."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from ebft_kernels import StridedLayout
from ebft_trainer.config import EBFTOptions
from ebft_trainer.feature_maps import TextEncoderFeatures, build_feature_map
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import before_end
from ebft_trainer.texts import anchor_texts


def letters(texts: list[str]) -> torch.Tensor:
    """[N, 3]: how many of the characters a, b and c."""
    return torch.tensor([[text.count(x) for x in "abc"] for text in texts], dtype=torch.float64)


@pytest.fixture
def batch(byte_tokenizer):
    """Layout, prompt and rollouts of bytes, one anchor not valid, and the mask of what stands before an end."""
    prompt = torch.tensor([byte_tokenizer(text)["input_ids"] for text in ("abcabcbacabc", "bbbbccccaaaa")])
    layout = StridedLayout.strided(2, 12, context=3, stride=4, horizon=3, samples=2, lengths=torch.tensor([12, 9]))
    rollouts = prompt[:, :1, None, None] + torch.randint(
        -1, 2, (2, layout.num_anchors, 2, 3), generator=torch.Generator().manual_seed(0)
    )
    rollouts[:, :, 1, 1:] = byte_tokenizer.eos_token_id
    return layout, prompt, rollouts, before_end(rollouts, [byte_tokenizer.eos_token_id])


@pytest.mark.parametrize("batch_size", (1, 5, 64))
def test_features_are_those_of_the_prompt_with_each_continuation(byte_tokenizer, batch, batch_size):
    layout, prompt, rollouts, mask = batch
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return letters(texts)

    features = TextEncoderFeatures(encode, byte_tokenizer, prompt_characters=2, normalize=False, batch_size=batch_size)
    found, targets = features(layout.pack(prompt, rollouts), layout, rollout_mask=mask)
    assert found.shape == (2, layout.num_anchors, 2, 3) and targets.shape == (2, layout.num_anchors, 3)
    assert found.dtype == targets.dtype == torch.float32 and max(calls) <= batch_size
    assert sum(calls) == 3 * layout.num_valid
    texts = {(x.row, x.anchor): x for x in anchor_texts(byte_tokenizer, prompt, rollouts, layout, rollout_mask=mask)}
    assert len(texts) == layout.num_valid < layout.valid.numel()
    for b, a in layout.valid.nonzero().tolist():
        text = texts[b, a]
        assert torch.equal(targets[b, a], letters([text.prompt[-2:] + text.target])[0].float())
        assert torch.equal(found[b, a], letters([text.prompt[-2:] + x for x in text.completions]).float())
        assert len(text.completions[1]) == 1, "it ended after one byte"
    assert (found[~layout.valid] == 0).all() and (targets[~layout.valid] == 0).all()
    whole = TextEncoderFeatures(letters, byte_tokenizer)
    again, _ = whole(layout.pack(prompt, rollouts), layout, rollout_mask=mask)
    for b, a in layout.valid.nonzero().tolist():
        text = texts[b, a]
        expected = F.normalize(letters([text.prompt + x for x in text.completions]), dim=-1)
        torch.testing.assert_close(again[b, a], expected.float())
    none, _ = TextEncoderFeatures(letters, byte_tokenizer, prompt_characters=0, normalize=False)(
        layout.pack(prompt, rollouts), layout
    )
    assert (none.sum(-1) <= layout.horizon).all()


def test_an_encoder_must_give_one_feature_per_text(byte_tokenizer, batch):
    layout, prompt, rollouts, _ = batch
    packed = layout.pack(prompt, rollouts)
    with pytest.raises(ValueError, match=r"encode's features: expected shape \[9, F\], got \[8, 3\]"):
        TextEncoderFeatures(lambda texts: letters(texts)[1:], byte_tokenizer)(packed, layout)
    with pytest.raises(TypeError, match="encode's features: expected a tensor .*, got list"):
        TextEncoderFeatures(lambda texts: [0.0] * len(texts), byte_tokenizer)(packed, layout)


def test_a_feature_map_by_name(plain, tmp_path, monkeypatch):
    (tmp_path / "my_maps.py").write_text(
        "def build(model, tokenizer, options):\n"
        "    def features(packed, layout, token_mask=None, *, rollout_mask=None):\n"
        "        return model, tokenizer, options\n"
        "    return features\n\n"
        "def nothing(model, tokenizer, options):\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options, model = EBFTOptions(feature_map="my_maps:build"), plain.build()
    assert build_feature_map(model, "tokenizer", options)(None, None) == (model, "tokenizer", options)
    with pytest.raises(TypeError, match="feature_map: expected 'my_maps:nothing' to give a FeatureMap, got NoneType"):
        build_feature_map(model, None, EBFTOptions(feature_map="my_maps:nothing"))
    with pytest.raises(ValueError, match="feature_map: cannot load 'my_maps:more'"):
        build_feature_map(model, None, EBFTOptions(feature_map="my_maps:more"))
    network = build_feature_map(model, None, EBFTOptions(feature_layers=[2], pooling="mean", normalize="per_layer"))
    assert isinstance(network, FeatureNetwork)
    assert (network.layers, network.pooling, network.normalize) == ((2,), "mean", "per_layer")
    assert list(network.parameters())
    assert not list(build_feature_map(model, None, EBFTOptions(), share=True).parameters())
