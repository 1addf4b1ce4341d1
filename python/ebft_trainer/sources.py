"""From names of files, folders and data sets to documents, one after the other and without holding them all.

Text is UTF-8. Plain text and JSON lines need nothing but Python; Parquet files and data sets need the package
``datasets`` (``pip install "ebft-kernels[datasets]"``).
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

EXTENSIONS = tuple(
    ".c .cc .cpp .cs .cu .cuh .go .h .hpp .java .jl .js .jsonl .kt .lua .md .ndjson .parquet .php .py .r .rb .rs .rst "
    ".scala .sh .sql .swift .tex .ts .txt".split()
)
HUB = "hub:"
#: What rows of token ids may have beside ``input_ids``.
ROW_COLUMNS = (
    *("completion_mask", "attention_mask", "document_ids", "assistant_masks", "labels"),
    *("position_ids", "seq_lengths"),
)
#: Beside messages: JSON schemas of the functions that may be called.
TOOLS = "tools"

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z")
_PIECE = 2**20  # bytes of a text file that are one document; no line is cut that is not longer
_BATCH = 256


@dataclass(frozen=True)
class Document:
    """One text, prompt-completion pair, conversation or list of token ids; ``where`` is for error messages.

    Attributes:
        text: plain text; of a file that is read in pieces, one piece.
        starts, ends: whether the text's first and last characters are those of the file.
        prompt, completion: plain text.
        messages: ``[{"role": ..., "content": ...}, ...]``.
        answer: number of the message that the completion starts with; assistant turns from there on count.
        tools: JSON schemas of the functions that the assistant may call.
        tokens: a row: ``input_ids`` and what else there is to say about them.
    """

    where: str
    text: str | None = None
    starts: bool = True
    ends: bool = True
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    answer: int = 0
    tools: list[dict[str, Any]] | None = None
    tokens: dict[str, list[int]] | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns (fields of a JSON line) hold what. None: the usual name, told by which columns are there.

    With a name given, only the kind of data that it belongs to is read, whatever other columns there are.

    Raises:
        ValueError: names for more than one kind of data.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        if self._given() and len(self._kinds()) > 1:
            options = ", ".join(f"{name}_column" for name in self._given())
            raise ValueError(f"{options}: expected columns of one kind: text, prompt and completion, or messages")

    def _given(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def _kinds(self) -> list[dict[str, str]]:
        """For each kind of data that is looked for, the column of each of its parts."""
        kinds = (("text",), ("messages",), ("prompt", "completion"), ("input_ids",))
        given = set(self._given())
        return [
            {part: getattr(self, part, None) or part for part in kind}
            for kind in kinds
            if not given or given & set(kind)
        ]

    def find(self, present: Iterable[str], where: str) -> dict[str, str]:
        """The column of each part of the one kind of data that is there, and what else is read beside it.

        Raises:
            ValueError: there is no kind, or half of one, or several; two columns have one name.
        """
        present = list(present)
        _check_names(present, where)
        found = [kind for kind in self._kinds() if set(kind.values()) & set(present)]
        whole = len(found) == 1 and set(found[0].values()) <= set(present)
        masks = {name: name for name in ROW_COLUMNS if name in present}
        of_tokens = whole and "input_ids" in found[0]
        if not whole or (not self._given() and "completion_mask" in masks and not of_tokens):
            got = ", ".join(map(repr, present)) or "no field"
            hint = "; a column option says which to read" if len(found) > 1 else ""
            raise ValueError(f"data: expected an object with {self._expected()}, got {got} in {where}{hint}")
        beside = masks if of_tokens else {TOOLS: TOOLS} if TOOLS in present and "text" not in found[0] else {}
        return found[0] | beside

    def _expected(self) -> str:
        kinds = [" and ".join(map(repr, kind.values())) for kind in self._kinds()]
        return kinds[0] if len(kinds) == 1 else f"{', '.join(kinds[:-1])} or {kinds[-1]} (with or without masks)"


@dataclass(frozen=True)
class Source:
    """The documents of files, folders and data sets, in a fixed order; iterating reads them anew and lazily.

    A name is a path, or ``hub:NAME`` with ``,config=C``, ``,split=S`` (train) and ``,revision=R`` behind it for a data
    set on the Hugging Face hub. By its ending, in whatever case, a file is JSON lines (``.jsonl``, ``.ndjson``), JSON
    (``.json``: an array of objects, one object, or lines of them), a table with a header (``.csv``, ``.tsv``), Parquet
    (``.parquet``) or plain text. Packed files are refused.
    A folder that ``Dataset.save_to_disk`` wrote is a data set; in other folders all files with ``extensions`` are
    read, but no hidden folders and no empty files. A file that is named itself is read whatever its ending.

    A text file is one document; of a larger one, each mebibyte up to the end of a line. A JSON line or row of a data
    set is a document: text, a conversation, a prompt-completion pair (strings, or lists of messages) or token ids.

    Attributes:
        names: paths and hub names.
        columns: where a JSON line or a row holds what.
        extensions: of the files that are read in folders; None: `EXTENSIONS`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: while iterating, naming file and byte, line or row: nothing to read, text that is not UTF-8, a line
            that is not JSON, columns missing or of another type, a data set that cannot be loaded.
    """

    names: Sequence[str | os.PathLike[str]]
    columns: Columns = Columns()
    extensions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in map(str, self.names):
            if not name.startswith(HUB) and not Path(name).exists():
                raise FileNotFoundError(f"data: expected a file or folder, got {name!r}, which does not exist")

    def __iter__(self) -> Iterator[Document]:
        for name in map(str, self.names):
            empty = True
            for document in self._read(name):
                empty = False
                yield document
            if empty:
                raise ValueError(f"data: expected text, got {name!r}, which is empty")

    def _read(self, name: str) -> Iterator[Document]:
        if name.startswith(HUB):
            return self._data_set(name, _load_published(name))
        path = Path(name)
        if not path.is_dir():
            return self._read_file(path)
        _refuse_splits(path)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return self._data_set(name, _load_saved(name))
        return (document for file in self.files_of(name) for document in self._read_file(file))

    def files_of(self, name: str) -> list[Path]:
        """The files behind one of ``names``, in the order in which they are read; none for a data set on the hub.

        Raises:
            ValueError: a folder without any.
        """
        path = Path(name)
        if name.startswith(HUB):
            return []
        if not path.is_dir():
            return [path]
        _refuse_splits(path)
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return _files(path, ("",))
        extensions = EXTENSIONS if self.extensions is None else tuple(self.extensions)
        files = _files(path, extensions)
        if not files:
            raise ValueError(f"data: expected files ending in {' '.join(extensions)} in folder {name!r}, got none")
        return files

    def _read_file(self, path: Path) -> Iterator[Document]:
        kind = path.suffix.lower()
        if kind in _PACKED:
            raise ValueError(f"data: expected an unpacked file, got {str(path)!r}")
        if kind == ".parquet":
            return self._parquet(path)
        if kind in (".jsonl", ".ndjson"):
            records = ((where, _parsed(where, line)) for where, line in _lines(path))
        elif kind == ".json":
            records = _json_records(path)
        elif kind in _DELIMITERS:
            records = _table_records(path, _DELIMITERS[kind])
        else:
            return _text_documents(path)
        return (self._recorded(where, record) for where, record in records)

    def _recorded(self, where: str, record: Any) -> Document:
        if not isinstance(record, dict):
            raise ValueError(f"data: expected a JSON object, got {type(record).__name__} in {where}")
        return _document(where, record, self.columns.find(record, where))

    def _parquet(self, path: Path) -> Iterator[Document]:
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise _missing_datasets(str(path)) from None
        number = 0
        try:
            with ParquetFile(path) as file:
                columns = self.columns.find(file.schema_arrow.names, str(path))
                # One thread: this may run in a forked worker of a data loader.
                for batch in file.iter_batches(_BATCH, columns=list(columns.values()), use_threads=False):
                    for record in batch.to_pylist():
                        yield _document(f"{path}, row {number}", _without_fillings(record), columns)
                        number += 1
        except pyarrow.ArrowException as error:
            raise ValueError(f"data: cannot read {str(path)!r} as Parquet: {error}") from None

    def _data_set(self, name: str, data_set: Any) -> Iterator[Document]:
        columns = self.columns.find(data_set.column_names, name)
        records = data_set.select_columns(list(columns.values())).with_format(None)
        return (
            _document(f"{name}, row {number}", _without_fillings(record), columns)
            for number, record in enumerate(records)
        )


def _check_names(names: Sequence[str], where: str) -> None:
    """Of two columns with one name the last would be read."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"data: expected different names of columns, got {twice!r} twice in {where}")


