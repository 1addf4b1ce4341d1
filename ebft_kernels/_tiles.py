"""Tile sizes, warps and pipeline stages of every Triton kernel, per family of GPUs, each with its reason."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from ._triton import MULTIPLIES_FLOAT64, Target, Tile, version

# Attention, per family and kernel, for heads of up to 64, 128 and 256 numbers of 16 bits. forward, dq and step:
# (BLOCK_M, BLOCK_N, BLOCK_E, warps, stages); dkdv and own, its launch over the rollouts' keys: (BLOCK_M, BLOCK_N,
# warps, stages). All are what compiles without spills; that, not shared memory, is what limits them.
#
# * BLOCK_M = 128 (row, head) pairs are the rollouts of one or two anchors at the usual 4 to 8 heads per group: one
#   triangle's worth of waste at their own tokens. Edge tiles are as narrow as the instructions take without waiting for
#   loads longer than they compute.
# * dkdv keeps two accumulators, [BLOCK_N, D] and [BLOCK_N, DV]; own keys are seen by few rows, hence narrow tiles.
#   Where a softcap or a window would make it spill there is a row for that, dkdv_options.
_ATTENTION: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    # mma.sync takes the keys from registers: 32 keys of 128 numbers at a time. All fit into the 99 KB of sm_86, sm_89
    # and sm_120; on sm_80, which has more, registers leave room for one program per processor just the same.
    "mma": {
        "forward": ((128, 64, 32, 8, 3), (128, 32, 32, 8, 3), (64, 32, 32, 8, 2)),
        "dq": ((128, 64, 32, 8, 2), (128, 32, 32, 8, 2), (64, 16, 16, 8, 2)),
        "dkdv": ((32, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "own": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
        "step": ((64, 64, 32, 4, 2), (64, 32, 32, 4, 3), (32, 32, 32, 4, 2)),
    },
    # wgmma takes keys and queries from shared memory, 64 rows per four warps.
    "sm_90": {
        "forward": ((128, 128, 64, 8, 2), (128, 64, 64, 8, 3), (128, 32, 32, 8, 2)),
        "dq": ((128, 64, 32, 8, 2), (128, 64, 32, 8, 2), (64, 32, 32, 8, 2)),
        "dkdv": ((64, 128, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        "dkdv_options": ((64, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        "own": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
        "step": ((64, 64, 32, 4, 3), (64, 64, 32, 4, 3), (32, 32, 32, 4, 2)),
    },
    # tcgen05 accumulates outside the registers, 64 or 128 rows at a time.
    "sm_100": {
        "forward": ((128, 64, 64, 8, 3), (128, 64, 64, 8, 3), (64, 32, 32, 8, 2)),
        "dq": ((128, 64, 32, 8, 2), (128, 64, 32, 8, 2), (64, 32, 32, 8, 2)),
        "dkdv": ((64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)),
        "dkdv_options": ((64, 64, 8, 1), (64, 64, 8, 2), (32, 64, 8, 2)),
        "own": ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
        "step": ((64, 64, 32, 4, 3), (64, 64, 32, 4, 3), (64, 32, 32, 8, 2)),
    },
    # CDNA keeps the masks of a tile in scalar registers, 64 bits per comparison: narrow masked tiles. 64 KB to share.
    "gfx": {
        "forward": ((128, 64, 16, 8, 2), (128, 64, 16, 8, 2), (32, 32, 16, 4, 1)),
        "dq": ((128, 64, 16, 8, 2), (64, 32, 16, 4, 1), (64, 16, 16, 8, 1)),
        "dkdv": ((16, 64, 4, 2), (16, 64, 4, 1), (16, 32, 4, 1)),
        "own": ((16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1)),
        "step": ((64, 16, 16, 4, 2), (64, 64, 16, 4, 2), (32, 32, 16, 4, 1)),
    },
    # float32 in IEEE precision has no matrix instructions: unrolled products, whose registers want small tiles.
    "float32": {
        "forward": ((32, 16, 16, 8, 1), (32, 16, 16, 8, 1), (16, 16, 16, 8, 1)),
        "dq": ((32, 16, 16, 8, 1), (32, 16, 16, 8, 1), (16, 16, 16, 8, 1)),
        "dkdv": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "own": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "step": ((16, 16, 16, 4, 1), (16, 16, 16, 4, 1), (16, 16, 16, 8, 1)),
    },
    # Few and small, so that the small inputs of tests reach every branch.
    "interpreter": {
        "forward": ((32, 16, 16, 4, 1),),
        "dq": ((32, 16, 16, 4, 1),),
        "dkdv": ((32, 16, 4, 1),),
        "own": ((32, 16, 4, 1),),
        "step": ((16, 16, 16, 4, 1),),
    },
}


@functools.cache
def attention_tiles(kernel: str, target: Target, size: int, value_size: int, itemsize: int) -> list[Tile]:
    """Tiles of an attention kernel (a key of the table) for heads of these sizes, best guess first.

    The other candidates have one stage less or half the rows, and so fit where the first one does. All of dkdv have the
    same BLOCK_M, which the bounds that are prepared for it depend on.
    """
    family = "interpreter" if target.arch == "interpreter" else "float32" if itemsize > 2 else _family(target)
    table = _ATTENTION[family]
    rows = table["dkdv"] if kernel == "dkdv_options" and kernel not in table else table[kernel]
    largest = max(size, value_size)
    *blocks, warps, stages = rows[min((largest > 64) + (largest > 128), len(rows) - 1)]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_E")
    # Left to itself the assembler spills in unrolled float32 products rather than take more than 64 registers.
    registers = 255 if family == "float32" else None
    first = Tile(dict(zip(names, blocks, strict=False)), warps, stages, max_registers=registers)
    if family == "interpreter":
        return [first]
    tiles = [first] if stages == 1 else [first, first._replace(num_stages=stages - 1)]
    if kernel in ("forward", "dq") and blocks[0] > 64:
        tiles.append(Tile({**first.sizes, "BLOCK_M": blocks[0] // 2}, warps // 2, stages))
    return tiles


def _lanes(target: Target) -> int:
    return 64 if target.arch.startswith("gfx") else 32


def _family(target: Target) -> str:
    if target.arch.startswith("gfx"):
        return "gfx"
    if target.shared_memory < 160 << 10:
        return "mma"
    return {"sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100"}.get(target.arch, "mma")


@functools.cache
def attention_row_tiles(target: Target, block: int, size: int) -> list[Tile]:
    """Tiles of the kernels that only read and write rows, of ``size`` numbers: of ``block`` pairs.

    No more warps than have 8 numbers for each thread, which are 16 bytes at 16 bits.
    """
    return [Tile({"BLOCK_M": block}, min(max(block * size // (8 * _lanes(target)), 1), 4))]


# Memory-bound kernels: enough bytes in flight, no spills; registers are what runs out.


@functools.cache
def pooling_tiles(target: Target, layers: int, channels: int, itemsize: int, copies: int) -> list[Tile]:
    """Tiles of ``pool_fwd_kernel`` and ``pool_bwd_kernel``, which keep ``copies`` float32 copies of a token.

    Each thread takes 16 bytes at a time; the fewest warps that keep a token in 96 registers per thread leave the most
    programs per processor. A token too long for 16 warps is read twice instead.
    """
    if target.arch == "interpreter":
        sizes = {"BLOCK": 64, "CHUNKS": -(-channels // 64)}
        return [Tile({**sizes, "RESIDENT": int(layers * sizes["CHUNKS"] <= 4)}, 1)]
    # 16 warps leave 128 registers to a thread, of which the addresses take a third.
    for warps, registers in ((1, 96), (2, 96), (4, 96), (8, 96), (16, 64), (8, 0)):
        threads, width = warps * _lanes(target), 16 // itemsize
        block = min(1 << max(channels - 1, 0).bit_length(), threads * width)
        chunks = -(-channels // block)
        resident = copies * layers * chunks * max(block // threads, 1) <= registers
        if resident:
            break
    return [Tile({"BLOCK": block, "CHUNKS": chunks, "RESIDENT": int(resident)}, warps)]


def declines(op: str, sizes: Mapping[str, int]) -> str:
    """Why there are no kernels of ``op`` for these sizes where there are kernels; "" if there are.

    ``sizes``: as for :func:`ebft_kernels.select_impl`.
    """
    most = _most_distinct(bool(torch.version.hip))
    if op != "feature_matching" or sizes.get("n", 1) <= most or version() >= MULTIPLIES_FLOAT64:
        return ""
    needed, found = (".".join(map(str, x)) for x in (MULTIPLIES_FLOAT64, version()))
    return f"more than {most} rollouts per anchor need Triton {needed}, there is {found}"


def _most_distinct(is_amd: bool) -> int:
    """Most rollouts whose inner products are summed up one by one; those of more are matrix products."""
    return 4 if is_amd else 8


@functools.cache
def matching_tiles(target: Target, n: int, itemsize: int) -> list[Tile]:
    """Tiles of the kernel that goes from features to rewards.

    A: anchors per program. Their small matrices fill a program's threads, which would otherwise all do the same float64
    arithmetic, and each warp sums up one of them. V: numbers per load of a thread, 16 bytes. DISTINCT: no inner product
    is computed twice; 45 of them (n = 8) are what registers hold. CDNA has float64 matrix cores, and scalar registers
    for the masks of 15 only. NVIDIA's consumer GPUs have next to no float64, so it is not for them to waste.
    """
    distinct = n <= _most_distinct(target.arch.startswith("gfx"))
    if target.arch == "interpreter":
        return [Tile({"A": 8 if distinct else 1, "BLOCK": 64, "V": 4, "DISTINCT": distinct}, 1)]
    width = 16 // itemsize
    if not distinct:
        block = min(8 * _lanes(target) * width >> (n - 1).bit_length(), 128)
        return [Tile({"A": 1, "BLOCK": block, "V": width, "DISTINCT": False}, 4, max_registers=255)]
    if n > 4:  # 8 numbers of 9 vectors as float64 and the 45 sums would need 234 registers
        width = min(width, 4)
    return [
        Tile({"A": anchors, "BLOCK": 4 // anchors * _lanes(target) * width, "V": width, "DISTINCT": True}, 4, 1, 255)
        for anchors in (4, 2, 1)
    ]


@functools.cache
def gram_tiles(target: Target) -> list[Tile]:
    """Tiles of ``gram_kernel``: with fewer threads it spills where float64 has no matrix instructions."""
    if target.arch == "interpreter":
        return [Tile({"ROWS": 16, "BLOCK": 64}, 1)]
    return [Tile({"ROWS": 32, "BLOCK": 32}, 256 // _lanes(target))]


@functools.cache
def mean_embedding_tiles(target: Target, n: int, features: int, itemsize: int) -> list[Tile]:
    """Tiles of the mean-embedding kernels: 16 bytes per thread and load; the loads of all rollouts are in flight."""
    if target.arch == "interpreter":
        return [Tile({"BLOCK": 64}, 1)]
    block = min(4 * _lanes(target) * 16 // itemsize, 1 << max(features - 1, 0).bit_length())
    return [Tile({"BLOCK": block}, 4, max_registers=128 if n <= 8 else 255)]


@functools.cache
def mask_tiles(target: Target) -> list[Tile]:
    """Tiles of ``dense_mask_kernel``: one store of 16 bytes per thread; rows shorter than a tile need divisions."""
    if target.arch == "interpreter":
        return [Tile({"BLOCK": 64}, 1)]
    return [Tile({"BLOCK": 16 * 4 * _lanes(target)}, 4)]


@functools.cache
def geometry_tiles(target: Target) -> list[Tile]:
    """Tiles of ``geometry_kernel``: 4 rows per thread, 16 bytes of a range."""
    if target.arch == "interpreter":
        return [Tile({"BLOCK": 64}, 1)]
    return [Tile({"BLOCK": 4 * 2 * _lanes(target)}, 2)]


@functools.cache
def softmax_tiles(target: Target, itemsize: int) -> list[Tile]:
    """Tiles of ``softmax_add_kernel`` and ``softmax_gradient_kernel``: two loads of 16 bytes per thread in flight."""
    if target.arch == "interpreter":
        return [Tile({"BLOCK": 64}, 1)]
    return [Tile({"BLOCK": 2 * 4 * _lanes(target) * 16 // itemsize}, 4)]


@functools.cache
def draw_tiles(target: Target, itemsize: int, *, cut: bool = False) -> list[Tile]:
    """Tiles of the kernels that draw tokens: ``GROUP`` blocks of 128 logits, two loads of 16 bytes per thread.

    One where thresholds are looked for: its masks and sums need registers, and the search waits for loads and sums over
    all threads, while other programs of the processor may run.
    """
    if target.arch == "interpreter":
        return [Tile({"GROUP": 4}, 1)]
    loads, registers = (1, 168) if cut else (2, None)  # left to itself, or at 128, the assembler spills
    return [Tile({"GROUP": loads * 4 * _lanes(target) * 16 // itemsize // 128}, 4, max_registers=registers)]
