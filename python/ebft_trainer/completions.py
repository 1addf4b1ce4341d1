"""What the model writes at an evaluation, beside what the text goes on with: ``EBFTConfig(log_completions=True)``.

Of all anchors those are kept whose rollouts match worst and best. They are shown as a table on the terminal, sent to
W&B and TensorBoard if the run reports there, and written to `COMPLETIONS_FILE`, from which the report shows them.
"""

from __future__ import annotations

import html
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft_kernels import FeatureMatching, StridedLayout

from .checkpoint import writing
from .config import EBFTOptions
from .results import parse_json
from .texts import anchor_texts

COMPLETIONS_FILE = "completions.jsonl"
#: Anchors of each end that are kept of an evaluation.
KEPT = 8
#: Characters of a prefix, its last, that are kept.
PREFIX = 400
_HEADER = ("", "text", "alignment", "reward", "")


@dataclass(frozen=True)
class Anchor:
    """One anchor: how its text goes on, and how the model does.

    Attributes:
        prefix: the end of the text before it.
        target: the real continuation.
        completions: n rollouts.
        alignments, rewards: of each, as the options of the run weigh them.
        duplicates: whether each is equal to an earlier one.
    """

    prefix: str
    target: str
    completions: list[str]
    alignments: list[float]
    rewards: list[float]
    duplicates: list[bool]

    @property
    def alignment(self) -> float:
        """Mean of the rollouts."""
        return sum(self.alignments) / len(self.alignments)


