"""One step: log-probabilities, loss and gradients are those of the plain model run on each prefix and rollout alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from ebft_kernels import StridedLayout, feature_matching
from ebft_kernels.integrations.transformers import decoder_layers
from ebft_kernels.testing import assert_within_budget
from ebft_trainer import step
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.scoring import (
    loss_weights,
    policy_log_probs,
    prompt_log_probs,
    rollout_weights,
    scored_prompt_tokens,
)
from ebft_trainer.step import ebft_step

from ..model_checks import assert_gradients_within_budget

ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt_oss")
METRICS = {
    *("loss/rl", "loss/ce", "feature_matching_loss", "alignment", "diversity", "reward", "reward_std", "advantage_std"),
    *("duplicate_rate", "entropy", "log_prob_gap", "valid_anchors", "tokens"),
    *("seconds/rollout", "seconds/features", "seconds/matching", "seconds/policy"),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options(**changes) -> EBFTOptions:
    return EBFTOptions(**({"temperature": 0.8, "ce_coef": 0.3} | changes))


def completions(layout: StridedLayout) -> torch.Tensor:
    """A token mask that leaves one window without any counted token, others with some or all."""
    mask = torch.ones(layout.batch_size, layout.length, dtype=torch.bool)
    mask[:, ::3] = False
    mask[0] = torch.arange(layout.length) >= 12
    return mask


def expected_loss(advantage, rollout_log_probs, prompt_log_probs, layout, config, mask):
    """The formula, rollout by rollout and token by token."""
    mask = torch.ones(layout.batch_size, layout.length, dtype=torch.bool) if mask is None else mask
    terms = []
    for b, a in layout.valid.nonzero().tolist():
        anchor = int(layout.anchors[b, a])
        counted = [g for g in range(layout.horizon) if mask[b, anchor + g]]
        for j in range(layout.samples):
            gain = advantage[b, a, j]
            products = [(gain[g] if gain.ndim else gain) * rollout_log_probs[b, a, j, g] for g in counted]
            terms += [-sum(products) / len(counted)] if counted else []
    nats = [
        -prompt_log_probs[b, t - 1]
        for b in range(layout.batch_size)
        for t in range(1, int(layout.lengths[b]))
        if mask[b, t] and layout.prompt_start[b, t] < t
    ]
    return config.rl_coef * sum(terms) / len(terms) + config.ce_coef * sum(nats) / len(nats)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("replay", (False, True))
@pytest.mark.parametrize("layout", ("strided", "uneven"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampled_policy_and_plain_log_probs_agree(plain, name, layout, replay):
    model, layout = plain.build(name), plain.layouts[layout]()
    prompt = plain.prompt_of(layout)
    config = options(replay_rollouts=replay)
    result = ebft_step(model, FeatureNetwork(model), prompt, layout, config, generator=generator())
    tokens, valid = result.rollouts, layout.valid
    with torch.no_grad():
        eager, truth = (
            plain.rollout_log_probs(m, prompt, tokens, layout, 0.8)[valid] for m in (model, plain.double(model))
        )
        scored, of_prompt = policy_log_probs(model, prompt, tokens, layout, temperature=0.8, score_prompt=True)
        assert replay or torch.equal(result.log_probs, scored)
        assert not result.log_probs.requires_grad
        assert_within_budget(result.log_probs[valid], eager, truth, "the step's")
        assert_within_budget(scored[valid], eager, truth, "rollouts")
        counted = scored_prompt_tokens(layout)
        eager, truth = (plain.prompt_log_probs(m, prompt, layout)[counted] for m in (model, plain.double(model)))
        assert_within_budget(of_prompt[counted], eager, truth, "prompt")
        of_prompt, same = prompt_log_probs(model, prompt, layout)
        assert torch.equal(same, counted)
        assert_within_budget(of_prompt[counted], eager, truth, "prompt alone")
    rounding = (plain.rollout_log_probs(model, prompt, tokens, layout, 0.8)[valid] - result.log_probs[valid]).abs()
    assert result.metrics["log_prob_gap"] <= 2 * rounding.max() + 1e-6


@pytest.mark.parametrize(
    ("name", "layout", "masked", "changes"),
    (
        ("llama", "strided", False, {}),
        ("llama", "uneven", True, {"pooling": "mean", "whitening": "feature"}),
        ("llama", "strided", True, {"pooling": "token", "whitening": "none", "ce_coef": 0.0}),
        ("qwen2", "uneven", False, {"estimator": "group_norm", "normalize": "per_layer"}),
        ("gemma2", "strided", True, {"pooling": "concat", "alignment_coef": 0.5, "diversity_coef": 2.0}),
        ("gpt_oss", "uneven", True, {"estimator": "reinforce", "rl_coef": 2.0}),
    ),
)
def test_loss_and_gradients_are_those_of_the_plain_model(plain, name, layout, masked, changes):
    """The advantages are constants; everything else is computed anew, in float64 and float32."""
    layout, config = plain.layouts[layout](), options(**changes)
    prompt = plain.prompt_of(layout)
    mask = completions(layout) if masked else None
    exact = plain.build(name, dtype=torch.float64)
    network = FeatureNetwork(plain.build(name, seed=7), pooling=config.pooling, normalize=config.normalize)
    network.to(torch.float64)
    result = ebft_step(exact, network, prompt, layout, config, token_mask=mask, generator=generator())
    found = gradients(exact, result.loss)

    losses, plain_gradients = {}, {}
    for model in (exact, plain.build(name)):
        losses[model] = expected_loss(
            result.match.advantage,
            plain.rollout_log_probs(model, prompt, result.rollouts, layout, 0.8),
            plain.prompt_log_probs(model, prompt, layout),
            layout,
            config,
            mask,
        )
        plain_gradients[model] = gradients(model, losses[model])
    truth, eager = plain_gradients.values()
    assert_within_budget(result.loss.detach(), *(x.detach() for x in reversed(losses.values())), "loss")
    assert len(found) > 20
    assert max(x.abs().max() for x in truth.values()) > 1e-2
    # float64, held to the error of float32: models compute norms and rotary angles in float32 whatever their dtype.
    assert_gradients_within_budget(found, eager, truth)


def test_advantages_come_from_the_features(plain):
    layout = plain.layouts["uneven"]()
    prompt, mask = plain.prompt_of(layout), completions(layout)
    model, network = plain.build(), FeatureNetwork(plain.build(seed=7), pooling="mean", normalize="per_layer")
    config = options(whitening="sample", alignment_coef=0.7, diversity_coef=0.4)
    result = ebft_step(model, network, prompt, layout, config, token_mask=mask, generator=generator())
    counts = layout.valid & layout.windows(mask).any(-1)
    assert 0 < counts.sum() < layout.valid.sum()
    match = feature_matching(
        *network(layout.pack(prompt, result.rollouts), layout, mask),
        whitening="sample",
        alignment_coef=0.7,
        diversity_coef=0.4,
        groups=3,
        valid=counts,
    )
    for name, x in match._asdict().items():
        assert torch.equal(getattr(result.match, name), x)
    metrics = result.metrics
    assert metrics["valid_anchors"] == counts.sum()
    assert metrics["feature_matching_loss"] == pytest.approx(match.loss[counts].mean().item(), rel=1e-5)
    for name in ("alignment", "diversity", "reward"):
        assert metrics[name] == pytest.approx(getattr(match, name)[counts].mean().item(), rel=1e-5, abs=1e-6)
    assert metrics["advantage_std"] == pytest.approx(match.advantage[counts].std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("changes", ({}, {"pooling": "token"}, {"estimator": "reinforce"}))
def test_metrics(plain, changes):
    layout = plain.layouts["strided"]()
    prompt, config = plain.prompt_of(layout), options(**changes)
    model, network = plain.build(), FeatureNetwork(plain.build(seed=7), pooling=config.pooling)
    result = ebft_step(model, network, prompt, layout, config, generator=generator())
    metrics = result.metrics
    assert metrics.keys() == METRICS
    for name, value in metrics.items():
        assert isinstance(value, float) or (value.ndim == 0 and not value.requires_grad), name
        assert math.isfinite(value), name
    assert result.loss.item() == pytest.approx((metrics["loss/rl"] + 0.3 * metrics["loss/ce"]).item(), rel=1e-6)
    assert metrics["entropy"] == pytest.approx(-result.log_probs.mean().item(), rel=1e-5)
    assert metrics["feature_matching_loss"] == pytest.approx(result.match.loss.mean().item(), rel=1e-5)
    assert metrics["reward"] == pytest.approx(result.match.reward.mean().item(), rel=1e-5, abs=1e-6)
    assert metrics["advantage_std"] == pytest.approx(result.match.advantage.std(correction=0).item(), rel=1e-5)
    assert metrics["tokens"] == layout.batch_size * layout.packed_length


def test_duplicates_are_counted_against_earlier_rollouts(plain):
    layout = plain.layouts["strided"]()
    model = plain.build()
    config = SimpleNamespace(**(vars(options()) | {"temperature": 0.0}))
    result = ebft_step(model, FeatureNetwork(model), plain.prompt_of(layout), layout, config)
    assert result.metrics["duplicate_rate"] == pytest.approx((layout.samples - 1) / layout.samples)
    assert result.loss.isfinite(), "greedy rollouts are scored at temperature 1"
    rollouts = torch.tensor([[[[1, 2], [1, 3], [1, 2], [1, 3], [1, 2]]]])
    assert step._duplicates(rollouts).tolist() == [[[False, False, True, True, True]]]


def test_a_term_with_coefficient_0_is_not_computed(plain, monkeypatch):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    result = ebft_step(model, FeatureNetwork(model), prompt, layout, options(ce_coef=0.0), generator=generator())
    assert result.metrics.keys() == METRICS - {"loss/ce"}
    monkeypatch.setattr(step, "sample_rollouts", None)
    result = ebft_step(model, None, prompt, layout, options(rl_coef=0.0, ce_coef=0.5))
    assert result.rollouts is result.log_probs is result.match is None
    assert result.metrics.keys() == {"loss/ce", "tokens", "seconds/policy"}
    expected = -plain.prompt_log_probs(model, prompt, layout).mean()
    assert result.loss.item() == pytest.approx(0.5 * expected.item(), rel=1e-6)
    assert result.loss.requires_grad


def test_shares_weigh_the_two_terms_of_the_loss_and_no_metric(plain):
    layout = plain.layouts["uneven"]()
    model, prompt, mask = plain.build(), plain.prompt_of(layout), completions(layout)
    network, shares = FeatureNetwork(model), torch.tensor([0.5, 3.0])
    whole, part = (
        ebft_step(model, network, prompt, layout, options(), token_mask=mask, generator=generator(), shares=x)
        for x in (None, shares)
    )
    rl, ce = whole.metrics["loss/rl"], whole.metrics["loss/ce"]
    assert (part.metrics["loss/rl"], part.metrics["loss/ce"]) == (rl, ce)
    assert part.loss.item() == pytest.approx((0.5 * rl + 3 * 0.3 * ce).item(), rel=1e-6)
    for bad in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=r"shares: expected shape \[2\], got "):
            ebft_step(model, network, prompt, layout, options(), shares=bad)


def test_what_a_batch_weighs(plain):
    layout = plain.layouts["uneven"]()
    # Tokens with a token of their document before them: 17, 16 and 11 tokens of 1, 3 and 2 documents.
    assert loss_weights(layout).tolist() == [layout.num_valid, 16 + 13 + 9]
    mask = completions(layout)
    counted = (layout.valid[..., None] & layout.windows(mask)).any(-1).sum()
    assert loss_weights(layout, mask).tolist() == [counted, scored_prompt_tokens(layout, mask).sum()]


def test_changing_one_rollout_changes_no_other_log_prob(plain):
    layout = plain.layouts["strided"]()
    model, prompt, rollouts = plain.build(), plain.prompt_of(layout), plain.rollouts_of(layout)
    with torch.no_grad():
        before, before_prompt = policy_log_probs(model, prompt, rollouts, layout, score_prompt=True)
        rollouts[1, 2, 0, 1] = (rollouts[1, 2, 0, 1] + 1) % plain.vocabulary
        after, after_prompt = policy_log_probs(model, prompt, rollouts, layout, score_prompt=True)
    changed = torch.zeros_like(before, dtype=torch.bool)
    changed[1, 2, 0, 1:] = True
    assert torch.equal(before != after, changed)
    assert torch.equal(before_prompt, after_prompt)


def test_what_is_not_valid_weighs_nothing(plain):
    """Padding, and the window across the edge of a document, may hold any token."""
    layout = plain.layouts["uneven"]()
    model, network, prompt = plain.build(), FeatureNetwork(plain.build(seed=7)), plain.prompt_of(layout)
    first = ebft_step(model, network, prompt, layout, options(), generator=generator())
    expected = gradients(model, first.loss)
    padding = torch.arange(layout.length) >= layout.lengths[:, None]
    other = torch.where(padding, (prompt + 1) % plain.vocabulary, prompt)
    second = ebft_step(model, network, other, layout, options(), generator=generator())
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(x, expected[name]) for name, x in gradients(model, second.loss).items())

    weights = rollout_weights(layout)
    assert torch.equal(weights.any(-1), layout.valid)
    assert weights.sum() == pytest.approx(1.0)
    with torch.no_grad():
        before, _ = policy_log_probs(model, prompt, first.rollouts, layout)
        rollouts = first.rollouts.clone()
        rollouts[~layout.valid] = (rollouts[~layout.valid] + 1) % plain.vocabulary
        after, _ = policy_log_probs(model, prompt, rollouts, layout)
    assert torch.equal(before[layout.valid], after[layout.valid])
    assert not torch.equal(before, after) and after.isfinite().all()


def test_a_mask_without_any_counted_token_gives_0(plain):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    nothing = torch.zeros_like(prompt, dtype=torch.bool)
    result = ebft_step(model, FeatureNetwork(model), prompt, layout, options(), token_mask=nothing)
    assert result.loss == 0 and result.metrics["valid_anchors"] == 0
    assert all(x.abs().max() == 0 for x in gradients(model, result.loss).values())


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_gradient_checkpointing_changes_nothing(plain, name, reentrant):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(name).train(), plain.prompt_of(layout)
    network, config = FeatureNetwork(model), options(replay_rollouts=False)
    result = ebft_step(model, network, prompt, layout, config, generator=generator())
    expected = gradients(model, result.loss)
    calls = []
    decoder_layers(model)[0].self_attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = ebft_step(model, network, prompt, layout, options(), generator=generator())
    sampling = layout.horizon
    assert len(calls) == sampling + 1
    assert torch.equal(again.rollouts, result.rollouts) and torch.equal(again.loss, result.loss)
    found = gradients(model, again.loss)
    assert len(calls) == sampling + 2, "the backward pass ran the block again"
    assert found.keys() == expected.keys()
    for parameter, x in found.items():
        assert torch.equal(x, expected[parameter]), parameter


def test_adapters_alone_are_trained(plain):
    layout = plain.layouts["strided"]()
    torch.manual_seed(1)
    base, prompt = plain.build(), plain.prompt_of(layout)
    expected_features = FeatureNetwork(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    network = FeatureNetwork(model)
    result = ebft_step(model, network, prompt, layout, options(), generator=generator())
    found = gradients(model, result.loss)
    assert found and all("lora_" in name for name in found)
    packed = layout.pack(prompt, result.rollouts)
    for x, y in zip(network(packed, layout), expected_features(packed, layout), strict=True):
        assert torch.equal(x, y)
    plain_gradients = []
    for m in (plain.double(model), model):
        loss = expected_loss(
            result.match.advantage,
            plain.rollout_log_probs(m, prompt, result.rollouts, layout, 0.8),
            plain.prompt_log_probs(m, prompt, layout),
            layout,
            options(),
            None,
        )
        plain_gradients.append(gradients(m, loss))
    assert_gradients_within_budget(found, eager=plain_gradients[1], truth=plain_gradients[0])


def test_every_forward_goes_through_the_wrapper(plain, tmp_path):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    network = FeatureNetwork(model)
    result = ebft_step(model, network, prompt, layout, options(), generator=generator())
    expected = gradients(model, result.loss)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped, calls = DistributedDataParallel(model), []
        wrapped.register_forward_hook(lambda *_: calls.append(1))
        result = ebft_step(wrapped, network, prompt, layout, options(), generator=generator())
        found = gradients(model, result.loss)
    finally:
        torch.distributed.destroy_process_group()
    assert len(calls) == layout.horizon + 1
    assert found.keys() == expected.keys()
    for parameter, x in found.items():
        assert torch.equal(x, expected[parameter]), parameter


def test_bfloat16_autocast(plain):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    network = FeatureNetwork(model)
    with torch.autocast("cpu", torch.bfloat16):
        result = ebft_step(model, network, prompt, layout, options(), generator=generator())
        with torch.no_grad():
            eager = plain.rollout_log_probs(model, prompt, result.rollouts, layout, 0.8)
    assert result.loss.dtype == result.log_probs.dtype == torch.float32
    found = gradients(model, result.loss)
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in found.values())
    with torch.no_grad():
        truth = plain.rollout_log_probs(plain.double(model), prompt, result.rollouts, layout, 0.8)
    assert_within_budget(result.log_probs, eager, truth)
    # Twice the error of one: sampling and scoring are each that far from the truth at most.
    assert result.metrics["log_prob_gap"] <= 4 * (eager - truth).abs().max()


def test_bfloat16_model(plain):
    layout = plain.layouts["strided"]()
    model = plain.build(dtype=torch.bfloat16)
    result = ebft_step(model, FeatureNetwork(model), plain.prompt_of(layout), layout, options(), generator=generator())
    assert result.log_probs.dtype == torch.float32
    assert all(x.isfinite().all() for x in gradients(model, result.loss).values())


def test_the_same_seed_gives_the_same_step(plain):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    network = FeatureNetwork(model)
    first, second = (ebft_step(model, network, prompt, layout, options(), generator=generator(3)) for _ in range(2))
    assert torch.equal(first.rollouts, second.rollouts) and torch.equal(first.loss, second.loss)
    expected = gradients(model, first.loss)
    assert all(torch.equal(x, expected[name]) for name, x in gradients(model, second.loss).items())


def test_bad_input(plain):
    layout = plain.layouts["strided"]()
    model, prompt = plain.build(), plain.prompt_of(layout)
    network = FeatureNetwork(model)
    empty = StridedLayout.strided(2, 24, context=6, stride=4, horizon=4, samples=3, lengths=torch.tensor([9, 0]))
    cases = (
        ({"layout": empty}, ValueError, "layout: expected at least one valid anchor in the batch, got none"),
        ({"layout": 3}, TypeError, "layout: expected a StridedLayout, got int"),
        ({"feature_network": None}, ValueError, "feature_network: expected one with rl_coef = 1.0, got None"),
        ({"prompt": prompt[:, 1:]}, ValueError, r"prompt: expected shape \[B=2, P=24\], got \[2, 23\]"),
        ({"prompt": prompt.float()}, TypeError, "prompt: expected dtype int64, got float32"),
        ({"token_mask": prompt}, TypeError, "token_mask: expected dtype bool, got int64"),
        ({"token_mask": prompt[:1] > 0}, ValueError, r"token_mask: expected shape \[B=2, P=24\], got \[1, 24\]"),
    )
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for changes, error, message in cases:
        arguments = {"model": model, "feature_network": network, "prompt": prompt, "layout": layout}
        with pytest.raises(error, match=message):
            ebft_step(**(arguments | {"config": options()} | changes))
    assert not calls, "nothing runs before the arguments are checked"
    with pytest.raises(ValueError, match=r"rollouts: expected shape .* got \[2, 4, 3, 3\]"):
        policy_log_probs(model, prompt, plain.rollouts_of(layout)[..., 1:], layout)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0, got 0"):
        policy_log_probs(model, prompt, plain.rollouts_of(layout), layout, temperature=0)
