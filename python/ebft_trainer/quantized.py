"""Weights in 4 bits (bitsandbytes), of which the trainer asks one thing only."""

from __future__ import annotations

from torch import nn


def keep_gradients(model: nn.Module) -> None:
    """Have 4-bit layers on a CPU keep the weights that they have a gradient for.

    The first call in eval mode, here that of the rollouts, would pack them for inference on processors with 16-bit
    products: packed for good, they compute in bfloat16 and pass no gradient on to the adapters of earlier layers.

    Raises:
        ValueError: layers of ``model`` are packed already.
    """
    for name, module in model.named_modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"model: expected 4-bit weights that have a gradient, got {name!r} packed for inference by an earlier "
                "call in eval mode; load the model again"
            )
        module.support_avx512bf16_for_cpu = False
