"""How the rows of a layout are cut into tiles: decided on the host, once per layout, not once per layer or step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..layout import KeyRanges, slide_key_ranges

# A score that weighs nothing. Not -inf: the difference of the log-sum-exps of two empty parts must not be NaN.
MASKED = -1e30

# Up to this many scores per head, one masked part beats an unmasked and a masked one, and its mask is worth keeping.
_SMALL_MASK = 2**16

# A tile of prompt rows wastes half of its square at the diagonal.
_PROMPT_ROWS = 128


class Part(NamedTuple):
    """Keys ``[start, end)`` for all rows of a tile, and what is added to their scores [folded rows, end - start]."""

    start: int
    end: int
    mask: Tensor | None


class Tile(NamedTuple):
    """Query rows ``[start, end)``, the parts of the prompt that they see, and whether they are rollouts."""

    start: int
    end: int
    parts: list[Part]
    rollouts: bool


class Stripe(NamedTuple):
    """Batch rows ``[start, end)`` that share their geometry, and their tiles."""

    start: int
    end: int
    tiles: list[Tile]


class Plan(NamedTuple):
    """Tiles of all rows, and what is added to the scores of a rollout's folded rows with its own tokens."""

    stripes: list[Stripe]
    own_mask: Tensor | None


# End of the prefix ranges -> (their start, plans). Plans live as long as the layout that the ranges belong to.
_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plan_rows(
    ranges: KeyRanges,
    length: int,
    samples: int,
    horizon: int,
    *,
    window: int | None,
    full: bool,
    rows: int,
    repeat: int,
    dtype: torch.dtype,
) -> Plan:
    """Tiles of all packed rows, about ``rows`` in each; masks of ``dtype`` for ``repeat`` folded rows per row.

    With ``full``, rollout tokens see the later tokens of their rollout too.
    """

    def build() -> Plan:
        visible = ranges if window is None else slide_key_ranges(ranges, window)
        packed = visible.prefix_end.shape[1]
        cuts = [*range(0, length, min(rows, max(1, _PROMPT_ROWS // repeat)))]
        own_mask = None
        if horizon and packed > length:
            cuts += range(length, packed, _whole(rows, horizon, samples))
            step = torch.arange(horizon)
            own = ((step <= step[:, None]) | full) & (step > step[:, None] - (window or horizon))
            own_mask = _additive(own, repeat, dtype, visible.prefix_end.device)
        return Plan(_stripes(visible, [*cuts, packed], length, repeat, dtype), own_mask)

    return _cached(ranges, ("rows", length, samples, horizon, window, full, rows, repeat, dtype), build)


def plan_step(
    ranges: KeyRanges,
    length: int,
    samples: int,
    horizon: int,
    step: int,
    *,
    window: int | None,
    rows: int,
    repeat: int,
    dtype: torch.dtype,
) -> Plan:
    """Tiles of the rows of one step, ordered (anchor, sample), about ``rows`` in each."""

    def build() -> Plan:
        visible = ranges if window is None else slide_key_ranges(ranges, window)
        visible = KeyRanges(*(x[:, length + step :: horizon] for x in visible))
        count = visible.prefix_end.shape[1]
        return Plan(_stripes(visible, [*range(0, count, _whole(rows, 1, samples)), count], 0, repeat, dtype), None)

    # Without a window all steps of a rollout see the same part of the prompt.
    key = ("step", length, samples, horizon, window, None if window is None else step, rows, repeat, dtype)
    return _cached(ranges, key, build)


def _cached(ranges: KeyRanges, key: tuple, build: Callable[[], Plan]) -> Plan:
    entry = _PLANS.get(ranges.prefix_end)
    if entry is None or entry[0] is not ranges.prefix_start:
        entry = _PLANS[ranges.prefix_end] = (ranges.prefix_start, {})
    plans = entry[1]
    if key not in plans:
        plans[key] = build()
    return plans[key]


def _whole(rows: int, tokens: int, samples: int) -> int:
    """The number of rows, at most about ``rows``, of whole anchors, else of whole rollouts of ``tokens`` rows."""
    unit = tokens * samples if rows >= tokens * samples else tokens
    return max(1, rows // unit) * unit


def _stripes(visible: KeyRanges, cuts: list[int], length: int, repeat: int, dtype: torch.dtype) -> list[Stripe]:
    """Cut rows with prompt ranges [B, R] at ``cuts``; rows from ``length`` on are rollouts."""
    device = visible.prefix_end.device
    starts, ends = visible.prefix_start.cpu(), visible.prefix_end.cpu()
    batch = starts.shape[0]
    same = bool((starts == starts[:1]).all() and (ends == ends[:1]).all())
    stripes = []
    for row in range(1 if same else batch):
        tiles: list[Tile] = []
        for start, end in zip(cuts[:-1], cuts[1:], strict=True):
            parts = [
                Part(first, last, None if seen is None else _additive(seen, repeat, dtype, device))
                for first, last, seen in _parts(starts[row, start:end], ends[row, start:end], repeat)
            ]
            parts = _share_masks(parts, tiles[-1].parts if tiles else [])
            tiles.append(Tile(start, end, parts, start >= length))
        stripes.append(Stripe(row, batch if same else row + 1, tiles))
    return stripes


def _parts(starts: Tensor, ends: Tensor, repeat: int) -> list[tuple[int, int, Tensor | None]]:
    """The parts of a tile whose rows see the keys ``[starts, ends)``: first key, end, and who sees what (None: all)."""
    low, common_low = (int(x) for x in starts.aminmax())
    common_high, high = (int(x) for x in ends.aminmax())
    if high <= low:
        return []
    if (low, high) == (common_low, common_high):
        return [(low, high, None)]
    edges = (low, common_low, common_high, high)
    small = len(starts) * repeat * (high - low) <= _SMALL_MASK
    if small or 2 * (common_high - common_low) < high - low:
        edges = (low, high)
    parts = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        key = torch.arange(first, last)
        visible = (key >= starts[:, None]) & (key < ends[:, None])
        if first < last:
            parts.append((first, last, None if visible.all() else visible))
    return parts


def _share_masks(parts: list[Part], others: list[Part]) -> list[Part]:
    """``parts`` with the masks of ``others`` that are equal to theirs: at regular strides all tiles share one."""

    def shared(mask: Tensor | None) -> Tensor | None:
        known = [x.mask for x in others if mask is not None and x.mask is not None and torch.equal(x.mask, mask)]
        return known[0] if known else mask

    return [part._replace(mask=shared(part.mask)) for part in parts]


def _additive(visible: Tensor, repeat: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[R, K] bool -> [R*repeat, K], what to add to the scores of folded rows."""
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, MASKED)
    return mask.repeat_interleave(repeat, 0).to(device)
