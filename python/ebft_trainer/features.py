"""The frozen feature network: hidden states of a few layers, pooled to one vector per rollout and per window."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ebft_kernels import StridedLayout, pool_features
from ebft_kernels._checks import check_option, check_tensor
from ebft_kernels.integrations.transformers import decoder_layers, hidden_states, unwrapped
from ebft_kernels.layout import check_layout
from ebft_kernels.pooling.modes import NORMALIZATIONS, POOLINGS, SHORTEST_TOKEN

from .rollout import evaluation_mode


class FeatureMap(Protocol):
    """Anything that turns packed rows into features: called with packed [B, S] and layout, and which tokens count.

    ``token_mask`` [B, P] says it of the prompt (None: all) and ``rollout_mask`` [B, A, n, G] of the rollouts, whose
    tokens after their end do not count (None: each counts as the prompt token in whose place it stands). It returns
    rollout features [B, A, n, F] and target features [B, A, F] of one floating-point dtype, or both with a G axis
    before F. It is called without gradient. If it has ``groups``, F is as many equal parts that are whitened apart.
    """

    def __call__(
        self,
        packed: Tensor,
        layout: StridedLayout,
        token_mask: Tensor | None = None,
        *,
        rollout_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


class FeatureNetwork(nn.Module):
    """``phi`` of arXiv:2603.12248: the hidden states of some layers of a frozen model, normalised and pooled.

    One forward over packed rows gives the features of all rollouts and, from its prompt rows, those of all ground-truth
    windows. It stops after the deepest layer that is asked for, without the vocabulary head. Its parameters take no
    gradient, it stays in eval mode whatever :meth:`train` is told, and the model that it was made from is not changed.

    A plain model is copied as it is now: its embeddings and the layers up to the deepest one asked for. A PEFT model is
    shared instead, and its adapters are switched off for each forward: the weights beneath them must be frozen. Sharing
    is not meant for ``torch.compile``, which a forward that stops early leaves no chance to clean up; under FSDP2 and
    ZeRO-3 a shared network runs to the end.

    Hidden states are pooled layer by layer as they appear, so that none outlives its layer. With ``normalize="joint"``
    that takes ``pooling="last_token"``: the norm of a token over all layers is only known at the end, and a
    pooling that needs every token's norm keeps the tapped hidden states until then.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        layers: of the hidden states, in the order of the features: depths above 0 up to 1.0 as floats, or layer
            numbers as ints. A depth d is layer ``floor(d * L)``, at least 1. Numbers are those of transformers'
            ``hidden_states``: 0 the embeddings, l the output of the l-th block, L that of the final norm.
        pooling: see :func:`ebft_kernels.pool_features`.
        normalize: likewise.
        share: use the model itself instead of a copy; for a model that is not trained.

    Attributes:
        layers: layer numbers.
        groups: number of parts of the features that are whitened separately: each layer where layers are
            normalised separately, else 1 (:func:`ebft_kernels.feature_matching`).

    Raises:
        ValueError: no layers, a depth or number out of range, an unknown option, adapters that are merged or have
            trained weights beneath them.
        TypeError: something that is no layer, or no model.
    """

    layers: tuple[int, ...]
    groups: int

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[float] = (0.25, 0.5, 0.75),
        *,
        pooling: str = "last_token",
        normalize: str = "joint",
        share: bool = False,
    ) -> None:
        super().__init__()
        self.layers = layer_numbers(layers, len(decoder_layers(model)))
        check_option("pooling", pooling, POOLINGS)
        check_option("normalize", normalize, NORMALIZATIONS)
        self.pooling, self.normalize = pooling, normalize
        self.groups = len(self.layers) if normalize == "per_layer" else 1
        model = unwrapped(model)
        self._copy: nn.Module | None = None
        self._shared: tuple[nn.Module, ...] = ()
        check_adapters(model)
        if has_adapters(model):
            check_base_is_frozen(model)
        if share or has_adapters(model):
            # In a tuple, so that it is not a submodule: the policy's parameters are not this network's.
            self._shared = (model,)
        else:
            self._copy = _copy_up_to(model, max(self.layers)).requires_grad_(False)
        self.train(False)

    def is_trained_with(self, model: nn.Module) -> bool:
        """Whether training ``model`` changes this network."""
        shared = {id(x) for module in self._shared for x in module.parameters() if not has_adapters(module)}
        return any(id(x) in shared for x in model.parameters() if x.requires_grad)

    def shard(self) -> FeatureNetwork:
        """Spread the decoder blocks over all ranks (FSDP2), each whole only while it runs; embeddings stay replicated.

        Returns:
            itself.

        Raises:
            ValueError: there is no process group, or the network shares its weights with the model.
        """
        if self._copy is None:
            raise ValueError("shard: expected a feature network with weights of its own, got one that shares a model's")
        if not torch.distributed.is_initialized():
            raise ValueError("shard: expected several processes (torchrun, accelerate launch), got one without a group")
        for block in decoder_layers(self._copy)[: max(self.layers)]:
            # Each by itself: a forward that stops early would leave a root unfinished.
            fully_shard(block, reshard_after_forward=True)
        return self

    def train(self, mode: bool = True) -> FeatureNetwork:  # noqa: ARG002 (an interface)
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        packed: Tensor,
        layout: StridedLayout,
        token_mask: Tensor | None = None,
        *,
        rollout_mask: Tensor | None = None,
        pooling: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features of packed rows.

        Args:
            packed: [B, S] int64, prompts and rollouts (:meth:`ebft_kernels.StridedLayout.pack`).
            layout: of the packed rows.
            token_mask: [B, P] bool, prompt tokens that count; None: all.
            rollout_mask: [B, A, n, G] bool, rollout tokens that count; None: each as the prompt token in whose place it
                stands.
            pooling: instead of the network's own.

        Returns:
            rollout features [B, A, n, F] and target features [B, A, F], or with ``pooling="token"`` [B, A, n, G, F] and
            [B, A, G, F]; float32 (float64 for a float64 model).

        Raises:
            ValueError: a shape, device or option that does not fit.
            TypeError: another type or dtype.
        """
        _check_packed(packed, layout)
        pooling = self.pooling if pooling is None else pooling
        check_option("pooling", pooling, POOLINGS)
        masks = {"token_mask": token_mask, "rollout_mask": rollout_mask}
        at_once = self.normalize != "joint" or POOLINGS[pooling].last_only
        normalize = "none" if self.normalize == "joint" else self.normalize
        taken: dict[int, Any] = {}

        def take(layer: int, hidden: Tensor) -> None:
            if at_once:
                taken[layer] = pool_features([hidden], layout, pooling=pooling, normalize=normalize, **masks)
            else:
                taken[layer] = hidden

        self._run(packed, layout, take)
        parts = [taken[layer] for layer in self.layers]
        if not at_once:
            return pool_features(parts, layout, pooling=pooling, normalize="joint", **masks)
        rollouts, targets = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        if self.normalize != "joint":
            return rollouts, targets
        return F.normalize(rollouts, dim=-1, eps=SHORTEST_TOKEN), F.normalize(targets, dim=-1, eps=SHORTEST_TOKEN)

    def _run(self, packed: Tensor, layout: StridedLayout, take: Callable[[int, Tensor], None]) -> None:
        """One forward that hands each tapped hidden state to ``take`` and ends with the deepest."""
        model = self._shared[0] if self._copy is None else self._copy
        handles = []
        blocks = decoder_layers(model)
        wanted, deepest = set(self.layers), max(self.layers)
        # FSDP2 and ZeRO-3 clean up at the end of the forward.
        stops_early = not (isinstance(model, FSDPModule) or any(hasattr(p, "ds_id") for p in model.parameters()))

        def tap(layer: int, hidden: Tensor) -> None:
            take(layer, hidden)
            if layer == deepest and stops_early:
                raise _DeepestLayerDone

        if 0 in wanted:
            handles.append(blocks[0].register_forward_pre_hook(_on_input(tap), with_kwargs=True))
        for layer in sorted(wanted - {0, len(blocks)}):
            handles.append(blocks[layer - 1].register_forward_hook(_on_output(tap, layer)))
        try:
            with adapters_off(model), evaluation_mode(model):
                last = hidden_states(model, packed, layout)
                if deepest == len(blocks):
                    tap(deepest, last)
        except _DeepestLayerDone:
            pass
        finally:
            for handle in handles:
                handle.remove()


