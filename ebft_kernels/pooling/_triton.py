"""Pooling in Triton: one program per feature, or per packed row on the way back. Hidden states are read once.

The norm of a token is known only when all of it has been seen, so a program keeps the L hidden states of a token in
registers, as ``L * CHUNKS`` tiles of ``BLOCK`` channels. Tokens too long for that are read twice (``RESIDENT`` 0), the
second time from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import pooling_tiles
from .._triton import launch, target_of
from ._common import empty_features
from .modes import POOLINGS, SHORTEST_TOKEN

_SHORTEST = tl.constexpr(SHORTEST_TOKEN)


def forward(
    hidden_states: Sequence[Tensor],
    rollout_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor | None,
    pooling: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Features [B, A, n, F] and [B, A, F], with a K axis before F for ``"token"``, as ``_torch.forward``."""
    first = hidden_states[0]
    layers, channels, steps = len(hidden_states), first.shape[2], rollout_rows.shape[3]
    rollouts, targets = empty_features(hidden_states, rollout_rows, target_rows, pooling)
    *hidden, align = addresses(hidden_states)
    batch_size, anchors, samples, _ = rollout_rows.shape
    mode = POOLINGS[pooling]
    programs = batch_size * anchors * (samples + 1) * (1 if mode.adds_up else steps)
    launch(
        pool_fwd_kernel,
        lambda _: (programs if channels else 0,),
        *hidden,
        rollout_rows.contiguous(),
        target_rows.contiguous(),
        None if weight is None else weight.contiguous().view(torch.uint8),
        rollouts,
        targets,
        anchors,
        samples,
        steps,
        device=first.device,
        tiles=pooling_tiles(target_of(first.device), layers, channels, first.element_size(), 2 if mode.adds_up else 1),
        L=layers,
        C=channels,
        KP=triton.next_power_of_2(steps) if mode.adds_up else 1,
        MEAN=mode.adds_up,
        CONCAT=mode.side_by_side,
        NORMALIZE=normalize,
        ALIGN=align,
    )
    return rollouts, targets


def backward(
    grad_rollouts: Tensor,
    grad_targets: Tensor,
    hidden_states: Sequence[Tensor],
    rollout_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor | None,
    pooling: str,
    normalize: str,
) -> list[Tensor]:
    """Gradients of the hidden states, from those of the two results of :func:`forward`."""
    first, mode = hidden_states[0], POOLINGS[pooling]
    batch_size, packed_length, channels = first.shape
    layers, steps = len(hidden_states), rollout_rows.shape[3]
    grads = [torch.empty_like(hidden, memory_format=torch.contiguous_format) for hidden in hidden_states]
    *hidden, align = addresses(hidden_states)
    tiles = pooling_tiles(target_of(first.device), layers, channels, first.element_size(), 2)
    launch(
        pool_bwd_kernel,
        lambda _: (packed_length, batch_size if channels else 0),
        *hidden,
        tuple(grads),
        grad_rollouts.contiguous(),
        grad_targets.contiguous(),
        None if weight is None else weight.contiguous().view(torch.uint8),
        *_uses(rollout_rows, target_rows, packed_length),
        packed_length,
        rollout_rows.shape[1],
        rollout_rows.shape[2],
        steps,
        device=first.device,
        tiles=tiles,
        L=layers,
        C=channels,
        MEAN=mode.adds_up,
        CONCAT=mode.side_by_side,
        NORMALIZE=normalize,
        ALIGN=align,
    )
    return grads


