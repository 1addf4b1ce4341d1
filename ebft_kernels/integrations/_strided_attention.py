"""The attention function ``"strided"`` that transformers models call, and how the layout reaches it.

The layout travels with the forward's own arguments, twice: as the keyword ``strided_layout`` and as an attribute of
the attention mask. Some architectures drop unknown keywords, others lose the attribute; no supported one does both.
Nothing is held in a context variable, because gradient checkpointing runs the attention again during the backward
pass, after the context was left and on CUDA in another thread.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..attention.api import strided_attention, strided_attention_step
from ..layout import StridedLayout

if TYPE_CHECKING:
    from ._recording import ForwardRecording

NAME = "strided"

# Keywords that models hand down to their attention function and that do not change what it computes.
_HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shared_kv_states",
        "use_cache",
    }
)
# What torch's own attention honours, or what transformers has folded into the mask by then. Not softcap: "sdpa" raises
# on it or ignores it, depending on the release.
_PLAIN = _HARMLESS | {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "position_bias",
    "seq_idx",
    "sliding_window",
}

_MASK_REPLACES_CAUSAL = int(transformers.__version__.split(".")[0]) < 5

#: Configs whose model is inside a context, by id: a call without a layout is then a lost layout.
_in_context: Counter[int] = Counter()


class StridedCall:
    """One forward over packed rows: what the attention function needs to know, worked out once for all layers.

    Args:
        layout: the packed rows; of a prompt pass, a layout without rollout rows.
        step: decoding step, or None where all rows of ``layout`` are there.
        windowed: numbers of the layers whose attention must be given a sliding window.
        configs: configs to select ``"strided"`` on when the backward pass runs an attention layer again; empty where no
            gradient is wanted.
        kept_by: keeps what attention computes.
        known_by: gives what it computed before.
    """

    __slots__ = ("layout", "step", "windowed", "configs", "kept_by", "known_by", "_hooked", "_moved", "__weakref__")

    def __init__(
        self,
        layout: StridedLayout,
        step: int | None,
        windowed: frozenset[int],
        configs: tuple[Any, ...] = (),
        kept_by: ForwardRecording | None = None,
        known_by: ForwardRecording | None = None,
    ) -> None:
        self.layout = layout
        self.step = step
        self.windowed = windowed
        self.configs = configs
        self.kept_by = kept_by
        self.known_by = known_by
        self._hooked: dict[nn.Module, tuple[Any, Any]] = {}
        self._moved: dict[torch.device, StridedLayout] = {}

    def layout_on(self, device: torch.device) -> StridedLayout:
        """The layout on ``device``: the layers of one model may live on several."""
        if device == self.layout.device:
            return self.layout
        if device not in self._moved:
            self._moved[device] = self.layout.to(device)
        return self._moved[device]

    def survive_recompute(self, module: nn.Module) -> None:
        """Keep "strided" selected whenever ``module`` runs with this call, for as long as anything holds the call.

        A checkpointed layer holds its arguments, and with them this call, until its backward pass has run it again.
        """
        if not self.configs or module in self._hooked or torch.compiler.is_compiling():
            return
        if not self._hooked:
            weakref.finalize(self, _remove_hooks, self._hooked).atexit = False
        selection = _Reselect(self.configs)
        self._hooked[module] = (
            module.register_forward_pre_hook(selection.enter, with_kwargs=True),
            module.register_forward_hook(selection.leave, always_call=True),
        )


def _remove_hooks(hooked: dict[nn.Module, tuple[Any, Any]]) -> None:
    for handles in hooked.values():
        for handle in handles:
            handle.remove()
    hooked.clear()


class _Reselect:
    """Forward hooks that select "strided" for the duration of one module call that carries a layout."""

    def __init__(self, configs: tuple[Any, ...]) -> None:
        self._configs = configs
        self._entered: list[Selection | None] = []

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        carried = any(carried_call(value) is not None for value in (*args, *kwargs.values()))
        self._entered.append(Selection(self._configs, NAME) if carried else None)

    def leave(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        # The call during which the hooks were registered ends with `leave` and never saw `enter`.
        if self._entered and (selection := self._entered.pop()) is not None:
            selection.undo()


class Selection:
    """Another attention implementation on some configs, from now until :meth:`undo`.

    Each config is set by itself and not through ``set_attn_implementation``, which walks all modules, and sets the
    sub-configs of other towers too.
    """

    __slots__ = ("_configs", "_name", "_previous")

    def __init__(self, configs: tuple[Any, ...], name: str) -> None:
        self._configs, self._name = configs, name
        self._previous = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation_internal = name
        if name == NAME:
            _in_context.update(map(id, configs))

    def undo(self) -> None:
        """Put the previous settings back."""
        for config, previous in zip(self._configs, self._previous, strict=True):
            config._attn_implementation_internal = previous
            if self._name == NAME:
                _in_context[id(config)] -= 1
                if not _in_context[id(config)]:
                    del _in_context[id(config)]


def require_selected(architecture: str, configs: tuple[Any, ...]) -> None:
    """Raise ValueError unless "strided" is selected on all ``configs``."""
    for config in configs:
        if (found := config._attn_implementation) != NAME:
            raise ValueError(
                f"{architecture}: expected attn_implementation {NAME!r}, got {found!r}: call "
                f"model.set_attn_implementation({NAME!r}), or use strided_attention_context"
            )


def carrier_mask(call: StridedCall, device: torch.device) -> Tensor:
    """The mask that carries ``call``: four-dimensional, so that models hand it through instead of building their own.

    It has no elements and fits no attention scores: an attention function that used it as a mask would fail.
    """
    mask = torch.empty((1, 1, 1, 0), dtype=torch.bool, device=device)
    mask.strided_layout = call
    return mask


def row_mask(call: StridedCall, batch_size: int, length: int, device: torch.device) -> Tensor:
    """A [B, T] mask that carries ``call``, for models that read the mask outside of their attention.

    True for the prompts' tokens without their padding, which is what a loss over a mask is to be about; a decoding step
    has none of them, and is True throughout.
    """
    layout = call.layout
    if call.step is None:
        mask = torch.arange(length, device=device) < layout.lengths.to(device)[:, None]
    else:
        mask = torch.ones((batch_size, length), dtype=torch.bool, device=device)
    mask.strided_layout = call
    return mask


def carried_call(value: object) -> StridedCall | None:
    """The call that ``value``, an argument of a forward, carries; None for any other value."""
    if isinstance(value, StridedCall):
        return value
    return getattr(value, "strided_layout", None) if isinstance(value, Tensor) else None


def refuse(module: nn.Module, what: str) -> ValueError:
    """The error for a model that cannot be run; names the architecture."""
    config = getattr(module, "config", None)
    architecture = getattr(config, "model_type", None) or type(module).__name__
    return ValueError(f"{architecture}: {what}")


def strided_attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, Hkv, T or S, D]
    value: Tensor,  # [B, Hkv, T or S, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    strided_layout: StridedCall | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """The attention function "strided" of ``transformers.AttentionInterface``: ``[B, T, H, Dv]`` contiguous, and None.

    A call that carries a layout runs strided attention and honours softcap, sliding window and sinks. One without (an
    ordinary evaluation or ``generate`` of a model that was loaded with ``attn_implementation="strided"``) is exactly
    "sdpa".

    Raises:
        ValueError: the layout was lost on the way, or the architecture asks for a feature that strided attention does
            not have (attention dropout, biases, sparse indices ...); without a layout, one that "sdpa" would ignore.
    """
    call = strided_layout if strided_layout is not None else carried_call(attention_mask)
    if call is None:
        features |= {"softcap": softcap, "sliding_window": sliding_window, "is_causal": is_causal}
        return _plain_attention(module, query, key, value, attention_mask, dropout, scaling, s_aux, features)
    if attention_mask is not None and attention_mask.numel():
        raise refuse(module, "its attention adds a mask or bias of its own, which strided attention does not support")
    if dropout > 0:
        raise refuse(
            module, f"attention dropout {dropout} in train mode is not supported by strided attention; set it to 0"
        )
    if not _is_causal(module, is_causal):
        raise refuse(module, "attention that is not causal is not supported by strided attention")
    for name, feature in features.items():
        if feature is not None and name not in _HARMLESS and not (name == "output_attentions" and not feature):
            raise refuse(module, f"its attention asks for {name!r}, which strided attention does not support")
    if sliding_window is None and getattr(module, "layer_idx", None) in call.windowed:
        raise refuse(module, f"the sliding window of layer {module.layer_idx} does not reach the attention function")
    call.survive_recompute(module)
    options = {"scale": scaling, "softcap": softcap, "window": sliding_window, "sinks": s_aux}
    out = _attend(module, query, key, value, call, options)
    return out.transpose(1, 2).contiguous(), None  # no copy: the memory of `out` is ordered [B, T, H, Dv]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: StridedCall, options: dict[str, Any]
) -> Tensor:
    """[B, H, T, Dv]"""
    layout = call.layout_on(query.device)
    if call.known_by is not None:
        computed = tuple(x.transpose(1, 2) for x in call.known_by.take(module))
        return strided_attention(query, key, value, layout, computed=computed, **options)
    if call.step is None:
        out, lse = strided_attention(query, key, value, layout, return_lse=True, **options)
    else:
        if key.shape[2] != layout.packed_length:
            raise refuse(module, "the cache did not reach the attention of a decoding step; sample in eval mode")
        out, lse = strided_attention_step(query, key, value, layout, call.step, return_lse=True, **options)
    if call.kept_by is not None:
        call.kept_by.keep(module, call.step, out.transpose(1, 2), lse.transpose(1, 2))
    return out


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    own = getattr(module, "is_causal", True)
    # In transformers 4, False may only say that a mask is there, which is then what makes the attention causal.
    return own if is_causal is None or _MASK_REPLACES_CAUSAL else own and is_causal


def _plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    s_aux: Tensor | None,
    features: dict[str, Any],
) -> tuple[Tensor, None]:
    if id(getattr(module, "config", None)) in _in_context or _is_carrier(attention_mask):
        raise refuse(
            module,
            "the layout did not reach its attention: it drops both the keyword 'strided_layout' and the attention "
            "mask, or it was called inside strided_attention_context without the arguments that the context gives",
        )
    unknown = [name for name, feature in features.items() if feature is not None and name not in _PLAIN]
    if s_aux is not None:
        unknown.append("s_aux (attention sinks)")
    if unknown:
        raise refuse(
            module,
            f"its attention asks for {', '.join(unknown)}, which attention without a layout ('sdpa') would ignore; use "
            "another attn_implementation for plain calls",
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **features
    )


def _is_carrier(mask: Tensor | None) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.numel() == 0 and mask.shape[:3] == (1, 1, 1)


def strided_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask function "strided" of ``transformers.AttentionMaskInterface``: what carries a layout, else "sdpa"'s."""
    if (call := carried_call(attention_mask)) is not None:
        return carrier_mask(call, attention_mask.device)
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Register the attention function and its mask function with transformers."""
    AttentionInterface.register(NAME, strided_attention_forward)
    AttentionMaskInterface.register(NAME, strided_mask)