def layer_numbers(layers: Sequence[float], count: int) -> tuple[int, ...]:
    """Depths (floats) and numbers (ints) of layers of a model with ``count`` blocks -> numbers; see FeatureNetwork."""
    if isinstance(layers, (str, Tensor)) or not isinstance(layers, Sequence):
        raise TypeError(f"layers: expected a sequence of depths or layer numbers, got {layers!r}")
    if not layers:
        raise ValueError("layers: expected at least one depth or layer number, got none")
    numbers = []
    for layer in layers:
        if not isinstance(layer, (int, float)) or isinstance(layer, bool):
            raise TypeError(f"layers: expected depths (floats) or layer numbers (ints), got {layer!r}")
        if isinstance(layer, float):
            if not 0 < layer <= 1:
                raise ValueError(f"layers: expected depths above 0 up to 1.0, got {layer!r}")
            layer = max(1, math.floor(layer * count))
        elif not 0 <= layer <= count:
            raise ValueError(f"layers: expected layer numbers from 0 to {count}, the model's last, got {layer!r}")
        numbers.append(layer)
    return tuple(numbers)


class _DeepestLayerDone(Exception):
    """Ends the forward; never leaves this module."""


def _on_input(tap: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tap(0, args[0] if args else kwargs["hidden_states"])

    return hook


def _on_output(tap: Callable[[int, Tensor], None], layer: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        tap(layer, output[0] if isinstance(output, tuple) else output)

    return hook


def _check_packed(packed: object, layout: object) -> None:
    check_layout(layout)
    sizes = {"B": layout.batch_size, "S": layout.packed_length}
    check_tensor("packed", packed, "B S", sizes, dtype=torch.int64, device=layout.device)


def _copy_up_to(model: nn.Module, deepest: int) -> nn.Module:
    """A copy of the model with its first ``deepest`` blocks; the other blocks and the head are never copied."""
    left_out = [*decoder_layers(model)[deepest:], model.get_output_embeddings()]
    return copy.deepcopy(model, {id(module): nn.Identity() for module in left_out})


def has_adapters(model: nn.Module) -> bool:
    """Whether the model inside any wrapper has PEFT adapters."""
    return hasattr(unwrapped(model), "peft_config")


def check_adapters(model: nn.Module) -> None:
    """Raise ValueError if adapters are merged into the weights: switching them off takes them out again, layer by layer
    and for good, and merged ones are not trained."""
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None):
            raise ValueError(
                f"model: expected adapters beside the weights, got {name!r} merged; call unmerge_adapter()"
            )


def check_base_is_frozen(model: nn.Module) -> None:
    """Raise ValueError if a PEFT model without its adapters changes in training: biases, or what was unfrozen beside
    them."""
    trained = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    with adapters_off(model):
        for name, x in trained:
            if x.requires_grad:  # an adapter's is off
                raise ValueError(
                    f"model: expected the weights beneath the adapters to be frozen, got {name!r} trained: the model "
                    "without adapters, which is compared with, would change"
                )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Without PEFT adapters; afterwards each parameter takes a gradient if it did before."""
    if not has_adapters(model):
        yield
        return
    model = unwrapped(model)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:  # adapters that were added to the transformers model itself
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


class StartingAdapters:
    """The trained weights of a PEFT model as they are now: the frozen model beside one that goes on training.

    Holds a copy of the weights that take a gradient (adapters, ``modules_to_save``), and none of the others.

    Args:
        model: a PEFT model, wrapped or not, its weights whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: x.detach().clone() for name, x in _trained(model)}

    @contextmanager
    def put_back(self, model: nn.Module) -> Iterator[None]:
        """``model``, the same as at the start, in a wrapper or not, with these weights in the place of its own.

        Raises:
            ValueError: it trains other weights than at the start.
        """
        trained = dict(_trained(model))
        if trained.keys() != self._weights.keys():
            changed = sorted(trained.keys() ^ self._weights.keys())
            raise ValueError(f"model: expected the trained weights of the start, got a change of {changed[0]}")
        own = {name: _local(x).clone() for name, x in trained.items()}
        for name, x in trained.items():
            self._weights[name] = _like(self._weights[name], x)
            _local(x).copy_(self._weights[name])
        try:
            yield
        finally:
            for name, x in trained.items():
                _local(x).copy_(own[name])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    # A wrapper that recomputes activations puts itself into the names.
    found = ((name.replace("_checkpoint_wrapped_module.", ""), x) for name, x in unwrapped(model).named_parameters())
    return ((name, x) for name, x in found if x.requires_grad)


def _local(x: Tensor) -> Tensor:
    """What this rank holds, without gradient, in the same memory."""
    return x.detach().to_local() if isinstance(x, DTensor) else x.detach()


def _like(whole: Tensor, x: Tensor) -> Tensor:
    """``whole``, or the part of it that this rank has of the parameter ``x`` that became of it."""
    if isinstance(x, DTensor) and whole.shape != _local(x).shape:
        whole = distribute_tensor(whole.to(x.device), x.device_mesh, x.placements, src_data_rank=None).to_local()
    return whole.to(x.device)
