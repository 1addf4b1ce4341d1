"""Pooling, alignment, diversity, reward and advantages of the recorded features, against the recorded numbers.

What is not compared, because the recorded code does something else there: the advantages of ``embed_method="token"``
and of ``group_norm``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ebft_kernels import FeatureMatching, StridedLayout, feature_matching, pool_features

from ..op_checks import impls_here
from .loader import Case, case_parameters, load_case

POOLINGS = {"last_token": "last_token", "mean_pooling": "mean", "concat": "concat", "token": "token"}
IMPLS = (*impls_here("feature_matching"), "triton")


def tolerance(case: Case, name: str) -> Tensor:
    """How far a recorded number may be from the exact one.

    It was computed in float32, whose roundings act like noise in the features; ``*_sens`` is the largest change that
    such noise made in 8 draws. Twice that for what 8 draws miss, and the float32 rounding of terms that reach 2.
    """
    return 2 * torch.tensor(case.arrays[f"{name}_sens"]) + 4 * torch.finfo(torch.float32).eps


def assert_agrees(case: Case, name: str, actual: Tensor) -> None:
    excess = (actual - torch.tensor(case.arrays[name])).abs() - tolerance(case, name)
    assert excess.max() <= 0, f"{name}: {excess.max():.1e} beyond the tolerance"


def recorded_features(case: Case) -> tuple[Tensor, Tensor]:
    """The recorded features of every token, already normalised and masked: [B, A, n, G, L, C] and [B, A, G, L, C]."""
    config = case.config
    shape = (config["B"], config["n"], config["num_blocks"], config["generate_length"], config["NF"], config["H"])
    rollouts, targets = (torch.tensor(case.arrays[key]).view(shape) for key in ("gen_hidden", "gt_hidden"))
    assert torch.equal(targets, targets[:, :1].expand_as(targets))
    return rollouts.movedim(1, 2), targets[:, 0]


def pooled_features(case: Case, impl: str) -> tuple[Tensor, Tensor]:
    """The recorded token features, put into packed rows and pooled.

    Where the stride is shorter than the horizon, windows overlap; a prompt token has one feature, so they must agree.
    """
    config = case.config
    layout = StridedLayout.strided(
        config["B"],
        config["P"],
        context=config["context_length"],
        stride=config["stride"],
        horizon=config["generate_length"],
        samples=config["n"],
    )
    rollouts, targets = recorded_features(case)
    hidden = []
    for layer in range(config["NF"]):
        prompt = torch.zeros(config["B"], config["P"], config["H"])
        for a, start in enumerate(layout.anchors[0].tolist()):
            prompt[:, start : start + layout.horizon] = targets[:, a, :, layer]
        hidden.append(layout.pack(prompt, rollouts[..., layer, :]))
    mask = torch.tensor(case.arrays["qa_masks"]).bool() if config["qa_masking"] else None
    pooling = POOLINGS[config["embed_method"]]
    return pool_features(hidden, layout, pooling=pooling, normalize="none", token_mask=mask, impl=impl)


@functools.cache
def match(name: str, impl: str) -> FeatureMatching:
    """Once for the rewards and the advantages of a case: kernels in the interpreter take seconds."""
    case = load_case(name)
    config = case.config
    return feature_matching(
        *pooled_features(case, impl),
        whitening="sample" if config["use_whitening"] else "none",
        alignment_coef=config["alignment_coef"],
        diversity_coef=config["diversity_coef"],
        estimator=config["advantage_estimator"],
        groups=config["NF"],
        impl=impl,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", case_parameters())
def test_rewards(name, impl):
    case = load_case(name)
    result = match(name, impl)
    for field in ("alignment", "diversity", "reward"):
        assert_agrees(case, field, getattr(result, field).transpose(1, 2))  # recorded as [B, n, A, ...]


def advantages_are_comparable(config: dict[str, Any]) -> bool:
    return config["embed_method"] != "token" and config["advantage_estimator"] != "group_norm"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", case_parameters(advantages_are_comparable))
def test_advantages(name, impl):
    case = load_case(name)
    config = case.config
    advantage = match(name, impl).advantage  # [B, A, n]
    # Recorded for token t + 1 at index t of [B*n, S-1], rollout tokens ordered (step, anchor).
    per_token = advantage.movedim(2, 1)[:, :, None].expand(-1, -1, config["generate_length"], -1)
    actual = torch.zeros(config["B"] * config["n"], config["S"] - 1)
    actual[:, config["P"] - 1 :] = per_token.flatten(2).flatten(0, 1)
    assert_agrees(case, "advantages", actual)


@pytest.mark.parametrize("name", case_parameters(lambda config: config["use_whitening"]))
def test_no_recorded_singular_value_is_near_the_cut_off(name):
    """Otherwise rounding would decide which directions are dropped, and the comparison would mean nothing."""
    values = load_case(name).arrays["whiten_sv"]
    ratio = values / np.maximum(values.max(-1, keepdims=True), np.finfo(np.float64).tiny)
    assert not ((ratio > 1e-6) & (ratio < 1e-4)).any()
