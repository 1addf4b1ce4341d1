"""Feature matching and the mean-embedding loss in Triton: features are read once, small matrices stay in registers."""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import gram_tiles, matching_tiles, mean_embedding_tiles
from .._triton import launch, target_of
from . import _torch
from ._triton_core import loss_of, store_results, whiten
from ._triton_gram import as_matrices, distinct_products, matrices_by_dot, product_operand

#: Most rollouts whose eigen-problem is solved inside the kernel; above, only the Gram matrix is made there.
MAX_SAMPLES = 16
# Most rollouts of which a thread of the loss's backward pass keeps 16 bytes each.
_HELD = tl.constexpr(16)


def forward(
    rollouts: Tensor,
    targets: Tensor,
    whitening: str,
    alignment_coef: float,
    diversity_coef: float,
    estimator: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [...], alignment, diversity, reward and advantage [..., n] of rollouts [..., n, F] and targets [..., F]."""
    *leading, n, features = rollouts.shape
    rollouts, targets, geometry, align = _addresses(rollouts, targets)
    if n > MAX_SAMPLES:
        gram = _gram(rollouts, targets, geometry, align, groups).view(*leading, groups, n + 1, n + 1)
        return _torch.from_gram(gram, whitening, alignment_coef, diversity_coef, estimator, torch.float32)
    device = rollouts.device
    loss = torch.empty(leading, dtype=torch.float32, device=device)
    others = tuple(torch.empty(*leading, n, dtype=torch.float32, device=device) for _ in range(4))
    anchors = loss.numel()
    launch(
        match_fwd_kernel,
        lambda sizes: (-(-anchors // sizes["A"]),),
        rollouts,
        targets,
        loss,
        others,
        anchors,
        *geometry,
        *two_floats(alignment_coef),
        *two_floats(diversity_coef),
        groups,
        device=device,
        tiles=matching_tiles(target_of(device), n, rollouts.element_size()),
        C=features // groups,
        n=n,
        N=triton.next_power_of_2(n),
        WHITENING=whitening,
        ESTIMATOR=estimator,
        ALIGN=align,
    )
    return loss, *others


def two_floats(value: float) -> tuple[float, float]:
    """``value`` as the sum of two float32: a kernel's float arguments are float32."""
    (high,) = struct.unpack("f", struct.pack("f", value))
    return high, value - high


def _addresses(rollouts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """Features as [B, A, G, n, F] and [B, A, G, F] with adjacent numbers, their geometry, and how far vectors align.

    The last is the largest power of two, up to 16 bytes' worth of numbers, that divides all strides; the strides are
    given in units of it. Known to the compiler, it makes 16-byte accesses possible without strides compiled in.
    """
    rollouts, targets = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (rollouts, targets))
    if targets.ndim == 3:
        rollouts, targets = rollouts[:, :, None], targets[:, :, None]
    # The stride of an axis of size 1 means nothing.
    strides = [
        stride if size > 1 else 0
        for x in (rollouts, targets)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    align = math.gcd(16 // rollouts.element_size(), *strides)
    return rollouts, targets, (*targets.shape[1:3], *(stride // align for stride in strides)), align


# Sizes of the second and third leading axis; strides of the rollouts over the leading axes and n, and of the targets.
_GEOMETRY = ("size1", "size2", "x0", "x1", "x2", "xn", "y0", "y1", "y2")


@triton.jit
def _offsets(anchors, geometry, ALIGN: tl.constexpr):
    """Where the anchors' rollouts and targets begin, and how far apart the rollouts are; int64, as ``anchors``."""
    first = anchors // (geometry[0] * geometry[1])
    second = anchors // geometry[1] % geometry[0]
    third = anchors % geometry[1]
    rollouts = first * geometry[2] + second * geometry[3] + third * geometry[4]
    targets = first * geometry[6] + second * geometry[7] + third * geometry[8]
    return rollouts * ALIGN, targets * ALIGN, (anchors * 0 + geometry[5]) * ALIGN


@triton.jit(do_not_specialize=["M", *_GEOMETRY, "groups"])
def match_fwd_kernel(
    rollouts,  # [..., n, F]
    targets,  # [..., F]
    loss,  # [M]
    outputs,  # 4 x [M, n]
    M,
    size1,
    size2,
    x0,
    x1,
    x2,
    xn,
    y0,
    y1,
    y2,
    alignment_coef,  # as the sum of two float32
    alignment_rest,
    diversity_coef,
    diversity_rest,
    groups,
    C: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    WHITENING: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ALIGN: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
    V: tl.constexpr,
    DISTINCT: tl.constexpr,
):
    """Program: A anchors."""
    anchors = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    geometry = (size1, size2, x0, x1, x2, xn, y0, y1, y2)
    if DISTINCT:
        rollout_offset, target_offset, stride = _offsets(tl.minimum(anchors, M - 1), geometry, ALIGN)  # [A]
    else:  # A is 1
        rollout_offset, target_offset, stride = _offsets(tl.program_id(0).to(tl.int64), geometry, ALIGN)
    squares = tl.zeros((A, N), tl.float64)
    others = tl.zeros((A, N), tl.float64)
    cross = tl.zeros((A, N), tl.float64)
    met_square = tl.zeros((A, N), tl.float64)
    total_loss = tl.zeros((A,), tl.float64)
    for group in range(groups):
        start = group * C
        if DISTINCT:
            pointers = ()
            for j in tl.static_range(n):
                pointers = pointers + (rollouts + (rollout_offset + j * stride + start),)
            pointers = pointers + (targets + (target_offset + start),)
            k, v, t = as_matrices(distinct_products(pointers, C, n, V, A, BLOCK), n, A, N)
        else:
            j = tl.arange(0, N)
            rows = rollouts + (rollout_offset + tl.where(j < n, j, 0) * stride + start)  # [N]
            target = targets + (target_offset + start)
            k, v, t = matrices_by_dot(rows, target, C, n, N, BLOCK)
        total_loss += loss_of(k, v, t, n)
        parts = whiten(k, v, t, WHITENING, A, N)
        squares += parts[0]
        others += parts[1]
        cross += parts[2]
        met_square += parts[3]
    tl.store(loss + anchors, tl.where(total_loss < 0, 0.0, total_loss).to(tl.float32), mask=anchors < M)
    zero = tl.zeros((1, 1), tl.float64)
    coefs = (zero + alignment_coef + alignment_rest, zero + diversity_coef + diversity_rest)
    store_results(outputs, anchors, M, (squares, others, cross, met_square), coefs, ESTIMATOR, n, A, N)


def _gram(rollouts: Tensor, targets: Tensor, geometry: tuple[int, ...], align: int, groups: int) -> Tensor:
    """[..., groups, n+1, n+1] float64: all inner products of the rollouts and, last, the target, per part of F."""
    *leading, n, features = rollouts.shape
    gram = torch.empty(*leading, groups, n + 1, n + 1, dtype=torch.float64, device=rollouts.device)
    anchors = math.prod(leading)
    launch(
        gram_kernel,
        lambda sizes: (anchors * groups, -(-(n + 1) // sizes["ROWS"]), -(-(n + 1) // sizes["ROWS"])),
        rollouts,
        targets,
        gram,
        *geometry,
        groups,
        n,
        device=rollouts.device,
        tiles=gram_tiles(target_of(rollouts.device)),
        C=features // groups,
        ALIGN=align,
    )
    return gram


@triton.jit
def _load_vectors(rollouts, target, first, columns, stride, n, C: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS, BLOCK] float64: rollouts ``first ..``; number n is the target, and zeros follow."""
    j = first + tl.arange(0, ROWS)
    exists = (columns < C)[None, :]
    offset = tl.where(j < n, j, 0) * stride
    x = tl.load(rollouts + offset[:, None] + columns[None, :], mask=(j < n)[:, None] & exists, other=0.0)
    y = tl.load(target + columns[None, :] + 0 * j[:, None], mask=(j == n)[:, None] & exists, other=0.0)
    return x.to(tl.float32).to(tl.float64) + y.to(tl.float32).to(tl.float64)


@triton.jit(do_not_specialize=[*_GEOMETRY, "groups", "n"])
def gram_kernel(
    rollouts,  # [..., n, F]
    targets,  # [..., F]
    gram,  # [M, groups, n+1, n+1]
    size1,
    size2,
    x0,
    x1,
    x2,
    xn,
    y0,
    y1,
    y2,
    groups,
    n,
    C: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (part of F of an anchor, i, j): ROWS x ROWS inner products, and their mirror image."""
    part = tl.program_id(0).to(tl.int64)
    first, second = tl.program_id(1) * ROWS, tl.program_id(2) * ROWS
    if first < second:
        return
    rollout_offset, target_offset, stride = _offsets(part // groups, (size1, size2, x0, x1, x2, xn, y0, y1, y2), ALIGN)
    start = part % groups * C
    rollouts += rollout_offset + start
    targets += target_offset + start
    k = tl.zeros((ROWS, ROWS), tl.float64)
    for begin in range(0, C, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        x = _load_vectors(rollouts, targets, first, columns, stride, n, C, ROWS)
        y = _load_vectors(rollouts, targets, second, columns, stride, n, C, ROWS)
        k = tl.dot(product_operand(x), product_operand(tl.trans(y)), k, out_dtype=tl.float64)
    i, j = first + tl.arange(0, ROWS)[:, None], second + tl.arange(0, ROWS)[None, :]
    exists = (i <= n) & (j <= n)
    gram += part * (n + 1) * (n + 1)
    tl.store(gram + i * (n + 1) + j, k, mask=exists)
    tl.store(gram + j * (n + 1) + i, k, mask=exists)


def mean_embedding_forward(rollouts: Tensor, targets: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Loss [B, A] of rollouts [B, A, n, F] and targets [B, A, F], and ``mean_j phi_j - phi*`` [B, A, F]."""
    rollouts, targets, geometry, align = _addresses(rollouts, targets)
    batch_size, anchors, _, n, features = rollouts.shape
    device = rollouts.device
    loss = torch.empty(batch_size, anchors, dtype=torch.float32, device=device)
    difference = torch.empty(batch_size, anchors, features, dtype=torch.float32, device=device)
    launch(
        mean_embedding_fwd_kernel,
        lambda _: (batch_size * anchors,),
        rollouts,
        targets,
        loss,
        difference,
        *geometry,
        device=device,
        tiles=mean_embedding_tiles(target_of(device), n, features, rollouts.element_size()),
        n=n,
        F=features,
        UNBIASED=unbiased,
        ALIGN=align,
    )
    return loss, difference


def mean_embedding_backward(
    grad: Tensor, rollouts: Tensor, difference: Tensor, unbiased: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of rollouts and targets, in the dtype of the rollouts, from ``grad`` [B, A]."""
    rollouts, difference, geometry, align = _addresses(rollouts, difference)
    batch_size, anchors, _, n, features = rollouts.shape
    device = rollouts.device
    grad_rollouts = torch.empty(batch_size, anchors, n, features, dtype=rollouts.dtype, device=device)
    grad_targets = torch.empty(batch_size, anchors, features, dtype=rollouts.dtype, device=device)
    launch(
        mean_embedding_bwd_kernel,
        lambda sizes: (batch_size * anchors, -(-features // sizes["BLOCK"])),
        grad.contiguous(),
        rollouts,
        difference,
        grad_rollouts,
        grad_targets,
        *geometry,
        device=device,
        tiles=mean_embedding_tiles(target_of(device), n, features, rollouts.element_size()),
        n=n,
        F=features,
        UNBIASED=unbiased,
        ALIGN=align,
    )
    return grad_rollouts, grad_targets


@triton.jit
def _mean_and_spread(rollouts, first, columns, stride, n: tl.constexpr, F: tl.constexpr):
    """Mean over the rollouts and sum of the squared distances from it, both [BLOCK] float32, in one pass."""
    total = columns * 0.0
    running = columns * 0.0  # mean of the rollouts so far, of which the squared distances so far are
    spread = columns * 0.0
    for j in range(n):
        offset = first + j * stride
        x = tl.load(rollouts + offset + columns, mask=columns < F, other=0.0).to(tl.float32)  # [BLOCK]
        total += x
        change = x - running
        running += change / (j + 1)
        spread += change * (x - running)
    return tl.div_rn(total, n * 1.0), spread


@triton.jit(do_not_specialize=[*_GEOMETRY])
def mean_embedding_fwd_kernel(
    rollouts,  # [B, A, n, F]
    targets,  # [B, A, F]
    loss,  # [B, A]
    difference,  # [B, A, F]
    size1,
    size2,
    x0,
    x1,
    x2,
    xn,
    y0,
    y1,
    y2,
    n: tl.constexpr,
    F: tl.constexpr,
    UNBIASED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program: one anchor."""
    anchor = tl.program_id(0).to(tl.int64)
    rollout_offset, target_offset, stride = _offsets(anchor, (size1, size2, x0, x1, x2, xn, y0, y1, y2), ALIGN)
    targets += target_offset
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mean, spread = _mean_and_spread(rollouts, rollout_offset, columns, stride, n, F)
        away = mean - tl.load(targets + columns, mask=columns < F, other=0.0).to(tl.float32)  # [BLOCK]
        tl.store(difference + anchor * F + columns, away, mask=columns < F)
        total += away * away
        if UNBIASED:
            # sum_{j != k} K_jk / (n (n - 1)) = |mean|^2 - sum_j |phi_j - mean|^2 / (n (n - 1)), without cancellation.
            total -= tl.div_rn(spread, n * (n - 1.0))
    tl.store(loss + anchor, tl.sum(total, 0))


@triton.jit(do_not_specialize=[*_GEOMETRY])
def mean_embedding_bwd_kernel(
    grad,  # [B, A]
    rollouts,  # [B, A, n, F]
    difference,  # [B, A, F]
    grad_rollouts,  # [B, A, n, F]
    grad_targets,  # [B, A, F]
    size1,
    size2,
    x0,
    x1,
    x2,
    xn,
    y0,
    y1,
    y2,
    n: tl.constexpr,
    F: tl.constexpr,
    UNBIASED: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (anchor, part of F). Up to 16 rollouts stay in registers between their mean and their gradients."""
    anchor = tl.program_id(0).to(tl.int64)
    rollout_offset, difference_offset, stride = _offsets(anchor, (size1, size2, x0, x1, x2, xn, y0, y1, y2), ALIGN)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    twice = 2 * tl.load(grad + anchor)
    away = tl.load(difference + difference_offset + columns, mask=columns < F, other=0.0)
    dtype = grad_targets.dtype.element_ty
    tl.store(grad_targets + anchor * F + columns, (-twice * away).to(dtype), mask=columns < F)
    grad_rollouts += anchor * n * F
    common = away * tl.div_rn(twice, n * 1.0)
    if UNBIASED and n <= _HELD:
        tiles = ()
        for j in tl.static_range(n):
            offset = rollout_offset + j * stride
            x = tl.load(rollouts + offset + columns, mask=columns < F, other=0.0)  # [BLOCK]
            tiles = tiles + (x.to(tl.float32),)
        mean = tiles[0]
        for j in tl.static_range(1, n):
            mean += tiles[j]
        mean = tl.div_rn(mean, n * 1.0)
        for j in tl.static_range(n):
            change = common - (tiles[j] - mean) * tl.div_rn(twice, n * (n - 1.0))
            tl.store(grad_rollouts + j * F + columns, change.to(dtype), mask=columns < F)
    else:
        if UNBIASED:
            mean, _ = _mean_and_spread(rollouts, rollout_offset, columns, stride, n, F)
        for j in range(n):
            change = common
            if UNBIASED:
                offset = rollout_offset + j * stride
                x = tl.load(rollouts + offset + columns, mask=columns < F, other=0.0).to(tl.float32)  # [BLOCK]
                change = common - (x - mean) * tl.div_rn(twice, n * (n - 1.0))
            tl.store(grad_rollouts + j * F + columns, change.to(dtype), mask=columns < F)
