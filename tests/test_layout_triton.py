"""The layout's tensors as the kernels write them, against those of PyTorch; compiled or in the interpreter."""

from __future__ import annotations

import pytest
import torch

from ebft_kernels import StridedLayout, layout
from ebft_kernels.testing import LAYOUTS

pytestmark = pytest.mark.usefixtures("device")
SMALL = ("odd", "one_sample", "arbitrary", "padded", "documents", "empty_batch")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """Layouts are written by plain PyTorch until a test asks for the kernels."""
    monkeypatch.setattr(layout, "_kernels", lambda _: None)


def with_kernels(monkeypatch) -> list[str]:
    """Make every layout use the kernels; the list that is returned says what they were asked to write."""
    from ebft_kernels import _layout_triton

    written = []

    def recorded(name):
        function = getattr(_layout_triton, name)

        def call(*args, **options):
            written.append(name)
            return function(*args, **options)

        monkeypatch.setattr(_layout_triton, name, call)

    recorded("dense_mask")
    recorded("geometry")
    monkeypatch.setattr(layout, "_kernels", lambda _: _layout_triton)
    return written


@pytest.mark.parametrize("name", SMALL)
def test_positions_and_key_ranges(name, monkeypatch):
    expected = LAYOUTS[name]()
    written = with_kernels(monkeypatch)
    for change in ("", "without_last_step", "prompt_only"):
        plain, actual = (getattr(x, change)() if change else x for x in (expected, LAYOUTS[name]()))
        assert torch.equal(actual.position_ids, plain.position_ids) and actual.position_ids.dtype == torch.int64
        for a, b in zip(actual.key_ranges, plain.key_ranges, strict=True):
            assert torch.equal(a, b) and a.dtype == torch.int32
    assert set(written) == {"geometry"}


@pytest.mark.parametrize(
    ("length", "rows"),
    [(19, "several rows in a tile"), (40, "one or two rows in a tile")],
)
@pytest.mark.parametrize("block", ("causal", "full"))
@pytest.mark.parametrize("window", (None, 3))
def test_dense_mask(length, rows, block, window, monkeypatch):
    documents = torch.tensor([[0] * (length - 6) + [1] * 6, [0] * 4 + [1] * (length - 4)])
    made = StridedLayout.strided(2, length, context=2, stride=4, horizon=3, samples=2, document_ids=documents)
    expected = made.dense_mask(window, block=block)
    written = with_kernels(monkeypatch)
    assert (made.packed_length < 64) == (rows == "several rows in a tile")
    actual = made.dense_mask(window, block=block)
    assert written == ["dense_mask"]
    assert actual.dtype == torch.bool and actual.is_contiguous() and torch.equal(actual, expected)


def test_empty_batch(monkeypatch):
    expected = LAYOUTS["empty_batch"]().dense_mask()
    with_kernels(monkeypatch)
    assert LAYOUTS["empty_batch"]().dense_mask().shape == expected.shape
