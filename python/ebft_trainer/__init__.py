"""A thin trainer for energy-based fine-tuning on top of `ebft_kernels` and transformers.

What it offers is loaded when it is first asked for, so that `ebft-train --help` need not wait for transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._quiet import keep_quiet

if TYPE_CHECKING:  # for type checkers and the reference, which run nothing
    from .config import EBFTConfig as EBFTConfig
    from .config import EBFTOptions as EBFTOptions
    from .data import EBFTCollator as EBFTCollator
    from .feature_maps import TextEncoderFeatures as TextEncoderFeatures
    from .features import FeatureMap as FeatureMap
    from .features import FeatureNetwork as FeatureNetwork
    from .features import StartingAdapters as StartingAdapters
    from .rollout import sample_rollouts as sample_rollouts
    from .step import EBFTStep as EBFTStep
    from .step import ebft_step as ebft_step
    from .trainer import EBFTTrainer as EBFTTrainer
    from .verifiers import TextVerifier as TextVerifier
    from .verifiers import Verifier as Verifier

_HOME = {
    "EBFTCollator": "data",
    "EBFTConfig": "config",
    "EBFTOptions": "config",
    "EBFTStep": "step",
    "EBFTTrainer": "trainer",
    "FeatureMap": "features",
    "FeatureNetwork": "features",
    "StartingAdapters": "features",
    "TextEncoderFeatures": "feature_maps",
    "TextVerifier": "verifiers",
    "Verifier": "verifiers",
    "ebft_step": "step",
    "sample_rollouts": "rollout",
}
__all__ = [*_HOME]

keep_quiet()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
