"""Device functions on the small matrices of feature matching: A anchors of one program at a time, float64.

A Gram matrix is a tensor [A, N, N], N the number of rollouts n rounded up to a power of two and the surplus zero: all
threads of a program share the work. What comes out for an anchor does not depend on the others of its program.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Eigenvalues of the Gram matrix are squared singular values, which are dropped at 1e-5 of the largest.
_CUTOFF = tl.constexpr(1e-10)
# As torch.nn.functional.cosine_similarity.
_EPS = tl.constexpr(1e-8)
# Off-diagonal sum of squares, relative to that of the diagonal, at which a matrix counts as diagonal.
_CONVERGED = tl.constexpr(1e-34)
# Convergence is quadratic: 16 x 16 takes 7 or 8 sweeps.
_SWEEPS = tl.constexpr(16)


@triton.jit
def eigen_decompose(k, A: tl.constexpr, N: tl.constexpr):
    """Eigenvalues [A, N] in no order and eigenvectors [A, N, N], one per column, of symmetric finite ``k`` [A, N, N].

    Jacobi's method. In round m of a sweep the pairs (i, i xor m) are rotated at once; rounds 1 .. N-1 meet all pairs.
    """
    row, column = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    diagonal = tl.broadcast_to(row == column, (A, N, N))
    vectors = tl.where(diagonal, tl.full((A, N, N), 1.0, tl.float64), 0.0)
    rotating = _not_diagonal(k, diagonal)  # [A]
    sweep = 0
    while (tl.max(rotating, 0) > 0) & (sweep < _SWEEPS):
        for m in range(1, N):
            pair = tl.broadcast_to((row ^ m) == column, (A, N, N))
            k, vectors = _rotate(k, vectors, rotating, diagonal, pair, row, column, m, A, N)
        rotating = _not_diagonal(k, diagonal)
        sweep += 1
    return tl.sum(tl.where(diagonal, k, 0.0), 1), vectors


@triton.jit
def _not_diagonal(k, diagonal):
    """[A] int32, 1 where the matrix is not diagonal yet."""
    squares = k * k
    outside = tl.sum(tl.sum(tl.where(diagonal, 0.0, squares), 2), 1)
    inside = tl.sum(tl.sum(tl.where(diagonal, squares, 0.0), 2), 1)
    return (outside > inside * _CONVERGED).to(tl.int32)


@triton.jit
def _rotate(k, vectors, rotating, diagonal, pair, row, column, m, A: tl.constexpr, N: tl.constexpr):
    """One round: ``J^T k J`` and ``vectors J``, where J makes ``k`` zero at all (i, i xor m) at once."""
    own = tl.sum(tl.where(diagonal, k, 0.0), 1)  # [A, N]: k_ii
    other = tl.sum(tl.where(pair, own[:, :, None], 0.0), 1)  # k_pp of the partner p
    # k_ip + k_pi, the same number for both partners even where rounding made k_ip differ from k_pi: else J would not be
    # orthogonal.
    twice = tl.sum(tl.where(pair, k, 0.0), 1) + tl.sum(tl.where(pair, k, 0.0), 2)
    # The tangent of the smaller of the two angles; its sign is opposite for the two partners.
    quotient = (other - own) / tl.where(twice == 0, 1.0, twice)
    where_equal = tl.where(tl.arange(0, N) < (tl.arange(0, N) ^ m), 1.0, -1.0)[None, :]
    sign = tl.where(quotient > 0, 1.0, tl.where(quotient < 0, -1.0, where_equal))
    tangent = sign / (tl.abs(quotient) + tl.sqrt(quotient * quotient + 1))
    tangent = tl.where(twice == 0, 0.0, tl.where(rotating[:, None] > 0, tangent, 0.0))
    cosine = 1 / tl.sqrt(tangent * tangent + 1)
    sine = tangent * cosine

    partner_column = tl.broadcast_to(column ^ m, (A, N, N))
    partner_row = tl.broadcast_to(row ^ m, (A, N, N))
    k = cosine[:, None, :] * k - sine[:, None, :] * tl.gather(k, partner_column, 2)
    k = cosine[:, :, None] * k - sine[:, :, None] * tl.gather(k, partner_row, 1)
    k = tl.where(pair & (rotating[:, None, None] > 0), 0.0, k)
    vectors = cosine[:, None, :] * vectors - sine[:, None, :] * tl.gather(vectors, partner_column, 2)
    return k, vectors


@triton.jit
def whiten(k, v, t, WHITENING: tl.constexpr, A: tl.constexpr, N: tl.constexpr):
    """Inner products of the whitened vectors of one part of F.

    Takes rollouts with rollouts [A, N, N], rollouts with the target [A, N] and the target with itself [A]; returns four
    times [A, N]: each rollout with itself, with the sum of the others, with the target as it meets it, and the square
    of that target.
    """
    row, column = tl.arange(0, N)[None, :, None], tl.arange(0, N)[None, None, :]
    diagonal = tl.broadcast_to(row == column, (A, N, N))
    if WHITENING == "none":
        squares = tl.sum(tl.where(diagonal, k, 0.0), 2)
        others = tl.sum(tl.where(diagonal, 0.0, k), 2)
        cross = v
        met_square = v * 0 + t[:, None]
    else:
        # A matrix that holds NaN or infinity becomes 0; the results become NaN through v.
        broken = tl.max(tl.max(tl.where(tl.abs(k) < float("inf"), 0, 1), 2), 1)  # [A]
        values, vectors = eigen_decompose(tl.where(broken[:, None, None] > 0, 0.0, k), A, N)
        keep = values > tl.max(values, 1)[:, None] * _CUTOFF  # [A, N]
        lost = tl.where(keep[:, None, :], 0.0, vectors)
        sums = tl.sum(vectors, 1)  # [A, N], of each eigenvector
        # By what is dropped: exactly 1 and exactly 0 when nothing is.
        squares = 1.0 - tl.sum(lost * vectors, 2)
        others = 0.0 - tl.sum(lost * (sums[:, None, :] - vectors), 2)
        inverse = tl.where(keep, 1.0 / tl.where(keep, values, 1.0), 0.0)
        if WHITENING == "sample":
            inverse = tl.sqrt(inverse)
        along = tl.sum(vectors * v[:, :, None], 1)  # [A, N]
        cross = tl.sum(vectors * (inverse * along)[:, None, :], 2)
        if WHITENING == "sample":
            row_sums = tl.sum(vectors * (inverse * sums)[:, None, :], 2)  # of K^(-1/2)
            cross = row_sums * cross
            met_square = row_sums * row_sums * t[:, None]
        else:
            met_square = cross * 0 + tl.sum(cross * cross, 1)[:, None]
    return squares, others, cross, met_square


@triton.jit
def _length(square):
    """Square root, at least EPS; NaN stays NaN."""
    root = tl.sqrt(tl.where(square < 0, 0.0, square))
    return tl.where(root < _EPS, _EPS, root)


@triton.jit
def advantages(
    alignment, diversity, reward, alignment_coef, diversity_coef, real, ESTIMATOR: tl.constexpr, n: tl.constexpr
):
    """Reward less baseline, [A, N]; the surplus of N is zero in the arguments and not to be stored."""
    advantage = reward
    if ESTIMATOR == "group_norm":
        distance = tl.where(real, reward - (tl.sum(reward, 1) / n)[:, None], 0.0)
        if n > 1:
            distance = distance / (tl.sqrt(tl.sum(distance * distance, 1) / (n - 1)) + 1e-9)[:, None]
        else:
            distance = distance / 1e-9
        advantage = distance
    elif ESTIMATOR == "rloo":
        if n > 1:
            others = tl.sum(alignment, 1)[:, None] - alignment
            advantage = advantage - alignment_coef / (n - 1) * others
        if n > 2:
            # The diversity that the other rollouts would have had without this one.
            others = tl.sum(diversity, 1)[:, None] - 2 * diversity
            advantage = advantage + diversity_coef / (n - 2) * others
    return advantage


@triton.jit
def store_results(
    outputs,  # alignment, diversity, reward, advantage: each [M, n]
    anchors,  # [A], which of the M anchors these are
    M,
    products,  # as whiten() returns them, the parts of F summed
    coefs,  # of alignment and diversity, float64
    ESTIMATOR: tl.constexpr,
    n: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
):
    """From inner products to rewards and advantages."""
    squares, others, cross, met_square = products
    alignment_coef, diversity_coef = coefs
    index = tl.arange(0, N)[None, :]
    real = tl.broadcast_to(index < n, (A, N))
    alignment = tl.where(real, 2 * cross / (_length(squares) * _length(met_square)), 0.0)
    diversity = alignment * 0
    if n > 1:
        diversity = tl.where(real, others * (2 / (n - 1)), 0.0)
    reward = alignment_coef * alignment - diversity_coef * diversity
    advantage = advantages(alignment, diversity, reward, alignment_coef, diversity_coef, real, ESTIMATOR, n)
    offset = anchors[:, None] * n + index
    mask = (anchors[:, None] < M) & real
    tl.store(outputs[0] + offset, alignment.to(tl.float32), mask=mask)
    tl.store(outputs[1] + offset, diversity.to(tl.float32), mask=mask)
    tl.store(outputs[2] + offset, reward.to(tl.float32), mask=mask)
    tl.store(outputs[3] + offset, advantage.to(tl.float32), mask=mask)


@triton.jit
def loss_of(k, v, t, n: tl.constexpr):
    """``|| mean_j phi_j - phi* ||^2`` [A] of one part of F; rounding may leave it below 0."""
    return tl.sum(tl.sum(k, 2), 1) / (n * n) - tl.sum(v, 1) * (2 / n) + t
