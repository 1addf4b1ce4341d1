"""Documents to rows, all at once and as a stream, and an error for each way in which that can fail."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from ebft_trainer.config import EBFTOptions
from ebft_trainer.rows import RowStream, build_rows, cut_rows, split_in_two, tokenize
from ebft_trainer.sources import Document, Source

OPTIONS = EBFTOptions(context=3, stride=2, horizon=2, samples=2)
END = 256


def byte_tokenizer(*, eos: str | None = "<end>", bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, ``<end>`` = 256; with ``bos`` it also leads every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, model_max_length=4)


def test_tokens_of_each_kind_of_document():
    plain, leading = byte_tokenizer(), byte_tokenizer(bos=True)
    a, b, c = plain("abc")["input_ids"]
    assert tokenize(Document("x", text="abc"), plain)["input_ids"].tolist() == [a, b, c, END]
    assert tokenize(Document("x", text="abc"), byte_tokenizer(eos=None))["input_ids"].tolist() == [a, b, c]
    assert tokenize(Document("x", tokens={"input_ids": [5, 6]}), plain)["input_ids"].tolist() == [5, 6]
    row = tokenize(Document("x", prompt="ab", completion="c"), leading)
    assert row["input_ids"].tolist() == [END, a, b, c, END]
    assert row["completion_mask"].tolist() == [False, False, False, True, True]
    row = tokenize(Document("x", tokens={"input_ids": [5, 6], "completion_mask": [0, 1]}), plain)
    assert row["completion_mask"].tolist() == [False, True]


def test_given_tokens_lose_their_padding():
    tokens = {"input_ids": [0, 0, 5, 6, 7], "attention_mask": [0, 0, 1, 1, 1], "document_ids": [0, 0, 1, 2, 2]}
    row = tokenize(Document("x", tokens=tokens), byte_tokenizer())
    assert {name: column.tolist() for name, column in row.items()} == {
        "input_ids": [5, 6, 7],
        "document_ids": [1, 2, 2],
    }


def test_special_tokens_stand_only_where_a_text_starts_and_ends():
    """Of a text that is read in pieces, the middle has none, whatever the tokenizer adds by itself."""
    leading = byte_tokenizer(bos=True)
    a, b = leading("ab", add_special_tokens=False)["input_ids"]
    for starts, ends, expected in (
        (True, True, [END, a, b, END]),
        (True, False, [END, a, b]),
        (False, False, [a, b]),
        (False, True, [a, b, END]),
    ):
        row = tokenize(Document("x", text="ab", starts=starts, ends=ends), leading)
        assert row["input_ids"].tolist() == expected


def test_texts_are_cut_to_rows_and_short_ones_are_left_out_and_counted():
    documents = [
        Document("a", text="x" * 19),
        Document("b", text="yy"),
        Document("c", prompt="zzzz", completion="z" * 9),
    ]
    rows, left_out = build_rows(documents, byte_tokenizer(), OPTIONS, length=8)
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 8]
    assert ["completion_mask" in row for row in rows] == [False, False, True]
    assert left_out == 2  # the last 4 tokens of a, and b
    joined = torch.cat([row["input_ids"] for row in rows[:2]])
    assert torch.equal(joined, tokenize(documents[0], byte_tokenizer())["input_ids"][:16])


def test_packed_rows_are_full_and_know_their_documents():
    documents = [Document("a", text="x" * 9), Document("b", text="y" * 6), Document("c", text="z" * 2)]
    rows, left_out = build_rows(documents, byte_tokenizer(), OPTIONS, length=8, pack=True)
    assert [row["document_ids"].tolist() for row in rows] == [[0] * 8, [0, 0] + [1] * 6]
    assert left_out == 1  # the end of b with c: no window fits
    assert END in rows[1]["input_ids"].tolist()


def test_completions_are_packed_whole():
    """In rows of their own, apart from texts; one that is longer than a row is cut off."""
    sizes = (3, 4, 6, 2, 12)
    rows = [
        {"input_ids": torch.arange(size) + 10 * i, "completion_mask": torch.arange(size) > 0}
        for i, size in enumerate(sizes)
    ]
    texts = [{"input_ids": torch.arange(5) + 100}, {"input_ids": torch.arange(5) + 200}]
    packed = list(cut_rows([rows[0], texts[0], *rows[1:], texts[1]], 8, pack=True))
    assert [row["input_ids"].tolist() for row in packed] == [
        [0, 1, 2, 10, 11, 12, 13],
        [20, 21, 22, 23, 24, 25, 30, 31],
        [40, 41, 42, 43, 44, 45, 46, 47],
        [100, 101, 102, 103, 104, 200, 201, 202],
        [203, 204],
    ]
    assert packed[1]["document_ids"].tolist() == [0] * 6 + [1] * 2
    assert packed[1]["completion_mask"].tolist() == [False, *[True] * 5, False, True]
    assert "completion_mask" not in packed[-1]


def test_rows_that_were_packed_already_are_packed_and_cut_with_their_documents():
    row = {"input_ids": torch.arange(6), "document_ids": torch.tensor([7, 7, 3, 3, 3, 7])}
    packed = list(cut_rows([row, row], 8, pack=True))
    assert [r["document_ids"].tolist() for r in packed] == [[0, 0, 1, 1, 1, 2, 3, 3], [0, 0, 0, 1]]
    cut = list(cut_rows([row], 4))
    assert [r["document_ids"].tolist() for r in cut] == [[7, 7, 3, 3], [3, 7]]


def test_a_row_does_not_keep_its_document_in_memory():
    for pack in (False, True):
        for row in cut_rows([{"input_ids": torch.arange(1000)}], 10, pack=pack):
            assert row["input_ids"].untyped_storage().nbytes() == 80


@pytest.mark.parametrize(
    ("documents", "length", "message"),
    [
        ([Document("a", text="x" * 9)], 4, r"length: expected at least context \+ horizon = 3 \+ 2 tokens, got 4"),
        ([Document("a", text="x")], 8, "data: expected rows with 3 tokens .*, got 1 rows and none with room"),
        (
            [Document("a", tokens={"input_ids": []})],
            8,
            "data: expected rows with 3 tokens .*, got 0 rows and none with room",
        ),
        ([Document("here", tokens={"input_ids": [1, 257]})], 8, "data: expected token ids below 257, got 257 in here"),
        (
            [Document("here", tokens={"input_ids": [1] * 3, "attention_mask": [1, 0, 1]})],
            8,
            r"data: attention_mask: expected zeros .* got \[1, 0, 1\] in here",
        ),
    ],
)
def test_errors_of_building_rows(documents, length, message):
    with pytest.raises(ValueError, match=message):
        build_rows(documents, byte_tokenizer(), OPTIONS, length=length)


def test_the_split_is_a_partition_that_the_seed_decides():
    items = list(range(50))
    train, held_out = split_in_two(items, 0.1, seed=3)
    assert sorted(train + held_out) == items and len(held_out) == 5 and train == sorted(train)
    assert split_in_two(items, 0.1, seed=3) == (train, held_out) != split_in_two(items, 0.1, seed=4)
    assert [len(part) for part in split_in_two([1, 2], 0.9)] == [1, 1]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_a_split_needs_a_fraction(fraction):
    with pytest.raises(ValueError, match=f"eval_fraction: expected a number between 0 and 1, got {fraction}"):
        split_in_two([1, 2, 3], fraction)


def test_a_split_needs_two_items():
    with pytest.raises(ValueError, match="eval_fraction: expected at least 2 rows or documents to divide, got 1"):
        split_in_two([1], 0.5)


# Streams


def numbered(tmp_path, count: int) -> Source:
    """Documents whose number is in their tokens."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"input_ids": [i % 250, i // 250] * 3}) + "\n" for i in range(count)))
    return Source([path])


