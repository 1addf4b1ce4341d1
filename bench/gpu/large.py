"""Tensors with more than 2^31 numbers: what stands at their end is what the same rows give alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebft_kernels import StridedLayout, feature_matching, linear_log_probs, mean_embedding_loss, pool_features
from ebft_kernels import strided_attention as attend

from .job import Job

#: Numbers that an index of 32 bits does not reach.
_BEYOND = 2**31


def run(job: Job) -> None:
    """One op after the other, since each fills a large part of the memory."""
    for check in (_attention, _pooling, _matching, _dense_mask, _log_probs):
        with job.attempt(f"large {check.__name__.strip('_')}", needs=5) as enough:
            if enough:
                check(job)


def _rows(job: Job, per_row: int) -> int:
    """Rows of so many numbers that together are more than 2^31."""
    return 3 if job.rehearsal else _BEYOND // per_row + 2


def _compare(job: Job, name: str, run_with: Callable[..., list[Tensor]], tensors: list[Tensor]) -> None:
    """The last two rows of all against these two alone. All of it is drawn on the device."""
    whole = [x[-2:].clone() for x in run_with(*tensors)]
    alone = run_with(*(x[-2:].clone() for x in tensors))
    same = all(torch.equal(x, y) for x, y in zip(whole, alone, strict=True))
    size = max(x.numel() for x in tensors)
    job.write("check", case=f"{name}, {size} numbers", passed=same, detail="" if same else "other bits than alone")


def _random(job: Job, *size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    dtype = torch.float32 if job.rehearsal else dtype  # the interpreter's bfloat16 is wrong
    return torch.randn(size, device=job.device, dtype=dtype)


def _layout(job: Job, batch: int) -> StridedLayout:
    length = 14 if job.rehearsal else 1024
    return StridedLayout.strided(batch, length, context=5, stride=8, horizon=4, samples=4).to(job.device)


def _attention(job: Job) -> None:
    heads, size = 4, 16 if job.rehearsal else 128
    batch = _rows(job, heads * size * _layout(job, 1).packed_length)
    length = _layout(job, 1).packed_length

    def both_ways(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, _layout(job, len(q)), impl="triton")
        one = torch.ones((), dtype=out.dtype, device=out.device)
        return [out.detach(), *torch.autograd.grad(out, leaves, one.expand_as(out))]

    q, k, v = (_random(job, batch, x, length, size) for x in (heads, 1, 1))
    _compare(job, "strided_attention", both_ways, [q, k, v])


def _pooling(job: Job) -> None:
    channels = 24 if job.rehearsal else 4096
    batch = _rows(job, channels * _layout(job, 1).packed_length)

    def both_ways(hidden: Tensor) -> list[Tensor]:
        hidden = hidden.requires_grad_()
        features = pool_features([hidden], _layout(job, len(hidden)), impl="triton")
        (gradient,) = torch.autograd.grad(features, [hidden], [torch.ones_like(x) for x in features])
        return [*(x.detach() for x in features), gradient]

    _compare(job, "pool_features", both_ways, [_random(job, batch, _layout(job, 1).packed_length, channels)])


def _matching(job: Job) -> None:
    width, anchors, samples = 96 if job.rehearsal else 12288, 4, 4
    batch = _rows(job, anchors * samples * width)

    def rewards(rollouts: Tensor, targets: Tensor) -> list[Tensor]:
        match = feature_matching(rollouts, targets, whitening="sample", impl="triton")
        return [*match, mean_embedding_loss(rollouts, targets, reduction="none", impl="triton")]

    tensors = [_random(job, batch, anchors, samples, width), _random(job, batch, anchors, width)]
    _compare(job, "feature_matching, mean_embedding_loss", rewards, tensors)


def _dense_mask(job: Job) -> None:
    """One row per token, of which the last are looked at: what they see is in the layout's ranges."""
    length = 40 if job.rehearsal else 46400
    layout = StridedLayout.strided(1, length, context=length - 8, stride=8, horizon=8, samples=2).to(job.device)
    mask = layout.dense_mask()[0, 0, -20:]
    start, end, own = (x[0, -20:, None] for x in layout.key_ranges)
    key = torch.arange(layout.packed_length, device=job.device)
    row = key[-20:, None]
    expected = ((key >= start) & (key < end)) | ((key >= own) & (key <= row))
    same = torch.equal(mask, expected)
    job.write("check", case=f"dense_mask, {layout.packed_length**2} numbers", passed=same, detail="")


def _log_probs(job: Job) -> None:
    """A head of more than 2^31 numbers, targets among its last rows: right to two roundings of the logits."""
    channels, vocabulary = (8, 40) if job.rehearsal else (8192, _BEYOND // 8192 + 128)
    hidden = _random(job, 16, channels)
    weight = _random(job, vocabulary, channels).mul_(channels**-0.5)
    targets = vocabulary - 1 - torch.arange(16, device=job.device)
    log_probs = linear_log_probs(hidden, weight, targets, impl="triton")
    logits = hidden.float() @ weight[-16:].float().T
    differences = log_probs - logits.gather(1, (15 - torch.arange(16, device=job.device))[:, None])[:, 0]
    total = torch.stack([part.float().logsumexp(1) for part in (hidden @ weight.T).split(4)]).flatten()
    error = float((differences + total).abs().max())
    budget = 2 * torch.finfo(hidden.dtype).eps * float(logits.abs().max().clamp_min(1))
    job.write(
        "check",
        case=f"linear_log_probs, {weight.numel()} numbers",
        passed=error <= budget,
        error=error,
        budget=budget,
        detail="log-probabilities",
    )
