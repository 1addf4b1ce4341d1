"""How good a model is on held-out rows: cross-entropy, and feature matching for every horizon up to the trained one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels import FeatureMatching, StridedLayout, feature_matching
from ebft_kernels.pooling.modes import combine

from .completions import Completions
from .config import EBFTOptions
from .features import FeatureMap, FeatureNetwork
from .rollout import before_end, end_tokens, sample_rollouts
from .scoring import policy_log_probs, prompt_log_probs, rollout_mask, rollout_weights
from .verifiers import Verifier


@torch.no_grad()
def evaluation_sums(
    model: nn.Module,
    feature_network: FeatureMap,
    batch: dict[str, Any],
    options: EBFTOptions,
    *,
    generator: torch.Generator | None = None,
    verifier: Verifier | None = None,
    completions: Completions | None = None,
) -> Tensor:
    """Sums over one batch, to be added up over batches and ranks and given to `evaluation_metrics`.

    Rollouts are sampled once, with the full horizon. Those of a shorter horizon g are their first g tokens: the same
    distribution, and the features of their tokens are the same numbers.

    Args:
        model: the model to evaluate, in eval mode; autocast is the caller's.
        feature_network: the frozen network that training compares in, or another feature map, which is called for
            every horizon.
        batch: what `EBFTCollator` returns, on the model's device.
        options: how to sample and how to compare.
        generator: of the rollouts, on the model's device.
        verifier: whose rewards to measure too.
        completions: is given the rollouts and how they match.

    Returns:
        [7 + 2 G] float32: nats, tokens, valid anchors; nats of the rollouts' tokens and these tokens, so weighted that
        the tokens of a window together count as one; of the batch's first row, by how much its rollouts' tokens have
        other log-probabilities in one forward over all of them than where they were sampled, and these tokens, so
        weighted too; then per horizon 1..G, over valid anchors, the sum of the
        feature-matching loss and of the alignment (mean over samples); with a verifier one more, the same of its
        reward.
    """
    prompt, layout, mask = batch["input_ids"], batch["layout"], batch.get("completion_mask")
    log_probs, counted = prompt_log_probs(model, prompt, layout, token_mask=mask, vocabulary=options.vocabulary)
    ends = end_tokens(model, options.eos_token_ids)
    tokens, rollout_log_probs = sample_rollouts(
        model,
        prompt,
        layout,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        eos_token_ids=ends,
        vocabulary=options.vocabulary,
        generator=generator,
    )
    alive = before_end(tokens, ends) if ends else None
    masks = {"token_mask": mask, "rollout_mask": rollout_mask(alive, layout, mask)}
    weights = rollout_weights(layout, mask)
    valid = weights.any(-1)  # [B, A]
    # In its own precision, as in training, where autocast covers the model alone.
    with torch.autocast(prompt.device.type, enabled=False):
        features = _features_by_horizon(feature_network, prompt, tokens, layout, masks, options)
        losses, alignments, match = _by_horizon(features, valid, options, groups=getattr(feature_network, "groups", 1))
    if completions is not None:
        completions.add(prompt, tokens, layout, match, masks)
    share = weights[:, :, None].expand_as(tokens) * valid.sum() / layout.samples
    share = share if alive is None else share * alive
    sums = [-(log_probs * counted).sum(), counted.sum(), valid.sum(), -(rollout_log_probs * share).sum(), share.sum()]
    scored, _ = policy_log_probs(
        model,
        prompt[:1],
        tokens[:1],
        layout.first_rows(1),
        temperature=options.temperature or 1.0,
        vocabulary=options.vocabulary,
    )
    sums += [((scored - rollout_log_probs[:1]).abs() * share[:1]).sum(), share[:1].sum()]
    sums += [*losses, *alignments]
    if verifier is not None:
        sums.append((verifier(prompt, tokens, layout, **masks).mean(2) * valid).sum())
    return torch.stack([x.float() for x in sums])


def _features_by_horizon(
    feature_network: FeatureMap,
    prompt: Tensor,
    tokens: Tensor,
    layout: StridedLayout,
    masks: dict[str, Tensor | None],
    options: EBFTOptions,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rollout and target features of horizon 1, 2, .. G."""
    if isinstance(feature_network, FeatureNetwork):
        per_token = feature_network(layout.pack(prompt, tokens), layout, **masks, pooling="token")
        window_mask, own_mask = masks["token_mask"], masks["rollout_mask"]
        window_mask = torch.ones_like(prompt, dtype=torch.bool) if window_mask is None else window_mask
        window_mask = layout.windows(window_mask)
        counted = (window_mask[:, :, None] if own_mask is None else own_mask, window_mask)
        for horizon in range(1, layout.horizon + 1):
            rollouts, targets = (
                pool_first_tokens(x, mask, horizon, options.pooling, groups=feature_network.groups)
                for x, mask in zip(per_token, counted, strict=True)
            )
            yield rollouts, targets
        return
    layouts = [layout]
    while layouts[-1].horizon > 1:
        layouts.append(layouts[-1].without_last_step())
    for cut in reversed(layouts):
        own_mask = masks["rollout_mask"]
        own_mask = None if own_mask is None else own_mask[..., : cut.horizon]
        packed = cut.pack(prompt, tokens[..., : cut.horizon])
        yield feature_network(packed, cut, token_mask=masks["token_mask"], rollout_mask=own_mask)