def stream_of(source, **changes) -> RowStream:
    return RowStream(source, byte_tokenizer(), OPTIONS, **({"length": 8, "shuffle_buffer": 16} | changes))


def number_of(row) -> int:
    return int(row["input_ids"][..., 0]) + 250 * int(row["input_ids"][..., 1])


def test_a_pass_over_a_stream_is_the_rows_of_the_documents(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 30)
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.jsonl").write_text('{"prompt": "question", "completion": "reply"}\n' * 3)
    source = Source([tmp_path])
    for pack in (False, True):
        expected, _ = build_rows(source, byte_tokenizer(), OPTIONS, length=8, pack=pack)
        stream = stream_of(source, shuffle_buffer=1, pack=pack)
        for row, other in zip(itertools.islice(stream, 2 * len(expected)), expected * 2, strict=True):
            assert row.keys() == other.keys() and all(torch.equal(row[name], other[name]) for name in row)


def test_each_pass_has_every_row_once_in_an_order_that_the_seed_decides(tmp_path):
    source = numbered(tmp_path, 300)
    first, second = ([number_of(row) for row in itertools.islice(stream_of(source, seed=seed), 600)] for seed in (0, 1))
    assert sorted(first[:300]) == sorted(first[300:]) == sorted(second[:300]) == list(range(300))
    assert first[:300] != first[300:] and first != second
    torch.manual_seed(7)
    random.seed(7)
    assert [number_of(row) for row in itertools.islice(stream_of(source), 600)] == first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_and_workers_share_the_rows(tmp_path, ranks, workers):
    """In one pass every row is read by one worker of one rank; pass after pass in the same way."""
    stream = stream_of(numbered(tmp_path, 240))
    seen = []
    for _ in range(2):
        of_ranks = []
        for rank in range(ranks):
            loader = DataLoader(
                stream, batch_size=4, num_workers=workers, collate_fn=lambda rows: [number_of(row) for row in rows]
            )
            loader = prepare_data_loader(loader, num_processes=ranks, process_index=rank, dispatch_batches=False)
            of_ranks.append([x for batch in itertools.islice(loader, 60 // ranks) for x in batch])
        seen.append(of_ranks)
    assert seen[0] == seen[1]
    assert sorted(x for rank in seen[0] for x in rank) == list(range(240))


def test_workers_without_a_share_end(tmp_path):
    stream = stream_of(numbered(tmp_path, 1))
    loader = DataLoader(stream, batch_size=None, num_workers=2, collate_fn=number_of)
    assert list(itertools.islice(loader, 3)) == [0, 0, 0]


@pytest.mark.parametrize("pack", [False, True])
def test_a_stream_reads_no_further_than_it_must(pack):
    """Its shuffle buffer, and the rows that are checked together: what is in memory does not grow with the data."""
    read = 0

    def documents():
        nonlocal read
        for i in range(10**9):
            read += 1
            yield Document(f"{i}", tokens={"input_ids": [i % 250] * 8})

    class Endless:
        def __iter__(self):
            return documents()

    stream = stream_of(Endless(), pack=pack)
    read = 0
    for count, _ in enumerate(itertools.islice(stream, 500), 1):
        assert read <= count + 16 + 64


def test_errors_of_a_stream_name_the_line_when_it_is_read(tmp_path):
    source = numbered(tmp_path, 200)
    path = source.names[0]
    path.write_text(path.read_text() + '{"text": 5}\n')
    rows = iter(stream_of(source, shuffle_buffer=1))
    assert number_of(next(rows)) == 0
    with pytest.raises(ValueError, match="data: expected 'text' as a string, got int in .*rows.jsonl, line 201"):
        list(rows)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("word " * 9, {"length": 4}, r"length: expected at least context \+ horizon = 3 \+ 2 tokens, got 4"),
        ("word " * 9, {"shuffle_buffer": 0}, "shuffle_buffer: expected at least 1, got 0"),
        ("w", {}, "data: expected rows with 3 tokens before an anchor and a window of 2 tokens after it, got none"),
        (" ", {}, "data: expected text, got '.*a.txt', which is empty"),
    ],
)
def test_errors_of_making_a_stream(tmp_path, text, changes, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        stream_of(Source([tmp_path / "a.txt"]), **changes)