def read_documents(
    names: Sequence[str | os.PathLike[str]], *, columns: Columns | None = None, extensions: Sequence[str] | None = None
) -> list[Document]:
    """All documents of a `Source`; arguments and errors are its own."""
    return list(Source(names, columns or Columns(), extensions))


def documents_of(
    rows: Iterable[Mapping[str, Any]], *, columns: Columns | None = None, where: str = "rows"
) -> Iterator[Document]:
    """The documents of rows in memory: dicts, or a ``datasets.Dataset``; ``where`` names them in errors.

    Raises:
        ValueError: at a row: columns missing or of another type, as for `Source`.
        TypeError: at a row that is no mapping.
    """
    columns = columns or Columns()
    is_table = hasattr(rows, "column_names")
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"data: expected a mapping of columns, got {type(row).__name__} in {where}, row {number}")
        place = f"{where}, row {number}"
        yield _document(place, _without_fillings(row) if is_table else row, columns.find(row, place))


def _missing_datasets(name: str) -> ValueError:
    return ValueError(f"data: {name!r} needs the package datasets: pip install 'ebft-kernels[datasets]'")


def _load_saved(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise _missing_datasets(name) from None
    try:
        return datasets.load_from_disk(name)
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        # LookupError: what some versions raise for one without rows.
        raise ValueError(f"data: cannot load {name!r}: {error}") from None


def _load_published(name: str) -> Any:
    """The data set as a memory-mapped table: downloaded whole, once, but not read into memory."""
    repository, *options = name.removeprefix(HUB).split(",")
    given = dict(option.partition("=")[::2] for option in options)
    if not repository or "" in given.values() or not set(given) <= {"config", "split", "revision"}:
        raise ValueError(f"data: expected 'hub:NAME[,config=C][,split=S][,revision=R]', got {name!r}")
    try:
        import datasets
    except ImportError:
        raise _missing_datasets(name) from None
    try:
        return datasets.load_dataset(
            repository, given.get("config"), split=given.get("split", "train"), revision=given.get("revision")
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data: cannot load {name!r}: {error}") from None


def _files(folder: Path, extensions: Sequence[str]) -> list[Path]:
    found, endings = [], tuple(x.lower() for x in extensions)
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.lower().endswith(endings)]
    return sorted(found)


def _refuse_splits(folder: Path) -> None:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        got = f"{str(folder)!r} with {', '.join(splits)}"
        raise ValueError(f"data: expected one split, got {got}: give {folder / splits[0]}")


def _text_documents(path: Path) -> Iterator[Document]:
    pieces = _text_pieces(path)
    piece, starts = next(pieces, ""), True
    while piece:
        following = next(pieces, "")
        if piece.strip() or following or not starts:
            yield Document(str(path), text=piece, starts=starts, ends=not following)
        piece, starts = following, False


def _text_pieces(path: Path) -> Iterator[str]:
    """The file's text, cut at ends of lines where lines are not longer than a piece."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    raw = b"start"
    with path.open("rb") as file:
        while raw:
            start = file.tell() - len(decoder.getstate()[0])
            raw = file.read(_PIECE)
            raw += file.readline(_PIECE)
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, start, path) from None
            if "\0" in text:
                at = start + len(text[: text.index("\0")].encode())
                raise ValueError(f"data: expected text in UTF-8, got a zero byte at offset {at} of {str(path)!r}")
            text = text.removeprefix("\ufeff") if start == 0 else text
            if text:
                yield text


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each line that is not blank."""
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(error, start, path) from None
            line = line.removeprefix("\ufeff") if start == 0 else line
            if line.strip():
                yield f"{path}, line {number}", line
            start += len(raw)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _NamedTwice as error:
        raise ValueError(
            f"data: expected different names in an object, got {error.args[0]!r} twice in {where}"
        ) from None
    except json.JSONDecodeError as error:
        at = f"column {error.colno} of {where}" if error.lineno == 1 else f"line {error.lineno} of {where}"
        raise ValueError(f"data: expected JSON, got {error.msg} at {at}") from None
    except (RecursionError, ValueError):  # nested thousands of times; an integer of thousands of digits
        raise ValueError(f"data: expected JSON, got too deep nesting or too long a number in {where}") from None


class _NamedTwice(Exception):
    """Of two fields with this name the last would be read."""


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        raise _NamedTwice(next(name for name in names if names.count(name) > 1))
    return found


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Name and value of each object of one JSON document, which may be lines of JSON under another name."""
    lines = list(_lines(path))
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for _, line in lines):
        yield from ((where, _parsed(where, line)) for where, line in lines)
        return
    content = _parsed(str(path), "".join(_text_pieces(path))) if lines else []  # with blank lines, to number errors
    records = content if isinstance(content, list) else [content]
    yield from ((f"{path}, record {number}", record) for number, record in enumerate(records))


def _table_records(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name and fields of each row of a table whose first line has the names of its columns."""
    text = "".join(_text_pieces(path))
    csv.field_size_limit(max(len(text), csv.field_size_limit()))  # a document may be longer than the module expects
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        _check_names(reader.fieldnames or (), f"{path}, line 1")
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if None in record or None in record.values():
                raise ValueError(f"data: expected {len(reader.fieldnames or ())} fields as in the header, in {where}")
            yield where, record
    except csv.Error as error:
        raise ValueError(f"data: expected a table, got {error} in {path}, line {reader.line_num + 1}") from None


def _not_utf8(error: UnicodeDecodeError, start: int, path: Path) -> ValueError:
    byte = f"byte {error.object[error.start]:#04x} at offset {start + error.start}"
    return ValueError(f"data: expected UTF-8, got {byte} of {str(path)!r}")


def _document(where: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> Document:
    parts = {part: record[column] for part, column in columns.items()}
    if "input_ids" in parts:
        return Document(where, tokens=_tokens(where, parts))
    tools = parts.pop(TOOLS, None)
    if "messages" in parts:
        messages = _messages(where, columns["messages"], parts["messages"])
        return Document(where, messages=messages, tools=_tools(where, tools))
    if "prompt" in parts and isinstance(parts["prompt"], list):
        prompt, completion = (_messages(where, columns[part], parts[part]) for part in ("prompt", "completion"))
        return Document(where, messages=prompt + completion, answer=len(prompt), tools=_tools(where, tools))
    for part, value in parts.items():
        if not isinstance(value, str):
            raise ValueError(f"data: expected {columns[part]!r} as a string, got {type(value).__name__} in {where}")
        _check_characters(where, columns[part], value)
    return Document(where, **parts)


def _check_characters(where: str, column: str, text: str) -> None:
    """Half of a surrogate pair, which JSON can spell, is no character: no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"a lone surrogate {text[error.start]!r} at character {error.start}"
        raise ValueError(f"data: expected text, got {half} of {column!r} in {where}") from None


def _tokens(where: str, parts: Mapping[str, Any]) -> dict[str, list[int]]:
    ids = parts["input_ids"]
    if (
        not _is_list_of(ids, int)
        or any(isinstance(x, bool) for x in ids)
        or (ids and not 0 <= min(ids) <= max(ids) < 2**31)
    ):
        raise ValueError(f"data: expected 'input_ids' as a list of token ids in {where}")
    present = {name: values for name, values in parts.items() if values is not None}
    for name, values in present.items():
        is_mask = name.endswith(("_mask", "_masks"))
        if name == "seq_lengths":  # one for each document
            if not _is_list_of(values, int):
                raise ValueError(f"data: expected 'seq_lengths' with integers, in {where}")
        elif not _is_list_of(values, int) or len(values) != len(ids) or (is_mask and not set(values) <= {0, 1}):
            kind = "entries, 0 or 1 each" if is_mask else "integers"
            raise ValueError(f"data: expected {name!r} with {len(ids)} {kind}, in {where}")
    return present


def _messages(where: str, column: str, value: Any) -> list[dict[str, Any]]:
    """The messages without the fields that are None."""
    if not _is_list_of(value, dict) or not value:
        raise ValueError(f"data: expected {column!r} as a list of messages, got {type(value).__name__} in {where}")
    messages = [{name: field for name, field in message.items() if field is not None} for message in value]
    for number, message in enumerate(messages):
        here = f"in message {number}"
        if "tool_calls" in message:
            message["tool_calls"] = _functions(where, f"'tool_calls' {here}", message["tool_calls"])
        if not message.get("tool_calls"):  # a table has an empty list where other rows have calls
            message.pop("tool_calls", None)
        if "content" in message or "tool_calls" not in message:
            message["content"] = _content(where, here, message.get("content"))
        if not isinstance(message.get("role"), str):
            got = type(message.get("role")).__name__
            raise ValueError(f"data: expected 'role' as a string {here}, got {got} in {where}")
        _check_characters(where, f"{column}, message {number}", message.get("content", ""))
    return messages


def _content(where: str, here: str, content: Any) -> str:
    """The text of content, which may be given in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        got = "no part" if content == [] else type(content).__name__
        raise ValueError(f"data: expected 'content' as a string {here}, got {got} in {where}")
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            got = f"one of type {part.get('type')!r}" if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"data: expected the parts of 'content' to be of type 'text' {here}, got {got} in {where}")
    return "".join(part["text"] for part in content)


def _tools(where: str, value: Any) -> list[dict[str, Any]] | None:
    """The tools, which tables also have as JSON, since their schemas have different fields; None if there are none."""
    if isinstance(value, str):
        value = _parsed(f"{TOOLS!r}, {where}", value)
    return None if value is None or value == [] else _functions(where, repr(TOOLS), value)


def _functions(where: str, what: str, value: Any) -> list[dict[str, Any]]:
    named = _is_list_of(value, dict) and all(
        isinstance(function_of(x), dict) and isinstance(function_of(x).get("name"), str) for x in value
    )
    if not named:
        raise ValueError(
            f"data: expected {what} as a list of functions with a 'name' each, got {value!r:.100} in {where}"
        )
    _check_characters(where, what, json.dumps(value, ensure_ascii=False, default=str))
    return value


def function_of(described: Mapping[str, Any]) -> Any:
    """What has the name of a tool or of a call: itself or its ``function``."""
    return described.get("function", described)


def _without_fillings(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a table, its objects without the fields that are None: they have those of all other rows."""
    return {name: _filled_only(field) for name, field in record.items()}


def _filled_only(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled_only(field) for name, field in value.items() if field is not None}
    return [_filled_only(item) for item in value] if isinstance(value, list) else value


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(x, kind) for x in value)
