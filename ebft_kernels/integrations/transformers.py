"""Strided attention in transformers models, without a change to their code.

Importing this module registers the attention function ``"strided"`` with ``transformers.AttentionInterface``. A
forward over packed rows is

    with strided_attention_context(model, layout) as kwargs:
        logits = model(input_ids=layout.pack(prompt, rollouts), **kwargs).logits

and rollouts are drawn step by step with a :class:`StridedCache`:

    cache = StridedCache(layout)
    with strided_attention_context(model, layout, cache=cache) as kwargs:
        logits = model(input_ids=prompt, **kwargs).logits                           # [B, P, V]
    for step in range(layout.horizon - 1):
        with strided_attention_context(model, layout, cache=cache, step=step) as kwargs:
            logits = model(input_ids=tokens_of_step, **kwargs).logits               # [B, A*n] -> [B, A*n, V]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_int
from ..layout import StridedLayout, check_layout
from . import _model_check
from ._model_check import ModelSupport
from ._models import ModelFacts, base_model, decoder_layers, decoder_of, evaluation_mode, facts, last_hidden, unwrapped
from ._output_head import OutputHead, head_form, in_place_of_logits, output_head
from ._recording import ForwardRecording, replay_obstacle
from ._router_loss import router_loss_coefficient, router_losses
from ._strided_attention import NAME, Selection, StridedCall, carrier_mask, register, require_selected, row_mask
from ._strided_cache import StridedCache

__all__ = [
    "ForwardRecording",
    "ModelSupport",
    "OutputHead",
    "StridedCache",
    "apply_head",
    "base_model",
    "check_length",
    "check_model",
    "check_train_mode",
    "decoder_layers",
    "evaluation_mode",
    "facts",
    "hidden_states",
    "output_head",
    "replay_obstacle",
    "router_loss_coefficient",
    "router_losses",
    "strided_arguments",
    "strided_attention_context",
    "unwrapped",
]

register()


@contextmanager
def strided_attention_context(
    model: nn.Module,
    layout: StridedLayout,
    *,
    cache: StridedCache | None = None,
    step: int | None = None,
    recording: ForwardRecording | None = None,
) -> Iterator[dict[str, Any]]:
    """Select "strided" attention for ``model`` and give the keyword arguments of one forward over packed rows.

    The previous setting comes back on exit, also after an exception. The backward pass may run after the exit, with
    gradient checkpointing too. A forward inside the context that is not given the keyword arguments is refused.

    * ``cache=None``: ``model(input_ids=packed, **kwargs)`` with packed rows [B, S].
    * ``cache=cache``: the prompt pass, ``model(input_ids=prompt, **kwargs)`` with [B, P]; fills the prompt's rows.
    * ``cache=cache, step=g``: one decoding step, ``model(input_ids=tokens, **kwargs)`` with the tokens of step g
      [B, A*n], ordered (anchor, sample); writes their rows to the cache. No gradient.

    Entering it costs some microseconds, so that it can be entered for every decoding step.

    Args:
        model: a transformers causal language model, also inside PEFT, DDP, FSDP or ``torch.compile`` wrappers.
        layout: of the packed rows, on the model's device.
        cache: a :class:`StridedCache` of this layout.
        step: decoding step, 0 .. G-1.
        recording: with a cache it keeps what the forward computes; without one the forward is replayed from it, with
            the gradient of a computed one: see :class:`ForwardRecording`.

    Yields:
        Keyword arguments for the model's forward: position ids, cache, and the layout in two disguises.

    Raises:
        ValueError: the model cannot be run strided (the message names the architecture and the feature), ``step``
            without ``cache`` or out of range, a cache or recording of another layout, a recording that cannot be
            replayed, or a cache with gradient checkpointing in train mode; reentrant
            checkpointing under FSDP2 with transformers before 5.23.
        TypeError: ``model``, ``layout``, ``cache`` or ``recording`` is something else.
    """
    known = facts(model)
    if known.obstacle:
        raise ValueError(f"{known.architecture}: cannot be run strided: {known.obstacle}")
    _check_phase(model, layout, cache, step)
    _check_recomputation(model, known)
    if not (recording is None or isinstance(recording, ForwardRecording)):
        raise TypeError(f"recording: expected a ForwardRecording, got {type(recording).__name__}")
    if cache is None:
        rows, positions = layout, layout.position_ids
    elif step is None:
        rows, positions = layout.prompt_only(), layout.position_ids[:, : layout.length]
    else:
        rows, positions = layout, layout.step_rows(layout.position_ids, step)
    recomputable = cache is None and torch.is_grad_enabled()
    of_attention = {} if recording is None else {"known_by" if cache is None else "kept_by": recording}
    call = StridedCall(rows, step, known.windowed, known.configs if recomputable else (), **of_attention)
    kwargs = _forward_arguments(known, call, positions, cache)
    with ExitStack() as stack:
        if cache is not None:
            stack.enter_context(cache._running(step))
        if recording is not None:
            stack.enter_context(recording.running(layout, step, replay=cache is None))
        stack.callback(Selection(known.configs, NAME).undo)
        yield kwargs


def strided_arguments(model: nn.Module, layout: StridedLayout) -> dict[str, Any]:
    """Keyword arguments of one forward over packed rows, for a model that is at "strided" and stays there.

        model.set_attn_implementation("strided")        # or from_pretrained(..., attn_implementation="strided")
        logits = model(input_ids=packed, **strided_arguments(model, layout)).logits

    A call without them is an ordinary one, by "sdpa": packed rows are then nothing but long rows. Without them inside
    :func:`strided_attention_context`, it is refused.

    Args:
        model: as for :func:`strided_attention_context`.
        layout: of the packed rows [B, S], on the model's device.

    Raises:
        ValueError: the model is at another attention implementation, or cannot be run strided (the message names the
            architecture and the feature).
        TypeError: ``model`` or ``layout`` is something else.
    """
    known = facts(model)
    if known.obstacle:
        raise ValueError(f"{known.architecture}: cannot be run strided: {known.obstacle}")
    check_layout(layout)
    require_selected(known.architecture, known.configs)
    # The setting stays, so nothing has to be selected again when a checkpointed layer is run once more.
    return _forward_arguments(known, StridedCall(layout, None, known.windowed), layout.position_ids, None)


def _check_phase(model: nn.Module, layout: object, cache: object, step: int | None) -> None:
    check_layout(layout)
    if cache is None:
        if step is not None:
            raise ValueError(f"step: expected None without a cache, got {step}")
        return
    if not isinstance(cache, StridedCache):
        raise TypeError(f"cache: expected a StridedCache, got {type(cache).__name__}")
    if cache.layout is not layout:
        raise ValueError(f"cache: expected the cache of this layout, {layout}; got one of {cache.layout}")
    if step is not None:
        check_int("step", step, minimum=0)
        if step >= layout.horizon:
            raise ValueError(f"step: expected less than horizon = {layout.horizon}, got {step}")
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError("cache: gradient checkpointing in train mode drops the cache; sample in eval mode")


def _checkpoints_hooks() -> bool:
    """Whether this version of transformers recomputes a layer with its hooks, as before 5.23."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def _check_recomputation(model: nn.Module, known: ModelFacts) -> None:
    """Raise ValueError where reentrant gradient checkpointing loses gradients under FSDP2.

    Its hooks, recomputed with a layer, end FSDP2's backward pass with that layer's: the embeddings get no gradient.
    """
    if not (model.training and torch.is_grad_enabled() and _checkpoints_hooks()):
        return
    from torch.distributed.fsdp import FSDPModule

    for layer in decoder_layers(model):
        checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
        if isinstance(layer, FSDPModule) and getattr(layer, "gradient_checkpointing", False) and reentrant:
            raise ValueError(
                f"{known.architecture}: gradient checkpointing under FSDP2: expected use_reentrant=False or "
                "transformers 5.23, got use_reentrant=True and an older one, where the embeddings would get no gradient"
            )


