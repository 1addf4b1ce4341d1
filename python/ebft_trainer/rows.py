"""From documents to rows of token ids: all at once, or as a stream that holds only a few."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .chat import chat_tokens
from .config import EBFTOptions
from .data import EBFTCollator, Row, rows_without_anchor, unpadded
from .encoding import Encoded, Notes
from .sources import Document

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000

_CHUNK = 64
_CUT_OFF = "prompts with completions or conversations were longer than a row and are cut off"


def tokenize(document: Document, tokenizer: Any, notes: Notes | None = None) -> Row:
    """The document as one row of any length, without padding.

    Texts and completions get the tokenizer's end-of-text token, if it has one, behind them; conversations what the
    chat template says; token ids nothing. A prompt and its completion are tokenized as one text.

    Args:
        document: one of any kind.
        tokenizer: of transformers; where only a part of the text counts, a fast one.
        notes: counts what is no error but should be known, each under a sentence.

    Raises:
        ValueError: a token id that the tokenizer does not have, columns that do not fit; a tokenizer that does not say
            what characters a token stands for; a conversation that `chat_tokens` refuses. The message names the
            document.
    """
    notes = Notes() if notes is None else notes
    if document.tokens is not None:
        return _given_row(document, len(tokenizer))
    if document.messages is not None:
        beside = {"answer": document.answer, "tools": document.tools, "where": document.where}
        ids, mask = chat_tokens(document.messages, tokenizer, **beside, notes=notes)
        return {"input_ids": torch.tensor(ids, dtype=torch.int32), "completion_mask": mask}
    if document.text is not None:
        ids = _text_ids(document.text, tokenizer, starts=document.starts)
        first, last = _without_second_ends(ids, tokenizer)
        first, last = (first if document.starts else 0), (last if document.starts or document.ends else len(ids))
        return {"input_ids": torch.tensor(ids[first:last] + _end(tokenizer) * document.ends, dtype=torch.int32)}
    text = document.prompt + document.completion
    encoded = Encoded(text, tokenizer, special=True, where=document.where)
    counted, _ = encoded.tokens_of(len(document.prompt), len(text), notes)
    first, last = _without_second_ends(encoded.ids, tokenizer)
    ids = torch.tensor(encoded.ids[first:last] + _end(tokenizer), dtype=torch.int32)
    return {"input_ids": ids, "completion_mask": torch.arange(first, first + len(ids)) >= min(counted, last)}


def _text_ids(text: str, tokenizer: Any, *, starts: bool) -> list[int]:
    """Token ids of a text or, without ``starts``, of one that goes on from a line before it."""
    if not starts:
        # Behind a line, where a tokenizer puts no space before the first word; unless it joins the two.
        line, whole = (tokenizer(x, add_special_tokens=False, verbose=False)["input_ids"] for x in ("\n", "\n" + text))
        if whole[: len(line)] == line:
            return whole[len(line) :]
    return tokenizer(text, add_special_tokens=starts, verbose=False)["input_ids"]


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _without_second_ends(ids: list[int], tokenizer: Any) -> tuple[int, int]:
    """Where ``ids`` start with one token of the start, and stop before those of the end.

    A text may have them written in it, a tokenizer put them around it.
    """
    first = int(tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2)
    last = len(ids)
    while last > first and ids[last - 1 : last] == _end(tokenizer):
        last -= 1
    return first, last


def _given_row(document: Document, vocabulary: int) -> Row:
    try:
        row = unpadded(document.tokens)
    except ValueError as error:
        raise ValueError(f"data: {error} in {document.where}") from None
    ids = row["input_ids"]
    if len(ids) and int(ids.max()) >= vocabulary:
        raise ValueError(f"data: expected token ids below {vocabulary}, got {int(ids.max())} in {document.where}")
    dtypes = {"completion_mask": torch.bool}
    return {name: column.to(dtypes.get(name, torch.int32)) for name, column in row.items()}


def cut_rows(rows: Iterable[Row], length: int, *, pack: bool = False, notes: Notes | None = None) -> Iterator[Row]:
    """Cut rows of any length to rows of at most ``length`` tokens.

    A row without ``completion_mask`` becomes as many as it needs; one with it (a completion needs its prompt) is cut
    off. With ``pack``, rows follow one another in rows of ``length`` tokens, divided by ``document_ids``: those
    without a mask fill each to the end, those with one are not divided. ``notes`` counts the rows that are cut off.
    """
    packers = {is_masked: _Packer(length) for is_masked in (False, True)}
    for row in rows:
        is_masked = "completion_mask" in row
        if notes is not None and is_masked and len(row["input_ids"]) > length:
            notes[_CUT_OFF] += 1
        if pack:
            yield from packers[is_masked].add(row, whole=is_masked)
        else:
            count = len(row["input_ids"])
            for start in range(0, min(count, length) if is_masked else count, length):
                yield _part(row, start, start + length)
    for packer in packers.values():
        yield from packer.flush()


def _part(row: Row, start: int, end: int) -> Row:
    # A copy: a view would keep the whole document in memory.
    return {name: column[start:end].clone() for name, column in row.items()}


class _Packer:
    """Fills rows of ``length`` tokens with one document after the other."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._parts: list[Row] = []
        self._room = length

    def add(self, row: Row, *, whole: bool) -> Iterator[Row]:
        """Take in a document; yields the rows that it makes full (or, ``whole``, does not fit in)."""
        count = min(len(row["input_ids"]), self.length) if whole else len(row["input_ids"])
        if whole and count > self._room:
            yield from self.flush()
        start = 0
        while start < count:
            end = min(count, start + self._room)
            self._parts.append(_part(row, start, end))
            self._room -= end - start
            start = end
            if not self._room:
                yield from self.flush()

    def flush(self) -> Iterator[Row]:
        """Yield what there is as one row, if there is any."""
        if self._parts:
            documents, first = [], 0
            for part in self._parts:
                documents.append(_document_numbers(part) + first)
                first = int(documents[-1][-1]) + 1
            names = self._parts[0].keys() - {"document_ids"}
            row = {name: torch.cat([part[name] for part in self._parts]) for name in names}
            yield {**row, "document_ids": torch.cat(documents)}
        self._parts, self._room = [], self.length


