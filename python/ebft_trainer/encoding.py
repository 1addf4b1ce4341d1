"""A whole text to tokens, and which of them stand for a part of it.

A text that is made of parts is tokenized as one. Tokenized apart, a part may begin with a space that is not there, or
with other tokens than those of the text: tokenizers prepend a space to what they are given, and merge across edges.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from typing import Any

#: What is not an error but should be known: a sentence that starts with a number, and that number.
Notes = Counter[str]

_ACROSS = "tokens have characters on both sides of the start or end of what counts: they count"
_SPACE = "\u0120"  # as tokenizers of bytes write it


class Encoded:
    """Token ids of ``text``, and the characters that each stands for.

    Args:
        text: the whole.
        tokenizer: of transformers, a fast one.
        special: whether the tokenizer puts its special tokens around the text, each of which stands for no character.
        where: names the text in errors.

    Raises:
        ValueError: the tokenizer does not say which characters a token stands for.
    """

    def __init__(self, text: str, tokenizer: Any, *, special: bool, where: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "data: expected a fast tokenizer, which says what characters each token stands for, to tell what "
                f"counts in {where}, got {type(tokenizer).__name__}"
            )
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        self.ids: list[int] = encoded["input_ids"]
        self._tokenizer = tokenizer
        self._starts, self._ends = _untrimmed(encoded["offset_mapping"], self.ids, tokenizer, len(text))

    def tokens_of(self, start: int, end: int, notes: Notes) -> tuple[int, int]:
        """The first token that has one of the characters ``start`` to ``end``, and the first one behind those.

        A token with characters on both sides of an edge is one of them, which ``notes`` counts; a special token that
        takes in the spaces around it is not.
        """
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        across = [i for i, edge in ((first, start), (last - 1, end)) if first <= i < last and self._has_inside(i, edge)]
        known = self._tokenizer.added_tokens_decoder if across else {}
        for i in across:
            if self.ids[i] not in known:
                notes[_ACROSS] += 1
            elif i == first:
                first += 1
            else:
                last -= 1
        return first, max(first, last)

    def _has_inside(self, token: int, edge: int) -> bool:
        return self._starts[token] < edge < self._ends[token]


def _untrimmed(
    offsets: list[tuple[int, int]], ids: list[int], tokenizer: Any, length: int
) -> tuple[list[int], list[int]]:
    """Where the characters of each token start and end, both ascending.

    Some tokenizers of bytes leave the spaces of a token out of its offsets.
    """
    following = [*(start for start, _ in offsets), length][1:]
    starts, ends, at = [], [], 0
    for (start, end), next_start, token in zip(offsets, following, ids, strict=True):
        if start > at or next_start > end:
            name = tokenizer.convert_ids_to_tokens(token)
            before, behind = (len(name) - len(bare) for bare in (name.lstrip(_SPACE), name.rstrip(_SPACE)))
            start = max(at, start - before) if start > at else start
            end = max(end, min(end + behind, next_start)) if before < len(name) else end
        at = max(at, end)
        starts.append(start if end else at)  # A special token behind the text has no characters: it ends it.
        ends.append(at)
    return starts, ends