def _forward_arguments(
    known: ModelFacts, call: StridedCall, positions: Tensor, cache: StridedCache | None
) -> dict[str, Any]:
    if getattr(known.config, "output_router_logits", False):
        # The load-balancing loss of a mixture of experts reads the mask as [B, T]: see `router_losses`.
        mask = row_mask(call, *positions.shape, positions.device)
    else:
        mask = carrier_mask(call, positions.device)
    kwargs: dict[str, Any] = {"position_ids": positions, "attention_mask": mask, "use_cache": cache is not None}
    if cache is not None:
        kwargs[known.cache_keyword] = cache
    if known.takes_keywords:
        kwargs["strided_layout"] = call
    return kwargs


def hidden_states(
    model: nn.Module,
    input_ids: Tensor,
    layout: StridedLayout,
    *,
    cache: StridedCache | None = None,
    step: int | None = None,
) -> Tensor:
    """The last hidden state of one forward over packed rows, as the vocabulary head would get it.

    The forward goes through ``model`` itself, wrappers and hooks included; its head runs on one row, or not at all.
    Differentiable, under gradient checkpointing and autocast too.

    Args:
        model: as for :func:`strided_attention_context`.
        input_ids: [B, S] packed rows; with a cache [B, P] or [B, A*n].
        layout, cache, step: as for :func:`strided_attention_context`.

    Returns:
        [B, S, C] (the rows of ``input_ids``), after the decoder's final norm.

    Raises:
        ValueError, TypeError: as :func:`strided_attention_context`.
    """
    captured: list[Tensor] = []
    known = facts(model)
    decoder = decoder_of(base_model(model))
    handle = decoder.register_forward_hook(lambda _module, _args, output: captured.append(last_hidden(output)))
    try:
        _run(model, input_ids, layout, cache, step)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise RuntimeError(
            f"{known.architecture}: expected one call of its decoder {type(decoder).__name__}, saw {len(captured)}"
        )
    return captured[0]


