"""One step of Energy-Based Fine-Tuning: sample, compare in feature space, score. Usable in any training loop."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ebft_kernels import FeatureMatching, StridedLayout, feature_matching, linear_log_probs
from ebft_kernels._checks import check_tensor
from ebft_kernels.integrations.transformers import OutputHead, hidden_states, output_head

from .rollout import check_prompt, sample_rollouts

if TYPE_CHECKING:
    from .config import EBFTOptions
    from .features import FeatureNetwork


class EBFTStep(NamedTuple):
    """What :func:`ebft_step` returns. With ``rl_coef = 0`` there are no rollouts: the fields about them are None.

    Attributes:
        loss: scalar, to be differentiated.
        rollouts: [B, A, n, G] int64, the sampled tokens.
        log_probs: [B, A, n, G], of these tokens under the policy at the sampling temperature; no gradient.
        match: feature-matching losses, rewards and advantages.
        metrics: scalar tensors without gradient, and Python floats; see :func:`ebft_step`.
        terms: the loss's terms by name, with their coefficients, as the loss differentiable.
    """

    loss: Tensor
    rollouts: Tensor | None
    log_probs: Tensor | None
    match: FeatureMatching | None
    metrics: dict[str, Tensor | float]
    terms: dict[str, Tensor]


def ebft_step(
    model: nn.Module,
    feature_network: FeatureNetwork | None,
    prompt: Tensor,
    layout: StridedLayout,
    config: EBFTOptions,
    *,
    token_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> EBFTStep:
    """The whole method for one batch (arXiv:2603.12248); call ``.loss.backward()`` on what comes back.

        loss = rl_coef * mean_i( - advantage_i * mean_g log p_T(token_ig) )  +  ce_coef * mean_t( - log p_1(x_t) )

    over the rollouts i of valid anchors, at the sampling temperature T (1 where sampling is greedy), and over the
    prompt tokens t with a token of their document before them. With a token mask only counted tokens enter the means
    over g and t, and rollouts without any are left out. A term whose coefficient is 0 is not computed and not among the
    metrics.

    Rollouts are sampled in eval mode. The policy's forward runs through ``model`` itself in the mode that it is in,
    over the prompt and the first G-1 tokens of each rollout.

    Metrics, over the rollouts that count:
        ``loss/rl``, ``loss/ce``: the two terms without their coefficients.
        ``feature_matching_loss``, ``alignment``, ``diversity``, ``reward``: means.
        ``advantage_std``: standard deviation of the advantages.
        ``duplicate_rate``: fraction of rollouts equal to an earlier one of their anchor.
        ``entropy``: mean of - log p_T of the sampled tokens, an unbiased estimate unless top-k or top-p is used.
        ``log_prob_gap``: mean absolute difference between a token's log-probability when it was sampled and in the
            policy's forward: rounding, and dropout if there is any.
        ``valid_anchors``: anchors that count; ``tokens``: of the packed rows, all included.
        ``seconds/rollout``, ``seconds/features``, ``seconds/matching``, ``seconds/policy`` (forward and loss): the
            host's time, which on an accelerator is the time to submit the work.

    Args:
        model: a transformers causal language model, wrapped or not.
        feature_network: the frozen network; None only with ``rl_coef = 0``.
        prompt: [B, P] int64.
        layout: of the packed rows, on the prompt's device.
        config: the method's options; geometry and kind of the features are those of layout and feature network.
        token_mask: [B, P] bool, prompt tokens that count (completions); None: all.
        generator: of the rollouts.

    Raises:
        ValueError: no valid anchor, no feature network, a shape or device that does not fit, a model that cannot be run
            strided.
        TypeError: another type or dtype.
    """
    _check_batch(prompt, layout, token_mask)
    if not config.rl_coef:
        return _cross_entropy_step(model, prompt, layout, config, token_mask)
    if feature_network is None:
        raise ValueError(f"feature_network: expected one with rl_coef = {config.rl_coef}, got None")
    if not layout.num_valid:
        raise ValueError("layout: expected at least one valid anchor in the batch, got none")

    start = perf_counter()
    rollouts, sampled_log_probs = sample_rollouts(
        model,
        prompt,
        layout,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        generator=generator,
    )
    rollouts_done = perf_counter()
    features = feature_network(layout.pack(prompt, rollouts), layout, token_mask)
    features_done = perf_counter()
    weights = rollout_weights(layout, token_mask)  # [B, A, G]
    match = feature_matching(
        *features,
        whitening=config.whitening,
        alignment_coef=config.alignment_coef,
        diversity_coef=config.diversity_coef,
        estimator=config.estimator,
        groups=feature_network.groups,
        valid=layout.valid,
    )
    metrics: dict[str, Tensor | float] = _rollout_metrics(match, rollouts, weights)
    matching_done = perf_counter()
    log_probs, text_log_probs = policy_log_probs(
        model, prompt, rollouts, layout, temperature=config.temperature or 1.0, score_prompt=config.ce_coef != 0
    )
    rl_loss = -_mean(_per_token(match.advantage) * log_probs, weights)
    terms = {"rl": config.rl_coef * rl_loss}
    metrics["loss/rl"] = rl_loss.detach()
    if text_log_probs is not None:
        ce_loss = _masked_mean(-text_log_probs, scored_prompt_tokens(layout, token_mask))
        terms["ce"] = config.ce_coef * ce_loss
        metrics["loss/ce"] = ce_loss.detach()
    log_probs = log_probs.detach()
    metrics["entropy"] = -_mean(log_probs, weights)
    metrics["log_prob_gap"] = _mean((log_probs - sampled_log_probs).abs(), weights)
    metrics["tokens"] = float(layout.batch_size * layout.packed_length)
    metrics["seconds/rollout"] = rollouts_done - start
    metrics["seconds/features"] = features_done - rollouts_done
    metrics["seconds/matching"] = matching_done - features_done
    metrics["seconds/policy"] = perf_counter() - matching_done
    return EBFTStep(sum(terms.values()), rollouts, log_probs, match, metrics, terms)


def policy_log_probs(
    model: nn.Module,
    prompt: Tensor,
    rollouts: Tensor,
    layout: StridedLayout,
    *,
    temperature: float = 1.0,
    score_prompt: bool = False,
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
    short = layout.without_last_step()
    hidden = hidden_states(model, short.pack(prompt, rollouts[..., :-1]), short)  # [B, P + A*n*(G-1), C]
    head = output_head(model)
    log_probs = _score(layout.predictors(hidden), head, rollouts, temperature)
    return log_probs, _score_prompt(hidden, head, prompt) if score_prompt else None


def prompt_log_probs(
    model: nn.Module, prompt: Tensor, layout: StridedLayout, *, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the prompts' own tokens at temperature 1, by a forward without any rollouts. Differentiable.

    Args:
        model: a transformers causal language model, wrapped or not.
        prompt: [B, P] int64.
        layout: of the packed rows; its documents and padding count, its anchors do not.
        token_mask: [B, P] bool, prompt tokens that count; None: all.

    Returns:
        log_probs [B, P-1], where entry t is token t + 1, and counted [B, P-1] bool, see :func:`scored_prompt_tokens`.

    Raises:
        ValueError: a shape or device that does not fit, a model that cannot be run strided.
        TypeError: another type or dtype.
    """
    _check_batch(prompt, layout, token_mask)
    hidden = hidden_states(model, prompt, layout.prompt_only())
    return _score_prompt(hidden, output_head(model), prompt), scored_prompt_tokens(layout, token_mask)


