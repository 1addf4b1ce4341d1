"""From files to rows of token ids, and from rows to batches with a `StridedLayout`.

A row is a dict: ``input_ids`` [T], and if there is more to say ``completion_mask`` [T] (which tokens count),
``document_ids`` [T] (a document is a run of equal ids) or ``attention_mask`` [T] (ones, then zeros for padding).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import StridedLayout

from .config import EBFTOptions

TEXT_EXTENSIONS = tuple(
    ".c .cc .cpp .cs .cu .cuh .go .h .hpp .java .jl .js .jsonl .kt .lua .md .php .py .r .rb .rs .rst .scala .sh .sql "
    ".swift .tex .ts .txt".split()
)
_FIELDS = "'text', 'input_ids' (with or without 'completion_mask') or 'prompt' and 'completion'"
_CHUNK = 64

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One text, prompt-completion pair or list of token ids, and the ``where`` that error messages name."""

    where: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    input_ids: list[int] | None = None
    completion_mask: list[bool] | None = None


class EBFTCollator:
    """Pads rows on the right and says where their rollouts start.

    The batch holds ``input_ids`` [B, P] int64, ``attention_mask`` [B, P], ``layout`` (a `StridedLayout`, anchors every
    ``stride`` tokens, or with ``completion_mask`` from the start of each completion) and, if any row has them,
    ``completion_mask`` [B, P] bool and ``document_ids`` [B, P] (-1 on padding). The layout is built here because
    that reads values: on the CPU, where it costs no host synchronisation, and in the data loader's workers.

    With ``pad_to_multiple_of`` the length P of a batch is rounded up to a multiple, so that few shapes occur.

    Raises:
        ValueError: no row of a batch has room for an anchor; a mask that does not fit its row.
    """

    def __init__(self, options: EBFTOptions, *, pad_token_id: int = 0, pad_to_multiple_of: int = 1) -> None:
        self.geometry = {name: getattr(options, name) for name in ("context", "stride", "horizon", "samples")}
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        ids = [_unpadded(row) for row in rows]
        lengths = torch.tensor([len(x) for x in ids])
        length = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch: dict[str, Any] = {
            "input_ids": _pad(ids, length, self.pad_token_id),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }
        documents = mask = None
        if any("document_ids" in row for row in rows):
            documents = _pad([_column(row, "document_ids", x, 0) for row, x in zip(rows, ids, strict=True)], length, -1)
            batch["document_ids"] = documents
        if any("completion_mask" in row for row in rows):
            columns = [_column(row, "completion_mask", x, 1) for row, x in zip(rows, ids, strict=True)]
            batch["completion_mask"] = mask = _pad(columns, length, 0).bool()
        batch["layout"] = self._layout(lengths, length, mask, documents)
        return batch

    def _layout(self, lengths: Tensor, length: int, mask: Tensor | None, documents: Tensor | None) -> StridedLayout:
        context, horizon = self.geometry["context"], self.geometry["horizon"]
        if length < context + horizon:
            raise ValueError(
                f"input_ids: expected at least context + horizon = {context} + {horizon} tokens, got {length}"
            )
        if mask is not None:
            try:
                return StridedLayout.within(mask, **self.geometry, lengths=lengths, document_ids=documents)
            except ValueError as error:
                raise ValueError(f"completion_mask: no room for an anchor ({error})") from error
        layout = StridedLayout.strided(len(lengths), length, **self.geometry, lengths=lengths, document_ids=documents)
        if not layout.num_valid:
            raise ValueError(
                f"document_ids: no room for an anchor: expected {context} tokens before it and a window of {horizon} "
                "tokens after it in one document"
            )
        return layout


def _unpadded(row: Row) -> Tensor:
    """The row's token ids [T] without its right padding."""
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    if "attention_mask" not in row:
        return ids
    attended = torch.as_tensor(row["attention_mask"]).bool()
    count = int(attended.sum())
    if attended.shape != ids.shape or not attended[:count].all():
        raise ValueError(
            f"attention_mask: expected {len(ids)} numbers, ones and then zeros (right padding), got {attended.tolist()}"
        )
    return ids[:count]


