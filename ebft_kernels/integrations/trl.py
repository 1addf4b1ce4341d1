"""Token log-probabilities of TRL's trainers by :func:`ebft_kernels.linear_log_probs`: :func:`patch_trl`."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..logprob import linear_log_probs
from ._models import base_model, facts
from ._output_head import OutputHead, head_form, in_place_of_logits

if TYPE_CHECKING:
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer

#: First release whose trainers call `model(..., fused_lm_head=True)`, and the first that nobody has tested.
_SINCE, _BEFORE = (1, 15), (1, 17)
_IGNORED = -100
# Bytes of the logits that statistics are taken of together.
_TILE_BYTES = {"cpu": 16 << 20}
_OTHER_TILE_BYTES = 512 << 20
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class TRLPatch:
    """What :func:`patch_trl` did to one trainer; a context manager that undoes it at its end."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self.active = True

    def undo(self) -> None:
        """TRL's own head again. A second call does nothing."""
        self.active = False
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> TRLPatch:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.undo()


def patch_trl(trainer: GRPOTrainer | SFTTrainer | DPOTrainer) -> TRLPatch:
    """Let a trainer of TRL take its token log-probabilities from :func:`ebft_kernels.linear_log_probs`.

        trainer = GRPOTrainer(...)
        patch_trl(trainer)          # before trainer.train()
        trainer.train()

    Loss, gradients and logged metrics stay what they were, up to rounding. TRL 1.15 and 1.16 call their models with
    ``fused_lm_head=True``; the trainer's model and its reference model answer that call then with the implementation
    that :func:`ebft_kernels.select_impl` names, and score the positions that have a label alone, on every device. The
    model's own forward gives the router loss of mixtures of experts, and is what runs without ``fused_lm_head``. What
    TRL logs besides, the entropy among it, is computed from tiles of the logits, without gradient. No class and no
    module is changed, nor any other trainer.

    Args:
        trainer: a ``GRPOTrainer``, ``SFTTrainer`` or ``DPOTrainer``, or one of a subclass, before its training starts.

    Returns:
        :class:`TRLPatch`, whose ``undo()`` gives the trainer back as it was.

    Raises:
        ImportError: trl is not there, or of a release that is not known: 1.15 and 1.16 are.
        TypeError: another trainer.
        ValueError: an option that cannot be honoured (the message names it), a head that is not of the form of
            ``OutputHead``, or a trainer that is patched already.
    """
    _check_release()
    from trl import DPOTrainer, GRPOTrainer, SFTTrainer

    if not isinstance(trainer, (GRPOTrainer, SFTTrainer, DPOTrainer)):
        raise TypeError(f"trainer: expected a GRPOTrainer, SFTTrainer or DPOTrainer, got {type(trainer).__name__}")
    _check_options(trainer)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    for model in models:
        base = base_model(model)
        if "forward" not in base.__dict__:
            raise ValueError("trainer: expected models that TRL has set up, got one without a forward of its own")
        if getattr(base.forward, "_ebft_kernels_patched", False):
            raise ValueError("trainer: it is patched already")
        if model is trainer.model and hasattr(base, "_original_forward"):
            raise ValueError("trainer: expected one whose training has not started; call patch_trl before train()")
        head_form(model)
    patch = TRLPatch()
    for model in models:
        _replace_forward(trainer, base_model(model), _statistics_of(trainer, model), patch)
    return patch


def _check_release() -> None:
    try:
        import trl
    except ImportError as error:
        raise ImportError("patch_trl needs trl: pip install 'trl>=1.15,<1.17'") from error
    found = tuple(int(part) if part.isdigit() else -1 for part in trl.__version__.split(".")[:2])
    if not _SINCE <= found < _BEFORE:
        raise ImportError(f"trl: expected a release from 1.15 on and before 1.17, got {trl.__version__}")


def _check_options(trainer: Any) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    why = {
        "use_liger_kernel": "it replaces modules of the model when training starts",
        "torch_compile": "a compiled forward does not see what stands in the place of its head",
        "label_smoothing_factor": "the loss needs the logits of all tokens",
        "entropy_coef": "the gradient of the entropy needs the logits of all tokens",
        "use_adaptive_entropy": "the gradient of the entropy needs the logits of all tokens",
    }
    for name, reason in why.items():
        # Preference losses have a `label_smoothing` of their own, which needs log-probabilities alone.
        if value := getattr(args, name, None):
            raise ValueError(f"{name}: expected it to be off, got {value!r}: {reason}")
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError("compute_loss_func: expected None: the function is given the logits of all tokens")
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        raise ValueError("parallelism_config: expected no context, sequence or tensor parallelism; not tested with it")
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        if getattr(trainer, name, False):
            raise ValueError(f"{name}: expected a model that is whole on every rank (DDP or one process); not tested")


