"""One step of Energy-Based Fine-Tuning the published way, on the same weights, with the same random numbers.

An own plain implementation of what the method's authors run (arXiv:2603.12248), as slow as theirs and not slower: one
row per sample, so the prompt is repeated for each; rollout tokens ordered (step, anchor); a dense mask built anew for
every forward; the whole sequence recomputed for every generated token; every layer and the vocabulary head of the
feature network; logits of all positions in float32; whitening by a batched SVD in feature space. Attention is the
model's own: "eager" as the authors run it, or "sdpa", the fastest that takes a dense mask.

Its numbers are those of ``ebft_trainer.ebft_step`` up to rounding: the two check each other.
"""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_kernels import FeatureMatching, StridedLayout
from ebft_kernels.logprob._draw import draw_from
from ebft_trainer.config import EBFTOptions
from ebft_trainer.features import layer_numbers

from .features import match_by_batched_svd


class PublishedStep(NamedTuple):
    """Loss to be differentiated, tokens [B, A, n, G], their log-probabilities, what matching gave, seconds by phase."""

    loss: Tensor
    rollouts: Tensor
    log_probs: Tensor
    match: FeatureMatching
    seconds: dict[str, float]


def published_step(
    model: nn.Module,
    feature_model: nn.Module,
    prompt: Tensor,
    layout: StridedLayout,
    options: EBFTOptions,
    *,
    generator: torch.Generator | None = None,
    rollouts: Tensor | None = None,
) -> PublishedStep:
    """The step for ``prompt`` [B, P], rows without padding and in one document, at a temperature above 0.

    Only geometry is read from ``layout``. Features are the last token's, whitening is ``"sample"``, the estimator
    ``"rloo"``: the method's defaults. With ``rollouts`` [B, A, n, G] these are taken and none are sampled.
    """
    start = perf_counter()
    if rollouts is None:
        sequences = _generate(model, prompt, layout, options.temperature, generator)  # [B*n, P + A*G]
    else:
        sequences = layout.to_reference_order(layout.pack(prompt, rollouts))
    generated = perf_counter()
    rollout_features, target_features = _features(feature_model, sequences, layout, options)
    featured = perf_counter()
    match = match_by_batched_svd(rollout_features, target_features, options.alignment_coef, options.diversity_coef)
    matched = perf_counter()
    log_probs, text_log_probs = _log_probs(model, sequences, layout, options.temperature)
    loss = -options.rl_coef * (match.advantage[..., None] * log_probs).mean() - options.ce_coef * text_log_probs.mean()
    seconds = {
        "rollout": generated - start,
        "features": featured - generated,
        "matching": matched - featured,
        "policy": perf_counter() - matched,
    }
    rollouts = layout.rollouts(layout.from_reference_order(sequences))
    return PublishedStep(loss, rollouts, log_probs.detach(), match, seconds)


def dense_mask(anchors: list[int], length: int, steps: int) -> Tensor:
    """[S, S] bool of a row ``[prompt | tokens ordered (step, anchor)]``, True = may attend, as the authors build it."""
    count = len(anchors)
    size = length + steps * count
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[:length, :length] = torch.ones(length, length, dtype=torch.bool).tril()
    for step in range(steps):
        for index, anchor in enumerate(anchors):
            row = length + step * count + index
            mask[row, :anchor] = True
            for earlier in range(step + 1):
                mask[row, length + earlier * count + index] = True
    return mask


def _forward(model: nn.Module, sequences: Tensor, layout: StridedLayout, steps: int, *, hidden: bool = False):
    """The model over prompt and the first ``steps`` tokens of all rollouts [B*n, P + steps*A], mask and all."""
    anchors = layout.anchors[0].tolist()
    positions = [*range(layout.length), *(anchor + step for step in range(steps) for anchor in anchors)]
    positions = torch.tensor(positions, device=sequences.device).expand(len(sequences), -1)
    visible = dense_mask(anchors, layout.length, steps).to(sequences.device)
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=sequences.device)
    mask = mask.masked_fill(~visible, torch.finfo(dtype).min).expand(len(sequences), 1, -1, -1)
    return model(
        input_ids=sequences,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=hidden,
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _predictors(rows: Tensor, layout: StridedLayout) -> Tensor:
    """Rows [B*n, >= P + A*(G-1), ...] -> [B*n, G, A, ...]: those that predict each rollout token."""
    anchors = layout.anchors[0].long()
    later = rows[:, layout.length :].unflatten(1, (-1, layout.num_anchors))[:, : layout.horizon - 1]
    return torch.cat([rows[:, anchors - 1][:, None], later], 1)


@torch.no_grad()
def _generate(
    model: nn.Module, prompt: Tensor, layout: StridedLayout, temperature: float, generator: torch.Generator | None
) -> Tensor:
    batch, count, samples = layout.batch_size, layout.num_anchors, layout.samples
    sequences = prompt.repeat_interleave(samples, 0)
    for step in range(layout.horizon):
        logits = _wide(_forward(model, sequences, layout, step).logits)  # [B*n, P + step*A, V]
        rows = logits[:, -count:] if step else logits[:, layout.anchors[0].long() - 1]
        probability = (rows / temperature).softmax(-1)
        # The numbers that ebft_trainer draws, in its order (batch, anchor, sample).
        uniform = torch.rand(batch * count * samples, dtype=torch.float64, generator=generator, device=prompt.device)
        uniform = uniform.view(batch, count, samples).transpose(1, 2).reshape(-1, 1)
        token = draw_from(probability.flatten(0, 1), uniform).view(-1, count)
        sequences = torch.cat([sequences, token], 1)
    return sequences


@torch.no_grad()
def _features(
    model: nn.Module, sequences: Tensor, layout: StridedLayout, options: EBFTOptions
) -> tuple[Tensor, Tensor]:
    """Rollout features [B, A, n, F] and target features [B, A, F]: the last token's hidden states, normalised."""
    outputs = _forward(model, sequences, layout, layout.horizon, hidden=True)
    _wide(outputs.logits)
    layers = layer_numbers(options.feature_layers, model.config.num_hidden_layers)
    hidden = torch.cat([outputs.hidden_states[layer] for layer in layers], -1)
    hidden = F.normalize(_wide(hidden), dim=-1)  # [B*n, P + A*G, F]
    last = hidden[:, -layout.num_anchors :].unflatten(0, (layout.batch_size, layout.samples)).transpose(1, 2)
    window_end = layout.anchors[0].long() + layout.horizon - 1
    return last, hidden[:: layout.samples, window_end]


def _log_probs(model: nn.Module, sequences: Tensor, layout: StridedLayout, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the rollout tokens [B, A, n, G] and of the prompts' tokens [B, n, P-1]."""
    logits = _wide(_forward(model, sequences, layout, layout.horizon).logits)  # [B*n, P + A*G, V]
    tokens = sequences[:, layout.length :].unflatten(1, (layout.horizon, layout.num_anchors))
    rollouts = (_predictors(logits, layout) / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    rollouts = rollouts.unflatten(0, (layout.batch_size, layout.samples)).permute(0, 3, 1, 2)  # [B, A, n, G]
    text = logits[:, : layout.length - 1].log_softmax(-1)
    text = text.gather(-1, sequences[:, 1 : layout.length, None])[..., 0]
    return rollouts, text.unflatten(0, (layout.batch_size, layout.samples))
