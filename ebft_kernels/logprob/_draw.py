"""Tokens drawn from logits, and their log-probabilities: what every sampler does after the vocabulary head.

One rule for all devices. Without a cut a uniform number is looked up in the cumulative distribution over token ids;
with ``top_k`` or ``top_p`` in that from the most likely token down, of equally likely ones by their ids, so that of
several at the edge those with the lowest ids are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._dispatch import select_impl

#: Tokens per block of the two-level search: whole blocks are added up first, then one block token by token.
BLOCK = 128

# What the masses of a row add up to, as integers: their prefix sums are exact, and in the order of no device.
_WHOLE = float(1 << 61)


def draw_impl(device: torch.device | str, dtype: torch.dtype, *, cut: bool) -> str:
    """Who draws tokens from logits: "triton", "native" or "torch".

    Args:
        device, dtype: of the logits.
        cut: whether some tokens alone can be drawn: the most likely, or those of ``top_k`` and ``top_p``. There is
            compiled code for the softmax of all tokens alone.
    """
    impl = select_impl("linear_log_probs", device, dtype)
    return "torch" if impl == "native" and cut else impl


def draw_tokens(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    impl: str = "auto",
    statistics: bool = False,
) -> tuple[Tensor, ...]:
    """Tokens drawn from the softmax of each row of logits over the temperature. No gradient, no wait for the device.

    Args:
        logits: [R, V] float64, float32, bfloat16 or float16; may be overwritten.
        uniform: [R, d] float64 in [0, 1): one for each token to be drawn.
        temperature: divides the logits; 0: the most likely token, of equally likely ones the one with the lowest id.
        top_p: draw from the smallest set of tokens that together have at least this probability; 1: from all.
        top_k: draw from this many most likely tokens (before ``top_p``, whose probabilities then are relative to them);
            0: all.
        impl: "auto": :func:`draw_impl`; or one of its values, which must be able to.
        statistics: whether to return those of the softmax too.

    Returns:
        Ids [R, d] int64, never of a token of probability 0, and their log-probabilities before anything is cut off (at
        temperature 1 where that is 0), float32 (float64 for float64 logits). A row with NaN or infinity among its
        logits, or with nothing but -inf, gives an id below V and the log-probability NaN.
        With ``statistics``, of each row the largest logit over the temperature and the logarithm of the sum of
        ``exp(logit - largest)``, [R, 2] in the dtype of the log-probabilities.
    """
    cut = temperature == 0 or top_p < 1 or top_k > 0
    if impl == "auto":
        impl = draw_impl(logits.device, logits.dtype, cut=cut)
    if impl == "triton":
        from . import _triton_draw

        options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "statistics": statistics}
        return _triton_draw.draw(logits, uniform, block=BLOCK, **options)
    if temperature not in (0, 1):
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
    if impl == "native":
        drawn = _draw_by_blocks(logits, uniform)
        return drawn if statistics else drawn[:2]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        log_probability = logits.log_softmax(-1)
        index = logits.argmax(-1, keepdim=True)
        scored = log_probability.gather(1, index)
        drawn = index.expand_as(uniform), scored.expand_as(uniform)
        return (*drawn, torch.cat([logits.amax(-1, keepdim=True), -scored], 1)) if statistics else drawn
    largest = logits.amax(-1, keepdim=True)
    probability = logits.sub_(largest).exp_()
    total = probability.sum(-1, keepdim=True)
    probability.div_(total)
    index = draw_from(probability, uniform, top_p=top_p, top_k=top_k)
    drawn = index, probability.gather(1, index).log_()
    return (*drawn, torch.cat([largest, total.log_()], 1)) if statistics else drawn


def _draw_by_blocks(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without a cut, on the CPU: only the probabilities of the tokens near the drawn one are computed."""
    from ._native import block_statistics

    vocabulary = logits.shape[1]
    largest, total = block_statistics(logits, BLOCK)  # [R, V/128]
    of_all = largest.amax(1, keepdim=True)
    mass = (largest - of_all).exp_().mul_(total)
    block, uniform = _search(mass, uniform)  # [R, d]
    column = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)  # [R, d, 128]
    nearby = logits.gather(1, column.clamp_max(vocabulary - 1).flatten(1)).view(column.shape).to(mass.dtype)
    probability = (nearby - of_all[:, :, None]).exp_().where(column < vocabulary, 0)
    within, _ = _search(probability, uniform[:, :, None])
    log_total = mass.sum(1, keepdim=True).log_()
    log_probs = nearby.gather(2, within)[..., 0] - of_all - log_total
    ids = column.gather(2, within)[..., 0].clamp_max_(vocabulary - 1)
    return ids, log_probs, torch.cat([of_all, log_total], 1)


