"""Generated documents: written by a tool, compared by the same tool with ``--check``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; everything but the first column is aligned to the right where it holds numbers only."""
    rows = [[str(cell) for cell in row] for row in rows]
    numeric = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows) for i in range(len(header))]
    rule = ["---:" if i and numeric[i] else "---" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(header), rule, *rows)) + "\n"


def write(path: Path, text: str) -> None:
    """Write a generated document."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def drift(path: Path, text: str, command: str) -> list[str]:
    """What is wrong with the committed document, as lines to print; none if it equals ``text``."""
    committed = path.read_text(encoding="utf-8") if path.exists() else ""
    if committed == text:
        return []
    lines = difflib.unified_diff(committed.splitlines(), text.splitlines(), "committed", "computed now", "", "", 0, "")
    name = f"{path.parent.name}/{path.name}"
    return [f"{name} is not what the code gives now. If the change is wanted: {command}, and commit it.", *lines]
