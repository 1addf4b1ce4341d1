"""The parts of a strided EBFT step in OpenRLHF, the authors' fork (github.com/sjelassi/ebft_openrlhf), on fused ops.

Each function takes the arguments of what it replaces and gives its tensors in its order, one row per sample and rollout
tokens ordered (step, anchor):

| here | in the fork |
| --- | --- |
| :func:`build_strided_attention_mask_and_positions` | the same name in ``openrlhf.models.utils`` |
| :func:`strided_hidden_states` | ``EBFTCriticModelActor.forward``, its first result |
| :func:`strided_log_probs` | ``Actor.forward(..., return_logprobs=True)`` |
| :func:`whiten_embeddings_batched` | the same name in ``openrlhf.utils.embedding_utils`` |
| :func:`compute_rewards` | whitening, rewards and baselines of ``RemoteExperienceMaker`` |
| :func:`token_advantages` | the last part of ``compute_advantages_and_returns`` |

The numbers are the fork's own, but for three of its cases. Advantages per token (``embed_method="token"``) go to the
tokens that they belong to; the fork writes them in the order (anchor, step). ``group_norm`` takes mean and spread over
the samples of an anchor; the fork divides by the spread over a row's anchors. And whitening cannot fail; the fork adds
noise where its float32 SVD does not converge, or does not whiten. The baseline leaves a sample out of the diversity of
the other samples too, as the fork's does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_int, check_tensor
from ..layout import StridedLayout
from ..matching import feature_matching
from . import _reference_order as reference
from ._reference_order import token_advantages

__all__ = [
    "StridedRewards",
    "build_strided_attention_mask_and_positions",
    "compute_rewards",
    "strided_hidden_states",
    "strided_log_probs",
    "token_advantages",
    "whiten_embeddings_batched",
]

_DEPTHS = (0.25, 0.5, 0.75)


def build_strided_attention_mask_and_positions(
    full_sequence_length: int,
    prompt_length: int,
    context_length: int,
    generation_step: int,
    max_generation_length: int,
    stride: int,
    num_blocks: int,
    device: torch.device,
    doc_ids: Tensor,
    document_masking: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor]:
    """Mask and positions of prompts and the first ``generation_step`` tokens of each rollout.

    With ``document_masking``, an anchor whose window crosses the edge of a document is run as if the document went on:
    the fork lets the window change documents in its middle. Such anchors are not ``valid`` in a :class:`StridedLayout`.

    Args:
        full_sequence_length: T = prompt_length + num_blocks * generation_step.
        doc_ids: [B, prompt_length] int; longer rows are cut off.

    Returns:
        mask [B, 1, T, T], 0 or the lowest number of ``dtype``, and positions [B, T] int64.

    Raises:
        ValueError: sizes that do not fit one another; ``doc_ids`` in which a document has another inside it.
        TypeError: ``doc_ids`` is no tensor of integers.
    """
    check_int("generation_step", generation_step, minimum=0)
    if generation_step > max_generation_length:
        raise ValueError(
            f"generation_step: expected at most max_generation_length = {max_generation_length}, got {generation_step}"
        )
    expected = prompt_length + num_blocks * generation_step
    if full_sequence_length != expected:
        raise ValueError(
            f"full_sequence_length: expected prompt_length + num_blocks * generation_step = {expected}, got "
            f"{full_sequence_length}"
        )
    layout = _layout(
        doc_ids.shape[0], prompt_length, context_length, max_generation_length, stride, num_blocks, 1, doc_ids,
        document_masking, device,
    )  # fmt: skip
    return reference.mask_and_positions(layout, dtype, generation_step)


def strided_hidden_states(
    model: nn.Module,
    sequences: Tensor,
    prompt_length: int,
    context_length: int,
    generate_max_len: int,
    stride: int,
    num_blocks: int,
    hidden_state_method: str,
    doc_ids: Tensor | None = None,
    document_masking: bool = False,
    qa_masks: Tensor | None = None,
    qa_masking: bool = False,
    *,
    n_samples_per_prompt: int = 1,
) -> Tensor:
    """Every token's feature: hidden states of the chosen layers, of length 1, 0 where ``qa_masks`` is. No gradient.

    No mask is built, and each prompt is computed once for all of its samples.

    Args:
        model: the critic's transformers model (``critic.model``), wrapped or not.
        sequences: [B*n, S] int64, the n samples of a prompt following one another.
        hidden_state_method: "last_only", "mean", "middle", "middle_concat", "middle_stack", "concat", "stack",
            "layer_K", "concat_layers_I_J..." or "stack_layers_I_J...", as in the fork.
        doc_ids: [B*n, >= prompt_length], with ``document_masking``.
        qa_masks: [B*n, S], with ``qa_masking``.
        n_samples_per_prompt: n.

    Returns:
        [B*n, S, NF, H] float32.

    Raises:
        ValueError: an unknown method, a shape that does not fit, samples of one prompt with different prompts, or a
            model that cannot be run strided.
    """
    layout = _layout_of_rows(
        sequences, prompt_length, context_length, generate_max_len, stride, num_blocks, n_samples_per_prompt, doc_ids,
        document_masking,
    )  # fmt: skip
    _check_method(hidden_state_method)
    features = _features(reference.hidden_states(model, sequences, layout), hidden_state_method)
    features = features / features.norm(dim=-1, keepdim=True)
    if qa_masking:
        check_tensor("qa_masks", qa_masks, "R S", {"R": sequences.shape[0], "S": sequences.shape[1]})
        features = features * qa_masks[:, :, None, None]
    return features.float()


def strided_log_probs(
    model: nn.Module,
    sequences: Tensor,
    prompt_len: int,
    context_len: int,
    num_blocks: int,
    stride: int,
    *,
    temperature: float = 1.0,
    n_samples_per_prompt: int = 1,
    doc_ids: Tensor | None = None,
    document_masking: bool = False,
) -> Tensor:
    """``log p`` of token t + 1 at index t, rollouts at ``temperature`` and prompts at 1. Differentiable.

    No mask and no logits: each prompt is computed once for all of its samples, whose gradients add up there.

    Args:
        model: the actor's transformers model (``actor.model``), wrapped or not.
        sequences: [B*n, S] int64, the n samples of a prompt following one another.
        doc_ids: [B*n, >= prompt_len], with ``document_masking``.

    Returns:
        [B*n, S - 1] float32.

    Raises:
        ValueError: as :func:`strided_hidden_states`.
    """
    check_int("num_blocks", num_blocks, minimum=1)
    rollout_tokens = sequences.shape[1] - prompt_len
    if rollout_tokens < 1 or rollout_tokens % num_blocks:
        raise ValueError(
            f"sequences: expected prompt_len + num_blocks * G = {prompt_len} + {num_blocks} G tokens, got "
            f"{sequences.shape[1]}"
        )
    layout = _layout_of_rows(
        sequences, prompt_len, context_len, rollout_tokens // num_blocks, stride, num_blocks, n_samples_per_prompt,
        doc_ids, document_masking,
    )  # fmt: skip
    return reference.log_probs(model, sequences, layout, temperature)


def whiten_embeddings_batched(
    Phi: Tensor,  # noqa: N803 (the fork's names)
    Phi_gt: Tensor,  # noqa: N803
    whiten_tol: float = 1e-5,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both times ``W = (X X^T)^(-1/2)`` of the rollouts ``X`` [N, D]; N is axis 2 and D the last of 5 or 7.

    :func:`compute_rewards` needs no whitened vectors, and is faster than rewards computed from them.

    Raises:
        ValueError: shapes that differ, or of another number of axes.
    """
    if Phi.shape != Phi_gt.shape or Phi.ndim not in (5, 7):
        shapes = f"{list(Phi.shape)} and {list(Phi_gt.shape)}"
        raise ValueError(f"Phi, Phi_gt: expected one shape of 5 or 7 axes with the samples at axis 2, got {shapes}")
    x, y = (z.movedim(2, -2) for z in (Phi, Phi_gt))
    w = reference.inverse_root(x, whiten_tol)
    whitened = [(w @ z.double()).to(z.dtype).movedim(-2, 2) for z in (x, y)]
    return tuple(nn.functional.normalize(z, dim=-1) if normalize else z for z in whitened)