def _column(row: Row, name: str, ids: Tensor, default: int) -> Tensor:
    if name not in row:
        return torch.full_like(ids, default)
    column = torch.as_tensor(row[name], dtype=torch.long)
    if column.ndim != 1 or len(column) != len(row["input_ids"]):
        raise ValueError(f"{name}: expected {len(row['input_ids'])} numbers as in input_ids, got {column.numel()}")
    return column[: len(ids)]


def _pad(columns: Sequence[Tensor], length: int, value: int) -> Tensor:
    out = torch.full((len(columns), length), value)
    for line, column in zip(out, columns, strict=True):
        line[: len(column)] = column
    return out


def rows_without_anchor(rows: Sequence[Row], collator: Any) -> Iterator[tuple[int, str]]:
    """Number and reason of each row that has no room for a rollout; ``rows`` is read in order, in chunks."""
    for start in range(0, len(rows), _CHUNK):
        chunk = [rows[i] for i in range(start, min(start + _CHUNK, len(rows)))]
        try:
            if collator(chunk)["layout"].valid.any(1).all():
                continue
        except ValueError:
            pass  # One of the rows; found below.
        for offset, row in enumerate(chunk):
            try:
                collator([row])
            except ValueError as error:
                yield start + offset, str(error)


def read_documents(
    paths: Iterable[str | os.PathLike[str]], *, extensions: Sequence[str] | None = None
) -> list[Document]:
    """Read text files, JSON-lines files (``.jsonl``) and folders of them, in a fixed order.

    A JSON line is an object with ``text``, or ``input_ids`` and optionally ``completion_mask``, or ``prompt`` and
    ``completion``; other fields are not read. In folders, files of other ``extensions``, hidden folders and empty
    files are passed over. A file that is named itself is read whatever its extension.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a named file is empty, a folder has no file of the extensions, text is not UTF-8, a line is not JSON
            or has no usable fields; the message names file and byte or line.
    """
    documents: list[Document] = []
    extensions = TEXT_EXTENSIONS if extensions is None else tuple(extensions)
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data: expected a file or folder, got {str(path)!r}, which does not exist")
        files = _files(path, extensions) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"data: expected files ending in {' '.join(extensions)} in folder {str(path)!r}, got none")
        found = [document for file in files for document in _read(file)]
        if not found:
            raise ValueError(f"data: expected text, got {str(path)!r}, which is empty")
        documents += found
    return documents


def _files(folder: Path, extensions: Sequence[str]) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.endswith(tuple(extensions))]
    return sorted(found)


