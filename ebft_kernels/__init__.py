"""Fused PyTorch ops for Energy-Based Fine-Tuning (arXiv:2603.12248)."""

from ._dispatch import available_impls, select_impl
from .attention import strided_attention, strided_attention_step
from .diagnostics import build_info, self_test
from .layout import StridedLayout
from .logprob import linear_log_probs
from .matching import FeatureMatching, feature_matching, mean_embedding_loss
from .pooling import pool_features

__all__ = [
    "FeatureMatching",
    "StridedLayout",
    "available_impls",
    "build_info",
    "feature_matching",
    "linear_log_probs",
    "mean_embedding_loss",
    "pool_features",
    "select_impl",
    "self_test",
    "strided_attention",
    "strided_attention_step",
]
