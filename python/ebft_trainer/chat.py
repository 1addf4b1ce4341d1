"""Conversations through the tokenizer's chat template, with a mask of the tokens that the assistant says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from .encoding import Encoded, Notes
from .sources import function_of

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_UNSAID = "messages have thoughts that the chat template leaves out"
_SPECIAL = "messages say special tokens of the tokenizer, which are read as these tokens"

Messages = list[dict[str, Any]]
Span = tuple[int, int]


def chat_tokens(
    messages: Messages,
    tokenizer: Any,
    *,
    answer: int = 0,
    tools: list[dict[str, Any]] | None = None,
    where: str = "messages",
    notes: Notes | None = None,
) -> tuple[list[int], Tensor]:
    """Token ids [T] of a conversation and the mask [T] bool of what the assistant says in it.

    The ids are those of the text that the template writes, as a whole. A template with ``{% generation %}`` marks says
    itself what the assistant says. With any other, a turn is the text that the template puts behind the messages before
    it and the generation prompt, up to and including the end-of-text token if the turn has one. That is only right if
    the template never changes what it has already written, which is checked.

    Templates differ in whether they take the arguments of tool calls as objects or as JSON, and a message of calls with
    no or with empty content. The first form is taken that the template writes, with arguments as JSON.

    Args:
        messages: with ``role`` and ``content`` each; of a message with ``tool_calls`` the content may be missing.
        tokenizer: of transformers, a fast one, with a chat template.
        answer: number of the first message that may count.
        tools: JSON schemas of the functions that the assistant may call.
        where: names the conversation in errors.
        notes: counts what is no error but should be known, each under a sentence.

    Raises:
        ValueError: no template, an error in it or in the conversation, no counted turn, a template that changes earlier
            turns, or leaves out a message, a tool or a call.
    """
    notes = Notes() if notes is None else notes
    if tokenizer.chat_template is None:
        raise ValueError(f"data: expected a tokenizer with a chat template for the messages in {where}, got none")
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= answer]
    if not turns:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"data: expected a message of the assistant to train on, got roles {roles} in {where}")
    template = _Template(tokenizer, tools, where)
    messages, text, spans = _written(messages, template)
    if template.is_marked:
        spans = _check_marks(messages, spans, template, answer)
    else:
        spans = _compared_spans(messages, text, template, turns)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    if injected := sum(any(x in message.get("content", "") for x in special) for message in messages):
        notes[_SPECIAL] += injected
    thoughts = (message[name] for message in messages for name in _THOUGHTS if isinstance(message.get(name), str))
    if unsaid := sum(thought.strip() not in text for thought in thoughts):
        notes[_UNSAID] += unsaid
    encoded = Encoded(text, tokenizer, special=False, where=where)
    mask = torch.zeros(len(encoded.ids), dtype=torch.bool)
    for start, end in spans:
        first, last = encoded.tokens_of(start, end, notes)
        said = encoded.ids[first:last]
        if not template.is_marked and tokenizer.eos_token_id in said:
            last -= said[::-1].index(tokenizer.eos_token_id)
        mask[first:last] = True
    return encoded.ids, mask


class _Template:
    """The tokenizer's chat template; an error in it names the conversation."""

    def __init__(self, tokenizer: Any, tools: list[dict[str, Any]] | None, where: str) -> None:
        self._source, self._names = tokenizer.get_chat_template(tools=tools), tokenizer.special_tokens_map
        self.tools, self.where = tools, where
        self.is_marked = _MARKS.search(self._source) is not None

    def render(
        self, messages: Messages, *, generation_prompt: bool = False, tools: list[dict[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """The text and, of a template with marks, the characters between each pair of them."""
        try:
            (text,), spans = render_jinja_template(
                [messages],
                tools=self.tools if tools is None else tools,
                chat_template=self._source,
                return_assistant_tokens_mask=self.is_marked,
                add_generation_prompt=generation_prompt,
                **self._names,
            )
        except Exception as error:  # whatever a template does when it is run
            raise ValueError(f"data: the chat template fails on {self.where}: {error}") from None
        return text, spans[0] if self.is_marked else []


def _written(messages: Messages, template: _Template) -> tuple[Messages, str, list[Span]]:
    """The messages in a form in which the template writes all of them, its text, and what is between its marks."""
    failure: Exception | None = None
    for candidate in _forms(messages):
        try:
            text, spans = template.render(candidate)
            _check_nothing_is_left_out(candidate, text, template)
            return candidate, text, spans
        except ValueError as error:
            failure = failure or error
    raise failure


def _forms(messages: Messages) -> Iterator[Messages]:
    conversions = (_as_object, _as_json) if any("tool_calls" in message for message in messages) else (_as_object,)
    defaults = ({}, {"content": ""}) if any("content" not in message for message in messages) else ({},)
    for convert, default in itertools.product(conversions, defaults):
        yield [default | _with_arguments(message, convert) for message in messages]


def _with_arguments(message: dict[str, Any], convert: Any) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = function_of(call)
        if "arguments" in function:
            function = function | {"arguments": convert(function["arguments"])}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls}


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _check_nothing_is_left_out(messages: Messages, text: str, template: _Template) -> None:
    """What a template leaves out, it writes the same without: each part is changed to see whether the text does."""
    if template.tools and _writes(messages, text, template, tools=[_renamed(tool) for tool in template.tools]):
        raise ValueError(
            "data: expected a chat template that writes tools, got one that leaves out "
            f"{function_of(template.tools[0])['name']!r} of {template.where}"
        )
    for number, message in enumerate(messages):
        what, changes = f"message {number}, of the {message['role']},", []
        if message.get("content", "").strip() not in text:
            changes.append((what, {"content": message["content"] + " changed"}))
        for call in message.get("tool_calls", ()):
            function = function_of(call)
            if not _is_json_in(text, function.get("arguments")):
                raise ValueError(
                    f"data: the chat template does not write the arguments of {function['name']!r} in message "
                    f"{number} of {template.where} as JSON"
                )
            changes.append(
                (
                    f"the call of {function['name']!r} in message {number}",
                    {"tool_calls": [_renamed(x) if x is call else x for x in message["tool_calls"]]},
                )
            )
        for what, change in changes:
            if _writes([*messages[:number], message | change, *messages[number + 1 :]], text, template):
                raise ValueError(f"data: the chat template leaves out {what} in {template.where}")


def _renamed(described: dict[str, Any]) -> dict[str, Any]:
    function = function_of(described) | {"name": function_of(described)["name"] + "_changed"}
    return described | {"function": function} if "function" in described else function


def _is_json_in(text: str, arguments: Any) -> bool:
    """Not so if they are in quotes once more, in braces once more, or an object as Python shows it."""
    if isinstance(arguments, str):
        return arguments in text and "{" + arguments + "}" not in text
    return not arguments or str(arguments) not in text


def _writes(messages: Messages, text: str, template: _Template, tools: list[dict[str, Any]] | None = None) -> bool:
    try:
        return template.render(messages, tools=tools)[0] == text
    except ValueError:
        return False


def _check_marks(messages: Messages, spans: list[Span], template: _Template, answer: int) -> list[Span]:
    """Those of what is between the template's marks that count."""
    # Not the mask that transformers makes of them: where a token does not have the first or last character of a turn
    # (a space that it leaves out, say), that misses this turn and all after it, or counts all to the end.
    before, turns = (sum(message["role"] == "assistant" for message in part) for part in (messages[:answer], messages))
    if not any(start < end for start, end in spans) or (before and len(spans) != turns):
        raise ValueError(
            f"data: expected {turns} stretches of text between the template's generation marks, one for each message "
            f"of the assistant, got {len(spans)} in {template.where}"
        )
    return spans[before:]


def _compared_spans(messages: Messages, text: str, template: _Template, turns: Sequence[int]) -> list[Span]:
    spans = []
    for turn in turns:
        start = _length_of_start(text, messages, turn, template, generation_prompt=True)
        spans.append((start, max(start, _length_of_start(text, messages, turn + 1, template))))
    return spans


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
