"""From rows of token ids to batches with a `StridedLayout`.

A row is a dict: ``input_ids`` [T], and if there is more to say ``completion_mask`` [T] (which tokens count),
``document_ids`` [T] (a document is a run of equal ids) or ``attention_mask`` [T] (0 for padding on either side). What
counts may also be said as other trainers have it: by ``assistant_masks`` [T], or by ``labels`` [T], the token itself
where it counts and -100 where it does not; where documents start by ``position_ids`` [T] that start anew, or by
``seq_lengths``, the number of tokens of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import StridedLayout

from .config import EBFTOptions
from .sources import ROW_COLUMNS

Row = dict[str, Any]

IGNORED_LABEL = -100
_CHUNK = 64


class EBFTCollator:
    """Pads rows on the right and says where their rollouts start.

    The batch holds ``input_ids`` [B, P] int64, ``attention_mask`` [B, P], ``layout`` (a `StridedLayout`) and, if any
    row has them, ``completion_mask`` [B, P] bool and ``document_ids`` [B, P] (-1 on padding). Anchors stand every
    ``stride`` tokens, from ``context`` tokens into each document or, in rows with ``completion_mask``, from the start
    of each completion. Where they stand depends on the document alone: not on what it is packed or batched with, nor
    on the side of its padding. The layout is built here because that reads values: on the CPU, where it costs no
    host synchronisation, and in the data loader's workers.

    Args:
        options: of the method; their geometry is used.
        pad_token_id: fills rows that are shorter than the longest.
        pad_to_multiple_of: the length P of a batch is rounded up to a multiple, so that few shapes occur.
        vocabulary: token ids that the model knows, 0 to ``vocabulary - 1``; None: not checked.

    Raises:
        ValueError: no row of a batch has room for an anchor; a mask that does not fit its row or has padding in its
            middle; a token id that the model does not know.
    """

    def __init__(
        self,
        options: EBFTOptions,
        *,
        pad_token_id: int = 0,
        pad_to_multiple_of: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        self.geometry = {name: getattr(options, name) for name in ("context", "stride", "horizon", "samples")}
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.vocabulary = vocabulary

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        rows = [unpadded(row) for row in rows]
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        length = -(-int(lengths.max()) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        self._check_token_ids(rows)
        batch: dict[str, Any] = {
            "input_ids": _pad(rows, "input_ids", length, absent=0, padding=self.pad_token_id),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        }
        if any("document_ids" in row for row in rows):
            batch["document_ids"] = _pad(rows, "document_ids", length, absent=0, padding=-1)
        masked = torch.tensor(["completion_mask" in row for row in rows])
        if masked.any():
            batch["completion_mask"] = _pad(rows, "completion_mask", length, absent=1, padding=0).bool()
        batch["layout"] = self._layout(lengths, length, masked, batch.get("completion_mask"), batch.get("document_ids"))
        return batch

    def _check_token_ids(self, rows: Sequence[Row]) -> None:
        for row in rows:
            ids = row["input_ids"]
            unknown = ids[(ids < 0) | (ids >= (self.vocabulary or torch.iinfo(torch.long).max))]
            if len(unknown):
                last = "" if self.vocabulary is None else f" to {self.vocabulary - 1}"
                raise ValueError(f"input_ids: expected token ids from 0{last}, got {int(unknown[0])}")

    def _layout(
        self, lengths: Tensor, length: int, masked: Tensor, mask: Tensor | None, documents: Tensor | None
    ) -> StridedLayout:
        context, horizon = self.geometry["context"], self.geometry["horizon"]
        if length < context + horizon:
            raise ValueError(
                f"input_ids: expected at least context + horizon = {context} + {horizon} tokens, got {length}"
            )
        layout = StridedLayout.strided(len(lengths), length, **self.geometry, lengths=lengths, document_ids=documents)
        if mask is None and documents is None:
            return layout
        allowed = layout.position_ids[:, :length] >= context  # position in the document
        if mask is not None:
            allowed = torch.where(masked[:, None], mask, allowed)
        try:
            return StridedLayout.within(allowed, **self.geometry, lengths=lengths, document_ids=documents)
        except ValueError:
            raise ValueError(
                f"{'document_ids' if mask is None else 'completion_mask'}: no room for an anchor: expected {context} "
                f"tokens before a counted one and a window of {horizon} tokens from it on in one document"
            ) from None


def unpadded(row: Row) -> Row:
    """The row's columns as int64 tensors [T] without ``attention_mask`` and what it marks as padding, left or right.

    What counts is in ``completion_mask``, and which document a token is of in ``document_ids``, whichever column said
    it; ``labels`` of which none is left out and positions of one document say nothing.

    Raises:
        ValueError: a column that is not of integers, or has another number of tokens than ``input_ids``; padding
            between tokens; ``labels`` of other tokens; positions that do not count; two columns that differ in what
            they say.
    """
    names = [name for name in ("input_ids", *ROW_COLUMNS) if name in row]
    columns = {name: _integers(name, row[name]) for name in names}
    count = len(columns["input_ids"])
    if "seq_lengths" in columns:
        columns["seq_lengths"] = _numbers(columns["seq_lengths"], count)
    for name, column in columns.items():
        if column.ndim != 1 or len(column) != count:
            raise ValueError(f"{name}: expected {count} numbers as in input_ids, got shape {list(column.shape)}")
    if "attention_mask" not in columns:
        return _with_one_mask(_with_one_division(columns))
    attended = columns.pop("attention_mask").nonzero()[:, 0]
    first, last = (int(attended[0]), int(attended[-1])) if len(attended) else (0, -1)
    if last - first + 1 != len(attended):
        raise ValueError(
            "attention_mask: expected zeros (padding) only before or behind the tokens, "
            f"got {list(row['attention_mask'])}"
        )
    return _with_one_mask(_with_one_division({name: column[first : last + 1] for name, column in columns.items()}))


def _integers(name: str, values: Any) -> Tensor:
    """As int64; what is no integer is not rounded."""
    try:
        column = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected integers, got {values!r:.100}: {error}") from None
    if len(column.shape) == 0 or (column.numel() and (column.is_floating_point() or column.is_complex())):
        raise ValueError(f"{name}: expected integers, got {values!r:.100}")
    return column.long()


def _numbers(lengths: Tensor, count: int) -> Tensor:
    """[T], the number of the document that each token is of."""
    if lengths.ndim != 1 or (lengths < 1).any() or int(lengths.sum()) != count:
        raise ValueError(f"seq_lengths: expected lengths with the sum {count}, as in input_ids, got {lengths.tolist()}")
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _with_one_division(columns: Row) -> Row:
    """The columns of a row without padding, its documents in ``document_ids`` alone."""
    said = {name: columns[name] for name in ("document_ids", "seq_lengths") if name in columns}
    positions = columns.pop("position_ids", None)
    if positions is not None:
        starts = positions == 0
        wrong = (~starts & (positions != torch.cat([positions.new_tensor([-1]), positions[:-1]]) + 1)).nonzero()[:, 0]
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                "position_ids: expected 0, where a document starts, or one more than before, "
                f"got {int(positions[at])} at token {at}"
            )
        said["position_ids"] = starts.cumsum(0) - 1
    for (one, numbers), (other, same) in itertools.pairwise(said.items()):
        changes = (numbers.diff() != 0) != (same.diff() != 0)
        if changes.any():
            at = 1 + int(changes.nonzero()[0, 0])
            raise ValueError(f"{other}: expected the documents that {one} has, got another edge at token {at}")
    columns.pop("seq_lengths", None)
    if said and "document_ids" not in columns:
        numbers = next(iter(said.values()))
        return columns | {"document_ids": numbers} if (numbers.diff() != 0).any() else columns
    return columns


def _with_one_mask(columns: Row) -> Row:
    """The columns of a row without padding, what counts in ``completion_mask`` alone."""
    labels = columns.pop("labels", None)
    said = {name: columns.pop(name) for name in ("completion_mask", "assistant_masks") if name in columns}
    if labels is not None:
        counts = labels != IGNORED_LABEL
        other = (counts & (labels != columns["input_ids"])).nonzero()[:, 0]
        if len(other):
            at = int(other[0])
            raise ValueError(
                f"labels: expected the token itself, {int(columns['input_ids'][at])}, or {IGNORED_LABEL}, "
                f"got {int(labels[at])} at token {at}"
            )
        if said or not counts.all():
            said["labels"] = counts.long()
    for (one, mask), (other, same) in itertools.pairwise(said.items()):
        if not mask.equal(same):
            at = int((mask != same).nonzero()[0, 0])
            raise ValueError(f"{other}: expected the tokens that {one} counts, got another at token {at}")
    return columns | {"completion_mask": next(iter(said.values()))} if said else columns


def _pad(rows: Sequence[Row], name: str, length: int, *, absent: int, padding: int) -> Tensor:
    """One column of all rows, [B, length]; rows without it have ``absent`` throughout."""
    out = torch.full((len(rows), length), padding)
    for line, row in zip(out, rows, strict=True):
        line[: len(row["input_ids"])] = row.get(name, absent)
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
