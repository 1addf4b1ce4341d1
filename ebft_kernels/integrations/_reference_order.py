"""Rows as the method's authors have them, one per sample with tokens ordered (step, anchor), over packed forwards.

Row ``r`` of ``[B*n, P + A*G, ...]`` is sample ``r % n`` of prompt ``r // n``; token ``g`` of anchor ``b`` stands at
``P + g*A + b``. Everything goes through ``StridedLayout.from_reference_order`` and ``to_reference_order``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._checks import FLOATING, check_int, check_positive, check_tensor
from ..layout import StridedLayout
from ..logprob import linear_log_probs
from ..matching._reference import CUTOFF
from ._models import facts
from .transformers import OutputHead, apply_head, strided_attention_context


def strided_layout(
    batch_size: int,
    *,
    prompt_length: int,
    context_length: int,
    generate_max_len: int,
    stride: int,
    num_blocks: int,
    n_samples: int = 1,
    doc_ids: Tensor | None = None,
    device: torch.device | str | None = None,
) -> StridedLayout:
    """The layout of ``num_blocks`` anchors ``context_length + b * stride`` for each of ``batch_size`` prompts.

    Raises:
        ValueError: another ``num_blocks`` than fits; ``doc_ids`` in which a document has another inside it.
    """
    for name, value in (("stride", stride), ("num_blocks", num_blocks), ("generate_max_len", generate_max_len)):
        check_int(name, value, minimum=1)
    fitting = (prompt_length - generate_max_len - context_length) // stride + 1
    if num_blocks != fitting:
        raise ValueError(
            f"num_blocks: expected (prompt_length - generate_max_len - context_length) // stride + 1 = {fitting}, got "
            f"{num_blocks}"
        )
    if doc_ids is not None:
        _check_documents(doc_ids)
    return StridedLayout.strided(
        batch_size,
        prompt_length,
        context=context_length,
        stride=stride,
        horizon=generate_max_len,
        samples=n_samples,
        document_ids=doc_ids,
        device=device,
    )


def _check_documents(doc_ids: Tensor) -> None:
    """A document is a run of equal ids here, and all tokens of one id there: the same unless an id comes twice."""
    runs = torch.cat([doc_ids.new_ones(len(doc_ids), 1), doc_ids.diff(dim=1) != 0], 1).bool()
    for row, starts in zip(doc_ids, runs, strict=True):
        if len(row[starts].unique()) != int(starts.sum()):
            raise ValueError(f"doc_ids: expected the tokens of each document side by side, got ids {row.tolist()}")


def packed_index(layout: StridedLayout) -> Tensor:
    """[n, P + A*G] int64: which packed row each token of the n rows of a prompt is."""
    rows = torch.arange(layout.packed_length, device=layout.device).expand(layout.batch_size, -1)
    return layout.to_reference_order(rows)[: layout.samples]


def mask_and_positions(layout: StridedLayout, dtype: torch.dtype, steps: int) -> tuple[Tensor, Tensor]:
    """Additive mask [B, 1, T, T] and positions [B, T] of the prompt and the first ``steps`` tokens of each rollout.

    The rows of all samples are alike, so ``layout`` is to have one. T = P + A * steps.
    """
    index = packed_index(layout)[0, : layout.length + layout.num_anchors * steps]
    allowed = layout.dense_mask()[:, :, index[:, None], index]
    mask = torch.zeros(allowed.shape, dtype=dtype, device=layout.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min), layout.position_ids[:, index]


def mask_mod(layout: StridedLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as a FlexAttention predicate over rows in this order; ``layout`` has one sample."""
    index, visible = packed_index(layout)[0], layout.mask_mod()
    return lambda batch, head, query, key: visible(batch, head, index[query], index[key])


def packed_rows(sequences: Tensor, layout: StridedLayout, name: str = "sequences") -> Tensor:
    """[B*n, P + A*G] -> [B, S].

    Raises:
        ValueError: samples of one prompt that have different prompts.
    """
    prompts = sequences[:, : layout.length].unflatten(0, (-1, layout.samples))
    if not (prompts == prompts[:, :1]).all():
        raise ValueError(f"{name}: expected the {layout.samples} samples of a prompt to follow one another, got others")
    return layout.from_reference_order(sequences)


