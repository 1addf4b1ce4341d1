"""Keys and values of packed rows, for rollouts that are drawn step by step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .._dispatch import autocast_inputs
from ..layout import StridedLayout

_PROMPT = -1


class _StridedCacheLayer(CacheLayerMixin):
    """One layer's preallocated keys [B, Hkv, S, D] and values [B, Hkv, S, Dv] in packed order."""

    is_sliding = False

    def __init__(self, cache: StridedCache) -> None:
        super().__init__()
        # A cycle would keep the buffers until the next garbage collection, through the training pass that follows.
        self._cache = weakref.proxy(cache)
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocate the buffers of a layer whose keys and values look like these."""
        length = self._cache.layout.packed_length
        self.keys = key_states.new_empty((*key_states.shape[:2], length, key_states.shape[3]))
        value_states = key_states if value_states is None else value_states
        self.values = value_states.new_empty((*value_states.shape[:2], length, value_states.shape[3]))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of the current phase; returns what its queries attend to."""
        # In the dtype that attention will want, so that a step does not cast the whole buffer.
        key_states, value_states = autocast_inputs(key_states, value_states)
        layout, phase = self._cache.layout, self._cache.phase
        if phase is None:
            raise RuntimeError("a StridedCache works only inside strided_attention_context(..., cache=cache)")
        if phase == _PROMPT:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys[:, :, : layout.length] = key_states.detach()
            self.values[:, :, : layout.length] = value_states.detach()
            return key_states, value_states
        if not self.is_initialized:
            raise RuntimeError("the prompt pass must come before the first decoding step")
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            layout.step_rows(buffer.transpose(1, 2), phase).copy_(states.detach().transpose(1, 2))
        return self.keys, self.values

    def get_seq_length(self, *_args: object) -> int:
        """Packed rows that may hold something: the length that masks and default positions would start from."""
        return self._cache.get_seq_length()

    def get_mask_sizes(self, query_length: object) -> tuple[int, int]:  # noqa: ARG002 (an interface)
        """Length and offset of the keys that the next queries attend to."""
        layout = self._cache.layout
        return (layout.length if self._cache.phase == _PROMPT else layout.packed_length), 0

    def get_max_length(self) -> int:
        """S."""
        return self._cache.layout.packed_length

    get_max_cache_shape = get_max_length


class StridedCache(Cache):
    """Keys and values of all layers, one buffer [B, Hkv, S, D] per layer in packed order, allocated once.

    The prompt's rows are stored once for all samples; a decoding step writes its ``A * n`` rows in place. Layers with a
    sliding window keep full buffers, since every anchor has its own window. Use it through
    :func:`strided_attention_context`, which says what the next forward is.

    Args:
        layout: of the packed rows.
    """

    def __init__(self, layout: StridedLayout) -> None:
        super().__init__(layers=[])
        self.layout = layout
        self.phase: int | None = None

    @contextmanager
    def _running(self, step: int | None) -> Iterator[None]:
        previous, self.phase = self.phase, _PROMPT if step is None else step
        try:
            yield
        finally:
            self.phase = previous

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new rows; returns the keys and values that the queries of these rows attend to."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_StridedCacheLayer(self))
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0, *_args: object) -> int:  # noqa: ARG002 (an interface)
        """0 before and in the prompt pass, then the P prompt rows plus the steps before the current one."""
        return 0 if self.phase in (None, _PROMPT) else self.layout.length + self.phase

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002 (an interface)
        """S."""
        return self.layout.packed_length

    def get_mask_sizes(self, query_length: object, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys that the next queries attend to."""
        return (self.layout.length if self.phase == _PROMPT else self.layout.packed_length), 0

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows of a layout are not interchangeable.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"StridedCache cannot be reordered (beam indices of shape {list(beam_idx.shape)})")
