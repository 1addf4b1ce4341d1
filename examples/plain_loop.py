"""The method in a plain PyTorch loop, out of the fused ops; on real text: ``python plain_loop.py DIR_OR_NAME FILE``."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout, feature_matching, linear_log_probs
from ebft_kernels.integrations.transformers import check_model, hidden_states, output_head
from ebft_trainer import FeatureNetwork, sample_rollouts


def train(model: nn.Module, batches: Iterable[Tensor], *, learning_rate: float = 1e-6) -> list[float]:
    """Train on batches of token ids [B, P]; the feature-matching loss before each step."""
    check_model(model).require()
    phi = FeatureNetwork(model)  # frozen, as the model is now; pools with ebft_kernels.pool_features
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for prompt in batches:
        layout = StridedLayout.strided(*prompt.shape, context=8, stride=8, horizon=8, samples=4, device=prompt.device)
        rollouts, _ = sample_rollouts(model, prompt, layout, temperature=0.6)  # [B, A, n, G]
        packed = layout.pack(prompt, rollouts)  # [B, S]
        match = feature_matching(*phi(packed, layout), whitening="sample")
        hidden, rows = layout.distinct_predictors(hidden_states(model, packed, layout))  # [R, C] and [B, A, n, G]
        head = output_head(model)
        options = {"bias": head.bias, "temperature": 0.6, "softcap": head.softcap, "scale": head.scale}
        log_probs = linear_log_probs(hidden, head.weight, rollouts, rows=rows, **options)  # [B, A, n, G]
        loss = -(match.advantage[..., None] * log_probs).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(match.loss.mean().item())
    return losses


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, file = sys.argv[1:]
    with open(file, encoding="utf-8") as text:
        ids = AutoTokenizer.from_pretrained(name)(text.read(), return_tensors="pt")["input_ids"][0]
    rows = ids[: len(ids) // 256 * 256].view(-1, 1, 256)
    print(train(AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), rows))
