"""What Python takes to prepare a launch stays small against the kernels: see bench/launch_overhead.py."""

from __future__ import annotations

import pytest
import torch

from bench import launch_overhead

pytestmark = pytest.mark.speed


@pytest.fixture(scope="module")
def measured() -> dict[str, launch_overhead.Overhead]:
    torch.use_deterministic_algorithms(False)
    return {one.name: one for one in launch_overhead.overheads()}


def test_every_function_that_launches_kernels_is_measured(measured):
    assert set(measured) == {
        "strided_attention forward",
        "strided_attention backward",
        "strided_attention_step forward",
        "pool_features forward",
        "pool_features backward",
        "mean_embedding_loss forward",
        "mean_embedding_loss backward",
        "feature_matching forward",
        "dense_mask forward",
        "geometry forward",
    }


@pytest.mark.parametrize(
    "name",
    [
        f"{op} {way}"
        for op, (_, functions) in launch_overhead._CALLS.items()
        for way in ("forward", "backward")[: len(functions)]
    ],
)
def test_microseconds_per_call(name, measured):
    assert measured[name].module < launch_overhead.GOAL_MICROSECONDS
