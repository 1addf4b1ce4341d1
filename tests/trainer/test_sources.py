"""Names to documents, and an error for each way in which that can fail."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import tracemalloc

import pytest

from ebft_trainer import sources
from ebft_trainer.sources import Columns, Document, Source, read_documents


def test_text_files_folders_and_json_lines_are_read_in_a_fixed_order(tmp_path):
    (tmp_path / "notes.log").write_text("named, so read\r\n", newline="", encoding="utf-8")
    code = tmp_path / "code"
    for name, text in {
        "b.py": "b",
        "a.txt": "\ufeffa",
        "c.bin": "no",
        "sub/d.md": "d",
        ".git/e.py": "no",
        "f.py": " \n",
    }.items():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text(text, encoding="utf-8")
    lines = [
        {"text": "t", "source": "ignored"},
        {"input_ids": [1, 2], "completion_mask": [0, 1]},
        {"prompt": "p", "completion": "c"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    documents = read_documents([tmp_path / "notes.log", code, str(tmp_path / "rows.jsonl")])
    assert [d.text for d in documents] == ["named, so read\r\n", "a", "b", "d", "t", None, None]
    assert documents[5].tokens == {"input_ids": [1, 2], "completion_mask": [0, 1]}
    assert (documents[6].prompt, documents[6].completion) == ("p", "c")
    assert documents[6].where.endswith("rows.jsonl, line 5")
    assert [d.text for d in read_documents([code], extensions=[".md", ".bin"])] == ["no", "d"]


def test_a_path_must_exist(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="data: expected a file or folder, got '.*gone.txt', which does not exist"
    ):
        read_documents([tmp_path / "gone.txt"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "data: expected text, got '.*a.txt', which is empty"),
        ("a.jsonl", b"\n", "data: expected text, got '.*a.jsonl', which is empty"),
        ("a.txt", b"ab\xffcd", "data: expected UTF-8, got byte 0xff at offset 2 of '.*a.txt'"),
        ("a.jsonl", b'{"text": "\xe9"}', "data: expected UTF-8, got byte 0xe9 at offset 10 of '.*a.jsonl'"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "data: expected JSON, got .* at column 8 of .*a.jsonl, line 2"),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\xff', "got byte 0xff at offset 17 of '.*a.jsonl'"),
        ("a.jsonl", b'["text"]', "data: expected a JSON object, got list in .*a.jsonl, line 1"),
        ("a.jsonl", b"{}", "data: expected an object with 'text', 'messages', .*, got no field in .*line 1"),
        ("a.jsonl", b'{"txt": "a"}', "data: expected an object with 'text', .*, got 'txt' in .*line 1"),
        ("a.jsonl", b'{"prompt": "a"}', "data: expected an object with .*, got 'prompt' in .*line 1"),
        ("a.jsonl", b'{"text": "a", "input_ids": [1]}', "got 'text', 'input_ids' in .*a column option says which"),
        ("a.jsonl", b'{"text": "a", "completion_mask": [1]}', "data: expected an object with .*'completion_mask' in"),
        ("a.jsonl", b'{"text": 5}', "data: expected 'text' as a string, got int in .*line 1"),
        ("a.jsonl", b'{"prompt": "a", "completion": null}', "data: expected 'completion' as a string, got NoneType in"),
        ("a.jsonl", b'{"input_ids": "abc"}', "data: expected 'input_ids' as a list of token ids in .*line 1"),
        ("a.jsonl", b'{"input_ids": [1, -1]}', "data: expected 'input_ids' as a list of token ids in .*line 1"),
        (
            "a.jsonl",
            b'{"input_ids": [1, 2], "completion_mask": [1]}',
            "data: expected 'completion_mask' with 2 entries, 0 or 1 each, in .*line 1",
        ),
        ("a.jsonl", b'{"input_ids": [1], "attention_mask": [2]}', "'attention_mask' with 1 entries, 0 or 1 each, in"),
        ("a.jsonl", b'{"input_ids": [1], "document_ids": ["a"]}', "'document_ids' with 1 integers, in .*line 1"),
        ("a.jsonl", b'{"messages": "hello"}', "data: expected 'messages' as a list of messages, got str in .*line 1"),
        ("a.jsonl", b'{"messages": []}', "data: expected 'messages' as a list of messages, got list in .*line 1"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}',
            "expected 'content' as a string in message 0, got NoneType in",
        ),
        (
            "a.jsonl",
            b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
            "data: expected 'completion' as a list of messages, got str in .*line 1",
        ),
        ("a.jsonl", b'{"prompt": "a", "completion": [{"role": "user", "content": "a"}]}', "'completion' as a string"),
        ("a.parquet", b"PAR1", "data: cannot read '.*a.parquet' as Parquet: "),
    ],
)
def test_errors_of_reading(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / name])


def test_a_folder_must_hold_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"a")
    with pytest.raises(ValueError, match=r"data: expected files ending in .* in folder '.*', got none"):
        read_documents([tmp_path])
    (tmp_path / "a.py").write_bytes(b"\n")
    with pytest.raises(ValueError, match="data: expected text, got '.*', which is empty"):
        read_documents([tmp_path])


@pytest.fixture
def piece(monkeypatch):
    """Text files are cut into documents of 40 bytes and the rest of the line."""
    monkeypatch.setattr(sources, "_PIECE", 40)
    return 40


def test_a_large_text_file_is_read_in_pieces(tmp_path, piece):
    lines = ["\u20ac" * (i % 9) + f"{i}\r\n" for i in range(60)] + ["\U0001f600" * 77]
    text = "".join(lines)
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8", newline="")
    documents = read_documents([tmp_path / "a.txt"])
    assert "".join(document.text for document in documents) == text
    assert [d.starts for d in documents] == [True] + [False] * (len(documents) - 1)
    assert [d.ends for d in documents] == [False] * (len(documents) - 1) + [True]
    # Pieces end with a line, but where a line is longer than a piece.
    assert [d.text[-1] for d in documents if "\U0001f600" not in d.text] == ["\n"] * (len(documents) - 4)
    assert max(len(d.text.encode()) for d in documents) <= 2 * piece


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82"])
def test_the_offset_of_what_is_not_text_counts_from_the_start_of_the_file(tmp_path, bad):
    raw = "\u20ac".encode() * 61 + bad
    (tmp_path / "a.txt").write_bytes(raw)
    documents = iter(Source([tmp_path / "a.txt"]))
    with pytest.raises(ValueError, match=f"got byte {bad[0]:#04x} at offset {61 * 3} of"):
        list(documents)


@pytest.mark.usefixtures("piece")
def test_documents_are_read_when_they_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 5 + "no JSON\n")
    (tmp_path / "b.txt").write_bytes(b"line\n" * 100 + b"\xff")
    for name, good in (("a.jsonl", 5), ("b.txt", 5)):
        documents = iter(Source([tmp_path / name]))
        for _ in range(good):
            next(documents)
        with pytest.raises(ValueError, match=r"expected JSON, got .* line 6|got byte 0xff at offset 500"):
            list(documents)


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("name", ["one.txt", "many.jsonl", "many.parquet"])
def test_reading_a_large_file_takes_little_memory(tmp_path, name):
    text, count = "x" * 399, 3_000
    if name == "one.txt":
        (tmp_path / name).write_text(f"{text}\n" * count)
    else:
        write(tmp_path, name.removeprefix("many."), [{"text": text}] * count).rename(tmp_path / name)
    source = Source([tmp_path / name])
    assert next(iter(source)).text  # imports what it needs
    tracemalloc.start()
    found = sum(len(document.text.replace("\n", "")) for document in source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == len(text) * count and peak < found / 4


# Columns


def conversation(question: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


RECORDS = [
    {
        "prompt": f"p{i}",
        "completion": f"c{i}",
        "body": f"t{i}",
        "chat": conversation(f"q{i}", f"a{i}"),
        "score": i,
    }
    for i in range(3)
]
CHOICES = [
    (Columns(), [Document("", prompt=f"p{i}", completion=f"c{i}") for i in range(3)]),
    (Columns(text="body"), [Document("", text=f"t{i}") for i in range(3)]),
    (Columns(prompt="body"), [Document("", prompt=f"t{i}", completion=f"c{i}") for i in range(3)]),
    (Columns(messages="chat"), [Document("", messages=conversation(f"q{i}", f"a{i}")) for i in range(3)]),
]


def write(folder, kind: str, records: list[dict]):
    """The records in one of the formats for tables."""
    datasets = pytest.importorskip("datasets") if kind != "jsonl" else None
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize(("columns", "expected"), CHOICES)
def test_columns_by_name_in_every_format(tmp_path, kind, columns, expected):
    found = read_documents([write(tmp_path, kind, RECORDS)], columns=columns)
    assert [dataclasses.replace(document, where="") for document in found] == expected
    row = {"jsonl": "line 2"}.get(kind, "row 1")
    assert found[1].where == f"{tmp_path / f'data.{kind}'}, {row}"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_missing_columns_are_named_with_what_is_there(tmp_path, kind):
    path = write(tmp_path, kind, RECORDS)
    where = r"data\.\w+" + (", line 1" if kind == "jsonl" else "")
    there = "'prompt', 'completion', 'body', 'chat', 'score'"
    with pytest.raises(ValueError, match=f"data: expected an object with 'content', got {there} in .*{where}$"):
        read_documents([path], columns=Columns(text="content"))
    with pytest.raises(ValueError, match="data: expected an object with 'question' and 'completion', got 'prompt', "):
        read_documents([path], columns=Columns(prompt="question"))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_token_ids_and_missing_values_in_tables(tmp_path, kind):
    """A table has every column in every row; None stands for what a row does not have."""
    rows = [
        {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "completion_mask": None, "document_ids": [0, 0, 1]},
        {"input_ids": [7, 8], "attention_mask": None, "completion_mask": [0, 1], "document_ids": None},
    ]
    found = read_documents([write(tmp_path, kind, rows)])
    assert [d.tokens for d in found] == [{k: v for k, v in row.items() if v is not None} for row in rows]
    chats = [{"messages": [{"role": "user", "content": "a"}]}]
    chats += [{"messages": [{"role": "user", "content": "a", "name": "b"}]}]
    (tmp_path / "chats").mkdir()
    found = read_documents([write(tmp_path / "chats", kind, chats)])
    assert [d.messages for d in found] == [chat["messages"] for chat in chats]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_wrong_values_in_tables_name_their_row(tmp_path, kind):
    path = write(tmp_path, kind, [{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match="data: expected 'text' as a string, got NoneType in .*, row 1"):
        read_documents([path])


def test_prompts_and_completions_may_be_messages(tmp_path):
    prompt, completion = conversation("q", "a")[:1], conversation("q", "a")[1:]
    path = write(tmp_path, "jsonl", [{"prompt": prompt, "completion": completion}])
    (document,) = read_documents([path])
    assert (document.messages, document.answer) == (prompt + completion, 1)


def test_columns_of_several_kinds_are_refused():
    with pytest.raises(ValueError, match="text_column, messages_column: expected columns of one kind"):
        Columns(text="a", messages="b")


# Data sets


def test_parquet_files_in_folders_are_read(tmp_path):
    write(tmp_path, "parquet", RECORDS)
    (tmp_path / "z.txt").write_text("text")
    assert len(read_documents([tmp_path])) == 4


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_table_without_rows_is_empty(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": []})
    path = tmp_path / f"data.{kind}"
    table.to_parquet(path) if kind == "parquet" else table.save_to_disk(path)
    with pytest.raises(ValueError, match=f"data: (expected text, got|cannot load) '.*data.{kind}'"):
        read_documents([path])


def test_a_damaged_data_set_is_one_clear_error(tmp_path):
    path = write(tmp_path, "saved", RECORDS)
    (path / "data-00000-of-00001.arrow").write_bytes(b"no table")
    with pytest.raises(ValueError, match="data: cannot load '.*data.saved': "):
        read_documents([path])


def test_of_several_saved_splits_one_must_be_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match="expected one split, got '.*both' with train, test: give .*both/train"):
        read_documents([tmp_path / "both"])
    assert len(read_documents([tmp_path / "both" / "train"])) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub:owner/name", ("owner/name", None, "train", None)),
        ("hub:name,split=test[:10%]", ("name", None, "test[:10%]", None)),
        ("hub:name,config=de,revision=v1", ("name", "de", "train", "v1")),
    ],
)
def test_names_on_the_hub(monkeypatch, name, expected):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(repository, config, *, split, revision):
        asked.append((repository, config, split, revision))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read_documents([name])
    assert asked == [expected] and len(documents) == 3 and documents[2].where == f"{name}, row 2"


def test_a_hub_that_cannot_be_reached_is_one_clear_error():
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="data: cannot load 'hub:nobody/nothing': Couldn't reach 'nobody/nothing'"):
        read_documents(["hub:nobody/nothing"])


@pytest.mark.parametrize("name", ["hub:", "hub:a,split", "hub:a,split=", "hub:a,subset=b"])
def test_bad_hub_names(name):
    with pytest.raises(ValueError, match=r"data: expected 'hub:NAME\[,config=C\].*', got 'hub:"):
        read_documents([name])


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_without_datasets_the_error_names_the_extra(tmp_path, monkeypatch, kind):
    name = "hub:owner/name" if kind == "hub" else write(tmp_path, kind, RECORDS)
    for module in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'ebft-kernels\[datasets\]'"):
        read_documents([name])
    assert read_documents([write(tmp_path, "jsonl", RECORDS)])


def test_text_needs_no_other_package(tmp_path):
    """Reading text and JSON lines imports neither datasets nor what it brings along."""
    (tmp_path / "a.txt").write_text("text")
    write(tmp_path, "jsonl", RECORDS)
    code = (
        "import sys, importlib.util as util\n"
        f"spec = util.spec_from_file_location('sources', {sources.__file__!r})\n"
        "sys.modules['sources'] = module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"assert len(module.read_documents([{str(tmp_path)!r}])) == 4\n"
        "assert not {'datasets', 'pyarrow', 'pandas', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Records under other names than .jsonl: read as plain text, braces and all would be trained on.

PAIRS = [{"prompt": "2+2=", "completion": '4, "four"'}, {"prompt": "a\nb", "completion": "c"}]


@pytest.mark.parametrize("name", ["x.json", "x.JSON", "lines.json", "x.ndjson", "x.JSONL", "x.csv", "x.TSV"])
def test_records_are_read_whatever_the_name(tmp_path, name):
    path = tmp_path / name
    if name.endswith(("csv", "TSV")):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if name.endswith("csv") else "\t")
            writer.writeheader()
            writer.writerows(PAIRS)
    elif name in ("x.json", "x.JSON"):
        path.write_text(json.dumps(PAIRS, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, PAIRS)))
    documents = read_documents([path])
    assert [{"prompt": x.prompt, "completion": x.completion} for x in documents] == PAIRS
    if name in ("x.ndjson", "x.JSONL"):
        assert read_documents([tmp_path]) == documents


def test_one_object_is_one_document_and_labels_stay(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"input_ids": [1, 2], "labels": [-100, 2], "assistant_masks": [0, 1]}))
    assert read_documents([path])[0].tokens == {"input_ids": [1, 2], "labels": [-100, 2], "assistant_masks": [0, 1]}


def test_content_in_parts_of_text_is_joined(tmp_path):
    path = tmp_path / "x.jsonl"
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert read_documents([path])[0].messages == [{"role": "user", "content": "Hello, world"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.gz", "", r"data: expected an unpacked file, got '.*x\.jsonl\.gz'"),
        ("x.json", "[1]", "data: expected a JSON object, got int in .*x.json, record 0"),
        (
            "x.json",
            '[\n{"text": "a"},\n\n{"text" 1}]',
            "data: expected JSON, got Expecting ':' delimiter at line 4 of .*x.json",
        ),
        ("x.csv", "text\na,b\n", "data: expected 1 fields as in the header, in .*x.csv, line 2"),
        ("x.csv", "prompt,completion\na\n", "data: expected 2 fields as in the header, in .*x.csv, line 2"),
        ("x.csv", 'text\n"a" b\n', "data: expected a table, got .* in .*x.csv, line 2"),
        ("x.csv", "input_ids\n1\n", "data: expected 'input_ids' as a list of token ids in .*x.csv, line 2"),
        (
            "x.jsonl",
            '{"text": "\\ud800"}',
            "expected text, got a lone surrogate .* at character 0 of 'text' in .*line 1",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "a\\udfff"}]}',
            "data: expected text, got a lone surrogate .* at character 1 of 'messages, message 0' in .*line 1",
        ),
        ("x.jsonl", "[" * 100_000, "data: expected JSON, got too deep nesting or too long a number in .*line 1"),
        ("x.jsonl", '{"input_ids": [' + "1" * 5000 + "]}", "got too deep nesting or too long a number in .*line 1"),
        ("x.jsonl", '{"input_ids": [2147483648]}', "data: expected 'input_ids' as a list of token ids in .*line 1"),
    ],
)
def test_records_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents([tmp_path / name])
