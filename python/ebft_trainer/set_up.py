"""What a trainer is given, checked before any work: the model, the rows, and what is to stay frozen beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import has_length

from ebft_kernels.integrations.transformers import check_model, check_train_mode, facts, output_head, router_losses

from .config import EBFTConfig
from .data import EBFTCollator, rows_without_anchor
from .features import FeatureNetwork, StartingAdapters, check_adapters, check_base_is_frozen, has_adapters
from .quantized import keep_gradients


def checked_model(model: nn.Module, args: EBFTConfig, *, training: bool) -> nn.Module:
    """``model`` without the wrappers of an earlier trainer.

    Args:
        model: as it was given.
        args: whose objective decides whether there are rollouts.
        training: whether it will be trained.

    Raises:
        ValueError: it cannot be run strided, is spread over the ranks already, has nothing to train, merged adapters, a
            load-balancing loss that it does not give, or is another model in train mode.
    """
    model = _without_autocast(model)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model: expected whole weights, got some that ZeRO-3 has spread over the ranks already; load the model "
            "before the EBFTConfig with its DeepSpeed settings is made"
        )
    if training and not any(x.requires_grad for x in model.parameters()):
        raise ValueError(
            "model: expected weights to train, got none with requires_grad; adapters are loaded with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    keep_gradients(model)
    check_adapters(model)
    with router_losses(model):  # whose absence raises
        check_model(model).require()
    if training and (args.rl_coef or args.verifier_coef or args.kl_coef or args.entropy_coef):
        check_train_mode(model).require()
    output_head(model)
    return model


def _without_autocast(model: nn.Module) -> nn.Module:
    """accelerate leaves it behind, and it would round the logits that are compared."""
    return extract_model_from_parallel(model, keep_fp32_wrapper=False)


def checked_collator(collator: Any, model: nn.Module, tokenizer: Any, args: EBFTConfig, vocabulary: int | None) -> Any:
    """``collator``, or for None an `EBFTCollator`; it refuses rows that the model has too few positions for."""
    if collator is None:
        pad = getattr(tokenizer, "pad_token_id", None)
        collator = EBFTCollator(
            args,
            pad_token_id=0 if pad is None else pad,
            pad_to_multiple_of=args.pad_to_multiple_of,
            vocabulary=vocabulary or model.get_input_embeddings().weight.shape[0],
        )
    positions = facts(model).positions
    return collator if positions is None else _WithinPositions(collator, positions)


class _WithinPositions:
    """A data collator that refuses rows with more positions than the model has learned."""

    def __init__(self, collator: Any, positions: int) -> None:
        self._collator, self._positions = collator, positions

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch = self._collator(rows)
        layout = batch["layout"]
        if layout.length > self._positions:
            needed = 1 + int(layout.position_ids.max())
            if needed > self._positions:
                raise ValueError(
                    f"input_ids: expected rows of at most {self._positions} positions, which is what the model has "
                    f"learned, got {needed}"
                )
        return batch


def check_rows(name: str, dataset: Any, collator: Any) -> int:
    """The positions of the longest row of ``dataset``; 0 for one without a length, which is not read.

    Raises:
        ValueError: there is no row, or one without room for a rollout.
    """
    if dataset is None or not has_length(dataset):
        return 0
    if len(dataset) == 0:
        raise ValueError(f"{name}: expected at least one row, got none")
    longest = 0

    def measured(rows: Sequence[Any]) -> dict[str, Any]:
        nonlocal longest
        batch = collator(rows)
        longest = max(longest, batch["layout"].length)
        return batch

    for number, reason in rows_without_anchor(dataset, measured):
        raise ValueError(f"{name}: row {number}: {reason}")
    return longest


def check_frozen(model: nn.Module, feature_network: Any, reference: nn.Module | None) -> None:
    """Raise ValueError if what is to be frozen has weights that ``model`` trains."""
    if isinstance(feature_network, FeatureNetwork) and feature_network.is_trained_with(model):
        raise ValueError("feature_network: expected a frozen network, got one that shares the weights that are trained")
    trained = {id(x) for x in model.parameters() if x.requires_grad}
    if reference is not None and any(id(x) in trained for x in reference.parameters()):
        raise ValueError(
            "reference_model: expected a model of its own, got one that shares the weights that are trained"
        )


def frozen_reference(
    model: nn.Module, args: EBFTConfig, given: nn.Module | None
) -> nn.Module | StartingAdapters | None:
    """The model that the divergence is from, as `ebft_step` takes it: ``given``, or ``model`` as it is now, or None.

    Raises:
        ValueError: ``args.kl_reference`` does not fit; ``given`` cannot be run strided.
    """
    if given is not None:
        if args.kl_reference != "start":
            raise ValueError(f"kl_reference: expected 'start' with a reference_model, got {args.kl_reference!r}")
        given = _without_autocast(given)
        check_model(given).require()
        output_head(given)
        return given
    if not args.kl_coef:
        return None
    if not has_adapters(model):
        if args.kl_reference == "base":
            raise ValueError("kl_reference: expected 'start' for a model without PEFT adapters, got 'base'")
        return copy.deepcopy(model)
    if args.kl_reference == "base":
        check_base_is_frozen(model)
        return None
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "kl_reference: expected 'base' with ZeRO-3, which spreads adapters over the ranks, got 'start'"
        )
    return StartingAdapters(model)
