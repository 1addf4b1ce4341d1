"""Whether a peer's step is the library's: masks, positions, greedy tokens, and all numbers for the same rollouts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout, feature_matching
from ebft_kernels.testing import error_budget
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import FeatureNetwork
from ebft_trainer.rollout import sample_rollouts
from ebft_trainer.scoring import policy_log_probs

from ..baselines.published import published_step


def disagreements(
    make_peer: Callable[[nn.Module, StridedLayout, EBFTOptions], Any],
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    options: EBFTOptions,
) -> list[str]:
    """What differs, in words; empty if nothing does.

    Rewards, advantages and gradients are compared for the rollouts that the peer sampled: peer and library may each be
    as far from the published algorithm in float64 as that algorithm is in the model's dtype (the error budget that all
    comparisons of this project use).
    """
    peer = make_peer(model, layout, options)
    found = []
    order = layout.to_reference_order(torch.arange(layout.packed_length).expand(layout.batch_size, -1))[0]
    mask, positions = peer.mask_and_positions()
    if not torch.equal(mask, layout.dense_mask()[0, 0][order][:, order]):
        found.append("attention masks differ")
    if not torch.equal(positions, layout.position_ids[0, order]):
        found.append("positions differ")
    greedy, _ = sample_rollouts(model, prompt, layout, temperature=0)
    if different := int((peer.greedy(prompt) != greedy).sum()):
        found.append(f"{different} of {greedy.numel()} greedy tokens differ")

    step = peer.step(prompt)
    truth = _published(copy.deepcopy(model).double(), prompt, layout, options, step.rollouts, "eager")
    eager = [_published(model, prompt, layout, options, step.rollouts, how) for how in ("eager", "sdpa")]
    ours = _library(model, prompt, layout, options, step.rollouts)
    theirs = (step.rewards, step.advantages, step.gradient)
    for index, name in enumerate(("rewards", "advantages", "gradients")):
        budget = max(error_budget(way[index], truth[index], model.dtype) for way in eager)
        for who, results in (("peer", theirs), ("library", ours)):
            error = float((results[index].double() - truth[index]).abs().max())
            if not error <= budget:
                found.append(f"{name} of the {who}: error {error:.1e} exceeds the budget {budget:.1e}")
    return found


Results = tuple[Tensor, Tensor, Tensor]


def _published(
    model: nn.Module, prompt: Tensor, layout: StridedLayout, options: EBFTOptions, rollouts: Tensor, attention: str
) -> Results:
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    step = published_step(model, model, prompt, layout, options, rollouts=rollouts)
    model.set_attn_implementation(before)
    return step.match.reward, step.match.advantage, _gradient(step.loss, model)


def _library(
    model: nn.Module, prompt: Tensor, layout: StridedLayout, options: EBFTOptions, rollouts: Tensor
) -> Results:
    network = FeatureNetwork(model, options.feature_layers)
    match = feature_matching(
        *network(layout.pack(prompt, rollouts), layout),
        whitening=options.whitening,
        alignment_coef=options.alignment_coef,
        diversity_coef=options.diversity_coef,
        estimator=options.estimator,
    )
    log_probs, _ = policy_log_probs(model, prompt, rollouts, layout, temperature=options.temperature)
    loss = -options.rl_coef * (match.advantage[..., None] * log_probs).mean()
    return match.reward, match.advantage, _gradient(loss, model)


def _gradient(loss: Tensor, model: nn.Module) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])