def hidden_states(model: nn.Module, sequences: Tensor, layout: StridedLayout) -> list[Tensor]:
    """[B*n, P + A*G, C] each: embeddings, and what every block gives, the last after the final norm. No gradient.

    Each prompt is computed once for all of its samples.
    """
    packed = packed_rows(sequences, layout)
    with torch.no_grad(), strided_attention_context(model, layout) as kwargs:
        if facts(model).keeps_logits:
            kwargs["logits_to_keep"] = 1
        states = model(input_ids=packed, output_hidden_states=True, **kwargs).hidden_states
    return [layout.to_reference_order(x) for x in states]


def log_probs(model: nn.Module, sequences: Tensor, layout: StridedLayout, temperature: float) -> Tensor:
    """[B*n, P + A*G - 1]: log p of token t + 1 at t; rollouts at ``temperature``, prompts at 1. Differentiable.

    A prompt's token is scored by the one before it; a rollout's first token by the last one that its anchor sees, and
    each later one by the token before it in its own rollout, which stands A places back, not one.
    """
    check_positive("temperature", temperature)
    packed = packed_rows(sequences, layout)
    prompt, rollouts = packed[:, : layout.length], layout.rollouts(packed)
    short = layout.without_last_step()  # the last token of a rollout is only ever a target

    def score(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
        hidden = hidden.to(head.weight.dtype)
        options = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap}
        before, (rows, index) = hidden[:, : layout.length - 1], layout.distinct_predictors(hidden)
        of_prompt = linear_log_probs(before, head.weight, prompt[:, 1:], **options)
        return of_prompt, linear_log_probs(rows, head.weight, rollouts, rows=index, temperature=temperature, **options)

    of_prompt, of_rollouts = apply_head(model, short.pack(prompt, rollouts[..., :-1]), short, score)
    nothing = of_prompt.new_zeros(len(packed), 1)  # nobody scores the first token of a prompt
    return layout.to_reference_order(layout.pack(torch.cat([nothing, of_prompt], 1), of_rollouts))[:, 1:]


def token_advantages(advantages: Tensor, horizon: int, length: int) -> Tensor:
    """Advantages [R, A], or [R, A, G] per token, on the tokens that they belong to: [R, length - 1], else 0.

    Index t is token t + 1. Tokens are ordered (step, anchor), so that the A advantages come once for each step.
    """
    if advantages.ndim == 2:
        advantages = advantages[:, :, None].expand(-1, -1, horizon)
    check_tensor("advantages", advantages, "R A G", {"G": horizon})
    tokens = advantages.mT.flatten(1)  # [R, G*A]
    if not tokens.shape[1] <= length - 1:
        raise ValueError(f"full_sequence_length: expected more than {tokens.shape[1]} rollout tokens, got {length}")
    return torch.cat([tokens.new_zeros(len(tokens), length - 1 - tokens.shape[1]), tokens], 1)


def inverse_root(x: Tensor, cutoff: float = CUTOFF, power: float = 0.5) -> Tensor:
    """``(X X^T)^(-power)`` [..., n, n] float64 of X [..., n, F], as a pseudo-inverse.

    Directions whose singular value is at most ``cutoff`` of the largest are zero. From a float64 Gram matrix, where
    products of float32 numbers are exact: duplicate rows are recognised, and no decomposition can fail to converge.
    """
    check_tensor("phi", x, "... n F", {}, dtype=FLOATING)
    check_positive("whiten_tol", cutoff)
    x = x.double()
    eigenvalues, vectors = torch.linalg.eigh(x @ x.mT)
    kept = eigenvalues > cutoff**2 * eigenvalues.amax(-1, keepdim=True)
    scale = torch.where(kept, eigenvalues, 1).pow(-power).where(kept, 0)
    return vectors * scale[..., None, :] @ vectors.mT
