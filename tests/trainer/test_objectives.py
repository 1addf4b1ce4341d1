"""Objectives, penalties and ends of rollouts in one step, against the plain model run on each prefix and rollout."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ebft_kernels import StridedLayout, feature_matching
from ebft_kernels.testing import assert_within_budget
from ebft_trainer import scoring, step
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import before_end, end_tokens, sample_rollouts
from ebft_trainer.scoring import policy_log_probs, reference_log_probs
from ebft_trainer.step import ebft_step

from ..model_checks import assert_gradients_within_budget

ENDS = list(range(0, 50, 4))  # so many that most rollouts end


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options(**changes) -> EBFTOptions:
    return EBFTOptions(**({"temperature": 0.8, "eos_token_ids": ENDS} | changes))


def some_tokens(layout: StridedLayout) -> torch.Tensor:
    mask = torch.ones(layout.batch_size, layout.length, dtype=torch.bool)
    mask[:, ::3] = False
    return mask


def token_rewards(_prompt, rollouts, _layout, *, rollout_mask=None, **_masks):
    """A verifier without text: the mean of the rollout tokens that count, over 61."""
    counted = torch.ones_like(rollouts, dtype=torch.bool) if rollout_mask is None else rollout_mask
    return (rollouts * counted).sum(-1) / counted.sum(-1).clamp_min(1) / 61


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def until_first_end(tokens: list[int]) -> int:
    """How many tokens there are up to the first end token, that one included."""
    return next((g + 1 for g, token in enumerate(tokens) if token in ENDS), len(tokens))


def expected_penalty(p, difference, counted, j, estimator) -> torch.Tensor:
    """Of rollout j, from log-probabilities and their differences [n, G]."""
    total = p.new_zeros(())
    for g in counted[j]:
        d = difference[j, g]
        if estimator == "k2":
            total = total + d**2 / 2
        elif estimator == "k3":
            total = total + torch.exp(-d) - 1 + d
        else:
            to_go = [
                sum([difference[k, h].detach() for h in steps if h >= g], p.new_zeros(()))
                for k, steps in enumerate(counted)
            ]
            credit = to_go[j] - (sum(to_go) - to_go[j]) / (len(to_go) - 1)
            total = total + d.detach() + credit * (p[j, g] - p[j, g].detach())
    return total


def expected_terms(result, log_probs, reference, text, layout, config, mask) -> dict[str, torch.Tensor]:
    """Every term of the loss, rollout by rollout and token by token."""
    mask = torch.ones(layout.batch_size, layout.length, dtype=torch.bool) if mask is None else mask
    terms: dict[str, list] = {name: [] for name in ("rl", "verifier", "kl", "entropy")}
    for b, a in layout.valid.nonzero().tolist():
        anchor = int(layout.anchors[b, a])
        in_window = [g for g in range(layout.horizon) if mask[b, anchor + g]]
        if not in_window:
            continue
        group = result.rollouts[b, a].tolist()
        counted = [[g for g in in_window if g < until_first_end(tokens)] for tokens in group]
        p, share = log_probs[b, a], 1 / len(in_window)
        rewards = result.verifier_reward[b, a]
        for j in range(layout.samples):
            others = [k for k in range(layout.samples) if k != j]
            advantage = rewards[j] - sum(rewards[k] for k in others) / len(others)
            total = sum([p[j, g] for g in counted[j]], p.new_zeros(()))
            terms["verifier"].append(-advantage * share * total)
            terms["rl"].append(-result.match.advantage[b, a, j] * share * total)
            difference = p - reference[b, a]
            terms["kl"].append(share * expected_penalty(p, difference, counted, j, config.kl_estimator))
            terms["entropy"].append(share * expected_penalty(p, p, counted, j, "k1"))
    nats = [
        -text[b, t - 1]
        for b in range(layout.batch_size)
        for t in range(1, int(layout.lengths[b]))
        if mask[b, t] and layout.prompt_start[b, t] < t
    ]
    return {name: sum(parts) / len(parts) for name, parts in (terms | {"ce": nats}).items()}


@pytest.mark.parametrize(
    ("layout", "masked", "changes"),
    (
        ("strided", False, {"kl_estimator": "k1"}),
        ("uneven", False, {"kl_estimator": "k2", "pooling": "mean"}),
        ("strided", True, {"kl_estimator": "k1", "whitening": "none"}),
        ("uneven", True, {"kl_estimator": "k3"}),
    ),
)
def test_every_term_and_its_gradient_are_those_of_the_plain_model(plain, layout, masked, changes):
    layout = plain.layouts[layout]()
    config = options(rl_coef=0.7, verifier_coef=2.0, ce_coef=0.3, kl_coef=0.5, entropy_coef=0.2, **changes)
    prompt, mask = plain.prompt_of(layout), some_tokens(layout) if masked else None
    exact, frozen = plain.build(dtype=torch.float64), plain.build(seed=5, dtype=torch.float64)
    network = FeatureNetwork(plain.build(seed=7).double(), pooling=config.pooling)
    result = ebft_step(
        exact,
        network,
        prompt,
        layout,
        config,
        token_mask=mask,
        generator=generator(),
        verifier=token_rewards,
        reference_model=frozen,
    )
    found = gradients(exact, result.loss)
    alive = before_end(result.rollouts, ENDS)
    assert 0.2 < alive.double().mean() < 0.9, "some rollouts end, some do not"

    terms, plain_gradients = {}, {}
    for model, reference in ((exact, frozen), (plain.build(), plain.build(seed=5))):
        with torch.no_grad():
            q = plain.rollout_log_probs(reference, prompt, result.rollouts, layout, 0.8)
        p = plain.rollout_log_probs(model, prompt, result.rollouts, layout, 0.8)
        text = plain.prompt_log_probs(model, prompt, layout)
        terms[model] = expected_terms(result, p, q, text, layout, config, mask)
        loss = sum(getattr(config, f"{name}_coef") * term for name, term in terms[model].items())
        plain_gradients[model] = gradients(model, loss)
    names = ("rl", "verifier", "ce", "kl", "entropy")
    assert terms[exact].keys() == set(names)
    truth, eager = (torch.stack([x[name].detach().double() for name in names]) for x in terms.values())
    found_terms = torch.stack([result.metrics[f"loss/{name}"].double() for name in names])
    # To the error of float32: models compute norms and rotary angles in it whatever their dtype.
    assert_within_budget(found_terms.float(), eager, truth, "terms")
    truth, eager = plain_gradients.values()
    assert max(x.abs().max() for x in truth.values()) > 1e-2
    assert_gradients_within_budget(found, eager, truth)


def test_reward_training_follows_the_exact_gradient_of_the_expected_reward(plain, monkeypatch):
    """All pairs of rollouts of a model of four tokens, each with its probability; the last token ends a rollout."""
    end, horizon = 3, 2
    every = [(3, 3), *((a, b) for a, b in product(range(3), range(4)))]  # after an end there is nothing to choose
    pairs = torch.tensor(list(product(every, repeat=2)))  # [169, 2, 2]
    values = {rollout: 0.1 * i**2 % 1.3 for i, rollout in enumerate(every)}
    prompt = torch.tensor([[1, 0, 2, 2, 1]]).expand(len(pairs), -1)
    layout = StridedLayout.from_anchors(torch.full((len(pairs), 1), 3), 5, horizon=horizon, samples=2)
    model = plain.build(vocab_size=4, dtype=torch.float64)

    def log_probability(model, rollouts):
        """[R] of rollouts [R, 2] up to their end."""
        tokens = torch.cat([prompt[:1, :3].expand(len(rollouts), -1), rollouts], 1)
        log_probs = (model(input_ids=tokens).logits[:, 2:-1] / 0.8).log_softmax(-1)
        log_probs = log_probs.gather(-1, rollouts[..., None])[..., 0]
        return torch.where(before_end(rollouts, [end]), log_probs, 0).sum(-1)

    with torch.no_grad():
        share = log_probability(model, pairs.flatten(0, 1)).view(-1, 2).sum(-1).exp()
    assert share.sum() == pytest.approx(1.0)

    def reward(_prompt, rollouts, _layout, **_masks):
        found = torch.tensor([[values[tuple(x)] for x in pair] for pair in rollouts[:, 0].tolist()])
        # The step weighs all pairs alike; advantages are linear in the rewards.
        return (found * share[:, None] * len(pairs))[:, None]

    drawn = pairs[:, None], torch.zeros(len(pairs), 1, 2, horizon, dtype=torch.float64)
    monkeypatch.setattr(step, "sample_rollouts", lambda *_args, **_options: drawn)
    config = EBFTOptions(objective="rlvr", temperature=0.8, eos_token_ids=[end])
    result = ebft_step(model, None, prompt, layout, config, verifier=reward)
    found = gradients(model, result.loss)
    expected = []
    for m in (model, plain.build(vocab_size=4)):
        probability = log_probability(m, torch.tensor(every)).exp()
        mean = (probability * torch.tensor([values[x] for x in every])).sum()
        expected.append(gradients(m, -mean / horizon))
    truth, eager = expected
    assert max(x.abs().max() for x in truth.values()) > 1e-2
    assert_gradients_within_budget(found, eager, truth)


# Ends of rollouts


def test_a_rollout_ends_with_its_first_end_token(plain):
    layout, model = plain.layouts["strided"](), plain.build()
    prompt = plain.prompt_of(layout)
    endless, whole = sample_rollouts(model, prompt, layout, temperature=0.8, generator=generator())
    tokens, log_probs = sample_rollouts(
        model, prompt, layout, temperature=0.8, eos_token_ids=ENDS, generator=generator()
    )
    ended = 0
    for b, a, j in product(*map(range, tokens.shape[:3])):
        count = until_first_end(endless[b, a, j].tolist())
        ended += count < layout.horizon
        assert torch.equal(tokens[b, a, j, :count], endless[b, a, j, :count])
        assert torch.equal(log_probs[b, a, j, :count], whole[b, a, j, :count])
        assert (tokens[b, a, j, count:] == ENDS[0]).all() and (log_probs[b, a, j, count:] == 0).all()
        assert before_end(tokens[b, a, j], ENDS).tolist() == [g < count for g in range(layout.horizon)]
    assert ended > 3


def test_what_stands_after_an_end_is_not_read(plain, monkeypatch):
    """NaN in place of its log-probabilities, and other tokens, change nothing."""
    layout, model = plain.layouts["strided"](), plain.build()
    prompt, network = plain.prompt_of(layout), FeatureNetwork(plain.build(seed=7))
    config = options(verifier_coef=1.0, kl_coef=0.3, entropy_coef=0.2)
    arguments = {"verifier": token_rewards, "reference_model": plain.build(seed=5)}
    clean = ebft_step(model, network, prompt, layout, config, generator=generator(), **arguments)
    expected = gradients(model, clean.loss)
    after = ~before_end(clean.rollouts, ENDS)
    assert after.any()

    def poisoned(*args, **options):
        log_probs, text = policy_log_probs(*args, **options)
        return log_probs.masked_fill(after, torch.nan), text

    monkeypatch.setattr(step, "policy_log_probs", poisoned)
    monkeypatch.setattr(scoring, "policy_log_probs", poisoned)
    result = ebft_step(model, network, prompt, layout, config, generator=generator(), **arguments)
    found = gradients(model, result.loss)
    assert torch.equal(result.loss, clean.loss) and torch.equal(result.log_probs, clean.log_probs)
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    for name, value in clean.metrics.items():
        assert name.startswith("seconds/") or result.metrics[name] == value, name


@pytest.mark.parametrize("pooling", ("last_token", "mean", "concat", "token"))
def test_features_are_those_of_the_tokens_up_to_the_end(plain, pooling):
    layout, frozen = plain.layouts["strided"](), plain.build(seed=7)
    prompt, mask = plain.prompt_of(layout), some_tokens(layout)
    network = FeatureNetwork(frozen, pooling=pooling)
    seen = []

    def spy(*args, **kwargs):
        seen.append(network(*args, **kwargs))
        return seen[-1]

    result = ebft_step(plain.build(), spy, prompt, layout, options(), token_mask=mask, generator=generator())
    counted = before_end(result.rollouts, ENDS) & layout.windows(mask)[:, :, None]

    def pooled(model):
        """Token by token, the targets as long as they are."""
        tokens, targets = plain.features(model, prompt, result.rollouts, layout, network.layers, pooling="token")
        channels = tokens.shape[-1] // len(network.layers)
        found = []
        for x, masks in ((tokens, counted), (targets, layout.windows(mask))):
            rows = x.flatten(0, -3)  # [R, G, F]
            parts = []
            for row, flags in zip(rows, masks.flatten(0, -2), strict=True):
                kept = row * flags[:, None]
                last = [g for g in range(layout.horizon) if flags[g]]
                by_layer = kept.unflatten(-1, (-1, channels)).transpose(0, 1)
                parts.append(
                    {
                        "token": kept,
                        "mean": kept.sum(0) / layout.horizon,
                        "concat": by_layer.flatten(),
                        "last_token": row[last[-1]] if last else torch.zeros_like(row[0]),
                    }[pooling]
                )
            found.append(torch.stack(parts).unflatten(0, x.shape[:-2]))
        return found

    for name, actual, eager, truth in zip(
        ("rollouts", "targets"), seen[0], pooled(frozen), pooled(plain.double(frozen)), strict=True
    ):
        assert_within_budget(actual, eager, truth, name)


def test_ends_in_the_metrics(plain):
    layout, model = plain.layouts["strided"](), plain.build()
    prompt, network = plain.prompt_of(layout), FeatureNetwork(model)
    result = ebft_step(model, network, prompt, layout, options(), generator=generator())
    alive = before_end(result.rollouts, ENDS)
    ended = torch.isin(result.rollouts, torch.tensor(ENDS)).any(-1)
    assert result.metrics["eos_rate"] == pytest.approx(ended.float().mean().item())
    assert result.metrics["entropy"] == pytest.approx(-result.log_probs[alive].mean().item(), rel=1e-5)
    assert (result.log_probs[~alive] == 0).all()
    reward = result.match.reward
    spread = (reward - reward.mean(2, keepdim=True)).square().mean().sqrt()
    assert result.metrics["reward_std"] == pytest.approx(spread.item(), rel=1e-5)
    only = ebft_step(model, network, prompt, layout, options(eos_token_ids=list(range(61))), generator=generator())
    assert only.metrics["eos_rate"] == 1
    first = only.rollouts[..., 0]
    duplicates = sum(len(x) - len(set(x)) for x in first.flatten(0, 1).tolist()) / first.numel()
    assert only.metrics["duplicate_rate"] == pytest.approx(duplicates), "equal up to their ends"
    never = ebft_step(model, network, prompt, layout, options(eos_token_ids=[]), generator=generator())
    assert "eos_rate" not in never.metrics


def test_where_end_tokens_come_from(plain):
    model = plain.build()
    assert end_tokens(model, None) == ()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = 5
    assert end_tokens(model, None) == (5,)
    model.generation_config.eos_token_id = [7, 8]
    assert end_tokens(model, None) == (7, 8)
    assert end_tokens(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), None) == (7, 8)
    assert end_tokens(model, []) == () and end_tokens(model, [3]) == (3,)
    with pytest.raises(ValueError, match=r"eos_token_ids: expected token ids below 61, got \[61\]"):
        end_tokens(model, [61])


# What is computed, and what is not


def test_objectives_compute_what_their_coefficients_ask_for(plain):
    layout, model = plain.layouts["strided"](), plain.build()
    prompt, network = plain.prompt_of(layout), FeatureNetwork(model)
    calls = []

    def verifier(*args, **kwargs):
        calls.append(1)
        return token_rewards(*args, **kwargs)

    def run(**changes):
        calls.clear()
        config = options(**changes)
        result = ebft_step(model, network, prompt, layout, config, verifier=verifier, generator=generator())
        return result, {name for name in result.metrics if name.startswith("loss/")}

    result, losses = run(objective="ebft")
    assert losses == {"loss/rl"} and not calls and result.verifier_reward is None
    result, losses = run(objective="sft")
    assert losses == {"loss/ce"} and not calls and result.rollouts is None
    result, losses = run(objective="rlvr")
    assert losses == {"loss/verifier"} and calls == [1] and result.match is None
    assert {"verifier_reward", "verifier_reward_std", "verifier_advantage_std", "duplicate_rate", "eos_rate"} < set(
        result.metrics
    )
    assert "reward" not in result.metrics and "seconds/features" not in result.metrics
    result, losses = run(objective="sft", entropy_coef=0.1)
    assert losses == {"loss/ce", "loss/entropy"} and result.match is None and not calls
    mixed, losses = run(objective="rlvr", rl_coef=0.5, ce_coef=0.25)
    assert losses == {"loss/rl", "loss/verifier", "loss/ce"}
    total = 0.5 * mixed.metrics["loss/rl"] + mixed.metrics["loss/verifier"] + 0.25 * mixed.metrics["loss/ce"]
    assert mixed.loss.item() == pytest.approx(total.item(), rel=1e-6)


def test_mixed_advantages_are_the_advantage_of_the_mixed_reward(plain):
    """For rloo without diversity, where the reward of each rollout is its own."""
    layout, model = plain.layouts["strided"](), plain.build()
    prompt, network = plain.prompt_of(layout), FeatureNetwork(plain.build(seed=7))
    config = options(rl_coef=0.5, verifier_coef=3.0, whitening="none", diversity_coef=0.0)
    result = ebft_step(model, network, prompt, layout, config, verifier=token_rewards, generator=generator())
    mixed = 0.5 * result.match.reward + 3.0 * result.verifier_reward
    advantage = mixed - (mixed.sum(2, keepdim=True) - mixed) / (layout.samples - 1)
    expected = -(advantage * result.log_probs.sum(-1) / layout.horizon).mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


def test_the_reference_of_a_model_with_adapters_is_the_model_without_them(plain):
    layout, base = plain.layouts["strided"](), plain.build()
    frozen, prompt = copy.deepcopy(base), plain.prompt_of(layout)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = get_peft_model(base, lora).train()
    rollouts = plain.rollouts_of(layout)
    expected = reference_log_probs(frozen, frozen, prompt, rollouts, layout, temperature=0.8)
    found = reference_log_probs(model, None, prompt, rollouts, layout, temperature=0.8)
    assert torch.equal(found, expected) and not found.requires_grad
    assert all(module.training for module in model.modules())
    config = options(objective="sft", kl_coef=0.5)
    result = ebft_step(model, None, prompt, layout, config, generator=generator())
    assert result.metrics["loss/kl"] > 0
    trained = gradients(model, result.loss)
    assert trained and all("lora_" in name for name in trained)


def test_a_policy_that_is_its_reference_has_no_divergence(plain):
    layout, model = plain.layouts["strided"](), plain.build()
    prompt = plain.prompt_of(layout)
    for estimator in ("k1", "k2", "k3"):
        # A replayed forward rounds as decoding did, not as the reference's forward does.
        config = options(objective="rlvr", kl_coef=1.0, kl_estimator=estimator, replay_rollouts=False)
        result = ebft_step(
            model,
            None,
            prompt,
            layout,
            config,
            verifier=lambda _prompt, rollouts, _layout, **_masks: torch.zeros(rollouts.shape[:3]),
            reference_model=copy.deepcopy(model),
            generator=generator(),
        )
        assert result.metrics["loss/kl"] == 0
        assert all(x.abs().max() == 0 for x in gradients(model, result.loss).values())


def test_the_reference_takes_no_gradient_and_stays_in_its_mode(plain):
    layout, model, frozen = plain.layouts["strided"](), plain.build(), plain.build(seed=5).train()
    config = options(objective="sft", kl_coef=1.0)
    result = ebft_step(model, None, plain.prompt_of(layout), layout, config, reference_model=frozen)
    result.loss.backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(module.training for module in frozen.modules())


def test_a_feature_map_never_gets_a_gradient(plain):
    """Neither its own parameters, nor the policy through it, whatever it does."""
    layout, model = plain.layouts["strided"](), plain.build()
    prompt = plain.prompt_of(layout)
    table = torch.nn.Embedding(61, 5)
    seen = []

    def features(packed, layout, token_mask=None, *, rollout_mask=None):
        del token_mask, rollout_mask
        through_policy = model.get_input_embeddings()(packed)[..., :5]
        tokens = table(packed) + through_policy
        seen.append(tokens.requires_grad)
        return layout.rollouts(tokens).mean(3), layout.windows(tokens).mean(2)

    result = ebft_step(model, features, prompt, layout, options(whitening="none"), generator=generator())
    assert seen == [False]
    result.loss.backward()
    assert table.weight.grad is None
    with torch.no_grad():
        expected = feature_matching(*features(layout.pack(prompt, result.rollouts), layout), valid=layout.valid)
    assert torch.equal(result.match.advantage, expected.advantage)
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    log_probs, _ = policy_log_probs(model, prompt, result.rollouts, layout, temperature=0.8)
    log_probs = torch.where(before_end(result.rollouts, ENDS), log_probs, 0)
    again = gradients(model, -(result.match.advantage[..., None] * log_probs).mean())
    for name, x in again.items():
        torch.testing.assert_close(mine[name], x, rtol=1e-4, atol=1e-6)


def test_bad_input(plain):
    layout, model = plain.layouts["strided"](), plain.build()
    prompt = plain.prompt_of(layout)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    cases = (
        (options(objective="rlvr"), {}, "verifier: expected one with verifier_coef = 1.0, got None"),
        (
            options(objective="sft", kl_coef=0.1),
            {},
            "reference_model: expected one with kl_coef = 0.1 and a model without PEFT adapters, got None",
        ),
    )
    for config, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ebft_step(model, None, prompt, layout, config, **arguments)
    assert not calls, "nothing runs before the arguments are checked"
    with pytest.raises(ValueError, match=r"the verifier's rewards: expected shape \[B=2, A=4, n=3\], got \[2, 4\]"):
        ebft_step(model, None, prompt, layout, options(objective="rlvr"), verifier=lambda *_, **__: torch.zeros(2, 4))
    one_sample = layout.rollouts(layout.pack(prompt, plain.rollouts_of(layout)))[:, :, :1, :2].double().flatten(3)
    for features, message in (
        (
            (one_sample, one_sample[:, :, 0]),
            r"the feature map's rollout features: expected shape \[B=2, A=4, n=3, ...\]",
        ),
        ((one_sample.expand(-1, -1, 3, -1), one_sample[:, 0]), r"the feature map's target features: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ebft_step(model, lambda *_, found=features, **__: found, prompt, layout, options())


def test_rewards_of_anchors_that_are_not_valid_weigh_nothing(plain):
    layout, model = plain.layouts["uneven"](), plain.build()
    prompt, config = plain.prompt_of(layout), options(objective="rlvr")

    def poisoned(*args, **masks):
        return token_rewards(*args, **masks).masked_fill(~layout.valid[:, :, None], torch.nan)

    losses = [
        ebft_step(model, None, prompt, layout, config, verifier=verifier, generator=generator()).loss
        for verifier in (token_rewards, poisoned)
    ]
    assert losses[0].isfinite() and torch.equal(*losses)