def apply_head(
    model: nn.Module,
    input_ids: Tensor,
    layout: StridedLayout,
    function: Callable[[Tensor, OutputHead], tuple[Tensor, ...]],
    *,
    cache: StridedCache | None = None,
    step: int | None = None,
    vocabulary: int | None = None,
    recording: ForwardRecording | None = None,
) -> tuple[Tensor, ...]:
    """One forward over packed rows with ``function(hidden, head)`` in the place of the vocabulary head.

    ``hidden`` [B, S, C] is what :func:`hidden_states` gives, ``head`` the model's :class:`OutputHead`. The call comes
    inside the model's forward, while the head's module runs, so that it is right under any wrapper: FSDP2 has gathered
    the weight by then and takes care of its gradient.

    Args:
        model, input_ids, layout, cache, step: as for :func:`hidden_states`.
        function: returns one or more tensors; those with gradient must all be of one dtype.
        vocabulary: give ``function`` the head of the token ids below this alone, where a head has more rows than its
            tokenizer has tokens (:meth:`OutputHead.first`); None: all.
        recording: as for :func:`strided_attention_context`; ``function`` is called in any case.

    Returns:
        What ``function`` returned.

    Raises:
        ValueError, TypeError: as :func:`hidden_states`; the head is not of the form of :class:`OutputHead`;
            ``vocabulary`` below 1.
    """
    if vocabulary is not None:
        check_int("vocabulary", vocabulary, minimum=1)
    results, _ = in_place_of_logits(
        model,
        lambda hidden, head: function(hidden, head.first(vocabulary)),
        lambda: _run(model, input_ids, layout, cache, step, recording),
    )
    return results


def _run(
    model: nn.Module,
    input_ids: Tensor,
    layout: StridedLayout,
    cache: StridedCache | None,
    step: int | None,
    recording: ForwardRecording | None = None,
) -> None:
    """A forward over packed rows whose logits nobody needs."""
    with strided_attention_context(model, layout, cache=cache, step=step, recording=recording) as kwargs:
        if facts(model).keeps_logits:
            kwargs["logits_to_keep"] = 1
        model(input_ids=input_ids, **kwargs)


def check_model(model: nn.Module, *, training: bool = True) -> ModelSupport:
    """Whether ``model`` can be run strided, found out before any work is lost on wrong numbers.

    First what its class and config tell: layers other than full or sliding attention, chunked attention, biases,
    rotary frequencies that depend on the length of the call, attention dropout. Then a measurement on 27 tokens: the
    logits of a packed forward and of cached decoding against ordinary eager forwards over each prefix and rollout
    alone. The model is left as it was: modes, attention setting, random states, gradients. What begins beyond so few
    tokens is for :func:`check_length`.

    Args:
        model: as for :func:`strided_attention_context`; it is run as it is, adapters and wrappers included.
        training: whether it will be run in train mode, where attention dropout would be drawn.

    Returns:
        :class:`ModelSupport`; call ``.require()`` on it to make it a hard error.

    Raises:
        TypeError: ``model`` holds no transformers model.
    """
    try:
        known = facts(model)
    except ValueError as error:
        architecture, _, reason = str(error).partition(": ")
        return ModelSupport(False, reason, architecture)
    reason = _model_check.static_reason(model, known, training)
    if not reason:
        with _model_check.undisturbed(model):
            reason = _measure(model, known)
    return ModelSupport(not reason, reason, known.architecture)


