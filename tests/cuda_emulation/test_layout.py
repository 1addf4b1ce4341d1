"""Positions, key ranges and the dense mask, written by the CUDA kernels, against ``StridedLayout``."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, _layout_native, _native
from ebft_kernels import layout as layouts
from ebft_kernels.testing import LAYOUTS

PROMPT_ONLY = {"prompt_only": lambda: LAYOUTS["documents"]().prompt_only()}


def sizes_of(layout: StridedLayout) -> tuple[int, ...]:
    return layout.batch_size, layout.length, layout.num_anchors, layout.samples, layout.horizon


def mask_of(emulation, layout: StridedLayout, window: int | None, block: str, *, shift: int = 0) -> Tensor:
    """The mask, written ``shift`` bytes into a buffer; what surrounds it must stay as it is."""
    size = layout.batch_size * layout.packed_length**2
    buffer = torch.full((size + 32,), 7, dtype=torch.uint8)
    ranges = [r.contiguous() for r in layout.visible_keys(window)]
    tensors = [_native.layout_tensor(r) for r in ranges]
    emulation.module.layout_mask(0, sizes_of(layout), *tensors, block == "full", buffer[shift:].data_ptr())
    assert (buffer[:shift] == 7).all() and (buffer[shift + size :] == 7).all()
    mask = buffer[shift : shift + size]
    assert (mask <= 1).all()
    return mask.bool().view(layout.batch_size, 1, layout.packed_length, layout.packed_length)


@pytest.fixture
def by_kernels(cuda, monkeypatch):  # noqa: ARG001
    """Has the kernels write all large tensors of layouts from now on."""
    return lambda: monkeypatch.setattr(layouts, "_kernels", lambda _x: _layout_native)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_written_by_kernels(name, by_kernels):
    expected = LAYOUTS[name]()
    expected = [expected, expected.without_last_step(), expected.prompt_only()]
    masks = [[x.dense_mask(3, block=block) for block in ("causal", "full")] for x in expected]
    by_kernels()
    layout = LAYOUTS[name]()
    for actual, plain, of_plain in zip(
        (layout, layout.without_last_step(), layout.prompt_only()), expected, masks, strict=True
    ):
        assert torch.equal(actual.position_ids, plain.position_ids) and actual.position_ids.dtype == torch.int64
        for a, b in zip(actual.key_ranges, plain.key_ranges, strict=True):
            assert torch.equal(a, b) and a.dtype == torch.int32
        for block, mask in zip(("causal", "full"), of_plain, strict=True):
            made = actual.dense_mask(3, block=block)
            assert torch.equal(made, mask) and made.dtype == torch.bool and made.is_contiguous()


@pytest.mark.parametrize("block", ("causal", "full"))
@pytest.mark.parametrize("name", [*LAYOUTS, *PROMPT_ONLY])
def test_mask(emulation, name, block):
    layout = {**LAYOUTS, **PROMPT_ONLY}[name]()
    for window, shift in itertools.product((None, 3), (0, 1, 8)):
        actual = mask_of(emulation, layout, window, block, shift=shift)
        assert torch.equal(actual, layout.dense_mask(window, block=block))


@pytest.mark.parametrize(
    "layout",
    [
        StridedLayout.strided(1, 8300, context=4000, stride=4000, horizon=3, samples=2),
        StridedLayout.strided(700, 3, context=1, stride=1, horizon=1, samples=1),
    ],
    ids=("longer", "shorter"),
)
def test_mask_of_rows_longer_and_much_shorter_than_what_a_block_writes(emulation, layout):
    assert torch.equal(mask_of(emulation, layout, None, "causal"), layout.dense_mask())


@pytest.mark.parametrize("batch_size", range(1, 17))
def test_masks_that_end_anywhere_within_16_bytes(emulation, batch_size):
    layout = StridedLayout.strided(batch_size, 3, context=1, stride=5, horizon=1, samples=2)
    assert layout.packed_length == 5
    assert torch.equal(mask_of(emulation, layout, None, "causal"), layout.dense_mask())
