"""The layout's large tensors, each written by one kernel: the dense mask, the position ids and the key ranges.

Everything is written as one flat array of whole tiles, a little longer than what is returned of it, so that every store
is 16 bytes wide whatever the length of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import geometry_tiles, mask_tiles
from ._triton import launch, target_of


def dense_mask(
    prefix_start: Tensor, prefix_end: Tensor, own_start: Tensor, *, length: int, horizon: int, full: bool
) -> Tensor:
    """[B, 1, S, S] bool from the key ranges, each [B, S] int32.

    Args:
        length: P.
        horizon: G.
        full: a rollout token sees the later tokens of its rollout too.
    """
    batch_size, packed_length = own_start.shape
    device, size = own_start.device, batch_size * packed_length * packed_length
    tiles = mask_tiles(target_of(device))
    block = tiles[0].sizes["BLOCK"]
    mask = _whole_tiles(size, block, torch.uint8, device)
    launch(
        dense_mask_kernel,
        lambda _: (-(-size // block),),
        prefix_start.contiguous(),
        prefix_end.contiguous(),
        own_start.contiguous(),
        mask,
        batch_size,
        packed_length,
        length,
        horizon,
        device=device,
        tiles=tiles[:1],
        FULL=full,
        NARROW=packed_length < block,
    )
    return mask[:size].view(torch.bool).view(batch_size, 1, packed_length, packed_length)


def geometry(
    anchors: Tensor, prompt_start: Tensor, horizon: int, samples: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Position ids [B, S] int64 and the three key ranges [B, S] int32 of all packed rows.

    Args:
        anchors: [B, A] int32.
        prompt_start: [B, P] int32.
    """
    (batch_size, length), device = prompt_start.shape, prompt_start.device
    packed_length = length + anchors.shape[1] * samples * horizon
    size = batch_size * packed_length
    tiles = geometry_tiles(target_of(device))
    block = tiles[0].sizes["BLOCK"]
    position_ids = _whole_tiles(size, block, torch.int64, device)
    ranges = [_whole_tiles(size, block, torch.int32, device) for _ in range(3)]
    launch(
        geometry_kernel,
        lambda _: (-(-size // block),),
        anchors.contiguous(),
        prompt_start.contiguous(),
        position_ids,
        *ranges,
        batch_size,
        length,
        anchors.shape[1],
        samples * horizon,
        horizon,
        packed_length,
        device=device,
        tiles=tiles[:1],
    )
    position_ids, *ranges = (x[:size].view(batch_size, packed_length) for x in (position_ids, *ranges))
    return position_ids, tuple(ranges)


def _whole_tiles(size: int, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(-(-size // block) * block, dtype=dtype, device=device)


@triton.jit
def _ranges(prefix_start, prefix_end, own_start, row, rows, S, P, G, FULL: tl.constexpr):
    """What row ``row`` of all ``rows`` = B * S sees: ``[start, end)`` of the prompt and ``[own, own_end)``."""
    row = tl.minimum(row, rows - 1)
    index = (row % S).to(tl.int32)
    own_end = index + 1
    if FULL:
        own_end = tl.where(index < P, own_end, index - (index - P) % G + G)
    return tl.load(prefix_start + row), tl.load(prefix_end + row), tl.load(own_start + row), own_end


@triton.jit(do_not_specialize=["B", "S", "P", "G"])
def dense_mask_kernel(
    prefix_start,  # [B, S]
    prefix_end,  # [B, S]
    own_start,  # [B, S]
    mask,  # [B*S*S, rounded up]
    B,
    S,
    P,
    G,
    FULL: tl.constexpr,
    NARROW: tl.constexpr,  # a tile may hold more than two rows
    BLOCK: tl.constexpr,
):
    """Program: BLOCK bytes of the mask."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    rows = B.to(tl.int64) * S
    row, key = first // S, (first % S).to(tl.int32) + tl.arange(0, BLOCK)
    if NARROW:
        rows_on, key = key // S, key % S  # [BLOCK]
        start, end, own, own_end = _ranges(prefix_start, prefix_end, own_start, row + rows_on, rows, S, P, G, FULL)
        seen = ((key >= start) & (key < end)) | ((key >= own) & (key < own_end))
    else:
        start, end, own, own_end = _ranges(prefix_start, prefix_end, own_start, row, rows, S, P, G, FULL)
        seen = ((key >= start) & (key < end)) | ((key >= own) & (key < own_end))
        # A range of the next row lies S further on; no range of either row reaches into the other.
        key -= S
        start, end, own, own_end = _ranges(prefix_start, prefix_end, own_start, row + 1, rows, S, P, G, FULL)
        seen = seen | ((key >= start) & (key < end)) | ((key >= own) & (key < own_end))
    tl.store(mask + first + tl.arange(0, BLOCK), seen.to(tl.uint8))


@triton.jit(do_not_specialize=["B", "P", "A", "own_rows", "G", "S"])
def geometry_kernel(
    anchors,  # [B, A]
    prompt_start,  # [B, P]
    position_ids,  # [B*S, rounded up]
    prefix_start,
    prefix_end,
    own_start,
    B,
    P,
    A,
    own_rows,  # n*G, rows of an anchor
    G,
    S,
    BLOCK: tl.constexpr,
):
    """Program: BLOCK of the B*S packed rows."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.minimum(index // S, B - 1)
    row = (index - batch * S).to(tl.int32)
    in_prompt = row < P
    rollout_row = tl.where(in_prompt, 0, row - P)
    step = rollout_row % tl.maximum(G, 1)
    anchor = tl.minimum(rollout_row // tl.maximum(own_rows, 1), A - 1)
    end = tl.load(anchors + batch * A + anchor, mask=row >= P, other=0)
    end = tl.where(in_prompt, row + 1, tl.maximum(end, 0))
    # The document of the last prompt token that the row sees; where it sees none, that of the first.
    last = tl.minimum(tl.maximum(end - 1, 0), P - 1)
    start = tl.load(prompt_start + batch * P + last, mask=last >= 0, other=0)
    position = tl.where(in_prompt, row - start, end - start + step)
    tl.store(position_ids + index, position.to(tl.int64))
    tl.store(prefix_start + index, start)
    tl.store(prefix_end + index, end)
    tl.store(own_start + index, tl.where(in_prompt, row + 1, row - step))
