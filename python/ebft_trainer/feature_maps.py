"""Feature maps other than the frozen model's hidden states, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebft_kernels import StridedLayout
from ebft_kernels._checks import check_tensor

from .config import EBFTOptions
from .features import FeatureMap, FeatureNetwork
from .texts import anchor_texts, load_object


class TextEncoderFeatures:
    """A `FeatureMap` of decoded text: what an encoder of any kind makes of the prompt with each of its continuations.

    Args:
        encode: N texts -> [N, F], such as ``SentenceTransformer.encode`` with ``convert_to_tensor=True``.
        tokenizer: that of the policy.
        prompt_characters: how much of the prompt's end is put before a continuation; None: all of it.
        normalize: divide each feature by its L2 norm.
        batch_size: texts per call of ``encode``.
    """

    groups = 1

    def __init__(
        self,
        encode: Callable[[list[str]], Tensor],
        tokenizer: Any,
        *,
        prompt_characters: int | None = None,
        normalize: bool = True,
        batch_size: int = 64,
    ) -> None:
        self.encode, self.tokenizer = encode, tokenizer
        self.prompt_characters, self.normalize, self.batch_size = prompt_characters, normalize, batch_size

    @torch.no_grad()
    def __call__(
        self,
        packed: Tensor,
        layout: StridedLayout,
        token_mask: Tensor | None = None,
        *,
        rollout_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Rollout features [B, A, n, F] and target features [B, A, F]; 0 where the anchor is not valid.

        Raises:
            ValueError, TypeError: ``encode`` returns something else than one feature per text.
        """
        prompt, rollouts = packed[:, : layout.length], layout.rollouts(packed)
        masks = {"token_mask": token_mask, "rollout_mask": rollout_mask}
        found = list(anchor_texts(self.tokenizer, prompt, rollouts, layout, **masks))
        texts = [self._end(x.prompt) + text for x in found for text in (*x.completions, x.target)]
        chunks = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        sizes: dict[str, int] = {}
        parts = []
        for chunk in chunks:
            part = self.encode(chunk)
            check_tensor("encode's features", part, f"{len(chunk)} F", sizes)
            parts.append(part.to(packed.device, torch.float32))
        encoded = torch.cat(parts)
        if self.normalize:
            encoded = F.normalize(encoded, dim=-1)
        features = encoded.new_zeros(*layout.valid.shape, layout.samples + 1, encoded.shape[-1])
        features[layout.valid] = encoded.view(-1, *features.shape[2:])  # in the order of `anchor_texts`
        return features[:, :, :-1], features[:, :, -1]

    def _end(self, prompt: str) -> str:
        if self.prompt_characters is None:
            return prompt
        return prompt[max(len(prompt) - self.prompt_characters, 0) :]


def build_feature_map(model: nn.Module, tokenizer: Any, options: EBFTOptions, *, share: bool = False) -> FeatureMap:
    """What ``options`` compare in: the hidden states of ``model`` as it is now, or what ``feature_map`` makes.

    ``share``: ``model`` is frozen and need not be copied (:class:`ebft_trainer.FeatureNetwork`).

    Raises:
        ValueError: there is no such factory, or it raises; a layer out of range.
        TypeError: the factory gives nothing that can be called.
    """
    if options.feature_map is None:
        kind = {"pooling": options.pooling, "normalize": options.normalize}
        return FeatureNetwork(model, options.feature_layers, **kind, share=share)
    factory = load_object(options.feature_map, "feature_map")
    try:
        features = factory(model, tokenizer, options)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"feature_map: expected {options.feature_map!r} to give a FeatureMap, got {got}") from error
    if not callable(features):
        raise TypeError(
            f"feature_map: expected {options.feature_map!r} to give a FeatureMap, got {type(features).__name__}"
        )
    return features
