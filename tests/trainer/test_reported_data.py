"""Faults of data that users of neighbouring projects reported, by kind: what is right here, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ebft_kernels import StridedLayout
from ebft_trainer import sources
from ebft_trainer.chat import chat_tokens
from ebft_trainer.config import EBFTOptions
from ebft_trainer.data import EBFTCollator, unpadded
from ebft_trainer.encoding import Encoded, Notes
from ebft_trainer.rows import RowStream, build_rows, split_in_two, tokenize
from ebft_trainer.sources import Document, Source, documents_of, read_documents
from ebft_trainer.texts import anchor_texts

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


# Tools: not passed on, calls dropped, arguments quoted twice or as Python shows them, content that is null

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "number"}}}}},
]
CITY = {"city": 'K\u00f6ln "am Rhein"'}


def with_call(arguments, content=None) -> list[dict]:
    return [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
    ]


def tool_template(call: str) -> str:
    return (
        "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ CONTENT }}"
        "{% for call in m.tool_calls or [] %}[{{ call.function.name }} CALL]{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    ).replace("CALL", call)


TEMPLATES = {
    "takes both": "{% set x = call.function.arguments %}{{ x if x is string else x | tojson }}",
    "takes objects": "{{ call.function.arguments | tojson }}",
    "takes JSON": "{{ '' + call.function.arguments }}",
    "takes either, and writes JSON only": "{{ call.function.arguments }}",
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("content", ["{{ m.content }}", "{{ '' + m.content }}", "{{ m.content or '' }}"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_tools_and_calls_are_written_as_json_whatever_form_the_template_takes(tmp_path, template, content, kind):
    tokenizer = with_template(TOKENIZERS["bytes"], tool_template(template).replace("{{ CONTENT }}", content))
    texts = []
    for arguments in (CITY, json.dumps(CITY, ensure_ascii=False)):
        for tools in (TOOLS, json.dumps(TOOLS)):
            record = {"messages": with_call(arguments), "tools": tools, "unread": 1}
            row = tokenize(read(tmp_path, kind, [record])[0], tokenizer)
            texts.append(tokenizer.decode(row["input_ids"]))
            said = tokenizer.decode(row["input_ids"][row["completion_mask"]])
            called = '{"city": "K\u00f6ln \\"am Rhein\\""}'
            assert said == f"[weather {called}]</s>It is sunny.</s>"
    assert len(set(texts)) == 1
    assert texts[0].startswith("".join(json.dumps(tool) + "\n" for tool in TOOLS) + "<user>weather?</s><assistant>[")


def read(folder, kind: str, records: list[dict]) -> list[Document]:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        pytest.importorskip("datasets").Dataset.from_list(records).to_parquet(path)
    return list(Source([path]))


def test_fields_that_a_table_fills_in_are_not_there(tmp_path):
    """Objects in a table have the fields of all others, with nothing in them."""
    other = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    chats = [with_call(CITY), [CHAT[1], {"role": "assistant", "content": None, "tool_calls": [other]}], CHAT]
    records = [
        {"messages": messages, "tools": tools} for messages, tools in zip(chats, (TOOLS, TOOLS[1:], None), strict=True)
    ]
    documents = read(tmp_path, "parquet", records)
    assert [document.tools for document in documents] == [TOOLS, TOOLS[1:], None]
    assert [document.messages for document in documents] == [bare(messages) for messages in chats]


def test_tools_beside_a_prompt_and_a_completion_of_messages(tmp_path):
    messages = with_call(CITY)
    tokenizer = with_template(
        TOKENIZERS["bytes"], tool_template(TEMPLATES["takes both"]).replace("{{ CONTENT }}", "{{ m.content }}")
    )
    (pair,) = read(tmp_path, "jsonl", [{"prompt": messages[:3], "completion": messages[3:], "tools": TOOLS}])
    row = tokenize(pair, tokenizer)
    assert tokenizer.decode(row["input_ids"][row["completion_mask"]]) == "It is sunny.</s>"
    assert row["input_ids"].tolist() == tokenizer.apply_chat_template(messages, tools=TOOLS)["input_ids"]


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (PLAIN, CHAT, TOOLS, "expected a chat template that writes tools, got one that leaves out 'weather' of here"),
        (PLAIN, with_call(CITY), None, "the chat template leaves out the call of 'weather' in message 1 in here"),
        (
            tool_template("{{ '{' ~ call.function.arguments ~ '}' }}").replace("{{ CONTENT }}", ""),
            with_call(CITY)[1:2],
            None,
            "does not write the arguments of 'weather' in message 0 of here as JSON",
        ),
        (
            PLAIN.replace("[{{ m", "{% if m.role != 'system' %}[{{ m").replace("\n", "\n{% endif %}"),
            CHAT,
            None,
            "the chat template leaves out message 0, of the system, in here",
        ),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", CHAT, None, "the chat template fails on here: "),
        ("{{ messages[9].content.x }}", CHAT, None, "the chat template fails on here: "),
    ],
)
def test_a_template_that_leaves_something_out_or_fails_is_refused(template, messages, tools, message):
    messages = bare(messages)
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        chat_tokens(messages, with_template(TOKENIZERS["bytes"], template), tools=tools, where="here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": [{"type": "image", "url": "x"}]}, "to be of type 'text' in message 0, got one of type 'image' in"),
        ({"content": [{"type": "text", "text": "a"}, "b"]}, "of type 'text' in message 0, got str in .*line 1"),
        ({"content": []}, "expected 'content' as a string in message 0, got no part in .*line 1"),
        ({"content": {"parts": []}}, "expected 'content' as a string .*, got dict in .*line 1"),
        ({"content": None}, "expected 'content' as a string .*, got NoneType in .*line 1"),
        ({"content": None, "tool_calls": []}, "expected 'content' as a string .*, got NoneType in .*line 1"),
        (
            {"tool_calls": "weather"},
            "expected 'tool_calls' in message 0 as a list of functions with a 'name' each, got 'wea",
        ),
        (
            {"tool_calls": [{"function": {"arguments": {}}}]},
            "'tool_calls' in message 0 as a list of functions with a 'name'",
        ),
    ],
)
def test_content_that_is_no_text_is_refused_by_its_type(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "jsonl", [{"messages": [{"role": "user", **fields}]}])


@pytest.mark.parametrize("tools", ["[{", "{}", "weather", 3, [{"type": "function"}], [{"function": {"name": 1}}]])
def test_tools_that_are_no_functions_are_refused(tmp_path, tools):
    with pytest.raises(
        ValueError, match=r"data: expected ('tools' as a list of functions with|JSON, got .*'tools', ).*line 1"
    ):
        read(tmp_path, "jsonl", [{"messages": CHAT, "tools": tools}])


# Start and end of a text twice: written in it, and put around it by the tokenizer or the trainer


def with_ends() -> PreTrainedTokenizerFast:
    tokenizer = metaspace("first")
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer._tokenizer.post_processor = ends
    return tokenizer


@pytest.mark.parametrize("tokenizer", [TOKENIZERS["metaspace-first"], with_ends()], ids=["start", "start and end"])
@pytest.mark.parametrize("text", ["the cat", "<s>the cat", "the cat</s>", "<s>the cat</s></s>"])
def test_a_text_starts_and_ends_once(tokenizer, text):
    bare = tokenizer(text.replace("<s>", "").replace("</s>", ""), add_special_tokens=False)["input_ids"]
    found = tokenize(Document("", text=text), tokenizer)["input_ids"].tolist()
    assert (found[0], found[-1]) == (1, 2) and found.count(1) == found.count(2) == 1
    assert text.startswith("<s>") or found[1:-1] == bare
    start, said = text[: text.index("cat")], text[text.index("cat") :]
    row = tokenize(Document("", prompt=start, completion=said), tokenizer)
    assert row["input_ids"].tolist() == found
    assert tokenizer.decode(row["input_ids"][row["completion_mask"]]) == "cat</s>"


def test_an_end_inside_a_text_stays():
    tokenizer = with_ends()
    row = tokenize(Document("", prompt="the</s>", completion="cat"), tokenizer)
    assert row["input_ids"].tolist() == tokenizer("the</s>cat")["input_ids"]
    assert tokenizer.decode(row["input_ids"][row["completion_mask"]]) == "cat</s>"


def test_a_template_that_ends_a_turn_with_another_token_than_the_tokenizers_end_has_it_counted():
    """And nothing behind it is added: the end of the turn is what the model must learn to write."""
    tokenizer = of_bytes()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|turn|>\n{% endfor %}"
    tokenizer = with_template(tokenizer, template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    ids, mask = chat_tokens(CHAT, tokenizer)
    said = CHAT[2]["content"] + "<|turn|>\n" + CHAT[4]["content"] + "<|turn|>\n"
    assert tokenizer.decode(torch.tensor(ids)[mask]) == said and tokenizer.eos_token_id not in ids


# A large file in pieces: a space before each


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_a_text_have_the_tokens_of_the_whole(tmp_path, monkeypatch, name):
    tokenizer = TOKENIZERS[name]
    text = "the cat said\nhello to the dog\nbye, so long\n" * 9
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(sources, "_PIECE", 40)
    documents = read_documents([tmp_path / "a.txt"])
    assert len(documents) > 5
    ids = torch.cat([tokenize(document, tokenizer)["input_ids"] for document in documents])
    if name == "joined":  # Its tokens have ends of lines inside of them.
        assert tokenizer.decode(ids[1:-1]).replace("\n ", "\n") == text
    else:
        assert ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


# Special tokens that somebody types in a message; rows that are cut off; both were silent


def test_special_tokens_that_are_typed_and_rows_that_are_cut_off_are_reported(caplog):
    tokenizer = with_template(TOKENIZERS["bytes"], PLAIN.replace("] ", "]\n"))
    typed = [{"role": "user", "content": "hi</s>\n[assistant] yes"}, CHAT[2]]
    pair = Document("", prompt="the cat", completion=" said hello" * 40)
    documents = [Document("", messages=CHAT), Document("", messages=typed), pair]
    build_rows(documents, tokenizer, OPTIONS, length=50)
    assert {record.message for record in caplog.records} == {
        "data: 1 messages say special tokens of the tokenizer, which are read as these tokens",
        "data: 2 prompts with completions or conversations were longer than a row and are cut off",
    }


def test_a_row_whose_completion_was_cut_off_is_left_out():
    """Nothing in it counts: a loss of nothing is no number, or 0."""
    documents = [Document("", prompt="the cat " * 30, completion="said hello"), Document("", text="hello " * 30)]
    rows, left_out = build_rows(documents, TOKENIZERS["bytes"], OPTIONS, length=20)
    assert left_out >= 1 and all("completion_mask" not in row for row in rows)


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_do_nothing():
    tokenizer = of_bytes()
    tokenizer._tokenizer.enable_truncation(4)
    tokenizer._tokenizer.enable_padding(length=64)
    for document in (Document("", text="the cat said hello"), Document("", prompt="the cat", completion=" said hello")):
        ids = tokenize(document, tokenizer)["input_ids"]
        assert tokenizer.decode(ids) == "<s>the cat said hello</s>"


# Rows that others have packed: without their documents, each would see the ones before it


@pytest.mark.parametrize("columns", [{"seq_lengths": [5, 7]}, {"position_ids": [*range(5), *range(7)]}])
def test_documents_of_rows_that_were_packed_elsewhere_do_not_see_each_other(tmp_path, columns):
    row = {"input_ids": list(range(1, 13)), **columns}
    expected = EBFTCollator(OPTIONS)([{"input_ids": row["input_ids"], "document_ids": [0] * 5 + [1] * 7}])
    (document,) = read(tmp_path, "jsonl", [row])
    for found in (row, document.tokens, tokenize(document, TOKENIZERS["bytes"])):
        batch = EBFTCollator(OPTIONS)([found])
        assert torch.equal(batch["document_ids"], expected["document_ids"])
        assert torch.equal(batch["layout"].anchors, expected["layout"].anchors)
    everything = {**row, "seq_lengths": [5, 7], "document_ids": [3] * 5 + [1] * 7}
    assert unpadded(everything)["document_ids"].tolist() == [3] * 5 + [1] * 7
    assert set(unpadded({"input_ids": [4, 5], "position_ids": [0, 1], "seq_lengths": [2]})) == {"input_ids"}
    padded = {"input_ids": [0, 4, 5], "attention_mask": [0, 1, 1], "position_ids": [1, 0, 1]}
    assert set(unpadded(padded)) == {"input_ids"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"seq_lengths": [2, 1]}, r"seq_lengths: expected lengths with the sum 4, as in input_ids, got \[2, 1\]"),
        ({"seq_lengths": [4, 0]}, "seq_lengths: expected lengths with the sum 4"),
        ({"position_ids": [0, 1, 3, 4]}, "position_ids: expected 0, .* or one more than before, got 3 at token 2"),
        ({"position_ids": [1, 2, 3, 4]}, "position_ids: expected 0, .*, got 1 at token 0"),
        ({"position_ids": [0, 1]}, "position_ids: expected 4 numbers as in input_ids"),
        (
            {"position_ids": [0, 1, 0, 1], "document_ids": [0, 1, 1, 1]},
            "position_ids: expected the documents that document_ids has, got another edge at token 1",
        ),
        ({"completion_mask": [0.0, 0.5, 1.0, 1.0]}, r"completion_mask: expected integers, got \[0.0, 0.5"),
        ({"labels": [None, 2, 3, 4]}, r"labels: expected integers, got \[None, 2"),
        ({"document_ids": "aabb"}, "document_ids: expected integers, got 'aabb'"),
        ({"document_ids": 3}, "document_ids: expected integers, got 3"),
    ],
)
def test_columns_that_say_no_documents_or_no_integers_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        unpadded({"input_ids": [1, 2, 3, 4], **columns})


def test_token_ids_are_not_rounded():
    """A column with something missing becomes one of floating point in many tables."""
    with pytest.raises(ValueError, match=r"input_ids: expected integers, got \[1.0, 2.5\]"):
        unpadded({"input_ids": [1.0, 2.5]})
    assert unpadded({"input_ids": []})["input_ids"].tolist() == []


# The same document trained on and held out


def test_equal_documents_are_not_divided():
    documents = [Document(f"line {i}", text=f"text {i // 4}") for i in range(40)]
    pairs = [Document(f"row {i}", prompt=f"{i % 5}", completion="c") for i in range(20)]
    rows = [{"input_ids": torch.tensor([i % 7, 1])} for i in range(21)]
    for items, content in (
        (documents, lambda x: x.text),
        (pairs, lambda x: x.prompt),
        (rows, lambda x: int(x["input_ids"][0])),
    ):
        for seed in range(5):
            train, held_out = split_in_two(items, 0.2, seed=seed)
            assert train and held_out and len(train) + len(held_out) == len(items)
            assert not {content(x) for x in train} & {content(x) for x in held_out}
    with pytest.raises(ValueError, match="eval_fraction: expected at least 2 rows or documents .*, got 3 equal ones"):
        split_in_two(documents[:3], 0.5)


# Files: two fields of one name, of which one is read; bytes that are no text; lines that end where none ends


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a", "text": "b"}',
            "expected different names in an object, got 'text' twice in .*line 1",
        ),
        (
            "a.json",
            b'[{"text": "a", "x": {"b": 1, "b": 2}}]',
            "different names in an object, got 'b' twice in .*a.json",
        ),
        ("a.csv", b"text,text\na,b\n", "expected different names of columns, got 'text' twice in .*a.csv, line 1"),
        ("a.txt", "ab\n".encode("utf-16-le"), "expected text in UTF-8, got a zero byte at offset 1 of '.*a.txt'"),
        ("a.txt", "\u20ac".encode() * 30 + b"\0", "expected text in UTF-8, got a zero byte at offset 90 of"),
        ("a.txt", "ab\n".encode("utf-16"), "expected UTF-8, got byte 0xff at offset 0 of"),
        ("a.csv", b"text\na\0b\n", "expected text in UTF-8, got a zero byte at offset 6 of"),
        ("a.jsonl", b'{"text": "a"}\0', "data: expected JSON, got Extra data at column 14"),
    ],
)
def test_files_that_are_not_what_they_seem_are_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(sources, "_PIECE", 40)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data: .*{message}" if not message.startswith("data") else message):
        read_documents([tmp_path / name])


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_only_where_lines_end(tmp_path, ends, mark):
    """Not at the other characters that some functions take for an end; a mark of the order of bytes is no text."""
    texts = ["a\u2028b\u2029c\x85d\x0ce\x1cf", "null", "NA", "None", "1", " ", "\ufeffx"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text(mark + ends.join(lines), encoding="utf-8", newline="")
    assert [document.text for document in read_documents([tmp_path / "a.jsonl"])] == texts
    table = ["text", *(f'"{text}"' for text in texts)]
    (tmp_path / "a.csv").write_text(mark + ends.join(table), encoding="utf-8", newline="")
    assert [document.text for document in read_documents([tmp_path / "a.csv"])] == texts
    (tmp_path / "a.txt").write_text(mark + texts[0] + ends, encoding="utf-8", newline="")
    assert read_documents([tmp_path / "a.txt"])[0].text == texts[0] + ends


def test_a_line_of_many_megabytes_is_one_document(tmp_path):
    text = "word " * 2**20
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "b"}))
    assert [document.text for document in read_documents([tmp_path / "a.jsonl"])] == [text, "b"]


def test_values_of_tables_keep_their_types(tmp_path):
    """Categories are texts; what is no text or no whole number is named, and of two columns none is dropped."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = arrow.array(["a", "b", "a"])
    path = tmp_path / "a.parquet"
    for values in (column.dictionary_encode(), column.cast(arrow.large_string())):
        parquet.write_table(arrow.table({"text": values}), path)
        assert [document.text for document in read_documents([path])] == ["a", "b", "a"]
    for table, message in (
        ({"text": arrow.array([b"a"])}, "expected 'text' as a string, got bytes in .*row 0"),
        ({"text": arrow.array([1])}, "expected 'text' as a string, got int in .*row 0"),
        ({"input_ids": arrow.array([[1.0, 2.0]])}, "expected 'input_ids' as a list of token ids in .*row 0"),
        ({"input_ids": arrow.array([[1, None]])}, "expected 'input_ids' as a list of token ids in .*row 0"),
        ({"input_ids": arrow.array([[True]])}, "expected 'input_ids' as a list of token ids in .*row 0"),
        (
            {"messages": arrow.array([{"role": ["user"], "content": ["a"]}])},
            "as a list of messages, got dict in .*row 0",
        ),
    ):
        parquet.write_table(arrow.table(table), path)
        with pytest.raises(ValueError, match=message):
            read_documents([path])
    parquet.write_table(arrow.Table.from_arrays([column, column], names=["text", "text"]), path)
    with pytest.raises(ValueError, match="expected different names of columns, got 'text' twice in .*a.parquet"):
        read_documents([path])


