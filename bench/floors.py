"""Work that no way of computing something can avoid, done bare: matrix products, or bytes read and written.

Each function here makes random operands and room for the results once and returns what is timed: nothing but calls of
``torch.mm`` and ``torch.bmm`` into memory that is there, at the shapes and with the operands' orders in memory of the
computation itself. No softmax, norm, activation, mask, copy or allocation is in it, so a ratio to a floor also counts
all of these. Products of a backward pass are counted at their own shapes. A floor is no bound of mathematics: where a
product runs faster in another form, it may be beaten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ebft_kernels import StridedLayout

Work = Callable[[], None]

#: Results of a linear layer held at once, but at least 512 rows: as fast as all rows at once, and they fit in memory.
_RESULT_NUMEL, _LEAST_ROWS = 1 << 25, 512
#: Keys per product of visible pairs. Of 32, 64, 128 and 256 the fastest on x86-64 with AVX-512.
_KEYS = 64


def linear(calls: Iterable[tuple[Tensor, int]], *, forward: bool = True, backward: bool = False) -> Work:
    """Products of linear layers: each weight [out, in] with its number of rows, in this order.

    Backward, two: the gradients of the rows and of the weight.
    """
    made: dict[tuple, tuple[Tensor, ...]] = {}
    products: list[tuple[Callable, Tensor, Tensor, Tensor]] = []
    for weight, rows in calls:
        size = max(_LEAST_ROWS, _RESULT_NUMEL // weight.shape[0])
        for count in (min(size, rows - start) for start in range(0, rows, size)):
            key = (count, *weight.shape, weight.dtype)
            if key not in made:
                made[key] = tuple(_random(weight, *s) for s in ((count, weight.shape[1]), (count, weight.shape[0])))
                made[key] += tuple(torch.empty_like(x) for x in (*made[key], weight))
            x, grad, grad_x, y, grad_weight = made[key]
            weight = weight.detach()
            products += [(torch.mm, x, weight.T, y)] * forward
            products += [(torch.mm, grad, weight, grad_x), (torch.mm, grad.T, x, grad_weight)] * backward
    return _run(products)


class Pairs:
    """Visible pairs of one attention call as products: for every block of 64 keys, the rows that see it.

    A row that sees a part of a block counts as that part; what rollout tokens see of their own rollouts counts as
    blocks of 64 keys too. So the number of pairs is exact up to rounding to one row per block.

    Attributes:
        rows: per block, rows per sequence of the batch.
        batch: sequences.
    """

    def __init__(self, start: Tensor, end: Tensor, own: Tensor) -> None:
        """From the visible prompt keys ``[start, end)`` and the number of visible own keys of each row, each [B, R]."""
        self.batch = len(end)
        first = torch.arange(0, int(end.max()), _KEYS, device=end.device)[:, None, None]
        seen = (end - first).clamp(0, _KEYS) - (start - first).clamp(0, _KEYS)  # [blocks, B, R]
        totals = [*seen.sum((1, 2)).tolist(), int(own.sum())]
        self.rows = [-(-total // (_KEYS * self.batch)) for total in totals if total]

    @classmethod
    def of(cls, layout: StridedLayout) -> Pairs:
        """Of a forward over packed rows."""
        start, end, own_start = layout.key_ranges
        row = torch.arange(layout.packed_length, device=layout.device)
        return cls(start, end, row + 1 - own_start)

    @classmethod
    def of_step(cls, layout: StridedLayout, step: int) -> Pairs:
        """Of one decoding step."""
        start, end, _ = (layout.step_rows(x, step) for x in layout.key_ranges)
        return cls(start, end, torch.full_like(end, step + 1))


def attention(
    calls: Sequence[Pairs],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    forward: bool = True,
    backward: bool = False,
) -> Work:
    """Products of attention at exactly the visible lengths, query heads of one key head side by side.

    Forward: queries times keys, probabilities times values. Backward, five: the scores again, the gradients of the
    probabilities, values, queries and keys.
    """
    batch, group = calls[0].batch * kv_heads, heads // kv_heads
    most = group * max(max(pairs.rows) for pairs in calls)
    like = torch.empty(0, dtype=dtype, device=device)
    sizes = ((most, head_dim), (_KEYS, head_dim), (most, _KEYS))
    q, k, p = (_random(like, batch, *size) for size in sizes)
    out_q, out_k, out_p = (torch.empty_like(x) for x in (q, k, p))
    products = []
    for rows in (group * rows for pairs in calls for rows in pairs.rows):
        scores = (torch.bmm, q[:, :rows], k.mT, out_p[:, :rows])
        values = (torch.bmm, p[:, :rows], k, out_q[:, :rows])
        transposed = (torch.bmm, p[:, :rows].mT, q[:, :rows], out_k)
        products += [scores, values] * forward + [scores, scores, transposed, values, transposed] * backward
    return _run(products)


def copied(read: int, written: int, device: torch.device | str = "cpu") -> Work:
    """``read`` bytes read once and ``written`` bytes written once, as copies as far as they go."""
    both = min(read, written)
    source, target = (torch.zeros(both // 4, device=device) for _ in range(2))
    rest = torch.zeros(abs(read - written) // 4, device=device)

    def run() -> None:
        target.copy_(source)
        if len(rest):
            rest.sum() if read > written else rest.zero_()

    return run


def _random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float32, device=like.device).to(like.dtype)


def _run(products: list[tuple[Callable, Tensor, Tensor, Tensor]]) -> Work:
    @torch.no_grad()
    def run() -> None:
        for multiply, a, b, out in products:
            multiply(a, b, out=out)

    return run
