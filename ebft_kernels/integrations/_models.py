"""What the integration needs to know of a model, found once: its decoder, its configs, why it cannot be run strided."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
_CALL_DEPENDENT_ROPE = ("dynamic", "longrope")
# What wrappers call the module that they wrap: torch.compile, DDP and DeepSpeed, FSDP.
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_dropout_prob")


@dataclass(frozen=True)
class ModelFacts:
    """What does not change from forward to forward.

    Attributes:
        architecture: the config's ``model_type``.
        config: the decoder's config.
        configs: every config from which the decoder's modules read their attention implementation.
        windowed: numbers of the layers that attend in a sliding window.
        takes_keywords: whether ``forward`` accepts keywords that it does not know.
        cache_keyword: what ``forward`` calls its cache of keys and values: transformers 5.24 has renamed it.
        keeps_logits: whether ``forward`` accepts ``logits_to_keep``.
        positions: how many positions it has learned embeddings, or a table, of; None: any number.
        obstacle: why the model cannot be run strided; empty when nothing is known against it.
    """

    architecture: str
    config: Any
    configs: tuple[Any, ...]
    windowed: frozenset[int]
    takes_keywords: bool
    cache_keyword: str
    keeps_logits: bool
    positions: int | None
    obstacle: str


_facts: WeakKeyDictionary[nn.Module, ModelFacts] = WeakKeyDictionary()


def unwrapped(model: nn.Module) -> Any:
    """The transformers or PEFT model inside DDP, FSDP and ``torch.compile``.

    Raises:
        TypeError: there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        # Their own submodules: wrappers pass attributes that they lack on to what they wrap.
        wrapped = next((inner._modules[name] for name in _WRAPPED if name in getattr(inner, "_modules", ())), None)
        if wrapped is None and hasattr(inner, "get_base_model"):
            return inner
        if wrapped is None:
            raise TypeError(f"model: expected a transformers model or a wrapper of one, got {type(model).__name__}")
        inner = wrapped
    return inner


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, ``torch.compile`` and PEFT wrappers.

    Raises:
        TypeError: there is none.
        ValueError: a PEFT wrapper puts virtual tokens in front of the input.
    """
    inner = unwrapped(model)
    if isinstance(inner, PreTrainedModel):
        return inner
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in inner.peft_config.values()):
        raise ValueError(
            f"{architecture_of(inner.get_base_model())}: PEFT prompt learning puts virtual tokens in front of the "
            "input, which packed rows have no place for"
        )
    return base_model(inner.get_base_model())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; on exit every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoder_of(base: PreTrainedModel) -> nn.Module:
    """The module that returns the last hidden state: embeddings, decoder blocks and final norm, without the head."""
    decoder = base.get_decoder()
    # Some releases give the whole model for architectures that name their decoder in a way of their own.
    return base.base_model if decoder is base else decoder


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order, of the model inside any wrapper.

    Raises:
        TypeError: ``model`` holds no transformers model.
        ValueError: its decoder keeps its blocks in an unknown way.
    """
    base = base_model(model)
    decoder = decoder_of(base)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    expected = getattr(decoder.config, "num_hidden_layers", None)
    for child in lists:
        if len(child) == expected:
            return child
    raise ValueError(
        f"{architecture_of(base)}: no list of its {expected} decoder blocks found in {type(decoder).__name__}; "
        f"it has lists of {[len(child) for child in lists]}"
    )


def facts(model: nn.Module) -> ModelFacts:
    """The facts of the model inside any wrapper; worked out again only while there is an obstacle.

    Raises:
        TypeError: ``model`` holds no transformers model.
    """
    base = base_model(model)
    known = _facts.get(base)
    if known is None or known.obstacle or known.config is not decoder_of(base).config:
        known = _facts[base] = _find_facts(base)
    return known


def _find_facts(base: PreTrainedModel) -> ModelFacts:
    decoder = decoder_of(base)
    config = decoder.config
    configs = {id(config): config}
    for module in decoder.modules():
        own = getattr(module, "config", None)
        if hasattr(own, "_attn_implementation"):
            configs.setdefault(id(own), own)
    parameters = inspect.signature(base.forward).parameters
    return ModelFacts(
        architecture=architecture_of(base),
        config=config,
        configs=tuple(configs.values()),
        windowed=_windowed_layers(config),
        cache_keyword="cache" if "cache" in parameters else "past_key_values",
        takes_keywords=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()),
        keeps_logits="logits_to_keep" in parameters,
        positions=_learned_positions(decoder),
        obstacle=_obstacle(base, decoder),
    )


def architecture_of(base: nn.Module) -> str:
    """The config's ``model_type``, for messages."""
    return getattr(base.config, "model_type", None) or type(base).__name__


def _learned_positions(decoder: nn.Module) -> int | None:
    for name, module in decoder.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (own == "wpe" or "position" in own):
            return module.num_embeddings - getattr(module, "offset", 0)
    table = getattr(decoder, "pos_encoding", None)
    return len(table) if isinstance(table, Tensor) else None


def _windowed_layers(config: Any) -> frozenset[int]:
    if getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", True) is False:
        return frozenset()
    types = getattr(config, "layer_types", None)
    if types is None:
        return frozenset(range(config.num_hidden_layers))
    return frozenset(i for i, kind in enumerate(types) if kind == "sliding_attention")


def _obstacle(base: PreTrainedModel, decoder: nn.Module) -> str:
    """Why strided attention cannot be right for this model, as far as its class and config tell; else empty."""
    config = decoder.config
    if getattr(base.config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if base.get_output_embeddings() is None:
        return f"{type(base).__name__} has no language-model head"
    kinds = [
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "layers_block_type", None) or ()),
    ]
    for kind in kinds:
        if kind not in _ATTENTION_LAYERS:
            return f"layers of type {kind!r} (supported: full and sliding attention)"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"chunked attention (attention_chunk_size {config.attention_chunk_size})"
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Conv1d):
            return f"a convolution over tokens ({name})"
    if getattr(config, "alibi", False):
        return "ALiBi position biases"
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    if both_ways or not getattr(config, "is_causal", True):
        return "attention that is not causal"
    if not (_uses_interface(base) and _uses_interface(decoder)):
        return "its attention ignores transformers' AttentionInterface"
    return _rope_obstacle(config)


def _uses_interface(model: nn.Module) -> bool:
    """Whether changing the attention implementation changes what the class computes with."""
    can_set = getattr(type(model), "_can_set_attn_implementation", None)
    return can_set() if can_set is not None else bool(getattr(model, "_supports_attention_backend", True))


def _rope_obstacle(config: Any) -> str:
    """A rotary embedding whose frequencies depend on how long the whole call is gives short prefixes other numbers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # One set of parameters, or one for each type of layer.
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict):
            kind = parameters.get("rope_type", parameters.get("type"))
            if kind in _CALL_DEPENDENT_ROPE:
                return f"{kind!r} RoPE, whose frequencies depend on the length of the call"
    return ""


def attention_dropout(model: nn.Module) -> tuple[str, float] | None:
    """Name and value of the config's attention dropout, None when there is none."""
    config = decoder_of(base_model(model)).config
    for name in _DROPOUTS:
        if isinstance(value := getattr(config, name, None), float) and value > 0:
            return name, value
    return None


def last_hidden(output: Any) -> Tensor:
    """The last hidden state [B, T, C] of what a decoder returned."""
    return output[0] if isinstance(output, tuple) else output.last_hidden_state