def _by_horizon(
    features: Iterable[tuple[Tensor, Tensor]], valid: Tensor, options: EBFTOptions, *, groups: int
) -> tuple[list[Tensor], list[Tensor], FeatureMatching]:
    """Features of each horizon -> its summed loss and alignment; and all that is known of the last."""
    losses, alignments = [], []
    for pair in features:
        match = feature_matching(*pair, whitening=options.whitening, groups=groups, valid=valid)
        # Features per token are compared token by token: the horizon's value is then the mean over its tokens.
        loss, alignment = match.loss.flatten(2).mean(2) if match.loss.ndim > 2 else match.loss, match.alignment
        losses.append((loss * valid).sum())
        alignments.append((alignment.flatten(2).mean(2) * valid).sum())
    return losses, alignments, match


def pool_first_tokens(features: Tensor, counted: Tensor, horizon: int, pooling: str, *, groups: int = 1) -> Tensor:
    """What `ebft_kernels.pool_features` gives for windows cut to ``horizon`` tokens, from its features per token.

    Args:
        features: [..., G, F], zero where a token does not count.
        counted: [..., G] bool, which do (broadcasts).
        horizon: g, 1..G.
        pooling: as for `pool_features`.
        groups: equal parts of F, such as layers, that ``"concat"`` keeps together.

    Returns:
        [..., F]; [..., g, F] for ``"token"``; [..., g F] for ``"concat"``.
    """
    tokens = features[..., :horizon, :].unflatten(-1, (groups, -1))
    return combine(tokens, counted[..., :horizon], pooling)


def evaluation_metrics(sums: Tensor, horizon: int) -> dict[str, float]:
    """Means from the added-up sums of `evaluation_sums` [7 + 2 G], or [8 + 2 G] with a verifier's.

    Returns:
        ``cross_entropy`` (nats per counted token), ``perplexity``, ``rollout_entropy`` (nats per rollout token at the
        sampling temperature, estimated from the rollouts up to their ends), ``entropy_gap`` (its excess over the
        cross-entropy: below 0 the model is surer of its own text than of real text), ``log_prob_gap`` (mean absolute
        difference between a token's log-probability when it was sampled and in one forward over finished rollouts, on
        a few rows: rounding), ``feature_matching_loss`` and ``alignment`` at the full horizon, and both as ``..._h1``
        to ``..._hG``; ``verifier_reward`` if it was measured.
    """
    nats, tokens, anchors, rollout_nats, rollout_tokens, gap, compared, *rest = sums.tolist()
    losses, alignments = ([x / anchors for x in part] for part in (rest[:horizon], rest[horizon : 2 * horizon]))
    cross_entropy, rollout_entropy = nats / tokens, rollout_nats / (rollout_tokens or 1.0)
    metrics = {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "rollout_entropy": rollout_entropy,
        "entropy_gap": rollout_entropy - cross_entropy,
        "log_prob_gap": gap / (compared or 1.0),
        "feature_matching_loss": losses[-1],
        "alignment": alignments[-1],
    }
    for name, values in (("feature_matching_loss", losses), ("alignment", alignments)):
        metrics.update({f"{name}_h{g}": value for g, value in enumerate(values, 1)})
    for reward in rest[2 * horizon :]:
        metrics["verifier_reward"] = reward / anchors
    return metrics
