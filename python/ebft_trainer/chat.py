"""Conversations through the tokenizer's chat template, with a mask of the tokens that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]


def chat_tokens(
    messages: Messages, tokenizer: Any, *, answer: int = 0, where: str = "messages"
) -> tuple[list[int], Tensor]:
    """Token ids [T] of a conversation and the mask [T] bool of what the assistant says in it.

    A template with ``{% generation %}`` marks says itself what that is. With any other, a turn is the text that the
    template puts behind the messages before it and the generation prompt, up to and including the end-of-text token if
    the turn has one. That is only right if the template never changes what it has already written, which is checked.
    Text before and in such a turn is tokenized apart, as it is when the model is to reply.

    Args:
        messages: with ``role`` and ``content`` each.
        tokenizer: of transformers, with a chat template.
        answer: number of the first message that may count.
        where: names the conversation in errors.

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
    try:
        if _MARKS.search(tokenizer.get_chat_template()):
            return _marked_tokens(messages, tokenizer, answer, where)
        return _compared_tokens(messages, tokenizer, turns, where)
    except TemplateError as error:
        raise ValueError(f"data: the chat template fails on {where}: {error}") from None


def _marked_tokens(messages: Messages, tokenizer: Any, answer: int, where: str) -> tuple[list[int], Tensor]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    mask = torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    starts = torch.cat([mask[:1], mask[1:] & ~mask[:-1]]).nonzero()[:, 0]
    before, turns = (sum(message["role"] == "assistant" for message in part) for part in (messages[:answer], messages))
    if len(starts) == 0 or (before and len(starts) != turns):
        raise ValueError(
            f"data: expected {turns} runs of tokens between the template's generation marks, one for each message of "
            f"the assistant, got {len(starts)} in {where}"
        )
    mask[: int(starts[before])] = False
    return encoded["input_ids"], mask


def _compared_tokens(messages: Messages, tokenizer: Any, turns: Sequence[int], where: str) -> tuple[list[int], Tensor]:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    edges = [0]
    for turn in turns:
        edges.append(_length_of_start(text, messages, turn, tokenizer, where, generation_prompt=True))
        edges.append(max(edges[-1], _length_of_start(text, messages, turn + 1, tokenizer, where)))
    ids: list[int] = []
    mask: list[bool] = []
    for number, (start, end) in enumerate(zip(edges, [*edges[1:], len(text)], strict=True)):
        part = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"] if start < end else []
        said = len(part) if number % 2 else 0
        if said and tokenizer.eos_token_id in part:
            said -= part[::-1].index(tokenizer.eos_token_id)
        ids += part
        mask += [True] * said + [False] * (len(part) - said)
    return ids, torch.tensor(mask, dtype=torch.bool)


def _length_of_start(
    text: str, messages: Messages, count: int, tokenizer: Any, where: str, *, generation_prompt: bool = False
) -> int:
    """Characters that the template writes for the first ``count`` messages; an error if ``text`` starts otherwise."""
    start = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=generation_prompt)
    if not text.startswith(start):
        raise ValueError(
            f"data: the chat template writes the first {count} of {len(messages)} messages in {where} differently when "
            "others follow, so what the assistant says cannot be told; use a template with {% generation %} marks"
        )
    return len(start)