def _statistics_of(trainer: Any, model: nn.Module) -> tuple[str, ...]:
    """What TRL reads of this model's outputs besides log-probabilities and loss."""
    from trl import DPOTrainer, GRPOTrainer

    if model is not trainer.model:
        return ()
    if isinstance(trainer, GRPOTrainer):
        return ("entropy",)
    if isinstance(trainer, DPOTrainer):
        return ("entropy", "mean_logits", "is_top1", *(("log_sum_sq_probs",) if trainer.use_weighting else ()))
    return ("entropy", "is_top1")


def _replace_forward(trainer: Any, base: PreTrainedModel, wanted: tuple[str, ...], patch: TRLPatch) -> None:
    previous = base.forward
    temperature = getattr(trainer, "temperature", 1.0)
    head_in_float32 = getattr(trainer.args, "cast_lm_head_to_fp32", False)

    def score(hidden: Tensor, head: OutputHead, labels: Tensor, shifted: bool) -> tuple[Tensor, ...]:
        """Log-probabilities [K] of the labels that count, and the wanted statistics, each [K]."""
        device = head.weight.device
        hidden, counted = hidden.to(device), (labels != _IGNORED).to(device)
        hidden = (hidden if shifted else hidden[:, :-1])[counted].to(head.weight.dtype)
        targets = labels.to(device)[counted]
        with torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type) and not head_in_float32):
            options = {"bias": head.bias, "scale": head.scale, "softcap": head.softcap, "temperature": temperature}
            log_probs = linear_log_probs(hidden, head.weight, targets, **options)
            found = _statistics(hidden, head.at_temperature(temperature), targets, wanted)
        return log_probs, *(x.to(log_probs.dtype) for x in found)

    # `generate` reads the signature of a forward, and accelerate takes its own wrappers off by `__wrapped__`.
    @wraps(previous)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not (fused_lm_head and patch.active):
            given = {name: value for name, value in given.items() if value is not None}
            # TRL's forward takes the flag off again; the class' own, of a model that it has not set up, has none.
            return previous(*args, **({"fused_lm_head": True} if fused_lm_head else {}), **given, **kwargs)
        if labels is None and shift_labels is None:
            raise ValueError("labels: expected the labels [B, T] of a call with fused_lm_head=True, got None")
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        kwargs["use_cache"] = False
        if facts(self).keeps_logits:
            kwargs["logits_to_keep"] = 1
        with trainer.accelerator.autocast():
            found, output = in_place_of_logits(
                self,
                lambda hidden, head: score(hidden, head, targets, shift_labels is not None),
                lambda: type(self).forward(self, *args, **kwargs),
            )
        return _output(self, targets, found, wanted, getattr(output, "aux_loss", None), num_items_in_batch)

    forward._ebft_kernels_patched = True
    replacement = types.MethodType(forward, base)
    base.forward = replacement

    def undo() -> None:
        # Where accelerate has wrapped the replacement since, it stays, and only hands on.
        if base.__dict__.get("forward") is replacement:
            base.forward = previous

    patch._undo.append(undo)


def _output(
    base: PreTrainedModel,
    targets: Tensor,
    found: tuple[Tensor, ...],
    wanted: tuple[str, ...],
    aux_loss: Tensor | None,
    num_items_in_batch: Any,
) -> Any:
    """TRL's own kind of output: numbers [B, T] that are 0 where a label does not count."""
    from trl.trainer.utils import FusedCausalLMOutput

    counted = (targets != _IGNORED).to(found[0].device)
    # Scattered into zeros that depend on the model even if no label counts: backward() gives zeros then.
    spread = [x.new_zeros(counted.shape).masked_scatter(counted, x) for x in found]
    log_probs, statistics = spread[0], dict(zip(wanted, spread[1:], strict=True))
    statistics = {name: x.detach() for name, x in statistics.items()}
    if "is_top1" in statistics:
        statistics["is_top1"] = statistics["is_top1"].bool()
    loss = -log_probs.sum() / (counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    if aux_loss is not None:
        loss = loss + getattr(base.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, label_mask=counted, aux_loss=aux_loss, **statistics)


@torch.no_grad()
def _statistics(hidden: Tensor, head: OutputHead, targets: Tensor, wanted: tuple[str, ...]) -> list[Tensor]:
    """The ``wanted`` statistics of the logits of hidden [K, C] and targets [K], each [K]."""
    if not wanted:
        return []
    rows = max(1, _TILE_BYTES.get(hidden.device.type, _OTHER_TILE_BYTES) // (4 * head.weight.shape[0]))
    tiles = [
        _tile_statistics(head.logits(part), ids, wanted)
        for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return [torch.cat([tile[name] for tile in tiles]) for name in wanted]


def _tile_statistics(logits: Tensor, targets: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found = {}
    if "mean_logits" in wanted:
        found["mean_logits"] = logits.mean(-1)
    if "is_top1" in wanted:
        found["is_top1"] = logits.argmax(-1) == targets
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    if "log_sum_sq_probs" in wanted:
        found["log_sum_sq_probs"] = probs.square().sum(-1).log()
    if "entropy" in wanted:
        found["entropy"] = -(probs * log_probs).sum(-1)
    return found
