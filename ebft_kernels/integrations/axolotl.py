"""The parts of axolotl's strided EBFT step (``axolotl.core.trainers.ebft``) on fused ops.

Each function takes the arguments of what it replaces and gives its tensors in its order, one row per sample and rollout
tokens ordered (step, anchor):

| here | there |
| --- | --- |
| :func:`build_strided_position_ids`, :func:`build_strided_dense_mask_and_positions` | the same names in ``strided`` |
| :func:`create_strided_block_mask` | the same name in ``strided`` |
| :func:`strided_log_probs` | the log-probabilities of ``AxolotlStridedEBFTTrainer.compute_loss`` |
| :func:`whiten_embeddings_batched` | the same name in ``rewards`` |
| :func:`compute_rewards` | the end of ``_compute_block_rewards``, and ``_compute_advantages`` |
| :func:`token_advantages` | ``advantages.repeat_interleave(generate_max_len, dim=1)`` in ``compute_loss`` |
| :func:`completion_layout` | ``anchor_offset`` in ``compute_loss``, of a whole batch |

Masks, positions, whitening and rewards are equal. Four things are not, on purpose:

* A rollout's log-probabilities come from the rows that predict its tokens, those that it was drawn from, at the
  temperature that is given. There they come from the row before in the sequence, which belongs to another anchor.
* Advantages go to the tokens of their anchor. There the tokens, ordered (step, anchor), get those of (anchor, step).
* The leave-one-out baseline takes a sample out of the diversity of the other samples as well. There the other samples'
  rewards contain it, and the baseline is biased.
* Each row's rollouts start where its own completion does. There they start where the longest prompt of the batch ends.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_int, check_tensor
from ..layout import StridedLayout
from ..matching import feature_matching
from . import _reference_order as reference
from ._reference_order import token_advantages

__all__ = [
    "BlockRewards",
    "build_strided_dense_mask_and_positions",
    "build_strided_position_ids",
    "completion_layout",
    "compute_rewards",
    "create_strided_block_mask",
    "strided_log_probs",
    "token_advantages",
    "whiten_embeddings_batched",
]

_IGNORED = -100


def build_strided_position_ids(
    full_sequence_length: int,
    prompt_length: int,
    context_length: int,
    generation_step: int,
    stride: int,
    num_blocks: int,
    device: torch.device,
    batch_size: int = 1,
) -> Tensor:
    """[batch_size, full_sequence_length] int64: positions of a prompt and ``generation_step`` tokens of each rollout.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    _, positions = _mask_and_positions(
        full_sequence_length, prompt_length, context_length, generation_step, None, stride, num_blocks, device,
        torch.float32,
    )  # fmt: skip
    return positions.repeat(batch_size, 1)


