"""What a run tells while it runs: a line of JSON for everything that is logged, and a warning when rewards collapse."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from .checkpoint import writing
from .results import parse_json

LOG_FILE = "log.jsonl"

#: Log lines in a row that must be bad before there is a warning of a collapse.
WINDOW = 5
#: Spread of rewards that is rounding beside rewards of order 1.
NO_SPREAD = 1e-4
#: Share of the weights that a step changes where they can hold it.
FEW_MOVED = 0.5
#: Of the rollouts that can be duplicates: all of an anchor but its first.
MOSTLY_DUPLICATES = 0.9

_LARGEST_STEP = 2**53

_ADVICE = "raise temperature or diversity_coef, lower learning_rate, or go on from an earlier checkpoint"

logger = logging.getLogger(__name__)


class Warned(NamedTuple):
    """One warning: the optimizer step of the log line that gave rise to it, what it means and what to do."""

    step: int
    text: str


class _Rule(NamedTuple):
    """A metric, when a value of it is bad given the number of samples, after how many lines in a row, the warning."""

    metric: str
    is_bad: Callable[[float, int], bool]
    lines: int
    text: str


def _same_rewards(metric: str, whose: str) -> _Rule:
    return _Rule(
        metric,
        lambda value, samples: samples > 1 and value < NO_SPREAD,
        WINDOW,
        f"rewards have collapsed: {metric} {{:.2g}}, below {NO_SPREAD:g} in {WINDOW} log lines in a row: the rollouts "
        f"of an anchor all get the same reward{whose}, and its term of the loss has no gradient; {_ADVICE}",
    )


_RULES = (
    _same_rewards("reward_std", ""),
    _same_rewards("verifier_reward_std", " from the verifier"),
    _Rule(
        "duplicate_rate",
        lambda value, samples: samples > 1 and value > MOSTLY_DUPLICATES * (samples - 1) / samples,
        WINDOW,
        f"rollouts have collapsed: duplicate_rate {{:.2f}}, near its largest value in {WINDOW} log lines in a row: "
        f"almost every rollout repeats another one of its anchor, and there is nothing to compare; {_ADVICE}",
    ),
    _Rule(
        "weights_moved",
        lambda value, _samples: value < FEW_MOVED,
        1,
        "only {:.1%} of the weights moved in the first step: their precision cannot hold steps so small; load the "
        "model with dtype=torch.float32 and train with bf16=True, or raise learning_rate",
    ),
    _Rule(
        "nonfinite_steps",
        lambda value, _samples: value > 0,
        1,
        "{:.0f} steps since the last line had a loss or gradient that is not finite and were skipped: the weights are "
        "those before them; lower learning_rate if there are more",
    ),
)


class Watch:
    """Looks at log lines as they come and warns once of each thing.

    Args:
        samples: rollouts per anchor.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._bad_lines = [0] * len(_RULES)

    def look(self, line: dict[str, Any]) -> Iterator[Warned]:
        """The warnings that ``line``, a dict of metrics with ``step``, gives; None stands for NaN."""
        for number, rule in enumerate(_RULES):
            if rule.metric not in line:
                continue
            value = math.nan if line[rule.metric] is None else float(line[rule.metric])
            self._bad_lines[number] = self._bad_lines[number] + 1 if rule.is_bad(value, self._samples) else 0
            if self._bad_lines[number] == rule.lines:
                yield Warned(line["step"], rule.text.format(value))


def warnings_of(history: Sequence[dict[str, Any]], samples: int) -> list[Warned]:
    """All warnings that a run's log lines give."""
    watch = Watch(samples)
    return [warned for line in history for warned in watch.look(line)]


class CollapseWarning(TrainerCallback):
    """Warns, in the log of the main process, when rewards or rollouts have collapsed or steps were skipped."""

    def __init__(self) -> None:
        self._watch: Watch | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Look at the line."""
        if not state.is_world_process_zero or logs is None:
            return
        self._watch = self._watch or Watch(args.samples)
        for warned in self._watch.look({**logs, "step": state.global_step}):
            logger.warning("step %d: %s", *warned)


class JsonlLog(TrainerCallback):
    """Writes every number that the trainer logs to a file, one JSON object per line, at once.

    Each line has ``step``. A number that is not finite, which JSON does not know, becomes null. When a run is resumed,
    lines after the step that it goes on from, and half a line at the end, are cut off; a run that starts anew begins an
    empty file. Only the main process writes.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self._own_lines: list[str] = []  # of this process, before training begins
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Cut the file to what belongs to this run."""
        if not state.is_world_process_zero:
            return
        kept = self._own_lines
        if state.global_step:
            lines = (line for line in read_log(self._path) if line["step"] <= state.global_step)
            kept = [json.dumps(line) for line in lines if "train_loss" not in line]  # which stands at a run's end
        temporary = self._path.with_name(self._path.name + ".tmp")
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self._path)
        self._training = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Append the line: whole, or (CheckpointError) not at all."""
        if not state.is_world_process_zero or logs is None:
            return
        numbers = {name: _finite(value) for name, value in logs.items() if isinstance(value, (int, float))}
        line = json.dumps({"step": state.global_step, **numbers})
        if not self._training:
            self._own_lines.append(line)
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # A log that is deleted while the run goes on is not begun anew.
        with writing(self._path), open(self._path, "r+b" if self._training else "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data := f"{line}\n".encode()) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a `JsonlLog`, without half a line at the end; none if there is no file.

    Raises:
        ValueError: another line is not a JSON object of numbers with ``step``; the message names file and line.
    """
    if not path.is_file():
        return []
    lines = []
    data = path.read_bytes()
    for number, raw in enumerate(data[: data.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            lines.append(log_line(parse_json(raw.decode("utf-8"))))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: expected a JSON object of numbers, got {error}") from None
    return lines


def log_line(line: Any) -> dict[str, float | None]:
    """``line`` if it is what a trainer logs: a dict of numbers by name, None where one is not finite, with ``step``.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if not isinstance(line, dict):
        raise ValueError(type(line).__name__)
    if type(line.get("step")) is not int or not 0 <= line["step"] <= _LARGEST_STEP:
        raise ValueError(f"'step': {str(line.get('step'))[:40]!r}")
    for name, value in line.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # An int may be too large for a float.
        if value is not None and not (is_number and (isinstance(value, float) or abs(value) < sys.float_info.max)):
            raise ValueError(f"{name[:40]!r}: {str(value)[:40]!r}")
    return line


def _finite(value: float) -> float | None:
    return value + 0 if math.isfinite(value) else None  # `+ 0`: of a bool its number


def gradient_norms(terms: dict[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """L2 norm of each term's gradient, by one more backward pass for each; the graph and ``.grad`` stay as they are.

    Args:
        terms: scalars by name.
        parameters: that the gradients are taken of.
    """
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norms[f"grad_norm/{name}"] = torch.stack(
            [torch.linalg.vector_norm(x, dtype=torch.float32) for x in gradients if x is not None]
        ).norm()
    return norms
