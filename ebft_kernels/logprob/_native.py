"""Log-probabilities by tiles of the logits: products by PyTorch, the softmax by the compiled module, which reads a tile
once, from the cache."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _native
from . import _tiled
from ._tiled import Tile


def _add(tile: Tile, largest: Tensor, total: Tensor, at_target: Tensor) -> None:
    _run("softmax_add", tile, largest, total, at_target)


def _differentiate(tile: Tile, largest: Tensor, log_total: Tensor, whole_upstream: Tensor, upstream: Tensor) -> None:
    _run("softmax_gradient", tile, largest, log_total, whole_upstream, upstream)


def _run(kernel: str, tile: Tile, *numbers: Tensor) -> None:
    _native.run(
        kernel,
        tile.data.device,
        _native.DTYPES[tile.data.dtype],
        (*tile.data.shape, tile.columns.start, len(tile.targets.ids)),
        tile.data.data_ptr(),
        tile.targets.ids.data_ptr(),
        tile.targets.offsets[tile.rows.start :].data_ptr(),
        tile.softcap,
        *(x.data_ptr() for x in numbers),
    )


forward = partial(_tiled.forward, _add)
backward = partial(_tiled.backward, _differentiate)
