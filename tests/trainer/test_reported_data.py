"""Faults of data that users of neighbouring projects reported, by kind: what is right here, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ebft_trainer.chat import chat_tokens
from ebft_trainer.config import EBFTOptions
from ebft_trainer.encoding import Encoded, Notes
from ebft_trainer.rows import RowStream, build_rows, tokenize
from ebft_trainer.sources import Document, Source

OPTIONS = EBFTOptions(context=2, stride=2, horizon=2, samples=2)

CORPUS = [
    "the cat said hello to the dog 2+2=4 abc\n[INST] user [/INST] assistant: 4 abc [system] be brief\n",
    "a  b   c caf\u00e9 \ufb01 \ud55c \U0001f600 yes so long bye for now, then\n",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def finished(tokenizer: Tokenizer, size: int, **options) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = tokenizer.post_processor
    tokenizer.post_processor = start if own is None else processors.Sequence([own, start])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def metaspace(prepend: str) -> PreTrainedTokenizerFast:
    """Words that begin with the space before them, one of which is put before the text, or before each part of it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    return finished(tokenizer, 300)


def joined() -> PreTrainedTokenizerFast:
    """The same by a normalizer and without words, so that tokens may have spaces anywhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replaced = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(replaced)
    return finished(tokenizer, 300, max_token_length=6)


def of_bytes(*, trimmed: bool = False, words: bool = True, normalizer=None) -> PreTrainedTokenizerFast:
    """Tokens of bytes; ``trimmed``: their offsets leave the spaces out."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed, add_prefix_space=False)
    return finished(tokenizer, 400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


TOKENIZERS = {
    "metaspace-first": metaspace("first"),
    "metaspace-always": metaspace("always"),
    "joined": joined(),
    "bytes": of_bytes(),
    "trimmed": of_bytes(trimmed=True),
    "trimmed-joined": of_bytes(trimmed=True, words=False),
    "nfkc": of_bytes(normalizer=normalizers.NFKC()),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def lengths(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """Of each token, by its name: bytes, or characters where a prepended space is one more."""
    return [0 if token == tokenizer.bos_token_id else len(tokenizer.convert_ids_to_tokens(token)) for token in ids]


# Parts of a text tokenized apart: a space is put between prompt and completion, and tokens are others than at inference


@each_tokenizer
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("2+2=", "4 abc"),
        ("2+2=", " 4 abc"),
        ("2+2= ", "4 abc"),
        ("2+2=  ", "  4 abc"),
        ("the ca", "t said"),
        ("the cat\n", "\n\nsaid "),
        ("", "hello"),
        ("hello", ""),
        ("hello ", "dog"),
    ],
)
def test_a_prompt_and_its_completion_are_tokenized_as_one_text(tokenizer, prompt, completion):
    row = tokenize(Document("here", prompt=prompt, completion=completion), tokenizer)
    whole = tokenizer(prompt + completion)["input_ids"]
    assert row["input_ids"].tolist() == [*whole, tokenizer.eos_token_id]
    assert tokenizer.decode(row["input_ids"][1:-1]) == prompt + completion
    sizes = lengths(tokenizer, whole)
    cut = sum(sizes) - len(completion) if prompt else 0  # a prepended space belongs to what follows
    ends = list(itertools.accumulate(sizes))
    assert row["completion_mask"].tolist() == [end > cut for end in ends] + [True]


@pytest.mark.parametrize("name", ["metaspace-first", "metaspace-always", "bytes", "trimmed"])
def test_a_token_across_the_start_of_a_completion_counts_and_is_reported(name, tmp_path, caplog):
    tokenizer = TOKENIZERS[name]
    path = tmp_path / "pairs.jsonl"
    pairs = [("the cat ", "said hello to the dog"), ("the cat", " said hello to the dog"), ("the ", "cat said hello")]
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    rows, _ = build_rows(Source([path]), tokenizer, OPTIONS, length=40)
    for row, (_, completion) in zip(rows, pairs, strict=True):
        counted = row["input_ids"][row["completion_mask"]]
        assert tokenizer.decode(counted).strip() == completion.strip() + "</s>"
    assert [record.message for record in caplog.records] == [
        "data: 2 tokens have characters on both sides of the start or end of what counts: they count"
    ]
    caplog.clear()
    stream = RowStream(Source([path]), tokenizer, OPTIONS, length=40, shuffle_buffer=1)
    for row, other in zip(itertools.islice(stream, 6), rows * 2, strict=True):
        assert all(torch.equal(row[column], other[column]) for column in row)
    assert len(caplog.records) == 1  # of the first pass


# Offsets without the spaces of a token, or of a text that is normalized first


def test_offsets_without_spaces_are_those_with_them():
    texts = ["2+2= 4 abc ", "a  b \n c  ", " the  cat ", "caf\u0065\u0301 \ufb01 x \ud55c\U0001f600</s> dog", " ", ""]
    for words in (True, False):
        whole, trimmed = of_bytes(words=words), of_bytes(trimmed=True, words=words)
        for text in texts:
            one, other = (Encoded(text, x, special=False, where="") for x in (whole, trimmed))
            assert one.ids == other.ids
            assert (one._starts, one._ends) == (other._starts, other._ends)


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD"])
def test_normalization_does_not_move_the_start_of_a_completion(form):
    tokenizer = of_bytes(normalizer=getattr(normalizers, form)())
    prompt, completion = "\ufb01 caf\u0065\u0301 \u2460 caf\u00e9", " hello\ufb01"
    row = tokenize(Document("", prompt=prompt, completion=completion), tokenizer)
    said = tokenizer.decode(row["input_ids"][row["completion_mask"]])
    assert said == (" hellofi" if form == "NFKC" else " hello\ufb01") + "</s>"


# Conversations: other tokens than the template's own, turns that begin with a lone space, masks that are wrong

PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{%- endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2+2="},
    {"role": "assistant", "content": "4 abc"},
    {"role": "user", "content": "bye "},
    {"role": "assistant", "content": "so long, bye\n\nfor now"},
]
MESSAGES = {
    "two turns": CHAT,
    "no system": CHAT[1:3],
    "spaces": [CHAT[1], {**CHAT[2], "content": "\n the cat"}, CHAT[3], {**CHAT[2], "content": "a "}],
    "empty": [*CHAT[:2], {"role": "assistant", "content": ""}, *CHAT[3:]],
}


def with_template(tokenizer, template: str):
    tokenizer.chat_template = template
    return tokenizer


@each_tokenizer
@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_a_conversation_is_what_its_template_makes_of_it(tokenizer, messages):
    expected = with_template(tokenizer, MARKED).apply_chat_template(messages, return_assistant_tokens_mask=True)
    found = {}
    for template in (PLAIN, MARKED):
        ids, mask = chat_tokens(messages, with_template(tokenizer, template))
        assert ids == tokenizer.apply_chat_template(messages)["input_ids"] == expected["input_ids"]
        found[template] = mask.tolist()
    assert found[PLAIN] == found[MARKED]
    if tokenizer not in (TOKENIZERS["trimmed"], TOKENIZERS["trimmed-joined"]):  # its own mask is wrong, see below
        assert found[MARKED] == [bool(counts) for counts in expected["assistant_masks"]]


@each_tokenizer
def test_turns_of_a_stream_are_those_of_the_template(tokenizer, tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in MESSAGES.values()))
    stream = RowStream(Source([path]), with_template(tokenizer, PLAIN), OPTIONS, length=300, shuffle_buffer=1)
    for row, messages in zip(stream, MESSAGES.values(), strict=False):
        assert row["input_ids"].tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("name", ["bytes", "trimmed"])
