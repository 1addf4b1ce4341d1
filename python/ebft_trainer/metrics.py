"""What a log line says of the optimizer steps since the last one."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor


class MetricSums:
    """Weighted sums of metrics between two log lines; tensors stay on their device until they are logged."""

    def __init__(self) -> None:
        self._steps = 0
        self._skipped = 0
        # Of each micro-batch of the step that is under way: values and weights.
        self._pending: list[dict[str, tuple[Any, Any]]] = []
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        self._started: float | None = None

    def start(self, *, new_step: bool) -> None:
        if new_step:
            self._pending.clear()
        if self._started is None:
            self._started = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        if self._started is not None:
            self._started += seconds

    def add(self, metrics: dict[str, Tensor | float], weights: Tensor) -> None:
        """Metrics of one micro-batch, most of them means over its anchors; ``weights`` [2] as `loss_weights`."""
        anchors, tokens = weights
        first = not self._pending
        entry = {}
        for name, value in metrics.items():
            if name == "loss":  # the micro-batches of a step add up to its loss
                value, weight = value.detach(), float(first)
            elif name in ("loss/ce", "loss/router"):
                value, weight = value * tokens, tokens
            elif name in ("tokens", "valid_anchors") or name.startswith("seconds/"):
                weight = 1.0
            else:
                value, weight = value * anchors, anchors
            entry[name] = value, weight
        self._pending.append(entry)

    def end_step(self, *, taken: bool) -> None:
        """The step under way enters the means, or is only counted."""
        self._steps += 1
        self._skipped += not taken
        for entry in self._pending if taken else ():
            for name, (value, weight) in entry.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._weights[name] = self._weights.get(name, 0.0) + weight
        self._pending.clear()

    def means(self, accelerator: Any) -> dict[str, float]:
        """Means over micro-batches and ranks, tokens per second of all ranks, seconds per optimizer step."""
        if self._started is None or not self._steps:
            return {}
        elapsed = time.perf_counter() - self._started
        out = {"loss": math.nan, "nonfinite_steps": self._skipped, "seconds/step": elapsed / self._steps}
        if not self._sums:
            return out
        values = [*self._sums.values(), *(self._weights[name] for name in self._sums)]
        table = torch.stack([torch.as_tensor(x, device=accelerator.device, dtype=torch.float32) for x in values])
        sums, weights = accelerator.reduce(table, "sum").cpu().double().view(2, -1)
        out.update(zip(self._sums, (sums / weights.clamp_min(1e-30)).tolist(), strict=True))
        if "tokens" in out:
            out["tokens_per_second"] = sums[list(self._sums).index("tokens")].item() / elapsed
        return out