def _document_numbers(row: Row) -> torch.Tensor:
    """[T] int32, 0 for the row's first document, 1 for the next."""
    numbers = torch.zeros(len(row["input_ids"]), dtype=torch.int32)
    if "document_ids" in row:
        numbers[1:] = (row["document_ids"][1:] != row["document_ids"][:-1]).cumsum(0)
    return numbers


def build_rows(
    documents: Iterable[Document], tokenizer: Any, options: EBFTOptions, *, length: int, pack: bool = False
) -> tuple[list[Row], int]:
    """Tokenize documents and cut them to rows of at most ``length`` tokens, see :func:`cut_rows`.

    Returns:
        The rows with room for at least one rollout, and how many rows had none and were left out.

    Raises:
        ValueError: ``length`` is below context + horizon; a document that `tokenize` refuses; no row is left.
    """
    _check_length(length, options)
    notes = Notes()
    rows = list(
        cut_rows((tokenize(document, tokenizer, notes) for document in documents), length, pack=pack, notes=notes)
    )
    _log(notes)
    unusable = {i for i, _ in rows_without_anchor(rows, EBFTCollator(options))}
    if len(unusable) == len(rows):
        raise _no_room(options, f"{len(rows)} rows and none with room for that")
    return [row for i, row in enumerate(rows) if i not in unusable], len(unusable)