def test_a_turn_that_begins_or_ends_with_a_space_does_not_lose_the_mask(name):
    """Where no token has the first character, the turn and all after it are lost; the last: all counts to the end."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}|{{ m.content }}|{% endif %}{% endfor %}"
    )
    tokenizer = with_template(TOKENIZERS[name], template)
    say = [{"role": role, "content": text} for role, text in (("assistant", "a"), ("user", "the cat"))]
    for content in (" the cat", "the cat ", " "):
        ids, mask = chat_tokens([*say, {"role": "assistant", "content": content}, *say[::-1]], tokenizer)
        assert tokenizer.decode(torch.tensor(ids)[mask]) == "a" + content + "a"


def test_a_special_token_that_takes_in_the_spaces_around_it_is_not_said():
    tokenizer = of_bytes()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|assistant|>", rstrip=True, special=True)]})
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{{ eos_token }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    for content in ("hello", "\nhello"):
        messages = [{"role": "user", "content": "bye"}, {"role": "assistant", "content": content}]
        ids, mask = chat_tokens(messages, with_template(tokenizer, template), notes=(notes := Notes()))
        assert tokenizer.decode(torch.tensor(ids)[mask]) == "hello</s>" and not notes


@pytest.mark.parametrize("kind", ["pair", "chat"])
def test_a_tokenizer_without_offsets_is_refused_where_a_part_counts(kind):
    tokenizer = with_template(ByT5Tokenizer(), PLAIN)
    document = Document("here", messages=CHAT) if kind == "chat" else Document("here", prompt="a", completion="b")
    with pytest.raises(ValueError, match="data: expected a fast tokenizer, .* counts in here, got ByT5Tokenizer"):
        tokenize(document, tokenizer)
    assert len(tokenize(Document("here", text="abc"), tokenizer)["input_ids"]) == 4
