"""Conversations through the tokenizer's chat template, with a mask of the tokens that the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, answer: int = 0, where: str = "messages"
) -> tuple[list[int], Tensor]:
    """Token ids [T] of a conversation and the mask [T] bool of what the assistant says in it.

    A template with ``{% generation %}`` marks says itself what that is. With any other, a turn is what the template
    puts behind the messages before it and the generation prompt, up to and including the end-of-text token if the
    turn has one. That is only right if the template never changes what it has already written, which is checked.

    Args:
        messages: with ``role`` and ``content`` each.
        tokenizer: of transformers, with a chat template.
        answer: number of the first message whose turn counts.
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
            return _marked_tokens(messages, tokenizer, turns[0] if answer else 0, where)
        return _compared_tokens(messages, tokenizer, turns, where)
    except TemplateError as error:
        raise ValueError(f"data: the chat template fails on {where}: {error}") from None


def _marked_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, first_turn: int, where: str
) -> tuple[list[int], Tensor]:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], torch.tensor(encoded["assistant_masks"], dtype=torch.bool)
    if first_turn:
        mask[: _common_start(messages, first_turn, ids, tokenizer, where, generation_prompt=True)] = False
    if not mask.any():
        raise ValueError(f"data: expected tokens between the template's generation marks, got none in {where}")
    return ids, mask


def _compared_tokens(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, turns: Sequence[int], where: str
) -> tuple[list[int], Tensor]:
    ids = _apply(messages, tokenizer)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for turn in turns:
        start = _common_start(messages, turn, ids, tokenizer, where, generation_prompt=True)
        end = _common_start(messages, turn + 1, ids, tokenizer, where)
        spoken = ids[start:end]
        if tokenizer.eos_token_id in spoken:
            end -= spoken[::-1].index(tokenizer.eos_token_id)
        mask[start:end] = True
    return ids, mask


def _common_start(
    messages: Sequence[Mapping[str, Any]],
    count: int,
    ids: list[int],
    tokenizer: Any,
    where: str,
    *,
    generation_prompt: bool = False,
) -> int:
    """How many of the conversation's tokens the first ``count`` messages are; an error if they are not its start."""
    start = _apply(messages[:count], tokenizer, generation_prompt=generation_prompt) if count < len(messages) else ids
    if ids[: len(start)] != start:
        raise ValueError(
            f"data: the chat template writes the first {count} of {len(messages)} messages in {where} differently when "
            "others follow, so what the assistant says cannot be told; use a template with {% generation %} marks"
        )
    return len(start)


def _apply(messages: Sequence[Mapping[str, Any]], tokenizer: Any, *, generation_prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=generation_prompt, return_dict=True
    )["input_ids"]