class StridedRewards(NamedTuple):
    """What :func:`compute_rewards` returns, each [MB, NG*NS, NB], or [MB, NG*NS, NB, G] for features per token.

    Attributes:
        gt_rewards: twice the cosine of each rollout with its window.
        diversity_rewards: twice its mean inner product with the other samples.
        rewards: ``alignment_rew_coef * gt_rewards - diversity_rew_coef * diversity_rewards``.
        shaped_rewards: the rewards less their baseline, the advantages.
    """

    gt_rewards: Tensor
    diversity_rewards: Tensor
    rewards: Tensor
    shaped_rewards: Tensor


def compute_rewards(
    gen_embedding: Tensor,
    gt_embedding: Tensor,
    *,
    use_whitening: bool = False,
    alignment_rew_coef: float = 1.0,
    diversity_rew_coef: float = 1.0,
    advantage_estimator: str = "rloo",
) -> StridedRewards:
    """Whitening, rewards, baseline and advantages of pooled features by one Gram matrix per anchor.

    Args:
        gen_embedding: [MB, NG, NS, NB, T, NF, D] features of the rollouts before whitening: micro-batches, prompts,
            samples, anchors, T = 1 pooled feature or G tokens, and NF parts that are whitened separately.
        gt_embedding: of the same shape, those of the windows; the same for all samples of a prompt.
        advantage_estimator: "rloo", "reinforce" or "group_norm".

    Raises:
        ValueError: shapes that do not fit, windows that differ between samples, an unknown estimator.
        TypeError: another type or dtype.
    """
    sizes: dict[str, int] = {}
    check_tensor("gen_embedding", gen_embedding, "MB NG NS NB T NF D", sizes)
    check_tensor("gt_embedding", gt_embedding, "MB NG NS NB T NF D", sizes, dtype=gen_embedding.dtype)
    if not torch.equal(gt_embedding, gt_embedding[:, :, :1].expand_as(gt_embedding)):
        raise ValueError("gt_embedding: expected the same windows for all samples of a prompt, got others")
    # [MB, NG, NS, NB, T, NF, D] -> prompts [MB*NG], anchors and tokens [NB*T], samples [NS], features [NF*D].
    rollouts = gen_embedding.permute(0, 1, 3, 4, 2, 5, 6).flatten(5).flatten(2, 3).flatten(0, 1)
    windows = gt_embedding[:, :, 0].flatten(4).flatten(2, 3).flatten(0, 1)
    match = feature_matching(
        rollouts,
        windows,
        whitening="sample" if use_whitening else "none",
        alignment_coef=alignment_rew_coef,
        diversity_coef=diversity_rew_coef,
        estimator=advantage_estimator,
        groups=sizes["NF"],
    )

    def as_theirs(x: Tensor) -> Tensor:  # [MB*NG, NB*T, NS]
        x = x.unflatten(1, (sizes["NB"], sizes["T"])).unflatten(0, (sizes["MB"], sizes["NG"]))
        x = x.movedim(-1, 2).flatten(1, 2)  # [MB, NG*NS, NB, T]
        return x[..., 0] if sizes["T"] == 1 else x

    return StridedRewards(*(as_theirs(x) for x in (match.alignment, match.diversity, match.reward, match.advantage)))


