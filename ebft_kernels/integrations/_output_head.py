"""The vocabulary head as plain numbers, so that log-probabilities can be computed without a logits tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..logprob._tiled import multiply
from ._models import architecture_of, base_model, decoder_of, evaluation_mode, last_hidden


class OutputHead(NamedTuple):
    """``logits = scale * (hidden @ weight.T + bias)``, then with ``softcap``: ``softcap * tanh(logits / softcap)``.

    Attributes:
        weight: [V, C], the model's own parameter.
        bias: [V] or None, likewise.
        scale: a factor of the logits.
        softcap: a bound of the logits, or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, memory: Tensor | None = None) -> Tensor:
        """[..., C] -> [..., V].

        ``memory`` [T, V], in the dtype of the weight, may be given for hidden [T, C] where there is no gradient: the
        logits are written there, unless ``torch.autocast`` asks for another dtype.
        """
        hidden = hidden.to(self.weight.dtype)
        if memory is not None and not torch.is_autocast_enabled(hidden.device.type):
            factor = self.scale if self.softcap is None else self.scale / self.softcap
            logits = multiply(hidden, self.weight, self.bias, factor, out=memory)
            return logits if self.softcap is None else logits.tanh_().mul_(self.softcap)
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def at_temperature(self, temperature: float) -> OutputHead:
        """The head whose logits are these over ``temperature``, which is above 0."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return self._replace(scale=self.scale / temperature, softcap=softcap)

    def first(self, vocabulary: int | None) -> OutputHead:
        """The head of the token ids below ``vocabulary`` alone, as views; None, or no fewer than there are: all."""
        if vocabulary is None or vocabulary >= self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return self._replace(weight=self.weight[:vocabulary], bias=bias)


# Model -> (scale, softcap) that were seen to give its logits.
_verified: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()


def output_head(model: nn.Module) -> OutputHead:
    """The vocabulary head of ``model``: its parameters, and the scale and soft cap that its config asks for.

    Checked against the model's own logits on a short input, once per model; the check runs in eval mode without
    gradient and leaves the model as it was.

    Raises:
        ValueError: the head is not of this form (the message names the architecture); use the model's own forward then.
            Or its weight is sharded over ranks, and whole only while the model runs (``apply_head``).
        TypeError: ``model`` holds no transformers model.
    """
    base = base_model(model)
    _refuse_sharded(base, head_module(base))
    form = head_form(model)
    return _head_of(head_module(base), form)


def head_form(model: nn.Module) -> tuple[float, float | None]:
    """Scale and soft cap of the head; raises as :func:`output_head`, but for a sharded weight."""
    base = base_model(model)
    if base not in _verified:
        candidates = list(_candidates(base.config, decoder_of(base).config))
        logits, found = _own_logits(model, candidates)
        for form, own in zip(candidates, found, strict=True):
            if _agree(own, logits, head_module(base).weight.dtype):
                _verified[base] = form
                break
        else:
            raise ValueError(
                f"{architecture_of(base)}: its logits are not softcap * tanh(scale * (hidden @ weight.T + bias) / "
                "softcap) for any scale and softcap that its config names"
            )
    return _verified[base]


def head_module(base: PreTrainedModel) -> nn.Module:
    """The module that multiplies with the head's weight; raises ValueError if there is more to it than that."""
    head = _active_module(base.get_output_embeddings())
    weight = getattr(head, "weight", None)
    # ZeRO-3 leaves an empty tensor behind, and the shape beside it, while the weight is spread over the ranks.
    if not isinstance(weight, Tensor) or len(getattr(weight, "ds_shape", weight.shape)) != 2:
        raise ValueError(
            f"{architecture_of(base)}: no vocabulary head with one weight matrix found, got {type(head).__name__}"
        )
    if not head.weight.is_floating_point():
        raise ValueError(f"{architecture_of(base)}: its vocabulary head is quantized ({head.weight.dtype})")
    if hasattr(head, "base_layer"):
        raise ValueError(f"{architecture_of(base)}: its vocabulary head is a PEFT adapter layer, not one weight matrix")
    return head


