"""Shapes of real models, and the geometry of a step: what everything in this folder is measured or counted at."""

from __future__ import annotations

from typing import NamedTuple

from ebft_kernels import StridedLayout


class ModelShape(NamedTuple):
    """A causal language model as far as its cost depends on it. Sizes as in its published configuration.

    ``kind`` is its ``model_type`` in transformers; ``tied``: its head has the weights of its embeddings.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tapped: int = 3
    kind: str = "llama"
    tied: bool = False

    @property
    def features(self) -> int:
        """F, the size of a feature: the tapped layers' hidden states side by side."""
        return self.tapped * self.hidden


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("demo", 256, 640, 4, 4, 2, 64, 2048),
        ModelShape("llama-256", 256, 688, 8, 8, 4, 32, 8192),
        ModelShape("Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 128, 151936, kind="qwen2", tied=True),
        ModelShape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 64, 128256, tied=True),
        ModelShape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    )
}


class Geometry(NamedTuple):
    """Batch and rollouts of a step; the defaults are those of arXiv:2603.12248."""

    batch: int = 1
    length: int = 1024
    context: int = 8
    stride: int = 8
    horizon: int = 8
    samples: int = 4

    def layout(self) -> StridedLayout:
        """The strided layout of this geometry, on the CPU."""
        return StridedLayout.strided(
            self.batch,
            self.length,
            context=self.context,
            stride=self.stride,
            horizon=self.horizon,
            samples=self.samples,
        )

    def __str__(self) -> str:
        return f"B={self.batch} P={self.length} c={self.context} s={self.stride} G={self.horizon} n={self.samples}"


def visible_pairs(layout: StridedLayout) -> int:
    """Pairs of a query row and a key that it sees, per head, in the whole batch."""
    return layout.visible_pairs()