def scored_prompt_tokens(layout: StridedLayout, token_mask: Tensor | None = None) -> Tensor:
    """[B, P-1] bool, entry t: token t + 1 is no padding, has a token of its document before it, and counts."""
    position = torch.arange(1, layout.length, device=layout.device)
    counted = (position < layout.lengths[:, None]) & (layout.prompt_start[:, 1:] != position)
    return counted if token_mask is None else counted & token_mask[:, 1:]


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


def _check_batch(prompt: object, layout: object, token_mask: object) -> None:
    check_prompt(prompt, layout)
    if token_mask is not None:
        sizes = {"B": layout.batch_size, "P": layout.length}
        check_tensor("token_mask", token_mask, "B P", sizes, dtype=torch.bool, device=layout.device)


def _cross_entropy_step(
    model: nn.Module, prompt: Tensor, layout: StridedLayout, config: EBFTOptions, token_mask: Tensor | None
) -> EBFTStep:
    start = perf_counter()
    log_probs, counted = prompt_log_probs(model, prompt, layout, token_mask=token_mask)
    ce_loss = _masked_mean(-log_probs, counted)
    metrics = {
        "loss/ce": ce_loss.detach(),
        "tokens": float(prompt.numel()),
        "seconds/policy": perf_counter() - start,
    }
    loss = config.ce_coef * ce_loss
    return EBFTStep(loss, None, None, None, metrics, {"ce": loss})


def _score(hidden: Tensor, head: OutputHead, targets: Tensor, temperature: float) -> Tensor:
    return linear_log_probs(
        hidden.to(head.weight.dtype),
        head.weight,
        targets,
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
        scale=head.scale,
    )


def _score_prompt(hidden: Tensor, head: OutputHead, prompt: Tensor) -> Tensor:
    return _score(hidden[:, : prompt.shape[1] - 1], head, prompt[:, 1:], 1.0)


def _rollout_metrics(match: FeatureMatching, rollouts: Tensor, weights: Tensor) -> dict[str, Tensor | float]:
    """Means of what matching found [B, A, n] (or with a G axis) over the rollouts that count."""
    loss = match.loss[:, :, None] if match.loss.ndim == 3 else match.loss[:, :, None, None]
    advantage = _per_token(match.advantage)
    deviation = advantage - _mean(advantage, weights)
    return {
        "feature_matching_loss": _mean(loss, weights),
        "alignment": _mean(_per_token(match.alignment), weights),
        "diversity": _mean(_per_token(match.diversity), weights),
        "reward": _mean(_per_token(match.reward), weights),
        "advantage_std": _mean(deviation.square(), weights).sqrt(),
        "duplicate_rate": _mean(_duplicates(rollouts)[..., None], weights),
        "valid_anchors": weights.any(-1).sum(),
    }


def _duplicates(rollouts: Tensor) -> Tensor:
    """[B, A, n] bool: equal to an earlier rollout of the anchor."""
    equal = (rollouts[:, :, :, None] == rollouts[:, :, None]).all(-1)  # [B, A, n, n]
    return equal.tril(-1).any(-1)


def _per_token(x: Tensor) -> Tensor:
    """[B, A, n] -> [B, A, n, 1]; with features per token [B, A, n, G] already."""
    return x if x.ndim == 4 else x[..., None]


def _mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean of x [B, A, n, G] (1 for a size that does not matter) with the weights [B, A, G] of its tokens."""
    return (x * weights[:, :, None]).sum() / x.shape[2]


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp_min(1)
