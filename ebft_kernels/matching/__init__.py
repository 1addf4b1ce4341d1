"""How well rollouts match the ground truth in feature space: the loss, the rewards and the advantages."""

from .api import FeatureMatching, feature_matching, mean_embedding_loss

__all__ = ["FeatureMatching", "feature_matching", "mean_embedding_loss"]