class RowStream(IterableDataset):
    """The rows of `build_rows` without end, made while they are asked for: for documents that do not fit in memory.

    Pass after pass over the documents, each in another order: of ``shuffle_buffer`` rows in memory one is drawn at
    random, and the next one read takes its place. Rows without room for a rollout are left out.

    The same arguments give the same rows, whatever else draws random numbers, so that a run that is resumed (which
    reads again, and passes over, the rows that it had) goes on as if it had not been interrupted. Each worker of a
    data loader tokenizes every so many documents; with several ranks accelerate reads the same stream in each and
    gives it its share.

    There is no length: `EBFTConfig` needs ``max_steps``.

    Args:
        documents: what can be iterated again and again, such as a `Source`.
        tokenizer: of transformers.
        options: of the method.
        length: tokens per row, at most.
        pack: as for `build_rows`.
        shuffle_buffer: rows in memory; 1: the order of the documents.
        seed: of the order.

    Raises:
        ValueError: a number out of range; no row with room for a rollout; at the first row, or later when it is read, a
            document that cannot be read or tokenized.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Any,
        options: EBFTOptions,
        *,
        length: int,
        pack: bool = False,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        seed: int = 0,
    ) -> None:
        _check_length(length, options)
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer: expected at least 1, got {shuffle_buffer}")
        self.documents, self.tokenizer, self.options = documents, tokenizer, options
        self.length, self.pack = length, pack
        self.shuffle_buffer, self.seed = shuffle_buffer, seed
        with closing(self._one_pass(0, 1, Notes())) as rows:
            if next(rows, None) is None:
                raise _no_room(options, "none")

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for repetition in itertools.count():
            order = random.Random(f"{self.seed} {repetition} {number}")
            empty = True
            notes = Notes()
            for row in _shuffled(self._one_pass(number, workers, notes), self.shuffle_buffer, order):
                empty = False
                yield row
            if repetition == 0:
                _log(notes)
            if empty:  # All rows are in the shares of other workers.
                return

    def _one_pass(self, worker: int, workers: int, notes: Notes) -> Iterator[Row]:
        documents = itertools.islice(self.documents, worker, None, workers)
        tokenized = (tokenize(document, self.tokenizer, notes) for document in documents)
        rows = cut_rows(tokenized, self.length, pack=self.pack, notes=notes)
        collator = EBFTCollator(self.options)
        while chunk := list(itertools.islice(rows, _CHUNK)):
            unusable = {i for i, _ in rows_without_anchor(chunk, collator)}
            yield from (row for i, row in enumerate(chunk) if i not in unusable)


def _log(notes: Notes) -> None:
    for sentence, number in notes.items():
        logger.warning("data: %d %s", number, sentence)


def _shuffled(rows: Iterable[Row], size: int, order: random.Random) -> Iterator[Row]:
    held: list[Row] = []
    for row in rows:
        if len(held) < size:
            held.append(row)
        else:
            i = order.randrange(size)
            held[i], row = row, held[i]
            yield row
    order.shuffle(held)
    yield from held


def _check_length(length: int, options: EBFTOptions) -> None:
    if length < options.context + options.horizon:
        raise ValueError(
            f"length: expected at least context + horizon = {options.context} + {options.horizon} tokens, got {length}"
        )


def _no_room(options: EBFTOptions, got: str) -> ValueError:
    return ValueError(
        f"data: expected rows with {options.context} tokens before an anchor and a window of {options.horizon} tokens "
        f"after it, got {got}"
    )


def split_in_two(items: Sequence[Any], fraction: float, *, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """The training and the held-out part of ``items``, each in the given order; the same for the same seed.

    Documents or rows that are equal are in one part: held out, they would have been trained on.

    Raises:
        ValueError: ``fraction`` is not between 0 and 1, or there are fewer than two different items.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction: expected a number between 0 and 1, got {fraction}")
    equal: dict[bytes, list[int]] = {}
    contents = [_content(item) for item in items]
    for i, content in enumerate(contents):
        equal.setdefault(content, []).append(i)
    if len(equal) < 2:
        got = f"{len(items)} equal ones" if len(items) > 1 else len(items)
        raise ValueError(f"eval_fraction: expected at least 2 rows or documents to divide, got {got}")
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out: set[int] = set()
    for i in order:
        alike = equal[contents[i]]
        if i not in held_out and len(held_out) < count and len(held_out) + len(alike) < len(items):
            held_out.update(alike)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for i, item in enumerate(items):
        parts[i in held_out].append(item)
    return parts


def _content(item: Any) -> bytes:
    """What two items share that are equal but for where they are from."""
    if isinstance(item, Document):
        item = replace(item, where="")
    elif isinstance(item, dict):
        item = torch.as_tensor(item["input_ids"]).tolist()
    return hashlib.sha256(repr(item).encode()).digest()
