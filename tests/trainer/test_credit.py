"""Advantages against loops; gradients of penalties against exact ones, over every rollout of a tiny policy."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ebft_trainer.credit import entropy_penalty, kl_penalty, mean_of_others, reward_advantages

VOCABULARY, HORIZON = 3, 3
ROLLOUTS = torch.tensor(list(product(range(VOCABULARY), repeat=HORIZON)))  # [27, G]
EPS = torch.finfo(torch.float64).eps


def table(seed: int) -> torch.Tensor:
    """Logits [prefixes, V] of a policy that remembers everything: a row for each of the 1 + 3 + 9 prefixes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(13, VOCABULARY, dtype=torch.float64, generator=generator)


def log_probs_of(logits: torch.Tensor, rollouts: torch.Tensor) -> torch.Tensor:
    """[..., G] log-probabilities of the tokens of rollouts [..., G]."""
    every = logits.log_softmax(-1)
    row, base, parts = torch.zeros_like(rollouts[..., 0]), 0, []
    for step in range(HORIZON):
        parts.append(every[base + row, rollouts[..., step]])
        base += VOCABULARY**step
        row = VOCABULARY * row + rollouts[..., step]
    return torch.stack(parts, -1)


def expected_gradient(logits: torch.Tensor, samples: int, penalty) -> torch.Tensor:
    """The mean over all groups of ``samples`` rollouts of the gradient of the mean of ``penalty`` [1, A, n, G]."""
    groups = torch.tensor(list(product(range(len(ROLLOUTS)), repeat=samples)))  # [A, n]
    log_probs = log_probs_of(logits, ROLLOUTS[groups])[None]  # [1, A, n, G]
    share = log_probs.detach().sum((2, 3)).exp()  # [1, A], of a group among all groups
    assert share.sum() == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad((penalty(log_probs, ROLLOUTS[groups][None]).mean((2, 3)) * share).sum(), logits)
    return gradient


def next_token_divergences(logits: torch.Tensor, other: torch.Tensor, *, reverse: bool = False) -> torch.Tensor:
    """Mean over steps of KL(p || q) of the next token (reversed: KL(q || p)), given prefixes as p draws them."""
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    divergence = (q.exp() * (q - p) if reverse else p.exp() * (p - q)).sum(-1)  # [13]
    probability = log_probs_of(logits.detach(), ROLLOUTS).sum(-1).exp()
    visits = torch.zeros(13, dtype=torch.float64)
    row, base = torch.zeros(len(ROLLOUTS), dtype=torch.int64), 0
    for step in range(HORIZON):
        visits.index_add_(0, base + row, probability)
        base += VOCABULARY**step
        row = VOCABULARY * row + ROLLOUTS[:, step]
    return (visits * divergence).sum() / HORIZON


def exact(estimator: str, logits: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The quantity whose gradient an estimator has on average."""
    if estimator != "k1":
        return next_token_divergences(logits, other, reverse=estimator == "k3")
    p, q = (log_probs_of(x, ROLLOUTS).sum(-1) for x in (logits, other))
    return (p.exp() * (p - q)).sum() / HORIZON


@pytest.mark.parametrize("samples", (1, 2))
@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
def test_gradient_of_the_kl_penalty_is_the_exact_one(estimator, samples):
    logits, other = table(1).requires_grad_(), table(2)
    (truth,) = torch.autograd.grad(exact(estimator, logits, other), logits)

    def penalty(log_probs, rollouts):
        return kl_penalty(log_probs, log_probs_of(other, rollouts), estimator)

    found = expected_gradient(logits, samples, penalty)
    assert truth.abs().max() > 1e-2
    assert (found - truth).abs().max() <= 1000 * EPS


def test_the_three_gradients_are_three():
    logits, other = table(1).requires_grad_(), table(2)
    gradients = [torch.autograd.grad(exact(x, logits, other), logits)[0] for x in ("k1", "k2", "k3")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (gradients[i] - gradients[j]).abs().max() > 1e-2


def test_values_of_the_kl_penalty():
    """k1 and k3 have the divergence as their mean, k2 to third order in the difference of the policies."""
    logits, other = table(1), table(2)
    p, q = (log_probs_of(x, ROLLOUTS) for x in (logits, other))
    probability = p.sum(-1).exp()
    means = {
        estimator: (kl_penalty(p[None, None], q[None, None], estimator)[0, 0].mean(-1) * probability).sum()
        for estimator in ("k1", "k2", "k3")
    }
    truth = next_token_divergences(logits, other)
    assert means["k1"] == pytest.approx(truth.item(), rel=1e-12)
    assert means["k3"] == pytest.approx(truth.item(), rel=1e-12)
    assert abs(means["k2"] - truth) > 1e-2
    near = log_probs_of(logits + 1e-3 * other, ROLLOUTS)
    k2 = (kl_penalty(p[None, None], near[None, None], "k2")[0, 0].mean(-1) * probability).sum()
    assert k2 == pytest.approx(next_token_divergences(logits, logits + 1e-3 * other).item(), rel=1e-2)


@pytest.mark.parametrize("samples", (1, 2))
def test_gradient_of_the_entropy_penalty_is_the_exact_one(samples):
    logits = table(1).requires_grad_()
    p = log_probs_of(logits, ROLLOUTS).sum(-1)
    (truth,) = torch.autograd.grad((p.exp() * p).sum() / HORIZON, logits)
    found = expected_gradient(logits, samples, lambda log_probs, _: entropy_penalty(log_probs))
    assert truth.abs().max() > 1e-2
    assert (found - truth).abs().max() <= 1000 * EPS
    log_probs = log_probs_of(logits, ROLLOUTS)[None, None]
    assert torch.equal(entropy_penalty(log_probs), log_probs), "its value is log p"


@pytest.mark.parametrize("samples", (1, 2, 5))
@pytest.mark.parametrize("estimator", ("rloo", "reinforce", "group_norm"))
def test_advantages_of_independent_rewards(estimator, samples):
    reward = torch.rand(2, 3, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = reward_advantages(reward, estimator)
    for b, a, j in product(range(2), range(3), range(samples)):
        own, every = reward[b, a, j].item(), reward[b, a].tolist()
        others = every[:j] + every[j + 1 :]
        mean = sum(every) / samples
        spread = (sum((x - mean) ** 2 for x in every) / max(samples - 1, 1)) ** 0.5
        expected = {
            "rloo": own - (sum(others) / len(others) if others else 0.0),
            "reinforce": own,
            "group_norm": (own - mean) / (spread + 1e-9),
        }
        assert found[b, a, j].item() == pytest.approx(expected[estimator], abs=1e-12)


def test_equal_rewards_give_no_advantage():
    reward = torch.full((1, 2, 3), 0.1)  # three of them, divided by three, are not 0.1 again in float32
    for estimator in ("rloo", "group_norm"):
        assert reward_advantages(reward, estimator).abs().max() <= 1e-6
    assert torch.equal(mean_of_others(torch.ones(1, 1, 1, 2)), torch.zeros(1, 1, 1, 2))
