"""What a decoding step launches is what the documents say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_launches_of_a_decoding_step_are_those_of_the_page():
    from bench.decoding_launches import launches

    counted = launches()
    layers, drawing = counted["layers"], counted["head and draw"]
    assert layers["ebft_kernels::strided_attention_step"] == 28, "one attention per layer"
    assert drawing["draw_blocks_kernel"] == drawing["draw_kernel"] == drawing["aten::addmm.out"] == 3, "tiles of rows"
    page = PAGE.read_text(encoding="utf-8")
    for part, total in (("layers", layers.total()), ("head and draw, temperature alone", drawing.total())):
        assert re.search(rf"^\| {part} \| \d+ \| {total} \|$", page, flags=re.M)
