"""A thin trainer for energy-based fine-tuning on top of `ebft_kernels` and transformers."""

from . import _quiet  # noqa: F401 (before all that imports transformers.Trainer)
from .config import EBFTConfig, EBFTOptions
from .data import EBFTCollator
from .feature_maps import TextEncoderFeatures
from .features import FeatureMap, FeatureNetwork, StartingAdapters
from .rollout import sample_rollouts
from .step import EBFTStep, ebft_step
from .trainer import EBFTTrainer
from .verifiers import TextVerifier, Verifier

__all__ = [
    "EBFTCollator",
    "EBFTConfig",
    "EBFTOptions",
    "EBFTStep",
    "EBFTTrainer",
    "FeatureMap",
    "FeatureNetwork",
    "StartingAdapters",
    "TextEncoderFeatures",
    "TextVerifier",
    "Verifier",
    "ebft_step",
    "sample_rollouts",
]