def _layout_of_rows(
    sequences: Tensor,
    prompt_length: int,
    context_length: int,
    generate_max_len: int,
    stride: int,
    num_blocks: int,
    samples: int,
    doc_ids: Tensor | None,
    document_masking: bool,
) -> StridedLayout:
    check_int("n_samples_per_prompt", samples, minimum=1)
    check_tensor("sequences", sequences, "R S", {"S": prompt_length + num_blocks * generate_max_len})
    if sequences.shape[0] % samples:
        raise ValueError(
            f"sequences: expected a multiple of n_samples_per_prompt = {samples} rows, got {len(sequences)}"
        )
    return _layout(
        sequences.shape[0] // samples, prompt_length, context_length, generate_max_len, stride, num_blocks, samples,
        None if doc_ids is None else doc_ids[::samples], document_masking, sequences.device,
    )  # fmt: skip


def _layout(
    batch_size: int,
    prompt_length: int,
    context_length: int,
    generate_max_len: int,
    stride: int,
    num_blocks: int,
    samples: int,
    doc_ids: Tensor | None,
    document_masking: bool,
    device: torch.device | str,
) -> StridedLayout:
    if document_masking and doc_ids is None:
        raise ValueError("doc_ids: expected the documents' ids with document_masking, got None")
    documents = doc_ids[:, :prompt_length].to(device) if document_masking else None
    return reference.strided_layout(
        batch_size,
        prompt_length=prompt_length,
        context_length=context_length,
        generate_max_len=generate_max_len,
        stride=stride,
        num_blocks=num_blocks,
        n_samples=samples,
        doc_ids=documents,
        device=device,
    )


def _check_method(method: str) -> None:
    named = ("last_only", "mean", "middle", "middle_concat", "middle_stack", "concat", "stack")
    if method not in named and not re.fullmatch(r"layer_\d+|(concat|stack)_layers_\d+(_\d+)*", method):
        raise ValueError(
            f"hidden_state_method: expected {', '.join(map(repr, named))}, 'layer_K', 'concat_layers_I_J' or "
            f"'stack_layers_I_J', got {method!r}"
        )


def _features(states: list[Tensor], method: str) -> Tensor:
    """[R, S, NF, H] of the embeddings and the blocks' hidden states, each [R, S, C]."""
    last = len(states) - 1
    middle = [last // 2, last // 2 + 1]
    chosen = {
        "last_only": [last],
        "mean": range(1, last + 1),
        "middle": middle,
        "middle_concat": middle,
        "middle_stack": middle,
    }.get(method)
    if chosen is None and "layer" in method:
        chosen = [int(number) for number in re.findall(r"\d+", method)]
    elif chosen is None:
        chosen = [min(max(1, int(last * depth)), last) for depth in _DEPTHS]
    if max(chosen) > last:
        raise ValueError(f"hidden_state_method: expected layers up to {last}, got {method!r}")
    selected = [states[number] for number in chosen]
    if method in ("mean", "middle"):
        return torch.stack(selected).mean(0)[:, :, None]
    return torch.stack(selected, 2) if "stack" in method else torch.cat(selected, -1)[:, :, None]
