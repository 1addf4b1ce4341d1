"""The load-balancing loss of mixtures of experts, which a model computes but adds to its own loss only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ._models import architecture_of, base_model, decoder_of
from ._strided_attention import carried_call


def router_loss_coefficient(model: nn.Module) -> float:
    """The factor of the load-balancing loss in the loss of the model inside any wrapper.

    0 unless its config has ``output_router_logits``, which is what makes transformers add it.

    Raises:
        ValueError: the config has it, and names no coefficient.
        TypeError: ``model`` holds no transformers model.
    """
    base = base_model(model)
    config = decoder_of(base).config
    if not getattr(config, "output_router_logits", False):
        return 0.0
    for owner in (base, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if isinstance(value := getattr(owner, name, None), (int, float)):
                return float(value)
    raise ValueError(
        f"{architecture_of(base)}: output_router_logits is set, but no coefficient of a load-balancing loss is known; "
        "set config.output_router_logits = False to train without one"
    )


@contextmanager
def router_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the load-balancing loss of every forward over packed rows inside the context; nothing without one.

    It is the model's own, without its coefficient, over the prompts' tokens alone: neither padding nor rollouts count,
    so that it is what a plain forward over the prompts gives. Differentiable.

    Raises:
        ValueError: no coefficient is known (:func:`router_loss_coefficient`); at a forward: the model gives no loss.
        TypeError: ``model`` holds no transformers model.
    """
    base = base_model(model)
    found: list[Tensor] = []
    if not router_loss_coefficient(model):
        yield found
        return

    def keep(_module: nn.Module, _args: object, kwargs: dict[str, Any], output: object) -> None:
        loss = getattr(output, "aux_loss", None)
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"{architecture_of(base)}: output_router_logits is set, but the model gives no load-balancing loss; "
                "set config.output_router_logits = False to train without one"
            )
        if any(carried_call(value) is not None for value in kwargs.values()):
            found.append(loss)

    handle = base.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