def build_strided_dense_mask_and_positions(
    full_sequence_length: int,
    prompt_length: int,
    context_length: int,
    generation_step: int,
    max_generation_length: int,
    stride: int,
    num_blocks: int,
    device: torch.device,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Mask [batch_size, 1, T, T], 0 or the lowest number of ``dtype``, and positions [batch_size, T] int64.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    mask, positions = _mask_and_positions(
        full_sequence_length, prompt_length, context_length, generation_step, max_generation_length, stride, num_blocks,
        device, dtype,
    )  # fmt: skip
    return mask.repeat(batch_size, 1, 1, 1), positions.repeat(batch_size, 1)


def create_strided_block_mask(
    prompt_length: int,
    context_length: int,
    max_generation_length: int,
    stride: int,
    num_blocks: int,
    full_sequence_length: int,
    batch_size: int,
    num_heads: int,  # noqa: ARG001 (the mask is one for all heads, here and there)
    device: torch.device,
):
    """A FlexAttention ``BlockMask`` of whole rollouts. In this order every block of queries sees most blocks of keys;
    rows in packed order have far fewer, see ``StridedLayout.mask_mod`` and :func:`ebft_kernels.strided_attention`.

    Raises:
        ValueError: sizes that do not fit one another.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    _check_length(full_sequence_length, prompt_length, num_blocks, max_generation_length)
    layout = _layout(1, prompt_length, context_length, max_generation_length, stride, num_blocks, 1, device)
    # One row stands for all: FlexAttention's batch index would go beyond it.
    visible = reference.mask_mod(layout)
    return create_block_mask(
        lambda batch, head, query, key: visible(torch.zeros_like(batch), head, query, key),
        B=batch_size,
        H=None,
        Q_LEN=full_sequence_length,
        KV_LEN=full_sequence_length,
        device=device,
    )


def strided_log_probs(
    model: nn.Module,
    full_sequences: Tensor,
    prompt_length: int,
    anchor_offset: int,
    stride: int,
    num_blocks: int,
    *,
    n_samples: int,
    temperature: float = 1.0,
) -> Tensor:
    """``log p`` of token t + 1 at index t, rollouts at ``temperature`` and prompts at 1. Differentiable.

    No mask and no logits: each prompt is computed once for all of its samples.

    Args:
        model: the trained model, wrapped or not.
        full_sequences: [B*n, S] int64, the n samples of a prompt following one another.
        anchor_offset: where the first rollout starts.
        temperature: that the rollouts were drawn at.

    Returns:
        [B*n, S - 1] float32.

    Raises:
        ValueError: sizes that do not fit one another, or a model that cannot be run strided.
    """
    check_int("n_samples", n_samples, minimum=1)
    check_int("num_blocks", num_blocks, minimum=1)
    check_tensor("full_sequences", full_sequences, "R S", {})
    rows, length = full_sequences.shape
    if rows % n_samples:
        raise ValueError(f"full_sequences: expected a multiple of n_samples = {n_samples} rows, got {rows}")
    horizon = (length - prompt_length) // num_blocks
    _check_length(length, prompt_length, num_blocks, horizon)
    device = full_sequences.device
    layout = _layout(
        rows // n_samples, prompt_length, anchor_offset, horizon, stride, num_blocks, n_samples, device
    )  # fmt: skip
    return reference.log_probs(model, full_sequences, layout, temperature)


def completion_layout(
    labels: Tensor, *, context_length: int, stride: int, generate_max_len: int, n_samples: int
) -> StridedLayout:
    """Rollouts every ``stride`` tokens from the start of each row's own completion.

    Args:
        labels: [B, P] int64, -100 where a token does not count.
        context_length: tokens before the first rollout, at least.

    Raises:
        ValueError: no row has room for a rollout.
    """
    geometry = {"context": context_length, "stride": stride, "horizon": generate_max_len, "samples": n_samples}
    return StridedLayout.within(labels != _IGNORED, **geometry)


def whiten_embeddings_batched(
    phi: Tensor, phi_gt: Tensor, whiten_tol: float = 1e-5, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Both times ``(X^T X)^(-1/2)`` of the rollouts ``X = phi`` [..., n, D], whose windows are ``phi_gt`` [..., n, D].

    By the n x n Gram matrix, without a D x D matrix. :func:`compute_rewards` needs no whitened vectors.

    Raises:
        ValueError: shapes that differ.
    """
    check_tensor("phi", phi, "... n D", sizes := {})
    check_tensor("phi_gt", phi_gt, "... n D", sizes)
    x, y = phi.double(), phi_gt.double()
    # X (X^T X)^(-1/2) = (X X^T)^(-1/2) X, and y (X^T X)^(-1/2) = y X^T (X X^T)^(-3/2) X.
    of_rollouts = reference.inverse_root(x, whiten_tol) @ x
    of_windows = (y @ x.mT) @ reference.inverse_root(x, whiten_tol, power=1.5) @ x
    whitened = of_rollouts.to(phi.dtype), of_windows.to(phi_gt.dtype)
    return tuple(nn.functional.normalize(z, dim=-1) if normalize else z for z in whitened)


class BlockRewards(NamedTuple):
    """What :func:`compute_rewards` returns.

    Attributes:
        rewards: [B, n, A].
        advantages: [B*n, A].
        alignment: [B, n, A], twice the cosine.
        diversity: [B, n, A], twice the mean inner product with the other samples.
        cfm_loss: scalar, ``|| mean of the rollouts - window ||^2`` of the features as given: there, of whitened ones.
    """

    rewards: Tensor
    advantages: Tensor
    alignment: Tensor
    diversity: Tensor
    cfm_loss: Tensor


def compute_rewards(
    gen_emb: Tensor,
    gt_emb: Tensor,
    *,
    use_whitening: bool = False,
    alignment_coef: float = 1.0,
    diversity_coef: float = 1.0,
    advantage_estimator: str = "rloo",
) -> BlockRewards:
    """Whitening, rewards, baseline and advantages of pooled features by one Gram matrix per anchor.

    Args:
        gen_emb: [B, n, A, D] features of the rollouts before whitening.
        gt_emb: [B, n, A, D] of the windows; the same for all samples of a prompt.
        advantage_estimator: "rloo", "reinforce" or "group_norm".

    Raises:
        ValueError: shapes that do not fit, windows that differ between samples, an unknown estimator.
        TypeError: another type or dtype.
    """
    sizes: dict[str, int] = {}
    check_tensor("gen_emb", gen_emb, "B n A D", sizes)
    check_tensor("gt_emb", gt_emb, "B n A D", sizes, dtype=gen_emb.dtype)
    if not torch.equal(gt_emb, gt_emb[:, :1].expand_as(gt_emb)):
        raise ValueError("gt_emb: expected the same windows for all samples of a prompt, got others")
    match = feature_matching(
        gen_emb.transpose(1, 2),
        gt_emb[:, 0],
        whitening="feature" if use_whitening else "none",
        alignment_coef=alignment_coef,
        diversity_coef=diversity_coef,
        estimator=advantage_estimator,
    )
    per_sample = (x.transpose(1, 2) for x in (match.reward, match.advantage, match.alignment, match.diversity))
    rewards, advantages, alignment, diversity = per_sample
    return BlockRewards(rewards, advantages.flatten(0, 1), alignment, diversity, match.loss.mean())


def _mask_and_positions(
    full_sequence_length: int,
    prompt_length: int,
    context_length: int,
    generation_step: int,
    max_generation_length: int | None,
    stride: int,
    num_blocks: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    check_int("generation_step", generation_step, minimum=0)
    _check_length(full_sequence_length, prompt_length, num_blocks, generation_step)
    if max_generation_length is None:  # any that gives so many anchors
        max_generation_length = max(prompt_length - context_length - (num_blocks - 1) * stride, generation_step)
    if generation_step > max_generation_length:
        raise ValueError(
            f"generation_step: expected at most max_generation_length = {max_generation_length}, got {generation_step}"
        )
    layout = _layout(1, prompt_length, context_length, max_generation_length, stride, num_blocks, 1, device)
    return reference.mask_and_positions(layout, dtype, generation_step)


def _check_length(full: int, prompt: int, blocks: int, steps: int) -> None:
    if full != prompt + blocks * steps:
        raise ValueError(
            f"full_sequence_length: expected prompt_length + num_blocks * steps = {prompt} + {blocks} * {steps}, got "
            f"{full}"
        )


def _layout(
    batch_size: int,
    prompt_length: int,
    context_length: int,
    horizon: int,
    stride: int,
    num_blocks: int,
    samples: int,
    device: torch.device | str,
) -> StridedLayout:
    return reference.strided_layout(
        batch_size,
        prompt_length=prompt_length,
        context_length=context_length,
        generate_max_len=horizon,
        stride=stride,
        num_blocks=num_blocks,
        n_samples=samples,
        device=device,
    )
