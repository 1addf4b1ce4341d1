"""Strided attention as written without this library: dense masks, FlexAttention, and a floor below all of them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ebft_kernels import StridedLayout
from ebft_kernels.testing import eager_attention


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores, softmax and product with a dense bool mask [B, 1, S, S]."""
    return eager_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's fused attention with a dense bool mask."""
    if (
        q.device.type == "cuda"
    ):  # none of the fused kernels there takes both a mask and fewer key heads than query heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_prompt(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Causal attention over the prompt alone: no rollouts at all, so nothing can be faster."""
    q, k, v = (x[:, :, :length] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of plain rows; on a GPU by the flash kernel, the yardstick of attention kernels."""
    backends = [SDPBackend.FLASH_ATTENTION] if q.device.type == "cuda" else [SDPBackend.MATH]
    with sdpa_kernel(backends):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def compiled_flex():
    """FlexAttention, compiled as its documentation asks."""
    return torch.compile(flex_attention, dynamic=False)


def flex_packed_mask(layout: StridedLayout):
    """FlexAttention's block mask of packed rows."""
    size = layout.packed_length
    return create_block_mask(layout.mask_mod(), layout.batch_size, None, size, size, device=layout.device)


def flex_reference_mask(layout: StridedLayout):
    """FlexAttention's block mask of one row per sample, ordered (step, anchor)."""
    visible = reference_mask(layout)[:, 0]
    size = visible.shape[-1]

    def visible_to(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[batch, query, key]

    return create_block_mask(visible_to, visible.shape[0], None, size, size, device=layout.device)


def reference_mask(layout: StridedLayout) -> Tensor:
    """The dense mask of one row per sample: [B*n, 1, P + A*G, P + A*G] bool."""
    index = torch.arange(layout.packed_length, device=layout.device).expand(layout.batch_size, -1)
    order = layout.to_reference_order(index)  # [B*n, P + A*G]
    dense = layout.dense_mask()[:, 0].repeat_interleave(layout.samples, 0)  # [B*n, S, S]
    rows = torch.arange(len(order), device=layout.device)[:, None, None]
    return dense[rows, order[:, :, None], order[:, None]][:, None]


def to_reference_order(layout: StridedLayout, x: Tensor) -> Tensor:
    """[B, H, S, D] packed -> [B*n, H, P + A*G, D]."""
    return layout.to_reference_order(x.transpose(1, 2)).transpose(1, 2).contiguous()


def from_reference_order(layout: StridedLayout, x: Tensor) -> Tensor:
    """The inverse, the prompt's rows taken from the first sample."""
    return layout.from_reference_order(x.transpose(1, 2)).transpose(1, 2)
