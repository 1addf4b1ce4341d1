"""Log-probabilities of rollouts and prompts, and which of their tokens count how much."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout, linear_log_probs
from ebft_kernels._checks import check_tensor
from ebft_kernels.integrations.transformers import OutputHead, apply_head, evaluation_mode

from .features import StartingAdapters, adapters_off
from .replay import RecordedRollouts
from .rollout import check_prompt


def policy_log_probs(
    model: nn.Module,
    prompt: Tensor,
    rollouts: Tensor,
    layout: StridedLayout,
    *,
    temperature: float = 1.0,
    score_prompt: bool = False,
    vocabulary: int | None = None,
    recorded: RecordedRollouts | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of given rollouts, and of the prompt, by one differentiable forward through ``model``.

    Each rollout token is scored given the prompt before its anchor and the rollout's earlier tokens. The last token of
    a rollout is only ever a target, so it is not run.

    Args:
        model: a transformers causal language model, wrapped or not.
        prompt: [B, P] int64.
        rollouts: [B, A, n, G] int64.
        layout: of the packed rows.
        temperature: divides the logits that score the rollouts.
        score_prompt: whether to score the prompt too, at temperature 1.
        vocabulary: token ids below this are all that there are (:func:`ebft_trainer.sample_rollouts`); None: all of the
            head's.
        recorded: these rollouts with what was computed when they were drawn, with these options, this vocabulary and
            the same weights: the forward is then replayed from it. It can be replayed once.

    Returns:
        [B, A, n, G] and, if asked for, [B, P-1]: entry t is token t + 1 (see :func:`scored_prompt_tokens`); float32
        (float64 for a float64 model).

    Raises:
        ValueError: a shape, device or option that does not fit, a model that cannot be run strided.
        TypeError: another type or dtype.
    """
    check_prompt(prompt, layout)
    sizes = {"B": layout.batch_size, "A": layout.num_anchors, "n": layout.samples, "G": layout.horizon}
    check_tensor("rollouts", rollouts, "B A n G", sizes, dtype=torch.int64, device=layout.device)
    if recorded is None:
        short, recording = layout.without_last_step(), None
    else:
        # What was decoded after a rollout's end has no gradient, but would have NaN if it were not what is recorded.
        recording, rollouts = recorded.forward, recorded.tokens
        short = recording.layout

    def score(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:  # hidden [B, P + A*n*(G-1), C]
        rows, index = layout.distinct_predictors(hidden)
        computed = None if recorded is None else recorded.of_head(head)
        log_probs = _score(rows, head, rollouts, temperature, index, computed)
        return (log_probs, _score_prompt(hidden, head, prompt)) if score_prompt else (log_probs,)

    packed = short.pack(prompt, rollouts[..., :-1])
    log_probs, *text_log_probs = apply_head(model, packed, short, score, vocabulary=vocabulary, recording=recording)
    return log_probs, text_log_probs[0] if score_prompt else None


def prompt_log_probs(
    model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    *,
    token_mask: Tensor | None = None,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the prompts' own tokens at temperature 1, by a forward without any rollouts. Differentiable.

    Args:
        model: a transformers causal language model, wrapped or not.
        prompt: [B, P] int64.
        layout: of the packed rows; its documents and padding count, its anchors do not.
        token_mask: [B, P] bool, prompt tokens that count; None: all.
        vocabulary: as for :func:`policy_log_probs`.

    Returns:
        log_probs [B, P-1], where entry t is token t + 1, and counted [B, P-1] bool, see :func:`scored_prompt_tokens`.

    Raises:
        ValueError: a shape or device that does not fit, a model that cannot be run strided.
        TypeError: another type or dtype.
    """
    check_batch(prompt, layout, token_mask)

    def score(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
        return (_score_prompt(hidden, head, prompt),)

    (log_probs,) = apply_head(model, prompt, layout.prompt_only(), score, vocabulary=vocabulary)
    return log_probs, scored_prompt_tokens(layout, token_mask)


def scored_prompt_tokens(layout: StridedLayout, token_mask: Tensor | None = None) -> Tensor:
    """[B, P-1] bool, entry t: token t + 1 is no padding, has a token of its document before it, and counts."""
    position = torch.arange(1, layout.length, device=layout.device)
    counted = (position < layout.lengths[:, None]) & (layout.prompt_start[:, 1:] != position)
    return counted if token_mask is None else counted & token_mask[:, 1:]


@torch.no_grad()
def reference_log_probs(
    model: nn.Module,
    reference_model: nn.Module | StartingAdapters | None,
    prompt: Tensor,
    rollouts: Tensor,
    layout: StridedLayout,
    *,
    temperature: float = 1.0,
    vocabulary: int | None = None,
) -> Tensor:
    """Log-probabilities [B, A, n, G] of given rollouts under the frozen model, in eval mode and without gradient.

    Args:
        model: the policy, whose PEFT adapters are switched off where there is no ``reference_model``.
        reference_model: a transformers causal language model; or the policy's adapters as they were; or None.
        prompt, rollouts, layout, temperature, vocabulary: as for :func:`policy_log_probs`.

    Raises:
        ValueError, TypeError: as :func:`policy_log_probs`.
    """
    options = {"temperature": temperature, "vocabulary": vocabulary}
    if reference_model is None:
        with adapters_off(model), evaluation_mode(model):
            return policy_log_probs(model, prompt, rollouts, layout, **options)[0]
    if isinstance(reference_model, StartingAdapters):
        with reference_model.put_back(model), evaluation_mode(model):
            return policy_log_probs(model, prompt, rollouts, layout, **options)[0]
    with evaluation_mode(reference_model):
        return policy_log_probs(reference_model, prompt, rollouts, layout, **options)[0]


def rollout_weights(layout: StridedLayout, token_mask: Tensor | None = None) -> Tensor:
    """[B, A, G] float32, the share of every rollout token in a mean over anchors of a mean over tokens.

    Anchors that are not valid or have no counted token in their window have no share; the shares of the others are
    equal, and are divided equally among their counted tokens.
    """
    valid = layout.valid[:, :, None]
    counted = valid.expand(-1, -1, layout.horizon) if token_mask is None else valid & layout.windows(token_mask)
    tokens = counted.sum(-1, keepdim=True)  # [B, A, 1]
    anchors = (tokens > 0).sum()
    return counted / (tokens * anchors).clamp_min(1)


def loss_weights(layout: StridedLayout, token_mask: Tensor | None = None) -> Tensor:
    """[2] float32: the anchors and the prompt tokens that count, over which the terms of the loss are means.

    Known before anything is sampled, so that batches that make one optimizer step can be given their ``shares``.
    """
    anchors = rollout_weights(layout, token_mask).any(-1).sum()
    return torch.stack([anchors, scored_prompt_tokens(layout, token_mask).sum()]).float()


def rollout_mask(alive: Tensor | None, layout: StridedLayout, token_mask: Tensor | None) -> Tensor | None:
    """[B, A, n, G] bool, the rollout tokens that count: up to the end, and in place of a prompt token that counts.

    None if rollouts do not end (``alive`` is None); the token mask alone decides then.
    """
    if alive is None or token_mask is None:
        return alive
    return alive & layout.windows(token_mask)[:, :, None]


def check_batch(prompt: object, layout: object, token_mask: object) -> None:
    """Raise TypeError / ValueError unless prompt and token mask [B, P] fit the layout."""
    check_prompt(prompt, layout)
    if token_mask is not None:
        sizes = {"B": layout.batch_size, "P": layout.length}
        check_tensor("token_mask", token_mask, "B P", sizes, dtype=torch.bool, device=layout.device)


def _score(
    hidden: Tensor,
    head: OutputHead,
    targets: Tensor,
    temperature: float,
    rows: Tensor | None = None,
    computed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    return linear_log_probs(
        hidden.to(head.weight.dtype),
        head.weight,
        targets,
        rows=rows,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        scale=head.scale,
        computed=computed,
    )


def _score_prompt(hidden: Tensor, head: OutputHead, prompt: Tensor) -> Tensor:
    return _score(hidden[:, : prompt.shape[1] - 1], head, prompt[:, 1:], 1.0)
