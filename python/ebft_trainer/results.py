"""What a run's folder holds, how it is read, and what its log lines add up to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RUN_FILE, CONFIG_FILE, RESULT_FILE, MODEL_FOLDER = "ebft.json", "config.yaml", "results.json", "model"


def seconds_per_step(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean seconds per optimizer step: of the whole step, of each phase, and of what remains (backward, optimizer).

    Empty if no line has any.
    """
    lines = [line for line in history if "seconds/step" in line]
    if not lines:
        return {}
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("seconds/"))
    means = {
        name.removeprefix("seconds/"): sum(line.get(name, 0.0) for line in lines) / len(lines)
        for name in ("seconds/step", *names)
    }
    means["backward and optimizer"] = 2 * means["step"] - sum(means.values())
    return means


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ValueError: it holds something else; the message names file, what was expected and what came.
        OSError: it cannot be read.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str) -> Any:
    """As `json.loads`. Raises ValueError, with one line, for whatever is not JSON or too deep or too long for it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text[:40]!r}: {error}") from None
    except RecursionError:
        raise ValueError(f"{text[:40]!r}: too deeply nested") from None


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, however deep, by their names joined with dots."""
    out, left = {}, list(reversed(settings.items()))
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(f"{name}.{inner}", x) for inner, x in reversed(value.items())]
        else:
            out[name] = value
    return out
