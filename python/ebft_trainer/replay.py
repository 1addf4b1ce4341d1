"""The policy's forward is the decoding that has just been run: rollouts with what was computed for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ebft_kernels import StridedLayout
from ebft_kernels.integrations._models import base_model
from ebft_kernels.integrations.transformers import ForwardRecording, OutputHead, replay_obstacle

if TYPE_CHECKING:
    from .config import EBFTOptions

logger = logging.getLogger(__name__)

# Model -> what was said of it last.
_said: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class RecordedRollouts:
    """What was computed while rollouts were drawn, for one differentiable forward with the same weights.

    Args:
        model: as for :func:`ebft_trainer.sample_rollouts`, to which this is then given.
        layout: of the packed rows.

    Attributes:
        forward: of the decoder.
        tokens: [B, A, n, G], as they were drawn and decoded: also after the end of a rollout.
        log_probs: [B, A, n, G], of these.
    """

    tokens: Tensor
    log_probs: Tensor

    def __init__(self, model: nn.Module, layout: StridedLayout) -> None:
        self.forward = ForwardRecording(model, layout)
        self._layout = layout
        self._statistics: list[Tensor] = []

    def drawn(self, tokens: Tensor, log_probs: Tensor, statistics: Sequence[Tensor]) -> None:
        """Keep tokens and log-probabilities [B, A, n, G], and of their predictors' logits, over the temperature, what
        the head's gradient needs: [B*A, 2], then G-1 times [B*A*n, 2], see :func:`ebft_kernels.linear_log_probs`."""
        self.tokens, self.log_probs, self._statistics = tokens, log_probs, list(statistics)

    def of_head(self, head: OutputHead) -> tuple[Tensor, Tensor] | None:
        """What :func:`ebft_kernels.linear_log_probs` need not compute for :meth:`StridedLayout.distinct_predictors`.

        None in 16 bits: the gradient computes logits once more. Rounded to 16 bits, by products of other shapes, they
        may be others than those that the statistics are of, by more than the probability of a likely token is from 1.
        """
        if head.weight.dtype.itemsize < 4 or torch.is_autocast_enabled(head.weight.device.type):
            return None
        layout, (first, *later) = self._layout, self._statistics
        sizes = (layout.batch_size, layout.num_anchors, layout.samples, 0, 2)
        steps = torch.stack([x.view(*sizes[:3], 2) for x in later], 3) if later else first.new_empty(sizes)
        rows = layout.join_predictors(first.view(*sizes[:2], 2), steps)
        return self.log_probs, rows.T.contiguous()


def recorded_rollouts(model: nn.Module, layout: StridedLayout, options: EBFTOptions) -> RecordedRollouts | None:
    """A recording, if the policy's forward after it is to be replayed; says to the log what happens, and why."""
    obstacle = "replay_rollouts is off" if not options.replay_rollouts else replay_obstacle(model)
    if not torch.is_grad_enabled():
        return None
    say(model, obstacle)
    return None if obstacle else RecordedRollouts(model, layout)


def say(model: nn.Module, obstacle: str) -> None:
    """Log, where it is news, whether the policy's forward replays what decoding computed."""
    how = f"computed again: {obstacle}" if obstacle else "replayed from decoding"
    base = base_model(model)
    if _said.get(base) != how:
        _said[base] = how
        logger.info("the policy's forward is %s", how)