def test_thoughts_that_a_template_leaves_out_are_reported():
    tokenizer, thought = TOKENIZERS["bytes"], {"reasoning_content": "hm"}
    messages = [CHAT[1], CHAT[2] | thought]
    for template, count in ((PLAIN, 1), (PLAIN.replace("{{ m.content", "{{ m.reasoning_content }}{{ m.content"), 0)):
        notes = Notes()
        chat_tokens(messages, with_template(tokenizer, template.replace("] ", "]\n")), notes=notes)
        assert notes.total() == count


def test_fields_that_a_data_set_in_memory_fills_in_are_not_there():
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": with_call(CITY), "tools": TOOLS}, {"messages": CHAT, "tools": TOOLS[1:]}]
    found = list(documents_of(datasets.Dataset.from_list(rows)))
    assert found == list(documents_of([{**row, "messages": bare(row["messages"])} for row in rows]))
    assert [document.tools for document in found] == [TOOLS, TOOLS[1:]]


def bare(messages: list[dict]) -> list[dict]:
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


# Texts of parts: a lost space, a character cut in two that is shown as a replacement in one part and whole in the other


@each_tokenizer
def test_prompt_and_target_are_the_text_itself(tokenizer):
    text = "the cat said  hello caf\u00e9 \ufb01 \ud55c \U0001f600 to\n\n the dog. so , long"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    length = ids.shape[1]
    layout = StridedLayout.from_anchors(torch.arange(1, length - 3)[None], length, horizon=3, samples=1)
    found = list(anchor_texts(tokenizer, ids, layout.windows(ids)[:, :, None], layout))
    assert len(found) == length - 4
    for number, texts in enumerate(found, 1):
        whole = tokenizer.decode(ids[0, : number + 3], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert texts.prompt + texts.target == whole and texts.completions == [texts.target]
        assert "\ufffd" not in texts.prompt
