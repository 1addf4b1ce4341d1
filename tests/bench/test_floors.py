"""The floors are the work that the problems count: neither less nor more, and into the right memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import floors
from bench.floors import Pairs
from bench.problems import DIRECTIONS, PROBLEMS
from bench.shapes import Geometry, ModelShape, visible_pairs
from bench.step import PHASES, Setup
from ebft_kernels.testing import LAYOUTS

CPU = torch.device("cpu")
MODEL = ModelShape("small", 24, 40, 4, 4, 2, 16, 97)


def operations(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"empty_batch"}))
def test_pairs_are_the_visible_ones_up_to_one_row_per_block(name):
    layout = LAYOUTS[name]()
    pairs = Pairs.of(layout)
    counted = 64 * layout.batch_size * sum(pairs.rows)
    assert visible_pairs(layout) <= counted < visible_pairs(layout) + 64 * layout.batch_size * len(pairs.rows)
    for step in range(layout.horizon):
        seen = int(layout.step_rows(layout.dense_mask()[:, 0], step).sum())
        pairs = Pairs.of_step(layout, step)
        counted = 64 * layout.batch_size * sum(pairs.rows)
        assert seen <= counted < seen + 64 * layout.batch_size * len(pairs.rows)


def test_operations_of_each_direction():
    pairs = Pairs.of(LAYOUTS["odd"]())
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
    product = 2 * 64 * 8 * 4 * pairs.batch * sum(pairs.rows)
    assert operations(floors.attention([pairs], **sizes)) == 2 * product
    assert operations(floors.attention([pairs, pairs], **sizes, forward=False, backward=True)) == 2 * 5 * product

    weights = [(torch.randn(10, 6), 700), (torch.randn(6, 10), 3)]
    product = 2 * 60 * 703
    assert operations(floors.linear(weights)) == product
    assert operations(floors.linear(weights, forward=False, backward=True)) == 2 * product


def test_wide_results_are_made_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(floors, "_RESULT_NUMEL", 10)
    monkeypatch.setattr(floors, "_LEAST_ROWS", 4)
    assert operations(floors.linear([(torch.randn(5, 3), 11)], backward=True)) == 3 * 2 * 15 * 11


@pytest.mark.parametrize("op", PROBLEMS)
def test_every_problem_has_a_floor_of_its_own_work(op):
    problem = PROBLEMS[op](MODEL, Geometry(batch=2, length=300), torch.float32, CPU)
    for direction in DIRECTIONS if problem.work_backward else ("forward",):
        work = problem.floor(direction)
        work()
        if problem.unit == "FLOP":
            forward, backward = direction != "backward", direction != "forward"
            expected = problem.work * forward + problem.work_backward * backward
            assert expected <= operations(work) < 1.05 * expected


@pytest.mark.parametrize(("read", "written"), [(4000, 4000), (4000, 800), (800, 4000), (4000, 0), (0, 0)])
def test_bytes(read, written):
    floors.copied(read, written)()


def test_a_step_has_a_floor_for_every_phase():
    setup = Setup(MODEL, Geometry(batch=2, length=40), torch.float32)
    counts = {phase: sum(operations(work) for work in works) for phase, works in setup._floor().items()}
    assert tuple(counts) == PHASES and counts["matching"] == 0
    layout = setup.layout.without_last_step()
    linear = 2 * layout.batch_size * layout.packed_length * 4 * (24 * 16 * (2 * 4 + 2 * 2) + 3 * 24 * 40)
    head = 2 * 24 * 97 * layout.batch_size * layout.num_anchors * (1 + layout.samples * layout.horizon)
    forward = linear + head + 4 * 16 * 4 * 4 * visible_pairs(layout)
    for phase, expected in (("rollout", forward), ("policy", forward), ("backward", 2 * (linear + head))):
        assert counts[phase] >= expected
    assert counts["rollout"] < 1.2 * forward and counts["policy"] < 1.1 * forward