@contextmanager
def in_place_of_head(
    model: nn.Module,
    form: tuple[float, float | None],
    function: Callable[[Tensor, OutputHead], Tensor | None],
    done: Callable[[Tensor], None] = lambda _logits: None,
) -> Iterator[None]:
    """Call ``function(hidden [B, S, C], head)`` whenever the head runs; a tensor that it returns becomes the logits.

    ``done`` is given what the wrapper's hooks have made of the logits.

    The call comes while the head's module runs: what wraps the model (FSDP2, ZeRO-3) has gathered its weight for
    that time, and what takes the place of the logits tells the wrapper when their gradient comes back.
    """
    base = base_model(model)
    hidden: list[Tensor] = []

    def call(module: nn.Module, _args: tuple[Any, ...], _logits: Tensor) -> Tensor | None:
        _refuse_sharded(base, module)
        return function(hidden.pop(), _head_of(module, form))

    handles = (
        decoder_of(base).register_forward_hook(lambda _module, _args, output: hidden.append(last_hidden(output))),
        # Before the wrapper's own hooks, which free the gathered weight.
        head_module(base).register_forward_hook(call, prepend=True),
        head_module(base).register_forward_hook(lambda _module, _args, logits: done(logits)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_place_of_logits(
    model: nn.Module, function: Callable[[Tensor, OutputHead], tuple[Tensor, ...]], forward: Callable[[], Any]
) -> tuple[tuple[Tensor, ...], Any]:
    """What ``function(hidden [B, S, C], head)`` returned during ``forward()``, a forward of ``model``; and its output.

    ``function`` returns one or more tensors; those with gradient must all be of one dtype.

    Raises:
        ValueError: the head is not of the form of :class:`OutputHead`.
    """
    results: list[tuple[Tensor, ...]] = []
    joined: Tensor | None = None

    def call(hidden: Tensor, head: OutputHead) -> Tensor | None:
        nonlocal joined
        results.append(function(hidden, head))
        if any(part.requires_grad for part in results[-1]):
            # In one tensor, whatever the model goes on to do with its logits.
            joined = torch.cat([part.flatten() for part in results[-1]])
        return joined

    def done(logits: Tensor) -> None:
        if joined is None:
            return
        # ZeRO-3 waits for the gradient of what it returns, FSDP2 for that of what it was given and may have cast.
        whole = logits if logits.dtype == joined.dtype else joined
        pieces = whole.split([part.numel() for part in results[-1]])
        results[-1] = tuple(piece.view_as(part) for piece, part in zip(pieces, results[-1], strict=True))

    with in_place_of_head(model, head_form(model), call, done):
        output = forward()
    if len(results) != 1:
        architecture = architecture_of(base_model(model))
        raise RuntimeError(f"{architecture}: expected one call of its vocabulary head, saw {len(results)}")
    return results[0], output


def _head_of(module: nn.Module, form: tuple[float, float | None]) -> OutputHead:
    return OutputHead(module.weight, getattr(module, "bias", None), *form)


def _refuse_sharded(base: PreTrainedModel, module: nn.Module) -> None:
    if isinstance(module.weight, DTensor):
        raise ValueError(f"{architecture_of(base)}: its vocabulary head is sharded over ranks; see apply_head")


def _active_module(head: Any) -> Any:
    """The module in use where PEFT keeps a trained copy of the head beside the original."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    if getattr(head, "disable_adapters", False) or not head.active_adapters:
        return head.original_module
    return copies[head.active_adapters[0]]


def _candidates(*configs: Any) -> Iterator[tuple[float, float | None]]:
    scales: list[float] = [1.0]
    softcaps: list[float | None] = [None]
    for config in configs:
        # Some architectures multiply by what they call a scaling, others divide.
        for name in ("logits_scaling", "logit_scale", "lm_head_multiplier", "logits_mup_width_multiplier"):
            if isinstance(value := getattr(config, name, None), (int, float)) and value:
                scales += [float(value), 1.0 / value]
        for name in ("final_logit_softcapping", "logits_soft_cap"):
            if isinstance(value := getattr(config, name, None), (int, float)) and value:
                softcaps.append(float(value))
    return product(dict.fromkeys(scales), dict.fromkeys(softcaps))


@torch.no_grad()
def _own_logits(model: nn.Module, forms: Sequence[tuple[float, float | None]]) -> tuple[Tensor, list[Tensor]]:
    """Logits [1, 5, V] of the model on a short input, attention as it is set, and those of a head of each form."""
    base = base_model(model)
    found: list[Tensor] = []

    def compute(hidden: Tensor, head: OutputHead) -> None:
        found.extend(head._replace(scale=scale, softcap=softcap).logits(hidden) for scale, softcap in forms)

    embeddings = base.get_input_embeddings()
    tokens = torch.arange(1, 6, device=embeddings.weight.device)[None] % embeddings.weight.shape[0]
    with evaluation_mode(model), in_place_of_head(model, forms[0], compute):
        logits = model(input_ids=tokens, use_cache=False).logits
    if len(found) != len(forms):
        calls = len(found) // len(forms)
        raise ValueError(f"{architecture_of(base)}: expected one call of its vocabulary head, saw {calls}")
    return logits, found


def _agree(own: Tensor, logits: Tensor, dtype: torch.dtype) -> bool:
    if own.shape != logits.shape:
        return False
    # Both come from one matrix product in one dtype and differ by a few roundings; a wrong scale or cap by far more.
    tolerance = 8 * torch.finfo(dtype).eps * logits.abs().max()
    return bool((own.float() - logits.float()).abs().max() <= tolerance)
