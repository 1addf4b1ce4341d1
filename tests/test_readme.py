"""The README cannot drift: its Python blocks run, its drawing is the layout's own."""

from __future__ import annotations

import re
from pathlib import Path

from ebft_kernels import StridedLayout

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert blocks
    exec("\n".join(blocks), {})


def test_the_drawing_is_the_mask():
    layout = StridedLayout.strided(1, 6, context=2, stride=2, horizon=2, samples=2)
    for line in layout.draw().splitlines():
        assert line in README
