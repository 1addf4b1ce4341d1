"""Who gets which credit: from rewards to advantages, and penalties whose gradient is that of what they estimate.

For a quantity ``E_p[c(x)]`` over rollouts x of the policy p, where c does not depend on p, the gradient is
``E_p[c(x) grad log p(x)]``. A cost of token h is no consequence of tokens after it, so token g is credited with the
costs from g on, less a baseline that does not depend on its own rollout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reward_advantages(reward: Tensor, estimator: str) -> Tensor:
    """Advantages of rewards that do not depend on the other rollouts of their anchor.

    That is what tells a verifier's reward from that of feature matching, whose diversity needs a baseline of its own
    (:func:`ebft_kernels.feature_matching`).

    Args:
        reward: [B, A, n].
        estimator: "rloo": reward - mean of the other n-1 (0 for n = 1); "reinforce": the reward; "group_norm":
            (reward - mean over n) / (standard deviation over n, with n - 1, + 1e-9), 0 for n = 1.

    Returns:
        [B, A, n].
    """
    if estimator == "reinforce":
        return reward
    # In float64, or the rounding of a mean of equal rewards would be blown up by their spread of almost 0.
    exact = reward.double()
    if estimator == "rloo":
        advantage = exact - mean_of_others(exact)
    elif reward.shape[2] == 1:
        advantage = torch.zeros_like(exact)
    else:
        advantage = (exact - exact.mean(2, keepdim=True)) / (exact.std(2, keepdim=True) + 1e-9)
    return advantage.to(reward.dtype)


def mean_of_others(x: Tensor) -> Tensor:
    """Mean over the other n-1 samples of x [B, A, n, ...]; 0 for n = 1."""
    return (x.sum(2, keepdim=True) - x) / max(x.shape[2] - 1, 1)


def kl_penalty(log_probs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimates of the KL divergence of the policy from a reference, by the tokens that the policy drew.

    With ``d = log p - log q`` of a drawn token, the values are ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) - 1 + d``
    (Schulman 2020). k1 and k3 have the mean KL(p || q), k2 only near p = q. Their gradients are another matter:

        "k1": through d itself it would be 0 on average, so it is that of the mean: token g's log-probability times the
            sum of d from g on, less that of the other samples. On average exactly the gradient of KL(p || q) of whole
            rollouts.
        "k2": ``d grad log p``, on average exactly that of KL(p || q) of each next token, its prefix taken as given.
        "k3": ``(1 - exp(-d)) grad log p``, on average that of KL(q || p) of each next token, prefix as given: the other
            direction. It is what "k3 as a loss" computes elsewhere too.

    All of it for samples of p itself: with top-k or top-p they are not.

    Args:
        log_probs: [B, A, n, G], of drawn tokens under the policy, 0 for those that do not count; differentiable.
        reference: [B, A, n, G], likewise, without gradient.
        estimator: "k1", "k2" or "k3".

    Returns:
        [B, A, n, G], to be averaged as the policy loss is.
    """
    difference = log_probs - reference
    if estimator == "k1":
        return _with_score_gradient(difference.detach(), log_probs)
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(-difference) + difference


def entropy_penalty(log_probs: Tensor) -> Tensor:
    """Estimates of minus the entropy of the rollouts, by the tokens that the policy drew: log p.

    As k1 of `kl_penalty` against a reference that finds all tokens equally likely: the gradient is on average exactly
    that of the entropy of whole rollouts. It takes no logits of other tokens; the price is the variance of a
    score-function estimate.

    Args:
        log_probs: [B, A, n, G], 0 for tokens that do not count; differentiable.

    Returns:
        [B, A, n, G], to be averaged as the policy loss is.
    """
    return _with_score_gradient(log_probs.detach(), log_probs)


def _with_score_gradient(cost: Tensor, log_probs: Tensor) -> Tensor:
    """``cost`` [B, A, n, G] as it is, with the gradient of its mean over rollouts: that of credit times log p."""
    to_go = cost.flip(-1).cumsum(-1).flip(-1)
    credit = to_go - mean_of_others(to_go)
    return cost + credit * (log_probs - log_probs.detach())
