"""Other people's implementations of the whole step, run from a checkout that the user has: an adapter for each.

An adapter has a class ``Peer``, made from the checkout's folder, the model, the layout and the options, with a method
``step(prompt) -> PeerStep``. It changes nothing in the checkout.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

#: Names for the command line.
NAMES = ("ebft_openrlhf",)


class PeerStep(NamedTuple):
    """One step, its gradients left in the peer's own copy of the model.

    Attributes:
        rollouts: [B, A, n, G], the tokens that it sampled.
        rewards, advantages: [B, A, n].
        gradient: [parameters], of all parameters of the model one after the other.
        seconds: by phase, those of `bench.step`.
    """

    rollouts: Tensor
    rewards: Tensor
    advantages: Tensor
    gradient: Tensor
    seconds: dict[str, float]


def parse(argument: str) -> tuple[str, Path]:
    """``NAME=DIR`` of the command line.

    Raises:
        ValueError: an unknown name, or no folder.
    """
    name, separator, folder = argument.partition("=")
    if name not in NAMES or not separator:
        raise ValueError(f"--peer: expected NAME=DIR with NAME one of {', '.join(NAMES)}; got {argument!r}")
    if not Path(folder).is_dir():
        raise ValueError(f"--peer: expected a checkout of {name}, but there is no folder {folder!r}")
    return name, Path(folder)


def adapter(name: str) -> ModuleType:
    """The module of one of ``NAMES``."""
    return importlib.import_module(f"{__name__}.{name}")