def check_length(model: nn.Module, length: int) -> ModelSupport:
    """Whether ``model``, which `check_model` accepts, gives the right numbers for prompts of ``length`` tokens too.

    The short measurement cannot see what begins beyond it: windows, positions that depend on the length, capacities.
    This one takes about three forwards over one such prompt, without gradient, and the logits of a few rows: those that
    predict a rollout in the middle of the prompt and one at its end, packed and with cached decoding, against ordinary
    forwards over the prefix and rollout alone. The model is left as it was.

    Args:
        model: as for :func:`strided_attention_context`, on the device that it is trained on.
        length: of the longest prompt.

    Raises:
        ValueError: ``length`` is below 1; the head is not of the form of :class:`OutputHead`.
        TypeError: ``model`` holds no transformers model.
    """
    check_int("length", length, minimum=1)
    known, form = facts(model), head_form(model)
    layout = _model_check.long_layout(length, base_model(model).get_input_embeddings().weight.device)
    tokens = _model_check.probe_tokens(model, layout)
    with _model_check.undisturbed(model):
        try:
            plain = _model_check.plain_tail_logits(model, tokens, layout, known, form)
            found = _packed_tail_logits(model, tokens, layout), _cached_tail_logits(model, tokens, layout)
        except Exception as error:  # noqa: BLE001 (whatever a model raises says that it cannot be run)
            reason = f"a forward over {length} tokens failed with {type(error).__name__}: {error}"
            return ModelSupport(False, reason, known.architecture)
    for what, logits in zip(("a packed forward", "cached decoding"), found, strict=True):
        # The first token of a rollout is predicted by a row of the prompt.
        by_step = [x.transpose(1, 3).flatten(1, 3) for x in (logits, plain)]
        what = f"{what} over {length} tokens"
        if reason := _model_check.disagreement(*by_step, layout.num_anchors, what):
            return ModelSupport(False, reason, known.architecture)
    return ModelSupport(True, "", known.architecture)


def check_train_mode(model: nn.Module) -> ModelSupport:
    """Whether ``model`` computes the same in train mode as in eval mode, in which rollouts are sampled.

    Where it draws something (dropout, layers that are left out, noise on a router) rollouts are scored by another model
    than the one that wrote them: what is trained is no policy gradient, and the divergence of a model from itself is
    not 0. Cross-entropy training does not mind.

    Args:
        model: as for :func:`strided_attention_context`; it is left as it was.

    Raises:
        TypeError: ``model`` holds no transformers model.
    """
    known = facts(model)
    drawn = _model_check.drawn_in_train_mode(model, known)
    reason = drawn and f"{drawn} would be drawn where rollouts are scored and not where they are sampled; set it to 0"
    return ModelSupport(not drawn, reason, known.architecture)


def _packed_tail_logits(model: nn.Module, tokens: Tensor, layout: StridedLayout) -> Tensor:
    """[1, A, 1, G, V], as `plain_tail_logits`."""
    return apply_head(model, tokens, layout, lambda hidden, head: (head.logits(layout.predictors(hidden)),))[0]


def _cached_tail_logits(model: nn.Module, tokens: Tensor, layout: StridedLayout) -> Tensor:
    cache = StridedCache(layout)
    prompt = tokens[:, : layout.length]

    def anchors(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
        return (head.logits(layout.anchor_rows(hidden)),)

    def all_rows(hidden: Tensor, head: OutputHead) -> tuple[Tensor, ...]:
        return (head.logits(hidden),)

    steps = [apply_head(model, prompt, layout, anchors, cache=cache)[0]]
    for step in range(layout.horizon - 1):
        steps += apply_head(model, layout.step_rows(tokens, step), layout, all_rows, cache=cache, step=step)
    return torch.stack(steps, 2)[:, :, None]


def _measure(model: nn.Module, known: ModelFacts) -> str:
    """What a short packed forward and cached decoding get wrong; empty if nothing."""
    layout = _model_check.probe_layout(base_model(model).get_input_embeddings().weight.device)
    tokens = _model_check.probe_tokens(model, layout)
    plain = _model_check.plain_logits(model, tokens, layout, known)
    if reason := _model_check.not_finite(model, plain):
        return reason
    for what, run in (("a packed forward", _packed_logits), ("cached decoding", _cached_logits)):
        try:
            logits = run(model, tokens, layout)
        except Exception as error:  # noqa: BLE001 (whatever a model raises says that it cannot be run)
            return f"{what} failed with {type(error).__name__}: {error}"
        if reason := _model_check.disagreement(logits, plain, layout.length, what):
            return reason
    return ""


def _packed_logits(model: nn.Module, tokens: Tensor, layout: StridedLayout) -> Tensor:
    with strided_attention_context(model, layout) as kwargs:
        return model(input_ids=tokens, **kwargs).logits


def _cached_logits(model: nn.Module, tokens: Tensor, layout: StridedLayout) -> Tensor:
    cache = StridedCache(layout)
    with strided_attention_context(model, layout, cache=cache) as kwargs:
        prompt = model(input_ids=tokens[:, : layout.length], **kwargs).logits
    steps = []
    for step in range(layout.horizon):
        with strided_attention_context(model, layout, cache=cache, step=step) as kwargs:
            steps.append(model(input_ids=layout.step_rows(tokens, step), **kwargs).logits)
    return torch.cat([prompt, torch.stack(steps, 2).flatten(1, 2)], 1)
