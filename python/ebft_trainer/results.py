"""What a run's folder holds, and what its log lines add up to."""

from __future__ import annotations

from collections.abc import Sequence

RUN_FILE, RESULT_FILE, MODEL_FOLDER = "ebft.json", "results.json", "model"


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