def _read(path: Path) -> list[Document]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte {raw[error.start]:#04x} at offset {error.start}"
        raise ValueError(f"data: expected UTF-8, got {byte} of {str(path)!r}") from None
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        return [_json_document(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    return [Document(str(path), text=text)] if text.strip() else []


def _json_document(where: str, line: str) -> Document:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: expected JSON, got {error.msg} at column {error.colno} of {where}") from None
    known = {"text", "input_ids", "prompt", "completion"} & set(fields) if isinstance(fields, dict) else set()
    misplaced_mask = known != {"input_ids"} and "completion_mask" in fields
    if known not in ({"text"}, {"input_ids"}, {"prompt", "completion"}) or misplaced_mask:
        got = ", ".join(map(repr, fields)) if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"data: expected an object with {_FIELDS}, got {got or 'no field'} in {where}")
    if "input_ids" in known:
        ids, mask = fields["input_ids"], fields.get("completion_mask")
        if not _is_list_of(ids, int) or (ids and min(ids) < 0):
            raise ValueError(f"data: expected 'input_ids' as a list of token ids in {where}")
        if mask is not None and (not _is_list_of(mask, (bool, int)) or len(mask) != len(ids)):
            raise ValueError(f"data: expected 'completion_mask' with {len(ids)} entries, 0 or 1 each, in {where}")
        return Document(where, input_ids=ids, completion_mask=mask)
    for name in sorted(known):
        if not isinstance(fields[name], str):
            raise ValueError(f"data: expected {name!r} as a string, got {type(fields[name]).__name__} in {where}")
    return Document(where, **{name: fields[name] for name in known})


def _is_list_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(x, kind) for x in value)


def split_in_two(items: Sequence[Any], fraction: float, *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """The training and the held-out part of ``items``, each in the given order; the same for the same seed.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there are fewer than two items.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction: expected a number between 0 and 1, got {fraction}")
    if len(items) < 2:
        raise ValueError(f"eval_fraction: expected at least 2 rows or documents to divide, got {len(items)}")
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:count])
    parts: tuple[list[Any], list[Any]] = ([], [])
    for i, item in enumerate(items):
        parts[i in held_out].append(item)
    return parts


def tokenize(document: Document, tokenizer: Any) -> Row:
    """The document as one row of any length, with the tokenizer's end-of-text token, if it has one, behind it."""
    if document.input_ids is not None:
        row = {"input_ids": torch.tensor(document.input_ids, dtype=torch.int32)}
        vocabulary = len(tokenizer)
        if len(row["input_ids"]) and int(row["input_ids"].max()) >= vocabulary:
            got = int(row["input_ids"].max())
            raise ValueError(f"data: expected token ids below {vocabulary}, got {got} in {document.where}")
        if document.completion_mask is not None:
            row["completion_mask"] = torch.tensor(document.completion_mask, dtype=torch.bool)
        return row
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if document.text is not None:
        ids = tokenizer(document.text, verbose=False)["input_ids"]
        return {"input_ids": torch.tensor(ids if ids[-1:] == end else ids + end, dtype=torch.int32)}
    prompt = tokenizer(document.prompt, verbose=False)["input_ids"]
    prompt = prompt[:-1] if end and prompt[-1:] == end and len(prompt) > 1 else prompt
    completion = tokenizer(document.completion, add_special_tokens=False, verbose=False)["input_ids"] + end
    ids = torch.tensor(prompt + completion, dtype=torch.int32)
    return {"input_ids": ids, "completion_mask": torch.arange(len(ids)) >= len(prompt)}


def build_rows(
    documents: Iterable[Document], tokenizer: Any, options: EBFTOptions, *, length: int, pack: bool = False
) -> tuple[list[Row], int]:
    """Tokenize documents and cut them to rows of at most ``length`` tokens.

    A text longer than that becomes several rows. A prompt-completion pair or a list of ids with a mask is one row, cut
    off at ``length``. With ``pack`` texts follow one another in full rows, divided by ``document_ids``.

    Returns:
        The rows with room for at least one rollout, and how many rows had none and were left out.

    Raises:
        ValueError: ``length`` is below context + horizon; a token id is out of range; no row is left.
    """
    if length < options.context + options.horizon:
        raise ValueError(
            f"length: expected at least context + horizon = {options.context} + {options.horizon} tokens, got {length}"
        )
    tokenized = [tokenize(document, tokenizer) for document in documents]
    single = [row for row in tokenized if "completion_mask" in row]
    texts = [row["input_ids"] for row in tokenized if "completion_mask" not in row]
    rows: list[Row] = [{name: column[:length] for name, column in row.items()} for row in single]
    if pack and texts:
        ids = torch.cat(texts)
        numbers = torch.cat([torch.full((len(x),), i, dtype=torch.int32) for i, x in enumerate(texts)])
        rows += [
            {"input_ids": x, "document_ids": d} for x, d in zip(ids.split(length), numbers.split(length), strict=True)
        ]
    else:
        rows += [{"input_ids": piece} for x in texts for piece in x.split(length) if len(piece)]
    rows = [row for row in rows if len(row["input_ids"])]
    unusable = {i for i, _ in rows_without_anchor(rows, EBFTCollator(options))}
    if len(unusable) == len(rows):
        raise ValueError(
            f"data: expected rows with {options.context} tokens before an anchor and a window of {options.horizon} "
            f"tokens after it, got {len(rows)} rows and none with room for that"
        )
    return [row for i, row in enumerate(rows) if i not in unusable], len(unusable)
