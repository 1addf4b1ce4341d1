"""Rollouts as text, for what judges text: verifiers and external encoders."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ebft_kernels import StridedLayout

logger = logging.getLogger(__name__)

# Tokens before an anchor that are decoded with what follows them: enough for any character that tokens share.
_TAIL = 8


class AnchorTexts(NamedTuple):
    """The texts of one valid anchor.

    Attributes:
        row, anchor: its place among the anchors [B, A].
        prompt: of its document, up to it; without a character of which it has only the first tokens.
        target: the ground-truth window.
        completions: n rollouts.
    """

    row: int
    anchor: int
    prompt: str
    target: str
    completions: list[str]


def anchor_texts(
    tokenizer: Any,
    prompt: Tensor,
    rollouts: Tensor,
    layout: StridedLayout,
    *,
    token_mask: Tensor | None = None,
    rollout_mask: Tensor | None = None,
) -> Iterator[AnchorTexts]:
    """Prompt, target and completions of every valid anchor, without special tokens and tokens that do not count.

    Completions and targets are what comes behind the prompt's text when both are decoded together, so that
    ``prompt + target`` is the text itself, also where a tokenizer drops the space before the first word that it is
    given, or where a character is made of several tokens.

    Args:
        tokenizer: of transformers.
        prompt: [B, P] int64.
        rollouts: [B, A, n, G] int64.
        layout: of the packed rows.
        token_mask: [B, P] bool, prompt tokens that count; None: all. The prompt's text has all of them.
        rollout_mask: [B, A, n, G] bool, rollout tokens that count; None: as ``token_mask``.
    """
    windows, valid, starts = layout.windows(prompt).tolist(), layout.valid.tolist(), layout.prompt_start.tolist()
    counted = None if token_mask is None else layout.windows(token_mask)
    if rollout_mask is None and counted is not None:
        rollout_mask = counted[:, :, None].expand_as(rollouts)
    window_masks, masks = (None if x is None else x.tolist() for x in (counted, rollout_mask))
    rows, drawn = prompt.tolist(), rollouts.tolist()
    for b, anchors in enumerate(layout.anchors.tolist()):
        for a, anchor in enumerate(anchors):
            if not valid[b][a]:
                continue
            prefix = rows[b][starts[b][anchor - 1] : anchor]
            target = _counted(windows[b][a], None if window_masks is None else window_masks[b][a])
            completions = [
                _counted(drawn[b][a][j], None if masks is None else masks[b][a][j]) for j in range(layout.samples)
            ]
            open_characters, texts = _continuations(tokenizer, prefix[-_TAIL:], [target, *completions])
            (text,) = _decode(tokenizer, [prefix])
            yield AnchorTexts(b, a, text[: len(text) - open_characters], texts[0], texts[1:])


def load_object(name: str, what: str) -> Any:
    """The object that ``module:attribute`` names: imports the module, which runs it, and logs from which file.

    Modules in the current folder are found too, but only by this import and those that it does at once: the folder is
    on ``sys.path`` no longer than that.

    Raises:
        ValueError: there is none, or the module cannot be imported; the message names ``what``, the argument.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"{what}: expected 'module:name', got {name!r}")
    here = os.getcwd()
    sys.path.append(here)
    try:
        imported = importlib.import_module(module)
        found = getattr(imported, attribute)
    except (Exception, SystemExit) as error:  # whatever a module does when it is run
        reason = str(error) if isinstance(error, (ImportError, AttributeError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: cannot load {name!r}: {reason}") from error
    finally:
        sys.path.reverse()
        sys.path.remove(here)  # the last one
        sys.path.reverse()
    logger.info("%s: %s is from %s", what, name, getattr(imported, "__file__", None) or "Python itself")
    return found


def _counted(tokens: list[int], mask: list[bool] | None) -> list[int]:
    return tokens if mask is None else [token for token, counts in zip(tokens, mask, strict=True) if counts]


def _decode(tokenizer: Any, tokens: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _continuations(tokenizer: Any, tail: list[int], parts: list[list[int]]) -> tuple[int, list[str]]:
    """How many characters at the end of ``tail`` are not its text, and what each of ``parts`` adds to the others."""
    head, *whole = _decode(tokenizer, [tail, *(tail + part for part in parts)])
    # A character whose last tokens are still to come is shown as a replacement; it belongs to what completes it.
    kept = len(os.path.commonprefix([head, *whole]))
    return len(head) - kept, [text[kept:] for text in whole]
