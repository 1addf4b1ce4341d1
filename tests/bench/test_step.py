"""The benchmark of a whole step: everyone takes the same step, and a different loss stops it."""

from __future__ import annotations

import pytest
import torch

from bench import step
from bench.shapes import Geometry, ModelShape

SHAPE = ModelShape("small", 24, 40, 4, 4, 2, 8, 97)
NAMES = [step.OURS, step.COMPUTED, *step.PUBLISHED_ATTENTION]


@pytest.fixture(scope="module")
def setup():
    return step.Setup(SHAPE, Geometry(batch=2, length=32), torch.float32)


def test_everyone_is_timed_by_phase(setup):
    seconds = setup.time(NAMES, rounds=1)
    assert list(seconds) == [*NAMES, step.FLOOR]
    assert all(set(phases) == set(step.PHASES) and min(phases.values()) > 0 for phases in seconds.values())
    lines = step.table(seconds, {step.OURS: 1 << 20, step.PUBLISHED: 6 << 20}).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith(f"| {step.PUBLISHED} / {step.OURS} |") and line.endswith("| 6.0 |") for line in lines)


def test_another_loss_stops_it(setup, monkeypatch):
    real, other = step.published_step, step.EBFTOptions(eos_token_ids=[], temperature=1.5, alignment_coef=3.0)
    monkeypatch.setattr(step, "published_step", lambda *args, **kwargs: real(*args[:4], other, **kwargs))
    with pytest.raises(RuntimeError, match="published algorithm: loss"):
        setup.time([step.OURS, step.PUBLISHED], rounds=1)


def test_a_policy_that_is_computed_has_the_loss_of_one_that_is_replayed(setup, monkeypatch):
    asked, real = [], step.ebft_step
    monkeypatch.setattr(step, "ebft_step", lambda *args, **kwargs: asked.append(args[4]) or real(*args, **kwargs))
    losses = [setup.run(name)[0] for name in (step.OURS, step.COMPUTED)]
    assert [options.replay_rollouts for options in asked] == [True, False]
    assert abs(losses[0] - losses[1]) < 1e-5


def test_gradients_are_those_of_one_step(setup):
    for name in NAMES:
        setup.run(name)
        once = [p.grad.clone() for p in setup.model.parameters()]
        setup.run(name)
        assert all(torch.equal(p.grad, g) for p, g in zip(setup.model.parameters(), once, strict=True))
