"""Evaluation against its definition: every horizon by itself, and the plain model's cross-entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ebft_kernels import StridedLayout, feature_matching, pool_features
from ebft_trainer import evaluate
from ebft_trainer.config import EBFTOptions
from ebft_trainer.data import EBFTCollator
from ebft_trainer.evaluate import evaluation_metrics, evaluation_sums, pool_first_tokens
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import sample_rollouts

GEOMETRY = {"context": 3, "stride": 4, "horizon": 3, "samples": 3}


def random_rows(*lengths: int, seed: int = 1, **columns) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 40, (n,), generator=generator), **columns} for n in lengths]


@pytest.mark.parametrize(
    ("pooling", "normalize", "whitening"),
    [
        ("last_token", "joint", "sample"),
        ("mean", "joint", "none"),
        ("concat", "per_layer", "sample"),
        ("concat", "joint", "feature"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_horizon_is_what_a_run_with_that_horizon_would_measure(plain, pooling, normalize, whitening, masked):
    options = EBFTOptions(**GEOMETRY, pooling=pooling, normalize=normalize, whitening=whitening)
    model, frozen = plain.build(), plain.build(seed=5)
    network = FeatureNetwork(frozen, [1, 3], pooling=pooling, normalize=normalize)
    rows = random_rows(17, 12)
    if masked:
        rows[0]["completion_mask"] = [0] * 6 + [1] * 4 + [0] * 2 + [1] * 5
    batch = EBFTCollator(options)(rows)
    layout, mask, prompt = batch["layout"], batch.get("completion_mask"), batch["input_ids"]

    def generator():
        return torch.Generator().manual_seed(3)

    metrics = evaluation_metrics(evaluation_sums(model, network, batch, options, generator=generator()), 3)
    rollouts, _ = sample_rollouts(model, prompt, layout, temperature=0.6, generator=generator())
    for horizon in (1, 2, 3):
        cut = StridedLayout.from_anchors(
            layout.anchors, layout.length, horizon=horizon, samples=3, lengths=layout.lengths
        )
        features = network(cut.pack(prompt, rollouts[..., :horizon]), cut, mask)
        match = feature_matching(*features, whitening=whitening, groups=network.groups)
        valid = layout.valid  # of the full horizon: all horizons are measured on the same anchors
        loss, alignment = match.loss[valid].mean().item(), match.alignment[valid].mean().item()
        assert metrics[f"feature_matching_loss_h{horizon}"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"alignment_h{horizon}"] == pytest.approx(alignment, rel=1e-4, abs=1e-5)
    assert metrics["feature_matching_loss"] == metrics["feature_matching_loss_h3"]
    assert metrics["alignment"] == metrics["alignment_h3"]


@pytest.mark.parametrize("pooling", ["last_token", "mean", "concat"])
@pytest.mark.parametrize("masked", [False, True])
def test_another_feature_map_is_asked_for_every_horizon_and_sees_ends(plain, pooling, masked):
    """The same network, once as what it is and once as any function: the same numbers."""
    options = EBFTOptions(**GEOMETRY, pooling=pooling, eos_token_ids=list(range(0, 61, 3)))
    model, network = plain.build(), FeatureNetwork(plain.build(seed=5), [1, 3], pooling=pooling)
    rows = random_rows(17, 12)
    if masked:
        rows[0]["completion_mask"] = [0] * 6 + [1] * 4 + [0] * 2 + [1] * 5
    batch = EBFTCollator(options)(rows)
    seen = []

    def features(packed, layout, token_mask=None, *, rollout_mask=None):
        seen.append(layout.horizon)
        assert rollout_mask.shape[3] == layout.horizon and (layout.horizon == 1 or not rollout_mask.all())
        return network(packed, layout, token_mask, rollout_mask=rollout_mask)

    def sums(feature_map):
        generator = torch.Generator().manual_seed(3)
        return evaluation_sums(model, feature_map, batch, options, generator=generator)

    expected = sums(network)
    torch.testing.assert_close(sums(features), expected, rtol=1e-4, atol=1e-4)
    assert seen == [1, 2, 3]
    options.eos_token_ids = []
    assert not torch.allclose(sums(network)[7:], expected[7:], rtol=1e-3), "without ends there are other features"


def test_a_verifiers_reward_is_measured_too(plain):
    options, model = EBFTOptions(**GEOMETRY), plain.build()
    batch = EBFTCollator(options)(random_rows(17, 12))
    layout = batch["layout"]
    given = []

    def verifier(_prompt, rollouts, _layout, *, token_mask, rollout_mask):
        assert token_mask is None and rollout_mask is None
        given.append(rollouts.double().mean(-1))
        return given[0]

    generator = torch.Generator().manual_seed(3)
    sums = evaluation_sums(model, FeatureNetwork(model, [2]), batch, options, generator=generator, verifier=verifier)
    assert len(sums) == 8 + 2 * 3
    metrics = evaluation_metrics(sums, 3)
    assert metrics["verifier_reward"] == pytest.approx(given[0][layout.valid].mean().item(), rel=1e-6)
    assert "verifier_reward" not in evaluation_metrics(sums[:-1], 3)


@pytest.mark.parametrize("pooling", ["last_token", "mean", "concat", "token"])
@pytest.mark.parametrize("normalize", ["joint", "per_layer"])
def test_pooled_features_of_the_full_window_follow_from_those_per_token(pooling, normalize):
    layout = StridedLayout.strided(2, 12, context=2, stride=3, horizon=3, samples=2)
    hidden = [torch.randn(2, layout.packed_length, 5) for _ in range(2)]
    mask = torch.rand(2, 12) < 0.6
    expected = pool_features(hidden, layout, pooling=pooling, normalize=normalize, token_mask=mask)
    per_token = pool_features(hidden, layout, pooling="token", normalize=normalize, token_mask=mask)
    counted = layout.windows(mask)
    for tokens, seen, pooled in zip(per_token, (counted[:, :, None], counted), expected, strict=True):
        torch.testing.assert_close(pool_first_tokens(tokens, seen, 3, pooling, groups=2), pooled)


def test_features_per_token_are_averaged_over_the_tokens_of_the_horizon(plain):
    options = EBFTOptions(**GEOMETRY, pooling="token", whitening="none")
    network = FeatureNetwork(plain.build(seed=5), [2])
    batch = EBFTCollator(options)(random_rows(17))
    sums = evaluation_sums(plain.build(), network, batch, options, generator=torch.Generator().manual_seed(3))
    metrics = evaluation_metrics(sums, 3)
    last = EBFTOptions(**GEOMETRY, pooling="last_token", whitening="none")
    sums = evaluation_sums(plain.build(), network, batch, last, generator=torch.Generator().manual_seed(3))
    one_by_one = evaluation_metrics(sums, 3)
    for name in ("feature_matching_loss", "alignment"):
        mean = sum(one_by_one[f"{name}_h{g}"] for g in (1, 2, 3)) / 3
        assert metrics[name] == pytest.approx(mean, rel=1e-5)


def test_cross_entropy_is_the_plain_models_over_counted_tokens(plain):
    options, model = EBFTOptions(**GEOMETRY), plain.build()
    rows = [*random_rows(17), *random_rows(12, seed=2, document_ids=[0] * 7 + [1] * 5)]
    batch = EBFTCollator(options)(rows)
    network = FeatureNetwork(model, [2])
    sums = evaluation_sums(model, network, batch, options, generator=torch.Generator().manual_seed(0))
    pieces = [rows[0]["input_ids"], rows[1]["input_ids"][:7], rows[1]["input_ids"][7:]]
    with torch.no_grad():
        nats = sum(
            F.cross_entropy(model(piece[None]).logits[0, :-1], piece[1:], reduction="sum").item() for piece in pieces
        )
    assert sums[1].item() == 16 + 6 + 4
    assert sums[2].item() == batch["layout"].num_valid
    metrics = evaluation_metrics(sums, 3)
    assert metrics["cross_entropy"] == pytest.approx(nats / 26, rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / 26), rel=1e-5)


def test_only_completions_are_scored(plain):
    options, model = EBFTOptions(**GEOMETRY), plain.build()
    (row,) = random_rows(12, completion_mask=[0] * 5 + [1] * 7)
    batch = EBFTCollator(options)([row])
    sums = evaluation_sums(model, FeatureNetwork(model, [2]), batch, options)
    with torch.no_grad():
        logits = model(row["input_ids"][None]).logits[0]
    nats = F.cross_entropy(logits[4:-1], row["input_ids"][5:], reduction="sum")
    assert sums[1].item() == 7
    torch.testing.assert_close(sums[0], nats)


def test_sums_of_several_batches_give_the_mean_over_all_anchors_and_tokens():
    rollouts = [[1.0, 1.0, 0.5, 1.0], [5.0, 2.0, 1.0, 2.0]]
    parts = torch.tensor([[6.0, 2.0, 1.0, *rollouts[0], 3.0, 5.0], [10.0, 6.0, 3.0, *rollouts[1], 1.0, 3.0]])
    metrics = evaluation_metrics(parts.sum(0), 1)
    assert (metrics["cross_entropy"], metrics["feature_matching_loss"], metrics["alignment"]) == (2.0, 1.0, 2.0)
    assert (metrics["rollout_entropy"], metrics["entropy_gap"], metrics["log_prob_gap"]) == (2.0, 0.0, 0.5)


def test_sampling_is_compared_with_one_forward_on_the_first_row(plain, monkeypatch):
    """By rounding; or by what a test adds to the scores of its tokens that count."""
    options = EBFTOptions(**GEOMETRY, eos_token_ids=list(range(0, 61, 5)))
    model = plain.build("gemma2").eval()
    rows = random_rows(17, 15)
    rows[0]["completion_mask"] = [0] * 6 + [1] * 11
    batch, network = EBFTCollator(options)(rows), FeatureNetwork(model, [2])

    def gap():
        sums = evaluation_sums(model, network, batch, options, generator=torch.Generator().manual_seed(3))
        assert 0 < sums[6] < sums[4]
        return evaluation_metrics(sums, 3)["log_prob_gap"]

    assert 0 < gap() < 1e-5
    real = evaluate.policy_log_probs
    monkeypatch.setattr(evaluate, "policy_log_probs", lambda *args, **kwargs: (real(*args, **kwargs)[0] - 0.25, None))
    assert gap() == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_rollout_entropy_is_over_the_tokens_that_count(plain, ends, masked):
    options = EBFTOptions(**GEOMETRY, eos_token_ids=list(range(0, 61, 3)) if ends else [])
    model = plain.build().eval()
    rows = random_rows(17, 12)
    if masked:
        rows[0]["completion_mask"] = [0] * 6 + [1] * 4 + [0] * 2 + [1] * 5
    batch = EBFTCollator(options)(rows)
    layout, mask, seed = batch["layout"], batch.get("completion_mask"), torch.Generator().manual_seed
    sums = evaluation_sums(model, FeatureNetwork(model, [2]), batch, options, generator=seed(3))
    rollouts, _ = sample_rollouts(
        model,
        batch["input_ids"],
        layout,
        temperature=options.temperature,
        eos_token_ids=options.eos_token_ids,
        generator=seed(3),
    )
    log_probs = plain.rollout_log_probs(
        model, batch["input_ids"], rollouts, layout, temperature=options.temperature
    ).detach()
    nats = tokens = 0.0
    for b, a, i in itertools.product(range(2), range(layout.num_anchors), range(3)):
        anchor = layout.anchors[b, a].item()
        window = [True] * 3 if mask is None else mask[b, anchor : anchor + 3].tolist()
        if not layout.valid[b, a] or not any(window):
            continue
        for g, counts in enumerate(window):
            before = rollouts[b, a, i, :g].tolist()
            if counts and not any(token in options.eos_token_ids for token in before):
                nats -= log_probs[b, a, i, g].item() / sum(window)
                tokens += 1 / sum(window)
    assert (tokens < 3 * sums[2].item()) == ends
    assert evaluation_metrics(sums, 3)["rollout_entropy"] == pytest.approx(nats / tokens, rel=1e-4)