class Completions:
    """Keeps the worst and the best anchors of the batches that it is given.

    Args:
        tokenizer: of transformers.
        options: whose coefficients make the reward.
    """

    def __init__(self, tokenizer: Any, options: EBFTOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._anchors: list[Anchor] = []

    def add(
        self, prompt: Tensor, tokens: Tensor, layout: StridedLayout, match: FeatureMatching, masks: dict[str, Any]
    ) -> None:
        """Look at prompts [B, P], rollouts [B, A, n, G] and how they match; ``masks`` as of `anchor_texts`."""
        alignment, diversity = (x.flatten(3).mean(3) if x.ndim > 3 else x for x in (match.alignment, match.diversity))
        reward = self._options.alignment_coef * alignment - self._options.diversity_coef * diversity
        equal = (tokens[:, :, :, None] == tokens[:, :, None]).all(-1).tril(-1).any(-1)  # [B, A, n]
        order = alignment.mean(2).masked_fill(~layout.valid, math.nan).flatten().argsort(stable=True)
        order = order[: int(layout.valid.sum())]  # NaN stands last
        chosen = torch.zeros_like(layout.valid.flatten())
        chosen[order[:KEPT]] = chosen[order[-KEPT:]] = True
        shown = layout._replace(valid=chosen.view_as(layout.valid), num_valid=int(chosen.sum()))
        for text in anchor_texts(self._tokenizer, prompt, tokens, shown, **masks):
            values = [x[text.row, text.anchor].tolist() for x in (alignment, reward, equal)]
            self._anchors.append(Anchor(text.prompt[-PREFIX:], text.target, text.completions, *values))
        ordered = sorted(self._anchors, key=lambda anchor: anchor.alignment)
        self._anchors = ordered if len(ordered) <= 2 * KEPT else ordered[:KEPT] + ordered[-KEPT:]

    def anchors(self) -> list[Anchor]:
        """Worst first."""
        return list(self._anchors)


def ends(anchors: Sequence[Anchor]) -> dict[str, list[Anchor]]:
    """The worst matches, worst first, and the best, best first; no anchor is in both."""
    half = -(-len(anchors) // 2)
    return {"worst matches": list(anchors[:half]), "best matches": list(reversed(anchors[half:]))}


def rows_of(anchor: Anchor) -> list[tuple[str, str, str, str, str]]:
    """What a table shows of an anchor, in the columns of `_HEADER`: the real text, then the rollouts."""
    found = zip(anchor.completions, anchor.alignments, anchor.rewards, anchor.duplicates, strict=True)
    rollouts = [("rollout", text, f"{a:.3f}", f"{r:.3f}", "duplicate" if same else "") for text, a, r, same in found]
    return [("real text", anchor.target, "", "", ""), *rollouts]


def printable(text: str) -> str:
    """``text`` in one line, without what moves a cursor, colours a terminal or turns the direction around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_table(anchors: Sequence[Anchor], title: str) -> None:
    """A table on the standard output: of rich where it is installed, else of plain lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return _print_plain(anchors, title)
    console = Console()
    for name, part in ends(anchors).items():
        table = Table(*_HEADER, title=Text(f"{title}: {name}"), title_justify="left", show_lines=False)
        for anchor in part:
            table.add_row("prefix", Text(_encodable(printable(anchor.prefix)[-120:])))
            for row in rows_of(anchor):
                table.add_row(*(Text(_encodable(printable(cell))) for cell in row))  # no markup: Text is taken as it is
            table.add_section()
        if part:
            console.print(table)
    return None


def _print_plain(anchors: Sequence[Anchor], title: str) -> None:
    for name, part in ends(anchors).items():
        for number, anchor in enumerate(part):
            lines = [f"{title}: {name}"] if not number else []
            lines.append(f"  prefix     {printable(anchor.prefix)[-120:]}")
            for kind, text, alignment, reward, mark in rows_of(anchor):
                lines.append(f"    {kind:<9}{alignment:>9}{reward:>9} {mark:<9} {printable(text)}")
            print("\n".join(map(_encodable, lines)))


def _encodable(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def send(
    anchors: Sequence[Anchor], name: str, step: int, *, report_to: Iterable[str], callbacks: Iterable[Any]
) -> None:
    """To W&B, as a table, and to TensorBoard, as text; where ``report_to`` names them and the run has begun there."""
    table = [
        [kind, anchor.prefix, *row]
        for kind, part in ends(anchors).items()
        for anchor in part
        for row in rows_of(anchor)
    ]
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            columns = ["match", "prefix", "kind", "text", "alignment", "reward", "duplicate"]
            wandb.log({name: wandb.Table(columns=columns, data=table), "train/global_step": step})
    if "tensorboard" in report_to:
        # TensorBoard takes text for Markdown with HTML: indented lines are shown as they are.
        lines = ["    " + html.escape(" | ".join(map(printable, row))) for row in table]
        for callback in callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_text(name, "\n".join(lines), step)


class CompletionsFile:
    """One JSON object per evaluation: ``step``, ``name`` (of the data, as metrics begin) and ``anchors``, worst first.

    What a run that goes on from an earlier step had written since is cut off with the first line.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder, COMPLETIONS_FILE)
        self._begun = False

    def write(self, anchors: Sequence[Anchor], name: str, step: int) -> None:
        """Append a line; CheckpointError if it cannot be written."""
        line = json.dumps({"step": step, "name": name, "anchors": [_finite(asdict(anchor)) for anchor in anchors]})
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._begun:
                old = self.path.read_bytes().splitlines(keepends=True) if step and self.path.is_file() else []
                self.path.write_bytes(b"".join(x for x in old if x.endswith(b"\n") and _step_of(x) < step))
                self._begun = True
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _finite(anchor: dict[str, Any]) -> dict[str, Any]:
    for name in ("alignments", "rewards"):
        anchor[name] = [x if math.isfinite(x) else None for x in anchor[name]]
    return anchor


def _step_of(line: bytes) -> float:
    try:
        return parse_json(line.decode("utf-8"))["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_completions(folder: Path) -> dict[str, tuple[int, list[Anchor]]]:
    """Of each name in a run's `COMPLETIONS_FILE` the last evaluation: its step and anchors, worst first.

    Raises:
        ValueError: a line, but for half a line at the end, is something else; the message names file and line.
    """
    path = folder / COMPLETIONS_FILE
    if not path.is_file():
        return {}
    found = {}
    data = path.read_bytes()
    for number, raw in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            line = parse_json(raw.decode("utf-8"))
            step, name, anchors = line["step"], line["name"], [_anchor(x) for x in line["anchors"]]
            if type(step) is not int or not isinstance(name, str):
                raise ValueError("'step' and 'name' of other types")
        except (ValueError, KeyError, TypeError) as error:
            message = f"{path}: line {number}: expected step, name and anchors of an evaluation, got {error}"
            raise ValueError(message) from None
        found[name] = step, anchors
    return found


def _anchor(values: Any) -> Anchor:
    anchor = Anchor(**values)
    count = len(anchor.completions) if isinstance(anchor.completions, list) else 0
    lists = (
        (anchor.completions, str),
        (anchor.alignments, (int, float, type(None))),
        (anchor.rewards, (int, float, type(None))),
        (anchor.duplicates, bool),
    )
    of_type = all(isinstance(x, list) and len(x) == count and all(isinstance(y, kind) for y in x) for x, kind in lists)
    if not count or not of_type or not isinstance(anchor.prefix, str) or not isinstance(anchor.target, str):
        raise ValueError("an anchor with other values")
    as_numbers = {
        name: [math.nan if x is None else float(x) for x in getattr(anchor, name)] for name in ("alignments", "rewards")
    }
    return Anchor(**{**asdict(anchor), **as_numbers})
