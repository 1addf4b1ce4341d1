"""Device functions from features to Gram matrices: float64 sums of products of float32, which are exact in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def distinct_products(
    pointers, C: tl.constexpr, n: tl.constexpr, V: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr
):
    """All inner products of n + 1 vectors of length C, each [A] float64, as a tuple: (0,0), (1,0), (1,1), (2,0), ...

    For few vectors: nothing is computed twice, which counts where float64 is slow. ``pointers``: n + 1 times [A].
    Each thread adds the products of the V numbers of one load before it adds them to its part of the sum.
    """
    sums = ()
    for _ in tl.static_range((n + 1) * (n + 2) // 2):
        sums = sums + (tl.zeros((A, BLOCK // V), tl.float64),)
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)[None, :]
        x = ()
        for i in tl.static_range(n + 1):
            tile = tl.load(pointers[i][:, None] + columns, mask=columns < C, other=0.0)  # [A, BLOCK]
            x = x + (tile.to(tl.float32).to(tl.float64),)
        longer = ()
        for i in tl.static_range(n + 1):
            for j in tl.static_range(i + 1):
                products = tl.sum(tl.reshape(x[i] * x[j], (A, BLOCK // V, V)), 2)  # [A, BLOCK/V]
                longer = longer + (sums[i * (i + 1) // 2 + j] + products,)
        sums = longer
    totals = ()
    for i in tl.static_range((n + 1) * (n + 2) // 2):
        totals = totals + (tl.sum(sums[i], 1),)
    return totals


@triton.jit
def as_matrices(products, n: tl.constexpr, A: tl.constexpr, N: tl.constexpr):
    """What :func:`distinct_products` returns as rollouts with rollouts [A, N, N], with the target [A, N], and [A]."""
    row, column = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, :]
    k = tl.zeros((A, N, N), tl.float64)
    v = tl.zeros((A, N), tl.float64)
    for i in tl.static_range(n):
        line = tl.zeros((A, N), tl.float64)
        for j in tl.static_range(n):
            product = products[i * (i + 1) // 2 + j if i > j else j * (j + 1) // 2 + i]
            line = tl.where(column == j, product[:, None], line)
        k = tl.where(row == i, line[:, None, :], k)
        v = tl.where(column == i, products[n * (n + 1) // 2 + i][:, None], v)
    return k, v, products[n * (n + 1) // 2 + n]


@triton.jit
def product_operand(x):
    """``x`` [X, Y] float64, as it is, for ``tl.dot``.

    Triton (seen in 3.8) lays out the operands of a product by the width in which their numbers were loaded, and fails
    for float64 products of what were 16 bits. It does not look through a sum, here over an axis of size 1.
    """
    return tl.sum(x[:, :, None], 2)


@triton.jit
def matrices_by_dot(rows, target, C: tl.constexpr, n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """The same three for one anchor of many rollouts, by matrix products. ``rows``: [N] pointers; ``target``: one."""
    k = tl.zeros((N, N), tl.float64)
    v = tl.zeros((N, BLOCK), tl.float64)
    t = tl.zeros((BLOCK,), tl.float64)
    exists = tl.arange(0, N)[:, None] < n
    for start in range(0, C, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(rows[:, None] + columns[None, :], mask=exists & (columns < C)[None, :], other=0.0)  # [N, BLOCK]
        y = tl.load(target + columns, mask=columns < C, other=0.0)  # [BLOCK]
        x, y = x.to(tl.float32).to(tl.float64), y.to(tl.float32).to(tl.float64)
        k = tl.dot(product_operand(x), product_operand(tl.trans(x)), k, out_dtype=tl.float64)
        v += x * y[None, :]
        t += y * y
    return k[None, :, :], tl.sum(v, 1)[None, :], tl.sum(t[None, :], 1)
