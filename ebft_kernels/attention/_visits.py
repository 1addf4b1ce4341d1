"""How much the attention kernels compute, counted exactly from a layout: their walks without their work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_option
from ..layout import KeyRanges, StridedLayout


class Visits(NamedTuple):
    """What one kernel computes, summed over the batch, for one key/value head.

    Attributes:
        unmasked: tiles of scores that are computed without a mask.
        masked: tiles of scores that are computed with one.
        scores: (row, head, key) scores in all of them.
    """

    unmasked: int
    masked: int
    scores: int


def visited_tiles(
    layout: StridedLayout,
    kernel: str,
    repeat: int,
    sizes: Mapping[str, int],
    *,
    step: int | None = None,
    window: int | None = None,
    block: str = "causal",
) -> Visits:
    """The tiles that an attention kernel visits, the ones of a decoding step not split along the keys.

    Args:
        layout: on the CPU.
        kernel: "forward", "dq" (the walk of forward), "dkdv", "own" (dkdv over the rollouts' keys) or "step".
        repeat: H/Hkv.
        sizes: of the tile, as in ``Tile.sizes``.
        step: of a decoding step.
        window, block: as for ``strided_attention``.

    Raises:
        ValueError: an unknown kernel.
    """
    check_option("kernel", kernel, ("forward", "dq", "dkdv", "own", "step"))
    window = layout._narrowing(window)
    ranges = layout.visible_keys(window)
    ranges = ranges._replace(prefix_start=torch.minimum(ranges.prefix_start, ranges.prefix_end))
    if kernel == "dkdv":
        return _key_visits(layout, ranges, repeat, sizes)
    if kernel == "own":
        return _own_key_visits(layout, repeat, sizes, full=block == "full")
    visits = []
    if kernel == "step":
        own_steps = step + 1 if window is None else min(step + 1, window)
        for rollouts in _tiles(0, layout.num_anchors * layout.samples, repeat, sizes["BLOCK_M"]):
            own = (rollouts[:, -1] - rollouts[:, 0] + 1) * own_steps
            visits.append(_query_visits(ranges, layout.length + rollouts * layout.horizon + step, own, sizes))
    else:
        own_end = layout._own_end(block)
        for rows in _query_tiles(layout, repeat, sizes["BLOCK_M"]):
            own = own_end[:, rows].amax(-1) - ranges.own_start[:, rows].amin(-1)  # [B, tiles]
            visits.append(_query_visits(ranges, rows, own.where(rows[:, 0] >= layout.length, 0), sizes))
    return Visits(*(sum(x) for x in zip(*visits, strict=True))) if visits else Visits(0, 0, 0)


def _tiles(first: int, end: int, repeat: int, block: int) -> Iterator[Tensor]:
    """Rows [tiles, BLOCK_M] of the tiles of (row, head) pairs over rows ``first .. end``; nothing if there are none."""
    if end > first:
        pair = torch.arange(0, (end - first) * repeat, block)[:, None] + torch.arange(block)
        yield first + pair.clamp_max((end - first) * repeat - 1) // repeat


def _query_tiles(layout: StridedLayout, repeat: int, block: int) -> Iterator[Tensor]:
    yield from _tiles(0, layout.length, repeat, block)
    yield from _tiles(layout.length, layout.packed_length, repeat, block)


def _query_visits(ranges: KeyRanges, rows: Tensor, own: Tensor, sizes: Mapping[str, int]) -> Visits:
    """Visits of tiles with these ``rows`` [tiles, BLOCK_M] and numbers of ``own`` keys [tiles] or [B, tiles]."""
    start, end = ranges.prefix_start[:, rows], ranges.prefix_end[:, rows]  # [B, tiles, BLOCK_M]
    unmasked = (end.amin(-1) - start.amax(-1)).clamp_min(0) // sizes["BLOCK_N"]
    edges = end.amax(-1) - start.amin(-1) - unmasked * sizes["BLOCK_N"] + own
    masked = -(-edges // sizes["BLOCK_E"])
    unmasked, masked = int(unmasked.sum()), int(masked.sum())
    scores = sizes["BLOCK_M"] * (unmasked * sizes["BLOCK_N"] + masked * sizes["BLOCK_E"])
    return Visits(unmasked, masked, scores)


def _key_visits(layout: StridedLayout, ranges: KeyRanges, repeat: int, sizes: Mapping[str, int]) -> Visits:
    block, keys = sizes["BLOCK_M"], sizes["BLOCK_N"]
    first_key = torch.arange(0, layout.length, keys)[:, None]  # [key tiles, 1]
    last_key = (first_key + keys).clamp_max(layout.length) - 1
    unmasked = masked = 0
    for rows in _query_tiles(layout, repeat, block):
        start, end = (x[:, None, rows] for x in ranges[:2])  # [B, 1, tiles, BLOCK_M]
        some = (start.amin(-1) <= last_key) & (end.amax(-1) > first_key)  # [B, key tiles, tiles]
        count = len(rows)
        whole = torch.arange(1, count + 1) * block <= (int(rows[-1, -1]) + 1 - int(rows[0, 0])) * repeat
        every = (start.amax(-1) <= first_key) & (end.amin(-1) > last_key) & whole
        index = torch.arange(count)
        first = index.where(some, count).amin(-1)
        seen = ((index + 1).where(some, 0).amax(-1) - first).clamp_min(0)
        full = index.where(every, count).amin(-1, keepdim=True)
        full_end = index.where(~every & (index > full), count).amin(-1)
        free = (full_end - full[..., 0]).clamp_min(0)
        unmasked, masked = unmasked + int(free.sum()), masked + int((seen - free).sum())
    return Visits(unmasked, masked, (unmasked + masked) * block * keys)


def _own_key_visits(layout: StridedLayout, repeat: int, sizes: Mapping[str, int], *, full: bool) -> Visits:
    block, keys, horizon = sizes["BLOCK_M"], sizes["BLOCK_N"], max(layout.horizon, 1)
    total = layout.packed_length - layout.length
    first_key = torch.arange(0, total, keys)
    last_key = (first_key + keys).clamp_max(total) - 1
    first_row = first_key // horizon * horizon if full else first_key
    pairs = (last_key // horizon * horizon + horizon - first_row) * repeat
    masked = layout.batch_size * int((-(-pairs // block)).sum())
    return Visits(0, masked, masked * block * keys)