def draw_from(probability: Tensor, uniform: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Ids [R, d] drawn from the rows of ``probability`` [R, V].

    Args:
        probability: [R, V], at least 0, each row with a sum near 1.
        uniform: [R, d] float64 in [0, 1).
        top_p, top_k: as for :func:`draw_tokens`.

    Returns:
        [R, d] int64; never a token of probability 0.
    """
    vocabulary = probability.shape[1]
    if top_k:
        largest, ids = _most_likely(probability, min(top_k, vocabulary))
        return ids.gather(1, _invert(_nucleus(largest, top_p), uniform))
    if top_p == 1:
        return _invert(probability, uniform)
    # A full sort is slow on a CPU and rarely needed; asking whether it is needed is slow everywhere else.
    return _draw_nucleus(probability, uniform, top_p, 64 if probability.device.type == "cpu" else vocabulary)


def _draw_nucleus(probability: Tensor, uniform: Tensor, top_p: float, size: int) -> Tensor:
    """As :func:`draw_from`, trying the ``size`` most likely tokens first."""
    whole = size * 8 > probability.shape[1]
    largest, ids = _most_likely(probability, probability.shape[1] if whole else size)
    index = ids.gather(1, _invert(_nucleus(largest, top_p, of_all=True), uniform))
    if not whole:
        short = largest.sum(1, dtype=torch.float64) < top_p
        if short.any():
            index[short] = _draw_nucleus(probability[short], uniform[short], top_p, 16 * size)
    return index


def _most_likely(probability: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row [R, V], descending, and their ids, ascending where they are equal."""
    if probability.device.type != "cpu" or 8 * count > probability.shape[1]:
        largest, ids = probability.sort(dim=1, descending=True, stable=True)
        return largest[:, :count], ids[:, :count]
    largest, ids = probability.topk(count)  # which of equal ones are in it, and where, is anybody's guess
    last = largest[:, -1:]
    at_edge = largest == last
    missing = at_edge.sum(1, keepdim=True)
    equal = probability == last
    if (equal.sum(1, keepdim=True) > missing).any():
        first = equal & (equal.cumsum(1, dtype=torch.int32) <= missing)
        ids[at_edge] = first.nonzero()[:, 1]
    ids = ids.sort(1).values
    largest, order = probability.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return largest, ids.gather(1, order)


def _nucleus(largest: Tensor, top_p: float, *, of_all: bool = False) -> Tensor:
    """Descending probabilities [R, K]; 0 from where those before add up to ``top_p`` (of the sum of all K, or of 1)."""
    if top_p == 1:
        return largest
    integers = (largest * _WHOLE).long()
    cumulative = integers.cumsum(1)
    total = _WHOLE if of_all else cumulative[:, -1:].double()
    return largest.where((cumulative - integers).double() < top_p * total, 0)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """Index [R, d] where the cumulative sum of ``mass`` [R, K], divided by its total, passes ``uniform`` [R, d]."""
    if mass.shape[1] <= 16 * BLOCK:
        return _search(mass, uniform)[0]
    # A cumulative sum over the vocabulary costs more than the softmax; block sums are cheap.
    missing = -mass.shape[1] % BLOCK
    blocks = pad(mass, (0, missing)) if missing else mass  # padding by nothing would copy
    blocks = blocks.unflatten(1, (-1, BLOCK))  # [R, K/128, 128]
    block, uniform = _search(blocks.sum(2), uniform)
    rows = torch.arange(mass.shape[0], device=mass.device)[:, None]
    within, _ = _search(blocks[rows, block], uniform[..., None])
    return (block * BLOCK + within[..., 0]).clamp_max_(mass.shape[1] - 1)  # NaN may lead to the padding


def _search(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The index that ``uniform`` [..., d] falls on in ``mass`` [..., K], and how far into its mass, from 0 to 1."""
    # Sums of integers: torch refuses those of floating-point numbers on CUDA where results must be reproducible.
    integers = (mass * (_WHOLE / mass.sum(-1, keepdim=True))).nan_to_num_(0).long()
    cumulative = integers.cumsum(-1)
    total = cumulative[..., -1:].contiguous()
    # Rounding may put a target at the total: the last index with any mass, not the one after it.
    target = (uniform * total.double()).long().minimum(total - 1)
    index = torch.searchsorted(cumulative, target, right=True).clamp_max_(mass.shape[-1] - 1)
    own = integers.gather(-1, index)
    into = target - (cumulative.gather(-1, index) - own)
    return index, into.double().div_(own.clamp_min(1))