def addresses(hidden_states: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], int, int, int]:
    """Hidden states as kernel arguments: tensors with equal strides and adjacent channels.

    Copies those that are not contiguous if the strides differ, or if channels are not adjacent.

    Returns:
        the tensors [B, S, C]; the strides of B and S in units of the last result; and the largest power of two, up to
        16 bytes' worth of elements, that divides both: known to the compiler, it makes 16-byte accesses possible
        without strides compiled in.
    """
    strides = {h.stride() for h in hidden_states}
    if len(strides) > 1 or (hidden_states[0].stride(2) != 1 and hidden_states[0].shape[2] > 1):
        hidden_states = [h.contiguous() for h in hidden_states]
    first = hidden_states[0]
    # The stride of an axis of size 1 means nothing.
    batch_stride, row_stride = (first.stride(i) if first.shape[i] > 1 else 0 for i in (0, 1))
    align = math.gcd(16 // first.element_size(), batch_stride, row_stride)
    return tuple(hidden_states), batch_stride // align, row_stride // align, align


def _uses(rollout_rows: Tensor, target_rows: Tensor, packed_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which features each packed row went into.

    Returns:
        [B, S] int32, the (anchor, sample, step) of the one rollout feature that took the row, -1 if none did;
        [B, A*K] int64, the (anchor, step) of all target features, those that took the same row side by side;
        [B, S+1] int32, where those of each row begin among them.
    """
    batch_size, device = rollout_rows.shape[0], rollout_rows.device
    rows = rollout_rows.flatten(1)
    index = torch.arange(rows.shape[1], dtype=torch.int32, device=device).expand(batch_size, -1)
    rollout_use = torch.full((batch_size, packed_length), -1, dtype=torch.int32, device=device)
    rollout_use.scatter_(1, rows, index)
    in_order, order = target_rows.flatten(1).sort(dim=1, stable=True)
    boundaries = torch.arange(packed_length + 1, device=device).expand(batch_size, -1).contiguous()
    return rollout_use, order, torch.searchsorted(in_order, boundaries, out_int32=True)


@triton.jit
def _row_pointers(hidden, batch_stride, row_stride, batch, row, L: tl.constexpr, ALIGN: tl.constexpr):
    """L pointers to one packed row."""
    pointers = ()
    offset = (batch * batch_stride + row * row_stride) * ALIGN
    for layer in tl.static_range(L):
        pointers = pointers + (hidden[layer] + offset,)
    return pointers


@triton.jit
def _load_token(pointers, count, L: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """One token's hidden states, L * CHUNKS tiles [BLOCK] float32; zeros beyond the first ``count`` numbers of each."""
    tiles = ()
    for layer in tl.static_range(L):
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * BLOCK + tl.arange(0, BLOCK)
            tile = tl.load(pointers[layer] + columns, mask=columns < count, other=0.0)  # [BLOCK]
            tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def _inner(x, y, L: tl.constexpr, CHUNKS: tl.constexpr, JOINT: tl.constexpr):
    """Inner products of two tokens, a tuple of one number per layer; each is the sum over all layers if ``JOINT``."""
    sums = ()
    for layer in tl.static_range(L):
        products = x[layer * CHUNKS] * y[layer * CHUNKS]  # [BLOCK]
        for chunk in tl.static_range(1, CHUNKS):
            products += x[layer * CHUNKS + chunk] * y[layer * CHUNKS + chunk]
        sums = sums + (tl.sum(products, 0),)
    return _over_layers(sums, L, JOINT)


@triton.jit
def _over_layers(sums, L: tl.constexpr, JOINT: tl.constexpr):
    if JOINT:
        total = sums[0]
        for layer in tl.static_range(1, L):
            total += sums[layer]
        sums = ()
        for _ in tl.static_range(L):
            sums = sums + (total,)
    return sums


@triton.jit
def _norms(squares, L: tl.constexpr):
    """What each layer of a token is divided by, from its squared norms."""
    norms = ()
    for layer in tl.static_range(L):
        norm = tl.sqrt_rn(squares[layer])
        # Not tl.maximum, which would turn the norm of a token that holds NaN into the bound.
        norms = norms + (tl.where(norm < _SHORTEST, _SHORTEST, norm),)
    return norms


@triton.jit
def _squares_from_memory(
    pointers, count, L: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, JOINT: tl.constexpr
):
    """As ``_inner`` of a token with itself, for one that is not kept."""
    sums = ()
    for layer in tl.static_range(L):
        squares = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(CHUNKS):
            columns = chunk * BLOCK + tl.arange(0, BLOCK)
            tile = tl.load(pointers[layer] + columns, mask=columns < count, other=0.0).to(tl.float32)  # [BLOCK]
            squares += tile * tile
        sums = sums + (tl.sum(squares, 0),)
    return _over_layers(sums, L, JOINT)


@triton.jit
def _counts(weight, token):
    """1.0 if a token counts, else 0.0."""
    if weight is None:
        counts = token * 0 + 1
    else:
        counts = tl.load(weight + token)
    return counts.to(tl.float32)


@triton.jit
def _sum_resident(
    hidden, batch_stride, row_stride, rows, weight, batch, first, last,
    L: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The sum of the normalised tokens ``rows[first .. last)``, as L * CHUNKS tiles [BLOCK]."""
    sums = ()
    for _ in tl.static_range(L * CHUNKS):
        sums = sums + (tl.zeros((BLOCK,), tl.float32),)
    for step in range(first, last):
        pointers = _row_pointers(hidden, batch_stride, row_stride, batch, tl.load(rows + step), L, ALIGN)
        tiles = _load_token(pointers, C, L, CHUNKS, BLOCK)
        counts = _counts(weight, step)
        if NORMALIZE != "none":
            norms = _norms(_inner(tiles, tiles, L, CHUNKS, NORMALIZE == "joint"), L)
        longer = ()
        for i in tl.static_range(L * CHUNKS):
            tile = tiles[i]
            if NORMALIZE != "none":
                tile = tl.div_rn(tile, norms[i // CHUNKS])
            longer = longer + (sums[i] + tile * counts,)
        sums = longer
    return sums


@triton.jit
def _norms_of_steps(
    hidden, batch_stride, row_stride, rows, batch, first, last,
    L: tl.constexpr, C: tl.constexpr, KP: tl.constexpr, NORMALIZE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What the tokens ``rows[first .. last)`` are divided by, a tuple of L vectors [KP]."""
    every = ()
    for _ in tl.static_range(L):
        every = every + (tl.full((KP,), 1.0, tl.float32),)
    for step in range(first, last):
        pointers = _row_pointers(hidden, batch_stride, row_stride, batch, tl.load(rows + step), L, ALIGN)
        squares = _squares_from_memory(pointers, C, L, CHUNKS, BLOCK, NORMALIZE == "joint")
        norms = _norms(squares, L)
        new = ()
        for layer in tl.static_range(L):
            new = new + (tl.where(tl.arange(0, KP) == step - first, norms[layer], every[layer]),)
        every = new
    return every


@triton.jit(
    do_not_specialize=["batch_stride", "row_stride", "A", "n", "K"],
    do_not_specialize_on_alignment=["rollout_rows", "target_rows", "weight"],
)
def pool_fwd_kernel(
    hidden,  # L x [B, S, C]
    batch_stride,
    row_stride,
    rollout_rows,  # [B, A, n, K]
    target_rows,  # [B, A, K]
    weight,  # [B, A, K] or None
    rollouts,  # [B, A, n, (K,) F]
    targets,  # [B, A, (K,) F]
    A,
    n,
    K,
    L: tl.constexpr,
    C: tl.constexpr,
    KP: tl.constexpr,  # power of two, at least K for "mean"
    MEAN: tl.constexpr,
    CONCAT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Program (anchor, sample, step): one token; (anchor, sample) for "mean": one feature. Sample n is the target."""
    program = tl.program_id(0).to(tl.int64)
    first = program * 0
    last = first + K
    size = first + L * C  # of an item's features
    layer_size = first + C
    if not MEAN:
        first, program = program % K, program // K
        last = first + 1
        size *= K
    if CONCAT:
        layer_size *= K
    sample, anchor = program % (n + 1), program // (n + 1)
    batch, item = anchor // A, anchor * n + sample
    rows = tl.where(sample == n, target_rows + anchor * K, rollout_rows + item * K)
    out = tl.where(sample == n, targets + anchor * size, rollouts + item * size)
    if weight is not None:
        weight += anchor * K
    divisor = 1.0
    if MEAN:
        divisor = K.to(tl.float32)
    elif CONCAT:
        out += first * C
    else:
        out += first * (L * C)

    if RESIDENT:
        sums = _sum_resident(
            hidden, batch_stride, row_stride, rows, weight, batch, first, last, L, C, NORMALIZE, ALIGN, BLOCK, CHUNKS
        )
        for i in tl.static_range(L * CHUNKS):
            columns = (i % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
            tl.store(out + (i // CHUNKS) * layer_size + columns, tl.div_rn(sums[i], divisor), mask=columns < C)
    else:
        if NORMALIZE != "none":
            every = _norms_of_steps(
                hidden, batch_stride, row_stride, rows, batch, first, last,
                L, C, KP, NORMALIZE, ALIGN, BLOCK, CHUNKS,
            )  # fmt: skip
        for i in tl.static_range(L * CHUNKS):
            columns = (i % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK,), tl.float32)
            for step in range(first, last):
                pointers = _row_pointers(hidden, batch_stride, row_stride, batch, tl.load(rows + step), L, ALIGN)
                tile = tl.load(pointers[i // CHUNKS] + columns, mask=columns < C, other=0.0)  # [BLOCK]
                tile = tile.to(tl.float32)
                if NORMALIZE != "none":
                    tile = tl.div_rn(
                        tile, tl.sum(tl.where(tl.arange(0, KP) == step - first, every[i // CHUNKS], 0.0), 0)
                    )
                total += tile * _counts(weight, step)
            tl.store(out + (i // CHUNKS) * layer_size + columns, tl.div_rn(total, divisor), mask=columns < C)


@triton.jit
def _feature(grad, index, use, K, L: tl.constexpr, C: tl.constexpr, CONCAT: tl.constexpr, MEAN: tl.constexpr):
    """Where the part of a feature that step ``use % K`` gave begins; ``index``: features before those of the row."""
    if MEAN:
        offset = (index + use // K) * (L * C)
    elif CONCAT:
        offset = (index + use // K) * (K * L * C) + use % K * C
    else:
        offset = (index * K + use) * (L * C)
    return grad + offset


@triton.jit
def _gradient_tile(
    columns, layer_offset, rollout_grad, taken, rollout_counts, grad_targets, weight, order, first, last, index, K,
    L: tl.constexpr, C: tl.constexpr, CONCAT: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """The gradients of all features that took one row, times what the row counts in them: one tile [BLOCK]."""
    total = tl.load(rollout_grad + layer_offset + columns, mask=columns < tl.where(taken, C, 0), other=0.0)  # [BLOCK]
    total *= rollout_counts
    for i in range(first, last):
        use = tl.load(order + i)
        grad = _feature(grad_targets, index, use, K, L, C, CONCAT, MEAN)
        tile = tl.load(grad + layer_offset + columns, mask=columns < C, other=0.0)  # [BLOCK]
        total += tile * _counts(weight, index * K + use)
    if MEAN:
        total = tl.div_rn(total, K.to(tl.float32))
    return total


@triton.jit
def _along(products, squares, L: tl.constexpr):
    """Per layer: by what the token is multiplied and taken off the gradient, which has no part along the token.

    A token so short that it is divided by a constant is scaled only; nothing is taken off.
    """
    factors = ()
    for layer in tl.static_range(L):
        norm = tl.sqrt_rn(squares[layer])
        divisor = tl.where(norm <= _SHORTEST, 1.0, norm)
        factors = factors + (tl.where(norm <= _SHORTEST, 0.0, tl.div_rn(tl.div_rn(products[layer], divisor), divisor)),)
    return factors


@triton.jit(
    do_not_specialize=["batch_stride", "row_stride", "S", "A", "n", "K"], do_not_specialize_on_alignment=["weight"]
)
def pool_bwd_kernel(
    hidden,  # L x [B, S, C]
    batch_stride,
    row_stride,
    grads,  # L x [B, S, C]
    grad_rollouts,  # [B, A, n, (K,) F]
    grad_targets,  # [B, A, (K,) F]
    weight,  # [B, A, K] or None
    rollout_use,  # [B, S]
    order,  # [B, A*K]
    target_first,  # [B, S+1]
    S,
    A,
    n,
    K,
    L: tl.constexpr,
    C: tl.constexpr,
    MEAN: tl.constexpr,
    CONCAT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Program (row, batch): one packed row, zeros if no feature took it. Anchors are added in order."""
    row, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = batch * A
    order += index * K
    first = tl.load(target_first + batch * (S + 1) + row)
    last = tl.load(target_first + batch * (S + 1) + row + 1)
    use = tl.load(rollout_use + batch * S + row).to(tl.int64)
    taken = use >= 0
    use = tl.where(taken, use, 0)
    counts = _counts(weight, index * K + use // (n * K) * K + use % K)
    rollout_grad = _feature(grad_rollouts, index * n, use, K, L, C, CONCAT, MEAN)
    layer_size = row * 0 + C
    if CONCAT:
        layer_size *= K
    pointers = _row_pointers(hidden, batch_stride, row_stride, batch, row, L, ALIGN)
    count = tl.where(taken | (first < last), C, 0)  # of the numbers of a layer that are read
    JOINT: tl.constexpr = NORMALIZE == "joint"

    if RESIDENT:
        totals = ()
        for i in tl.static_range(L * CHUNKS):
            columns = (i % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
            total = _gradient_tile(
                columns, (i // CHUNKS) * layer_size, rollout_grad, taken, counts, grad_targets, weight, order,
                first, last, index, K, L, C, CONCAT, MEAN,
            )  # fmt: skip
            totals = totals + (total,)
        tiles = totals
        if NORMALIZE != "none":
            tiles = _load_token(pointers, count, L, CHUNKS, BLOCK)
            squares = _inner(tiles, tiles, L, CHUNKS, JOINT)
            along = _along(_inner(tiles, totals, L, CHUNKS, JOINT), squares, L)
    elif NORMALIZE != "none":
        squares = _squares_from_memory(pointers, count, L, CHUNKS, BLOCK, JOINT)
        products = ()
        for layer in tl.static_range(L):
            sums = tl.zeros((BLOCK,), tl.float32)
            for chunk in range(CHUNKS):
                columns = chunk * BLOCK + tl.arange(0, BLOCK)
                total = _gradient_tile(
                    columns, layer * layer_size, rollout_grad, taken, counts, grad_targets, weight, order,
                    first, last, index, K, L, C, CONCAT, MEAN,
                )  # fmt: skip
                tile = tl.load(pointers[layer] + columns, mask=columns < count, other=0.0)  # [BLOCK]
                sums += total * tile.to(tl.float32)
            products = products + (tl.sum(sums, 0),)
        along = _along(_over_layers(products, L, JOINT), squares, L)

    if NORMALIZE != "none":
        norms = _norms(squares, L)
    for i in tl.static_range(L * CHUNKS):
        columns = (i % CHUNKS) * BLOCK + tl.arange(0, BLOCK)
        if RESIDENT:
            total = totals[i]
        else:
            total = _gradient_tile(
                columns, (i // CHUNKS) * layer_size, rollout_grad, taken, counts, grad_targets, weight, order,
                first, last, index, K, L, C, CONCAT, MEAN,
            )  # fmt: skip
        if NORMALIZE != "none":
            if RESIDENT:
                tile = tiles[i]
            else:
                tile = tl.load(pointers[i // CHUNKS] + columns, mask=columns < count, other=0.0)  # [BLOCK]
            total = tl.div_rn(total - tile.to(tl.float32) * along[i // CHUNKS], norms[i // CHUNKS])
        out = grads[i // CHUNKS] + (batch * S + row) * C + columns
        tl.store(out, total.to(out.dtype.element_ty), mask=columns < C)
