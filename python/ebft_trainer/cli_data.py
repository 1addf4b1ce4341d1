"""The options of `ebft-train` that say what is read, and how it becomes rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields, make_dataclass
from typing import Any

from .config import EBFTConfig, option, options_of
from .data import Row
from .rows import SHUFFLE_BUFFER, RowStream, build_rows, split_in_two
from .sources import Columns, Document, Source

_COLUMNS = tuple(column.name for column in fields(Columns))
_EVAL_FRACTION = 0.05

#: What a run that is resumed must agree in.
ROW_OPTIONS = (
    *("length", "pack", "extensions", *(f"{name}_column" for name in _COLUMNS), "chat_template"),
    *("stream", "shuffle_buffer", "eval_data", "eval_fraction"),
)


_ColumnArguments = make_dataclass(
    "_ColumnArguments",
    [(f"{x}_column", str | None, option(None, f"field or column of the {x}; default: {x}")) for x in _COLUMNS],
    kw_only=True,
)


@dataclass(kw_only=True)
class DataArguments(_ColumnArguments):
    """What is read, and how long rows are."""

    data: list[str] = option(
        MISSING, "text, .jsonl, .json, .csv, .parquet, folders of them, saved data sets, hub:NAME[,config=C][,split=S]"
    )
    extensions: list[str] | None = option(None, "files to read in folders; default: text, code and data")
    chat_template: str | None = option(None, "file with a template for messages; default: the tokenizer's own")
    length: int = option(512, "tokens per row")
    pack: bool = option(False, "put several short documents in a row; none sees another")


@dataclass(kw_only=True)
class TrainingDataArguments(DataArguments):
    """How training data are read, and what is held out."""

    stream: bool = option(False, "read --data while training: for more than fits in memory")
    shuffle_buffer: int | None = option(
        None, f"of a stream, rows in memory that the next is drawn from; default: {SHUFFLE_BUFFER}; 1: in order"
    )
    eval_data: list[str] | None = option(None, "held-out data; default: a part of --data")
    eval_fraction: float | None = option(
        None, f"held-out part of --data; default: {_EVAL_FRACTION}, of a stream none; 0: none"
    )


def check_training_data_options(arguments: TrainingDataArguments, config: EBFTConfig) -> None:
    """Fill in the defaults that depend on other options. Raises ValueError for options that exclude each other."""
    if arguments.stream and config.max_steps <= 0:
        raise ValueError("max_steps: expected --max-steps with --stream, which never ends, got none")
    if arguments.shuffle_buffer is not None and not arguments.stream:
        raise ValueError(f"shuffle_buffer: expected --stream with it, got {arguments.shuffle_buffer} without")
    if arguments.eval_fraction and (arguments.stream or arguments.eval_data):
        beside = "--stream" if arguments.stream else "--eval-data"
        raise ValueError(f"eval_fraction: expected none with {beside}, got {arguments.eval_fraction}")
    if arguments.eval_fraction is None:
        arguments.eval_fraction = 0.0 if arguments.stream or arguments.eval_data else _EVAL_FRACTION
    if arguments.stream and arguments.shuffle_buffer is None:
        arguments.shuffle_buffer = SHUFFLE_BUFFER


def source_of(arguments: DataArguments, names: Sequence[str]) -> Source:
    """The documents of ``names``, not yet read."""
    columns = Columns(**{name: getattr(arguments, f"{name}_column") for name in _COLUMNS})
    return Source(names, columns, arguments.extensions)


def rows_of(arguments: DataArguments, config: EBFTConfig, tokenizer: Any, documents: Iterable[Document]) -> list[Row]:
    """All rows of the documents; prints how many had to be left out."""
    rows, left_out = build_rows(documents, tokenizer, config, length=arguments.length, pack=arguments.pack)
    if left_out:
        print(f"{left_out} rows without room for a rollout were left out, {len(rows)} remain")
    return rows


def train_and_eval_rows(
    arguments: TrainingDataArguments,
    config: EBFTConfig,
    tokenizer: Any,
    documents: Source | Sequence[Document],
    held_out: Sequence[Document] | None,
) -> tuple[RowStream | list[Row], list[Row]]:
    """What is trained on, and held out: ``held_out``, or some of the documents, or, of few documents, of the rows."""
    eval_rows = [] if held_out is None else rows_of(arguments, config, tokenizer, held_out)
    if arguments.stream:
        stream = RowStream(
            documents,
            tokenizer,
            options_of(config),
            length=arguments.length,
            pack=arguments.pack,
            shuffle_buffer=arguments.shuffle_buffer,
            seed=config.seed,
        )
        return stream, eval_rows
    fraction = arguments.eval_fraction
    if fraction == 0:
        return rows_of(arguments, config, tokenizer, documents), eval_rows
    if len(documents) * fraction >= 1:
        train, held_out = split_in_two(documents, fraction, seed=config.eval_seed)
        return tuple(rows_of(arguments, config, tokenizer, part) for part in (train, held_out))
    return split_in_two(rows_of(arguments, config, tokenizer, documents), fraction, seed=config.eval_seed)
