"""Tokens, floating-point operations and a range of times for one step, from a dry run and a data sheet."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ebft_kernels import StridedLayout
from ebft_kernels.integrations.transformers import decoder_layers

from .dry_run import DryRun, Job, Phase
from .hardware import Device, Efficiency

#: The formulas, as the plan prints them; `phase_costs` computes them.
FORMULAS = {
    "linear": "2 x rows x weights of the blocks' matrices (of experts: those in use) x passes",
    "head": "2 x head rows x V x C x passes",
    "attention": "2 x heads x (D + Dv) x visible pairs of a query and a key, 5/2 of it in the backward pass",
}


class Cost(NamedTuple):
    """One phase of a step.

    Attributes:
        rows: token rows that run through the model's blocks.
        linear, head, attention: floating-point operations, by `FORMULAS`.
    """

    rows: int
    linear: float
    head: float
    attention: float

    @property
    def operations(self) -> float:
        """Of all three."""
        return self.linear + self.head + self.attention


class _Work(NamedTuple):
    """Rows of a phase, rows that the head runs on, layouts whose pairs count and do not, blocks that run; None: all."""

    rows: int
    head_rows: int
    pairs: StridedLayout
    without: StridedLayout | None = None
    blocks: int | None = None


def matrix_weights(model: nn.Module, blocks: int | None = None) -> float:
    """Weights that each row of the first ``blocks`` blocks is multiplied with; of experts, those in use."""
    config = model.config.get_text_config()
    total = 0.0
    for block in decoder_layers(model)[:blocks]:
        for parameter in block.parameters():
            if parameter.ndim == 3:
                total += parameter.numel() * config.num_experts_per_tok / parameter.shape[0]
            elif parameter.ndim == 2:
                total += parameter.numel()
    return total


def phase_costs(model: Any, run: DryRun, job: Job, *, deepest: int | None) -> dict[str, Cost]:
    """Costs of every phase of ``run`` that computes, by its name.

    Args:
        model: that was run.
        run: what it did.
        job: what it was asked to do.
        deepest: number of blocks that the feature network runs.
    """
    head = model.get_output_embeddings().weight.numel()
    trains_all = all(parameter.requires_grad for parameter in model.parameters())
    costs = {}
    for name, work in _work(job, deepest).items():
        phase = run.phases[name if name in run.phases else "rollout: prompt"]
        costs[name] = Cost(
            work.rows,
            2 * work.rows * matrix_weights(model, work.blocks),
            2 * work.head_rows * head,
            sum(2 * x.heads * (x.key_size + x.value_size) * _pairs(work, x.window) for x in phase.attention),
        )
    forward = costs["policy"]
    # Gradients of the inputs and, unless the weights are frozen, of the weights; the head computes its logits again.
    passes = 1 + trains_all
    again = int(job.checkpointing)
    costs["backward"] = Cost(
        forward.rows * again,
        (passes + again) * forward.linear,
        (passes + 1) * forward.head,
        (2.5 + again) * forward.attention,
    )
    return costs


def _work(job: Job, deepest: int | None) -> dict[str, _Work]:
    layout = job.layout()
    batch, prompt = layout.batch_size, layout.prompt_only()
    prompt_rows = batch * layout.length
    if job.objective == "sft":
        return {"policy": _Work(prompt_rows, batch * (layout.length - 1), layout)}
    short, anchors = layout.without_last_step(), batch * layout.num_anchors
    rollout_rows = anchors * layout.samples * (layout.horizon - 1)
    scored = anchors + rollout_rows + job.scores_prompt * batch * (layout.length - 1)
    work = {"rollout: prompt": _Work(prompt_rows, anchors, prompt)}
    if layout.horizon > 1:
        work["rollout: steps"] = _Work(rollout_rows, rollout_rows, short, without=prompt)
    if job.objective == "ebft":
        work["features"] = _Work(batch * layout.packed_length, 0, layout, blocks=deepest)
    work["policy"] = _Work(prompt_rows + rollout_rows, scored, short)
    return work


def _pairs(work: _Work, window: int | None) -> int:
    return work.pairs.visible_pairs(window) - (work.without.visible_pairs(window) if work.without else 0)


def seconds(phase: Phase, cost: Cost, device: Device, dtype: torch.dtype, reached: Efficiency) -> float:
    """Time of one phase, all its repetitions: products, memory traffic, and the start of every op.

    An accelerator computes while the host starts the next ops, so the slower of the two counts; on a CPU both do.
    """
    computing = cost.operations / (device.rates[dtype] * reached.products)
    moving = phase.times * phase.traffic / (device.bandwidth * reached.bandwidth)
    starting = phase.times * phase.ops * device.seconds_per_op * reached.starts
    return max(computing + moving, starting) if device.overlaps else computing + moving + starting
