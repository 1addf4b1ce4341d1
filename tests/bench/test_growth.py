"""Growth of a step: the fit, the count of operations, and that memory follows the tokens and not their square."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import growth
from bench.shapes import MODELS, Geometry, ModelShape, visible_pairs
from bench.step import Setup


def test_the_fit_finds_an_exponent():
    assert growth.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_operations_are_those_of_a_forward_pass_with_a_dense_mask_but_for_the_pairs_that_nobody_sees():
    shape = ModelShape("small", 24, 40, 3, 4, 2, 8, 97)
    geometry = Geometry(batch=2, length=40)
    setup = Setup(shape, geometry, torch.float32)
    setup.model.set_attn_implementation("eager")
    rows = setup.layout.packed_length
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        setup.model.model(torch.zeros(2, rows, dtype=torch.long))
    unseen = 2 * rows**2 - visible_pairs(setup.layout)
    assert growth.operations(shape, geometry) == counter.get_total_flops() - unseen * 4 * 8 * 4 * 3


def test_every_geometry_is_possible():
    for axis, values in growth.AXES.items():
        for value in values:
            assert growth.BASE._replace(**{axis: value}).layout().num_anchors > 1
    assert growth.operations(MODELS["demo"], growth.BASE) > 0


def test_table_and_plot(tmp_path):
    points = [growth.Point(x, 100 * x, 10**9 * x, 0.1 * x, x << 20) for x in (1, 2, 4)]
    text = growth.table("samples", points)
    assert "seconds ~ operations^1.00, peak memory ~ tokens^1.00" in text
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib; all else was compared")
    growth.plot(tmp_path / "growth.png", "samples", points, "the machine")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
