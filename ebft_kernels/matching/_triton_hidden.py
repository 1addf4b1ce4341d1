"""From hidden states to rewards in one Triton kernel: pooled features exist in registers only, and not whole.

Inner products of features are those of hidden states over the lengths that both are divided by, and those lengths are
on the diagonal of the same Gram matrix. So tokens need not be normalised before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tiles import matching_tiles
from .._triton import launch, target_of
from ..pooling._triton import addresses
from ..pooling.modes import POOLINGS, SHORTEST_TOKEN
from ._triton import two_floats
from ._triton_core import loss_of, store_results, whiten
from ._triton_gram import as_matrices, distinct_products, matrices_by_dot

_SHORTEST = tl.constexpr(SHORTEST_TOKEN)


def forward(
    hidden_states: Sequence[Tensor],
    rollout_rows: Tensor,
    target_rows: Tensor,
    weight: Tensor | None,
    pooling: str,
    normalize: str,
    whitening: str,
    alignment_coef: float,
    diversity_coef: float,
    estimator: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [B, A], alignment, diversity, reward and advantage [B, A, n]; with ``"token"`` [B, A, G] and [B, A, G, n].

    Args:
        hidden_states: L tensors [B, S, C].
        rollout_rows: [B, A, n, K] int64, the packed rows whose tokens make up each feature; n <= 16.
        target_rows: [B, A, K] int64.
        weight: [B, A, K] bool, which of these tokens count; None: all.
        pooling: "last_token" (K = 1), "concat" or "token".
        normalize: "joint", "per_layer" or "none".
        groups: 1 or L.
    """
    first, mode = hidden_states[0], POOLINGS[pooling]
    device, layers, channels = first.device, len(hidden_states), first.shape[2]
    batch_size, anchors, n, steps = rollout_rows.shape
    *hidden, align = addresses(hidden_states)
    leading = (batch_size, anchors, steps) if mode.own_axis else (batch_size, anchors)
    loss = torch.empty(leading, dtype=torch.float32, device=device)
    others = tuple(torch.empty(*leading, n, dtype=torch.float32, device=device) for _ in range(4))
    matched = loss.numel()
    launch(
        match_hidden_kernel,
        lambda sizes: (-(-matched // sizes["A"]),),
        *hidden,
        rollout_rows.contiguous(),
        target_rows.contiguous(),
        None if weight is None else weight.contiguous().view(torch.uint8),
        loss,
        others,
        matched,
        anchors,
        steps,
        *two_floats(alignment_coef),
        *two_floats(diversity_coef),
        device=device,
        tiles=matching_tiles(target_of(device), n, first.element_size(), layers=True),
        L=layers,
        C=channels,
        n=n,
        N=triton.next_power_of_2(n),
        GROUPS=groups,
        CONCAT=mode.side_by_side,
        NORMALIZE=normalize,
        WHITENING=whitening,
        ESTIMATOR=estimator,
        ALIGN=align,
    )
    return loss, *others


@triton.jit
def _layer_matrices(
    hidden, batch_stride, row_stride, rollout_rows, target_rows, batch, token, K,
    C: tl.constexpr, n: tl.constexpr, N: tl.constexpr, ALIGN: tl.constexpr, A: tl.constexpr, BLOCK: tl.constexpr,
    V: tl.constexpr, DISTINCT: tl.constexpr,
):  # fmt: skip
    """Inner products of one layer of one token: rollouts with rollouts [A, N, N], with the target [A, N], and [A].

    ``batch``, ``token``: [A], the latter the number of the (anchor, step) in ``target_rows`` [.., K].
    """
    if DISTINCT:
        rollout_token = token // K * (n * K) + token % K  # [A], of the first rollout
        pointers = ()
        for j in tl.static_range(n):
            row = tl.load(rollout_rows + rollout_token + j * K)
            pointers = pointers + (hidden + (batch * batch_stride + row * row_stride) * ALIGN,)
        row = tl.load(target_rows + token)
        pointers = pointers + (hidden + (batch * batch_stride + row * row_stride) * ALIGN,)
        k, v, t = as_matrices(distinct_products(pointers, C, n, V, A, BLOCK), n, A, N)
    else:  # A is 1
        token, batch = tl.sum(token, 0), tl.sum(batch, 0)
        j = tl.arange(0, N)
        row = tl.load(rollout_rows + token // K * (n * K) + token % K + tl.where(j < n, j, 0) * K)  # [N]
        rows = hidden + (batch * batch_stride + row * row_stride) * ALIGN
        row = tl.load(target_rows + token)
        target = hidden + (batch * batch_stride + row * row_stride) * ALIGN
        k, v, t = matrices_by_dot(rows, target, C, n, N, BLOCK)
    return k, v, t


@triton.jit
def _inverse_norm(square, counts):
    norm = tl.sqrt(square)
    return counts / tl.where(norm < _SHORTEST, _SHORTEST, norm)


@triton.jit
def _normalised(ks, vs, ts, counts, L: tl.constexpr, NORMALIZE: tl.constexpr, N: tl.constexpr):
    """The L layers' inner products of one token after normalisation; ``counts`` [A]: 1 or 0, whether the token does."""
    diagonal = tl.arange(0, N)[None, :, None] == tl.arange(0, N)[None, None, :]
    x_squares, y_squares = (), ()
    for layer in tl.static_range(L):
        x_squares = x_squares + (tl.sum(tl.where(diagonal, ks[layer], 0.0), 2),)  # [A, N]
        y_squares = y_squares + (ts[layer],)  # [A]
    if NORMALIZE == "joint":
        x_square, y_square = x_squares[0], y_squares[0]
        for layer in tl.static_range(1, L):
            x_square += x_squares[layer]
            y_square += y_squares[layer]
        x_squares, y_squares = (), ()
        for _ in tl.static_range(L):
            x_squares, y_squares = x_squares + (x_square,), y_squares + (y_square,)
    new_ks, new_vs, new_ts = (), (), ()
    for layer in tl.static_range(L):
        if NORMALIZE == "none":
            x_factor, y_factor = x_squares[layer] * 0 + counts[:, None], counts
        else:
            x_factor = _inverse_norm(x_squares[layer], counts[:, None])
            y_factor = _inverse_norm(y_squares[layer], counts)
        new_ks = new_ks + (ks[layer] * x_factor[:, :, None] * x_factor[:, None, :],)
        new_vs = new_vs + (vs[layer] * x_factor * y_factor[:, None],)
        new_ts = new_ts + (ts[layer] * y_factor * y_factor,)
    return new_ks, new_vs, new_ts


@triton.jit
def _added(parts, more, L: tl.constexpr, GROUPS: tl.constexpr):
    """The sums of ``parts`` (one per group) and ``more`` (one per layer)."""
    sums = ()
    for group in tl.static_range(GROUPS):
        total = parts[group] + more[group]
        if GROUPS == 1:
            for layer in tl.static_range(1, L):
                total += more[layer]
        sums = sums + (total,)
    return sums


@triton.jit(
    do_not_specialize=["batch_stride", "row_stride", "M", "anchors_per_row", "K"],
    do_not_specialize_on_alignment=["rollout_rows", "target_rows", "weight"],
)
def match_hidden_kernel(
    hidden,  # L x [B, S, C]
    batch_stride,
    row_stride,
    rollout_rows,  # [B, anchors_per_row, n, K]
    target_rows,  # [B, anchors_per_row, K]
    weight,  # [B, anchors_per_row, K] or None
    loss,  # [M]
    outputs,  # 4 x [M, n]
    M,
    anchors_per_row,
    K,
    alignment_coef,  # as the sum of two float32
    alignment_rest,
    diversity_coef,
    diversity_rest,
    L: tl.constexpr,
    C: tl.constexpr,
    n: tl.constexpr,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    CONCAT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WHITENING: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ALIGN: tl.constexpr,
    A: tl.constexpr,
    BLOCK: tl.constexpr,
    V: tl.constexpr,
    DISTINCT: tl.constexpr,
):
    """Program: A of the M anchors, or of the (anchor, step) that are matched on their own."""
    anchors = tl.program_id(0).to(tl.int64) * A + tl.arange(0, A)
    token = tl.minimum(anchors, M - 1)
    steps = 1
    if CONCAT:
        token = token * K
        steps = K
    batch = token // K // anchors_per_row
    ks, vs, ts = (), (), ()
    for _ in tl.static_range(GROUPS):
        ks = ks + (tl.zeros((A, N, N), tl.float64),)
        vs = vs + (tl.zeros((A, N), tl.float64),)
        ts = ts + (tl.zeros((A,), tl.float64),)
    for _ in range(steps):
        layer_ks, layer_vs, layer_ts = (), (), ()
        for layer in tl.static_range(L):
            k, v, t = _layer_matrices(
                hidden[layer], batch_stride, row_stride, rollout_rows, target_rows, batch, token, K,
                C, n, N, ALIGN, A, BLOCK, V, DISTINCT,
            )  # fmt: skip
            layer_ks, layer_vs, layer_ts = layer_ks + (k,), layer_vs + (v,), layer_ts + (t,)
        counts = tl.full((A,), 1.0, tl.float64)
        if weight is not None:
            counts = tl.load(weight + token).to(tl.float64)
        layer_ks, layer_vs, layer_ts = _normalised(layer_ks, layer_vs, layer_ts, counts, L, NORMALIZE, N)
        ks = _added(ks, layer_ks, L, GROUPS)
        vs = _added(vs, layer_vs, L, GROUPS)
        ts = _added(ts, layer_ts, L, GROUPS)
        token += 1

    squares = tl.zeros((A, N), tl.float64)
    others = tl.zeros((A, N), tl.float64)
    cross = tl.zeros((A, N), tl.float64)
    met_square = tl.zeros((A, N), tl.float64)
    total_loss = tl.zeros((A,), tl.float64)
    for group in tl.static_range(GROUPS):
        total_loss += loss_of(ks[group], vs[group], ts[group], n)
        parts = whiten(ks[group], vs[group], ts[group], WHITENING, A, N)
        squares += parts[0]
        others += parts[1]
        cross += parts[2]
        met_square += parts[3]
    tl.store(loss + anchors, tl.where(total_loss < 0, 0.0, total_loss).to(tl.float32), mask=anchors < M)
    zero = tl.zeros((1, 1), tl.float64)
    coefs = (zero + alignment_coef + alignment_rest, zero + diversity_coef + diversity_rest)
    store_results(outputs, anchors, M, (squares, others, cross, met_square), coefs, ESTIMATOR, n, A, N)
