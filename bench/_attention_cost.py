"""Operations and bytes of strided attention: needed, done by the Triton kernels, done by masks over dense blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ebft_kernels import StridedLayout
from ebft_kernels.attention._visits import visited_tiles

from ._cases import attention, attention_step
from ._targets import Gpu, standing_in
from .shapes import Geometry, ModelShape, visible_pairs

#: Goal of the forward kernel: operations done over operations needed.
ATTENTION_GOAL = 1.15
#: Block of FlexAttention's block mask.
FLEX_BLOCK = 128


class MaskCost(NamedTuple):
    """(query, key) pairs per head of one prompt and its rollouts.

    Attributes:
        how: who computes them.
        rows: query rows, the repeated prompt counted each time.
        pairs: scores that are computed.
    """

    how: str
    rows: int
    pairs: int


def mask_costs(geometry: Geometry) -> list[MaskCost]:
    """What the mask costs of one batch row by other means; the first entry is what is needed."""
    rows = geometry._replace(batch=1).layout()
    single = geometry._replace(batch=1, samples=1).layout()
    packed = rows.dense_mask()[0, 0]
    # In the reference order each sample has a row of its own: the prompt, then the tokens by (step, anchor).
    order = single.to_reference_order(torch.arange(single.packed_length)[None])[0]
    reference = single.dense_mask()[0, 0][order][:, order]
    copies, length = geometry.samples, len(order)
    return [
        MaskCost("needed, prompt once", rows.packed_length, visible_pairs(rows)),
        MaskCost("needed, prompt per sample", copies * length, copies * int(reference.sum())),
        MaskCost("FlexAttention, packed order", rows.packed_length, block_pairs(packed, FLEX_BLOCK)),
        MaskCost("FlexAttention, reference order", copies * length, copies * block_pairs(reference, FLEX_BLOCK)),
        MaskCost("dense mask, reference order", copies * length, copies * length**2),
    ]


def block_pairs(mask: Tensor, block: int) -> int:
    """Scores in the ``block`` x ``block`` blocks of ``mask`` [Q, K] that hold a pair; the last blocks count whole."""
    padding = [-size % block for size in mask.shape]
    mask = torch.nn.functional.pad(mask, (0, padding[1], 0, padding[0]))
    blocks = mask.unflatten(1, (-1, block)).any(2).unflatten(0, (-1, block)).any(1)
    return int(blocks.sum()) * block * block


class KernelCost(NamedTuple):
    """One kernel on one batch of one layer.

    Attributes:
        name: of the kernel.
        operations: floating-point operations of its matrix products over the visible pairs, two per multiply-add.
        done: the same over the pairs that its tiles cover.
        moved: bytes of its inputs and outputs, each once.
        loaded: bytes that its programs ask for and store, most of them from and to a cache; geometry left out.
    """

    name: str
    operations: int
    done: int
    moved: int
    loaded: int


def attention_costs(
    model: ModelShape, rows: StridedLayout, gpu: Gpu, dtype: torch.dtype = torch.bfloat16
) -> list[KernelCost]:
    """The attention kernels with the tiles that ``gpu`` gets; the decoding step is the last one, and not split."""
    repeat, step = model.heads // model.kv_heads, rows.horizon - 1
    tiles = _tiles_on(model, rows, gpu, dtype)
    dkdv_tiles = tiles["strided_attention_dkdv_kernel"], tiles["strided_attention_dkdv_kernel, own"]

    heads, kv_heads = rows.batch_size * model.heads, rows.batch_size * model.kv_heads
    row = dtype.itemsize * model.head_dim  # bytes of one query, key, value, output or gradient
    q, k = heads * rows.packed_length * row, kv_heads * rows.packed_length * row
    statistic = 4 * heads * rows.packed_length  # log-sum-exps, or the products of outputs and their gradients
    ranges = 12 * rows.batch_size * rows.packed_length
    rollouts = rows.num_anchors * rows.samples
    q_step, k_step = heads * rollouts * row, kv_heads * (rows.length + rollouts * (step + 1)) * row

    def cost(
        name: str, products: int, needed: int, scores: int, lines: int, moved: int, outside: int, per_line: int
    ) -> KernelCost:
        """``products`` per pair; ``per_line`` bytes for each line that is loaded, ``outside`` bytes besides."""
        per_pair = 2 * products * model.head_dim
        return KernelCost(
            f"strided_attention_{name}_kernel",
            per_pair * model.heads * needed,
            per_pair * model.kv_heads * scores,
            moved,
            outside + model.kv_heads * lines * per_line,
        )

    def visited(kernel: str, sizes: Mapping[str, int], block: str = "BLOCK_M") -> tuple[int, int]:
        """Scores, and the lines that are loaded for them: a tile of scores has ``block`` of them per line."""
        scores = visited_tiles(rows, kernel, repeat, sizes, step=step).scores
        return scores, scores // sizes[block]

    visible = visible_pairs(rows)
    walk = visited("forward", tiles["strided_attention_fwd_kernel"])
    fwd = cost("fwd", 2, visible, *walk, 2 * q + 2 * k + statistic + ranges, 2 * q + statistic, 2 * row)
    walk = visited("dq", tiles["strided_attention_dq_kernel"])
    dq = cost("dq", 3, visible, *walk, 3 * q + 2 * k + 2 * statistic + ranges, 3 * q + 2 * statistic, 2 * row)
    walks = zip(visited("dkdv", dkdv_tiles[0], "BLOCK_N"), visited("own", dkdv_tiles[1], "BLOCK_N"), strict=True)
    dkdv = cost("dkdv", 4, visible, *map(sum, walks), 2 * q + 4 * k + 2 * statistic + ranges, 4 * k, 2 * row + 8)
    walk = visited("step", tiles["strided_attention_step_kernel"])
    one_step = cost("step", 2, needed_step_pairs(rows, step), *walk, 2 * q_step + 2 * k_step, 2 * q_step, 2 * row)
    return [fwd, dq, dkdv, one_step]


def _tiles_on(model: ModelShape, rows: StridedLayout, gpu: Gpu, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """The compile-time options that each attention kernel would be launched with."""
    options = {}

    def launcher(kernel, _grid, _args, given):
        options[kernel.__name__ + (", own" if given.get("OWN") else "")] = given

    with standing_in(gpu, launcher):
        attention(model, rows, dtype).run()
        attention_step(model, rows, dtype).run()
    return options


def needed_step_pairs(rows: StridedLayout, step: int) -> int:
    """(query, key) pairs per head that may attend in one decoding step."""
    start, end, own = (x[:, rows.length + step :: rows.horizon] for x in rows.key_ranges)
    return int((end - start).sum()) + own.numel() * (step + 1)
