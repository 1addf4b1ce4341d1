"""Input factories and the error budget that tests, benchmarks and the self-test share.

The budget is derived, not picked: an implementation may be at most twice as far from the float64 result as eager
PyTorch is in the same dtype, plus one rounding of the output dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ._checks import check_option
from .layout import StridedLayout


def _documents(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


#: Named geometries that reach every case of the layout: each a function without arguments.
LAYOUTS: dict[str, Callable[[], StridedLayout]] = {
    "strided": lambda: StridedLayout.strided(2, 48, context=8, stride=8, horizon=8, samples=4),
    "odd": lambda: StridedLayout.strided(2, 41, context=7, stride=3, horizon=5, samples=3),
    "overlapping": lambda: StridedLayout.strided(1, 33, context=1, stride=2, horizon=7, samples=2),
    "one_anchor": lambda: StridedLayout.strided(1, 16, context=11, stride=8, horizon=5, samples=3),
    "one_sample": lambda: StridedLayout.strided(2, 30, context=4, stride=4, horizon=4, samples=1),
    "one_step": lambda: StridedLayout.strided(2, 24, context=4, stride=4, horizon=1, samples=2),
    "arbitrary": lambda: StridedLayout.from_anchors(
        torch.tensor([[1, 2, 9, 30, 37], [5, 6, 21, -1, -1], [-1, -1, -1, -1, -1]]), 37, horizon=3, samples=2
    ),
    "padded": lambda: StridedLayout.strided(
        3, 40, context=6, stride=6, horizon=4, samples=2, lengths=torch.tensor([40, 17, 0])
    ),
    "documents": lambda: StridedLayout.strided(
        2,
        45,
        context=5,
        stride=4,
        horizon=4,
        samples=2,
        document_ids=_documents([[45], [11, 3, 30, 1]]),
        lengths=torch.tensor([45, 41]),
    ),
    "empty_batch": lambda: StridedLayout.strided(0, 24, context=4, stride=4, horizon=4, samples=2),
}


def randn(
    *shape: int, seed: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Tensor:
    """Standard-normal numbers that depend on the seed alone: drawn in float64 on the CPU, then cast and moved.

    ``device``: default: torch's default device.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return x.to(device=torch.get_default_device() if device is None else device, dtype=dtype)


def attention_inputs(
    layout: StridedLayout,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, H, S, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] for ``layout``, on its device."""
    value_dim = head_dim if value_dim is None else value_dim
    batch, length, device = layout.batch_size, layout.packed_length, layout.device
    return (
        randn(batch, heads, length, head_dim, seed=seed, dtype=dtype, device=device),
        randn(batch, kv_heads, length, head_dim, seed=seed + 1, dtype=dtype, device=device),
        randn(batch, kv_heads, length, value_dim, seed=seed + 2, dtype=dtype, device=device),
    )


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    how: str = "normalize first",
) -> Tensor:
    """Attention as eager PyTorch code writes it, in the dtype of its inputs: the yardstick of the error budget.

    Args:
        q, k, v: [B, H, S, D], [B, Hkv, S, D], [B, Hkv, S, Dv].
        mask: [B, 1, S, S] bool, True = may attend.
        scale, softcap, sinks: as for ``strided_attention``.
        how: "normalize first": divide by the sum of the weights before the product with v; "normalize last": after it;
            "fused": ``F.scaled_dot_product_attention``, which has no softcap; "recomputed": weights from a log-sum-exp
            and from scores that are computed once more, channels in another order, as in backward passes
            that keep no weights. They round differently.
    """
    check_option("how", how, ("normalize first", "normalize last", "fused", "recomputed"))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if sinks is not None:  # one more key, all zero, whose score is the sink and whose value is zero
        k, v, mask = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1)), pad(mask, (0, 1), value=True)
        bias = pad(sinks[:, None, None].to(q.dtype).expand(-1, 1, 1), (k.shape[2] - 1, 0))  # [H, 1, S + 1]
    else:
        bias = q.new_zeros(())
    bias = bias.expand(*q.shape[:3], k.shape[2]).masked_fill(~mask, float("-inf"))
    if how == "fused":
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    def scores_of(q: Tensor, k: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        return (scores if softcap is None else torch.tanh(scores / softcap) * softcap) + bias

    scores = scores_of(q, k)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if how == "recomputed":
        total = scores.to(dtype).logsumexp(-1, keepdim=True)
        return torch.matmul((scores_of(q.flip(-1), k.flip(-1)).to(dtype) - total).exp().to(v.dtype), v)
    if how == "normalize first":
        return torch.matmul(torch.softmax(scores, -1, dtype=dtype).to(v.dtype), v)
    weights = torch.exp(scores.to(dtype) - scores.amax(-1, keepdim=True).detach())
    return (torch.matmul(weights.to(v.dtype), v) / weights.sum(-1, keepdim=True)).to(v.dtype)


def feature_inputs(
    batch_size: int,
    anchors: int,
    samples: int,
    features: int,
    *,
    duplicates: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random unit features: rollouts [B, A, n, F] and targets [B, A, F].

    Rollouts share a common direction with each other and with the target, as features of one prefix do. With
    ``duplicates``, rollout 1 of every anchor equals rollout 0, and all rollouts of every third anchor are equal: the
    rank-deficient groups that low temperatures give. ``device``: default: torch's default device.
    """
    common = randn(batch_size, anchors, 1, features, seed=seed, device="cpu")
    rollouts = common + 0.3 * randn(batch_size, anchors, samples, features, seed=seed + 1, device="cpu")
    targets = common + 0.3 * randn(batch_size, anchors, 1, features, seed=seed + 2, device="cpu")
    if duplicates and samples > 1:
        rollouts[:, :, 1] = rollouts[:, :, 0]
        rollouts[:, ::3] = rollouts[:, ::3, :1]
    rollouts, targets = (torch.nn.functional.normalize(x, dim=-1) for x in (rollouts, targets[:, :, 0]))
    device = torch.get_default_device() if device is None else device
    return rollouts.to(device=device, dtype=dtype), targets.to(device=device, dtype=dtype)


def error_budget(eager: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Largest allowed absolute error of a tensor whose float64 value is ``truth``.

    Twice the largest error of ``eager``, the same computation in plain PyTorch at the tested precision, plus one
    rounding of ``dtype`` at the largest magnitude.
    """
    if truth.numel() == 0:
        return 0.0
    truth = truth.double()
    rounding = torch.finfo(dtype).eps / 2 * truth.abs().max()
    return float(2 * (eager.double() - truth).abs().max() + rounding)


def assert_within_budget(actual: Tensor, eager: Tensor, truth: Tensor, name: str = "result") -> None:
    """Raise AssertionError unless ``actual`` is within :func:`error_budget` of ``truth`` (NaN never is).

    Args:
        actual: the result under test; its dtype sets the rounding term.
        eager: eager PyTorch in the same dtype.
        truth: the float64 result.
        name: what is compared, for the message.
    """
    if actual.shape != truth.shape:
        raise AssertionError(f"{name}: expected shape {list(truth.shape)}, got {list(actual.shape)}")
    if truth.numel() == 0:
        return
    error = float((actual.detach().double() - truth.double()).abs().max())
    budget = error_budget(eager, truth, actual.dtype)
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3e} exceeds the budget {budget:.3e}")
