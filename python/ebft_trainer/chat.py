"""Conversations through the tokenizer's chat template, with a mask of the tokens that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from .encoding import Encoded, Notes

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]
Span = tuple[int, int]


def chat_tokens(
    messages: Messages, tokenizer: Any, *, answer: int = 0, where: str = "messages", notes: Notes | None = None
) -> tuple[list[int], Tensor]:
    """Token ids [T] of a conversation and the mask [T] bool of what the assistant says in it.

    The ids are those of the text that the template writes, as a whole. A template with ``{% generation %}`` marks says
    itself what the assistant says. With any other, a turn is the text that the template puts behind the messages before
    it and the generation prompt, up to and including the end-of-text token if the turn has one. That is only right if
    the template never changes what it has already written, which is checked.

    Args:
        messages: with ``role`` and ``content`` each.
        tokenizer: of transformers, a fast one, with a chat template.
        answer: number of the first message that may count.
        where: names the conversation in errors.
        notes: counts what is no error but should be known, each under a sentence.

    Raises:
        ValueError: no template, an error in it or in the conversation, no counted turn, a template that changes earlier
            turns.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"data: expected a tokenizer with a chat template for the messages in {where}, got none")
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= answer]
    if not turns:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"data: expected a message of the assistant to train on, got roles {roles} in {where}")
    template = _Template(tokenizer, where)
    if template.is_marked:
        text, spans = _marked_spans(messages, template, answer)
    else:
        text, spans = _compared_spans(messages, template, turns)
    encoded = Encoded(text, tokenizer, special=False, where=where)
    mask = torch.zeros(len(encoded.ids), dtype=torch.bool)
    for start, end in spans:
        first, last = encoded.tokens_of(start, end, Notes() if notes is None else notes)
        said = encoded.ids[first:last]
        if not template.is_marked and tokenizer.eos_token_id in said:
            last -= said[::-1].index(tokenizer.eos_token_id)
        mask[first:last] = True
    return encoded.ids, mask


class _Template:
    """The tokenizer's chat template; an error in it names the conversation."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._source, self._names, self.where = tokenizer.get_chat_template(), tokenizer.special_tokens_map, where
        self.is_marked = _MARKS.search(self._source) is not None

    def render(self, messages: Messages, *, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text and, of a template with marks, the characters between each pair of them."""
        try:
            (text,), spans = render_jinja_template(
                [messages],
                chat_template=self._source,
                return_assistant_tokens_mask=self.is_marked,
                add_generation_prompt=generation_prompt,
                **self._names,
            )
        except Exception as error:  # whatever a template does when it is run
            raise ValueError(f"data: the chat template fails on {self.where}: {error}") from None
        return text, spans[0] if self.is_marked else []


def _marked_spans(messages: Messages, template: _Template, answer: int) -> tuple[str, list[Span]]:
    # Not the mask that transformers makes of them: where a token does not have the first or last character of a turn
    # (a space that it leaves out, say), that misses this turn and all after it, or counts all to the end.
    text, spans = template.render(messages)
    before, turns = (sum(message["role"] == "assistant" for message in part) for part in (messages[:answer], messages))
    if not any(start < end for start, end in spans) or (before and len(spans) != turns):
        raise ValueError(
            f"data: expected {turns} stretches of text between the template's generation marks, one for each message "
            f"of the assistant, got {len(spans)} in {template.where}"
        )
    return text, spans[before:]


def _compared_spans(messages: Messages, template: _Template, turns: Sequence[int]) -> tuple[str, list[Span]]:
    text, _ = template.render(messages)
    spans = []
    for turn in turns:
        start = _length_of_start(text, messages, turn, template, generation_prompt=True)
        spans.append((start, max(start, _length_of_start(text, messages, turn + 1, template))))
    return text, spans


def _length_of_start(
    text: str, messages: Messages, count: int, template: _Template, *, generation_prompt: bool = False
) -> int:
    """Characters that the template writes for the first ``count`` messages; an error if ``text`` starts otherwise."""
    start, _ = template.render(messages[:count], generation_prompt=generation_prompt)
    if not text.startswith(start):
        raise ValueError(
            f"data: the chat template writes the first {count} of {len(messages)} messages in {template.where} "
            "differently when others follow, so what the assistant says cannot be told; use a template with "
            "{% generation %} marks"
        )
    return len(start)
