"""How good a model is on held-out rows: cross-entropy, and feature matching for every horizon up to the trained one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels import feature_matching

from .config import EBFTOptions
from .features import FeatureNetwork
from .rollout import sample_rollouts
from .step import prompt_log_probs, rollout_weights


@torch.no_grad()
def evaluation_sums(
    model: nn.Module,
    feature_network: FeatureNetwork,
    batch: dict[str, Any],
    options: EBFTOptions,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sums over one batch, to be added up over batches and ranks and given to `evaluation_metrics`.

    Rollouts are sampled once, with the full horizon. Those of a shorter horizon g are their first g tokens: the same
    distribution, and the features of their tokens are the same numbers.

    Args:
        model: the model to evaluate, in eval mode; autocast is the caller's.
        feature_network: the frozen network that training compares in.
        batch: what `EBFTCollator` returns, on the model's device.
        options: how to sample and how to compare.
        generator: of the rollouts, on the model's device.

    Returns:
        [4 + 2 G] float32: nats, tokens, valid anchors, nats per rollout token (summed over anchors); then per horizon
        1..G, over valid anchors, the sum of the feature-matching loss and of the alignment (mean over samples).
    """
    prompt, layout, mask = batch["input_ids"], batch["layout"], batch.get("completion_mask")
    log_probs, counted = prompt_log_probs(model, prompt, layout, token_mask=mask)
    tokens, rollout_log_probs = sample_rollouts(
        model,
        prompt,
        layout,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        generator=generator,
    )
    # In its own precision, as in training, where autocast covers the model alone.
    with torch.autocast(prompt.device.type, enabled=False):
        features = feature_network(layout.pack(prompt, tokens), layout, mask, pooling="token")
    window_mask = torch.ones_like(prompt, dtype=torch.bool) if mask is None else mask
    weights = rollout_weights(layout, mask)
    valid = weights.any(-1)  # [B, A]
    losses, alignments = _by_horizon(
        *features, layout.windows(window_mask), valid, options, groups=feature_network.groups
    )
    surprise = -(rollout_log_probs * weights[:, :, None]).sum() / layout.samples * valid.sum()
    head = [-(log_probs * counted).sum(), counted.sum(), valid.sum(), surprise]
    return torch.stack([x.float() for x in (*head, *losses, *alignments)])


def _by_horizon(
    rollouts: Tensor,
    targets: Tensor,
    counted: Tensor,
    valid: Tensor,
    options: EBFTOptions,
    *,
    groups: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Features per token [B, A, n, G, F] and [B, A, G, F] -> the summed loss and alignment of each horizon."""
    losses, alignments = [], []
    for horizon in range(1, targets.shape[2] + 1):
        match = feature_matching(
            pool_first_tokens(rollouts, counted[:, :, None], horizon, options.pooling, groups=groups),
            pool_first_tokens(targets, counted, horizon, options.pooling, groups=groups),
            whitening=options.whitening,
            groups=groups,
            valid=valid,
        )
        # Features per token are compared token by token: the horizon's value is then the mean over its tokens.
        loss, alignment = match.loss.flatten(2).mean(2) if match.loss.ndim > 2 else match.loss, match.alignment
        losses.append((loss * valid).sum())
        alignments.append((alignment.flatten(2).mean(2) * valid).sum())
    return losses, alignments


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
    features = features[..., :horizon, :]
    if pooling == "token":
        return features
    if pooling == "concat":
        return features.unflatten(-1, (groups, -1)).transpose(-2, -3).flatten(-3)
    if pooling == "mean":
        return features.mean(-2)
    steps = torch.arange(horizon, device=features.device)
    last = torch.where(counted[..., :horizon], steps, 0).amax(-1)  # [...]
    last = last.expand(features.shape[:-2])[..., None, None].expand(*features.shape[:-2], 1, features.shape[-1])
    return features.gather(-2, last).squeeze(-2)


def evaluation_metrics(sums: Tensor, horizon: int) -> dict[str, float]:
    """Means from the added-up sums of `evaluation_sums` [4 + 2 G].

    Returns:
        ``cross_entropy`` (nats per counted token), ``perplexity``, ``rollout_entropy`` (nats per rollout token at the
        sampling temperature, estimated from the rollouts), ``entropy_gap`` (its excess over the cross-entropy: below 0
        the model is surer of its own text than of real text), ``feature_matching_loss`` and ``alignment`` at the
        full horizon, and both as ``..._h1`` to ``..._hG``.
    """
    nats, tokens, anchors, surprise, *rest = sums.tolist()
    losses, alignments = ([x / anchors for x in part] for part in (rest[:horizon], rest[horizon:]))
    cross_entropy = nats / tokens
    metrics = {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "rollout_entropy": surprise / anchors,
        "entropy_gap": surprise / anchors - cross_entropy,
        "feature_matching_loss": losses[-1],
        "alignment": alignments[-1],
    }
    for name, values in (("feature_matching_loss", losses), ("alignment", alignments)):
        metrics.update({f"{name}_h{g}": value for g, value in enumerate(values, 1)})
    return metrics
