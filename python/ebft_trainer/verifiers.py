"""Verifiable rewards: functions of three texts, and what makes rewards of rollouts out of them."""

from __future__ import annotations

import ast
import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from ebft_kernels import StridedLayout

from .texts import anchor_texts, load_object

Reward = Callable[[str, str, str], float]


class VerifierError(ValueError):
    """A verifier failed, or gave something that is no reward."""


class Verifier(Protocol):
    """Anything that gives a reward to every rollout: called with prompt [B, P], rollouts [B, A, n, G] and layout.

    ``token_mask`` [B, P] and ``rollout_mask`` [B, A, n, G] say which tokens count (None: all); tokens after a rollout's
    end do not. It returns [B, A, n], finite where the anchor is valid.
    """

    def __call__(
        self,
        prompt: Tensor,
        rollouts: Tensor,
        layout: StridedLayout,
        *,
        token_mask: Tensor | None = None,
        rollout_mask: Tensor | None = None,
    ) -> Tensor: ...


class TextVerifier:
    """A `Verifier` that decodes rollouts and asks a function of text.

    Args:
        reward: ``reward(prompt_text, completion_text, target_text) -> float``. The prompt's text is that of the
            document up to the anchor; the target's that of the ground-truth window (see
            :func:`ebft_trainer.texts.anchor_texts`).
        tokenizer: of transformers.
    """

    def __init__(self, reward: Reward, tokenizer: Any) -> None:
        if not callable(reward):
            raise TypeError(f"reward: expected a function of three texts, got {type(reward).__name__}")
        if not hasattr(tokenizer, "batch_decode"):
            raise TypeError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
        self.reward, self.tokenizer = reward, tokenizer

    def __call__(
        self,
        prompt: Tensor,
        rollouts: Tensor,
        layout: StridedLayout,
        *,
        token_mask: Tensor | None = None,
        rollout_mask: Tensor | None = None,
    ) -> Tensor:
        """Rewards [B, A, n] float32 on the prompt's device; 0 where the anchor is not valid.

        Raises:
            VerifierError: the function raises, or returns something that is no finite number.
        """
        rewards = torch.zeros(rollouts.shape[:3])
        masks = {"token_mask": token_mask, "rollout_mask": rollout_mask}
        for texts in anchor_texts(self.tokenizer, prompt, rollouts, layout, **masks):
            found = [self._reward(texts.prompt, completion, texts.target) for completion in texts.completions]
            rewards[texts.row, texts.anchor] = torch.tensor(found)
        return rewards.to(prompt.device)

    def _reward(self, prompt: str, completion: str, target: str) -> float:
        try:
            reward = self.reward(prompt, completion, target)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            raise VerifierError(f"verifier: expected a number, got {got} for the completion {completion!r}") from error
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise VerifierError(f"verifier: expected a finite number, got {reward!r} for the completion {completion!r}")
        return float(reward)


def exact_match(_prompt: str, completion: str, target: str) -> float:
    """1 if the completion is the target, character by character, else 0."""
    return float(completion == target)


def parses_as_python(_prompt: str, completion: str, _target: str) -> float:
    """1 if the completion by itself, its common indentation taken off, is Python with a statement in it, else 0."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(bool(ast.parse(textwrap.dedent(completion)).body))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return 0.0


def char_f_score(_prompt: str, completion: str, target: str) -> float:
    """Similarity of two texts, 0 to 1: the character n-gram F-score chrF (Popovic 2015), with n = 1..6 and beta = 2.

    White space is left out. Precision and recall are means over the n for which both texts have n-grams.
    """
    texts = ["".join(text.split()) for text in (completion, target)]
    precisions, recalls = [], []
    for order in range(1, min(6, *map(len, texts)) + 1):
        found, wanted = (Counter(text[i : i + order] for i in range(len(text) - order + 1)) for text in texts)
        common = (found & wanted).total()
        precisions.append(common / found.total())
        recalls.append(common / wanted.total())
    precision, recall = (sum(x) / max(len(x), 1) for x in (precisions, recalls))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


VERIFIERS: dict[str, Reward] = {f.__name__: f for f in (exact_match, parses_as_python, char_f_score)}


def load_verifier(name: str, tokenizer: Any) -> TextVerifier:
    """The verifier that ``name`` stands for: one of `VERIFIERS`, or ``module:function``.

    Raises:
        ValueError: there is none of this name.
        TypeError: it is no function, or there is no tokenizer.
    """
    if name in VERIFIERS:
        return TextVerifier(VERIFIERS[name], tokenizer)
    if ":" not in name:
        names = ", ".join(map(repr, VERIFIERS))
        raise ValueError(f"verifier: expected {names} or 'module:function', got {name!r}")
    return TextVerifier(load_object(name, "verifier"), tokenizer)
