"""Conversations to tokens and to the mask of what the assistant says; a template that cannot be trusted is refused."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from ebft_trainer.chat import chat_tokens
from ebft_trainer.demo_model import MODEL_FOLDER
from ebft_trainer.encoding import Notes
from ebft_trainer.rows import tokenize
from ebft_trainer.sources import Document

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{%- endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
#: Writes an empty thought before the last reply only, as some templates of reasoning models do.
CHANGING = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last and m.role == 'assistant' %}()\n{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def text_of(tokenizer, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("\u0120", " ").replace("\u010a", "\n")


@pytest.fixture
def said(byte_tokenizer):
    """The whole text and, for each run of counted tokens, the text of that run."""

    def run(template: str, messages: list[dict], **changes) -> tuple[str, list[str]]:
        byte_tokenizer.chat_template = template
        ids, mask = chat_tokens(messages, byte_tokenizer, **changes)
        assert len(ids) == len(mask)
        runs: list[list[int]] = []
        for i, (token, counted) in enumerate(zip(ids, mask.tolist(), strict=True)):
            if counted:
                runs = [*runs, []] if i == 0 or not mask[i - 1] else runs
                runs[-1].append(token)
        return text_of(byte_tokenizer, ids), [text_of(byte_tokenizer, run) for run in runs]

    return run


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_turns_of_the_assistant_count_to_their_end_token(said, template):
    text, runs = said(template, CHAT)
    assert text.startswith("[system]be brief<end>\n[user]hi<end>\n[assistant]yo<end>\n") and text.endswith(
        "long<end>\n"
    )
    assert runs == ["yo<end>", "so long<end>"]
    assert said(template, [*CHAT, {"role": "user", "content": "more"}])[1] == ["yo<end>", "so long<end>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_turns_of_the_completion_count(said, template):
    assert said(template, CHAT, answer=3)[1] == ["so long<end>"]


def test_without_an_end_token_a_turn_counts_to_the_next(said):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert said(template, CHAT)[1] == ["assistant: yo\n", "assistant: so long\n"]


def test_a_template_that_changes_earlier_turns_is_refused(said):
    assert said(CHANGING, CHAT[:3])[1] == ["()\nyo<end>"]  # One reply is clear.
    with pytest.raises(ValueError, match="writes the first 3 of 5 messages in here differently when others follow"):
        said(CHANGING, CHAT, where="here")


def test_a_template_whose_generation_prompt_is_not_what_replies_start_with_is_refused(said):
    with pytest.raises(ValueError, match="writes the first 2 of 3 messages in .* differently"):
        said(PLAIN.replace("}[assistant]", "}[model]"), CHAT[:3])


def test_marks_that_mark_nothing_are_refused(said):
    with pytest.raises(ValueError, match="expected 2 stretches of text between the .* marks, .*, got 0 in here"):
        marks = "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
        said(marks + "{% for m in messages %}{{ m.content }}{% endfor %}", CHAT, where="here")


def test_marks_that_cannot_be_matched_with_messages_are_refused(said):
    """Two marks in a message do not matter, unless earlier messages are not to count."""
    split = MARKED.replace("{{ m.content }}<end>{%-", "{{ m.content }}{% endgeneration %}|{% generation %}<end>{%-")
    assert said(split, CHAT)[1] == ["yo", "<end>", "so long", "<end>"]
    with pytest.raises(ValueError, match="expected 2 stretches of text between the .* marks, .*, got 4 in here"):
        said(split, CHAT, answer=3, where="here")


def test_a_conversation_is_tokenized_as_a_whole():
    """Also where a token has the end of the generation prompt and the start of the reply: it counts, and is noted."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = [{"role": "user", "content": "return"}, {"role": "assistant", "content": "self.value"}]
    notes = Notes()
    ids, mask = chat_tokens(messages, tokenizer, notes=notes)
    assert ids == tokenizer.apply_chat_template(messages)["input_ids"]
    said = [token for token, counts in zip(ids, mask.tolist(), strict=True) if counts]
    assert tokenizer.decode(said) == " self.value" + tokenizer.eos_token
    assert list(notes.values()) == [1]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (None, CHAT, "data: expected a tokenizer with a chat template for the messages in here, got none"),
        (PLAIN, CHAT[:2], "data: expected a message of the assistant to train on, got roles system, user in here"),
        (
            "{{ raise_exception('roles must alternate') }}",
            CHAT,
            "the chat template fails on here: roles must alternate",
        ),
        ("{% if %}", CHAT, "data: the chat template fails on here: "),
    ],
)
def test_errors_of_conversations(said, template, messages, message):
    with pytest.raises(ValueError, match=message):
        said(template, messages, where="here")


def test_a_turn_before_the_completion_does_not_count_alone(said):
    with pytest.raises(ValueError, match="expected a message of the assistant to train on"):
        said(PLAIN, CHAT[:4], answer=3)


def test_a_conversation_is_a_row(byte_tokenizer):
    byte_tokenizer.chat_template = PLAIN
    row = tokenize(Document("here", messages=CHAT, answer=3), byte_tokenizer)
    ids, mask = chat_tokens(CHAT, byte_tokenizer, answer=3)
    assert row["input_ids"].tolist() == ids and row["completion_mask"].tolist() == mask.tolist()
