"""Drawing of tokens: every implementation against the distribution in float64, down to where its intervals end."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ebft_kernels import _native, _tiles
from ebft_kernels.logprob import _draw
from ebft_kernels.logprob._draw import draw_impl, draw_tokens
from ebft_kernels.testing import assert_within_budget, randn

U = torch.finfo(torch.float32).eps / 2
CUTS = ({"top_k": 1}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.6}, {"top_k": 10**6, "top_p": 0.97})
IMPLS = ["torch"]
IMPLS += [] if _native.why_not("cpu") else ["native"]
IMPLS += [] if importlib.util.find_spec("triton") is None else ["triton"]
CASES = [(impl, cut) for impl in IMPLS for cut in ({}, *CUTS) if not (impl == "native" and cut)]


class Truth(NamedTuple):
    """One row in float64: ids [K] in the order of the draw, the ends of their intervals [K + 1], the log-probabilities
    of all [V], and how far rounding may move an end."""

    ids: Tensor
    ends: Tensor
    log_probs: Tensor
    rounding: float


def truth(logits: Tensor, *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Truth:
    """The specification, one token after the other.

    A mass exp(x - top) that is computed in float32 is off by a factor: one rounding each of x / T, top / T, their
    difference and 1 / T in the exponent, a few of the exponential itself, and those of a sum of 128. An end is a sum of
    masses over the sum of all, and so at most off by the mean of these factors over the distribution, of which what is
    kept has only a part; likewise the ``top_p`` that it is compared with.
    """
    x = logits.double() / (temperature or 1.0)
    probability = x.softmax(0)
    order = list(range(len(x)))
    if temperature == 0 or top_k or top_p < 1:
        order.sort(key=lambda i: (-float(x[i]), i))
        order = order[: 1 if temperature == 0 else top_k or len(order)]
        kept, before, total = [], 0.0, float(probability[order].sum())
        for i in order:
            if before < top_p * total:
                kept.append(i)
            before += float(probability[i])
        order = kept
    order = torch.tensor(order)
    ends = torch.cat([torch.zeros(1, dtype=torch.float64), probability[order].cumsum(0)])
    seen = probability > 0
    off = 4 * (x[seen].abs() + x.max().abs()) + 24
    rounding = 2 * U * float((probability[seen] * off).sum() / ends[-1])
    return Truth(order, ends / ends[-1], x.log_softmax(0), rounding)


def dtypes(impl: str, options: dict[str, float]) -> tuple[torch.dtype, ...]:
    if impl != "triton":
        return torch.float32, torch.bfloat16
    # The interpreter is wrong about bfloat16, and slow.
    return (torch.float16,) if options else (torch.float32, torch.float16)


@pytest.mark.parametrize("vocabulary", (1, 7, 131))
@pytest.mark.parametrize(("impl", "options"), CASES, ids=str)
def test_intervals_end_where_they_should(impl, options, vocabulary):
    """A number just inside either end of a token's interval draws that token: that is the whole distribution."""
    for seed, dtype in enumerate(dtypes(impl, options)):
        logits = randn(vocabulary, seed=seed).to(dtype)
        exact = truth(logits, temperature=0.7, **options)
        wide = exact.ends.diff() > 2 * exact.rounding
        begin, end, expected = exact.ends[:-1][wide], exact.ends[1:][wide], exact.ids[wide]
        assert 2 * len(expected) > len(exact.ids)
        inside = torch.stack([begin + exact.rounding, (begin + end) / 2, end - exact.rounding], 1)
        few = 2 if options else 20
        some = torch.linspace(0, len(inside) - 1, few if impl == "triton" else len(inside)).long().unique()
        uniform = inside[some].reshape(1, -1)
        ids, log_probs = draw_tokens(logits[None].clone(), uniform, temperature=0.7, impl=impl, **options)
        assert torch.equal(ids[0], expected[some].repeat_interleave(3))
        eager = (logits.float() / 0.7).log_softmax(0)
        # The budget is that of all tokens: one alone may be right by chance.
        assert_within_budget(eager.index_copy(0, ids[0], log_probs[0]), eager, exact.log_probs)


@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize(("impl", "options"), CASES, ids=str)
def test_tokens_are_those_of_the_specification(impl, options, rows):
    """Random numbers, equal tokens: but for a number that is within rounding of an end, or a cut that is."""
    logits = randn(rows, 300, seed=rows, dtype=torch.float32).mul_(3)
    uniform = torch.rand(rows, 2, dtype=torch.float64)
    ids, _ = draw_tokens(logits.clone(), uniform, impl=impl, **options)
    for row, numbers, found in zip(logits, uniform, ids, strict=True):
        exact = truth(row, **options)
        for number, token in zip(numbers, found, strict=True):
            place = int((exact.ends[1:] <= number).sum())
            near = (exact.ends - number).abs().min() <= exact.rounding
            assert token == exact.ids[place] or near


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "native"])
def test_of_equally_likely_tokens_the_first_are_kept(impl):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, -0.0, 0.0]]).repeat(1, 20)  # 160: more than a block
    ids = [1, 3, 9, 11]  # of 40 such
    uniform = (torch.arange(4, dtype=torch.float64)[None] + 0.5) / 4
    for options in ({"top_k": 4}, {"top_p": float(4 * logits.softmax(-1)[0, 1]) * 0.99}):
        assert draw_tokens(logits.clone(), uniform, impl=impl, **options)[0].tolist() == [ids], options
    greedy, log_probs = draw_tokens(logits.clone(), uniform, temperature=0, impl=impl)
    assert greedy.tolist() == [[1] * 4]
    assert_within_budget(log_probs, logits.log_softmax(-1)[:, ids], logits.double().log_softmax(-1)[:, ids])
    # Below all of the 40: the first 3 of the next ones, and a zero is a zero whatever its sign.
    last = torch.full((1, 1), 1 - 1e-9, dtype=torch.float64)
    assert draw_tokens(logits.clone(), last, temperature=50.0, top_k=43, impl=impl)[0].item() == 5
    assert draw_tokens(logits.clone(), last, temperature=50.0, top_k=122, impl=impl)[0].item() == 7


def test_the_most_likely_tokens_are_the_same_with_and_without_a_sort():
    probability = torch.randint(1, 20, (30, 500)) / 5000.0
    for count in (1, 7, 60):
        by_topk = _draw._most_likely(probability, count)
        largest, ids = probability.sort(dim=1, descending=True, stable=True)
        for found, expected in zip(by_topk, (largest, ids), strict=True):
            assert torch.equal(found, expected[:, :count])


@pytest.mark.parametrize("impl", IMPLS)
def test_extremes_of_the_temperature(impl):
    logits = torch.tensor([[5.0, 5.5, -1e30, 5.5, -math.inf]])
    uniform = torch.tensor([[0.1, 0.4, 0.6, 0.9]], dtype=torch.float64)

    def drawn(temperature, **options):
        return [
            x[0].tolist() for x in draw_tokens(logits.clone(), uniform, temperature=temperature, impl=impl, **options)
        ]

    half, quarter = pytest.approx([-math.log(2)] * 4), pytest.approx([-math.log(4)] * 4)
    assert drawn(1e-30) == [[1, 1, 3, 3], half]
    assert drawn(1e29)[0] == [0, 1, 1, 3]
    assert drawn(3e38) == [[0, 1, 2, 3], quarter]
    if impl != "native":
        assert drawn(1e-30, top_k=1)[0] == drawn(0)[0] == [1] * 4
        assert drawn(1e-30, top_p=0.5)[0] == [1] * 4
        assert drawn(1e-30, top_p=0.51)[0] == [1, 1, 3, 3]


@pytest.mark.parametrize(("impl", "options"), [*CASES, *((i, {"temperature": 0}) for i in IMPLS if i != "native")])
def test_what_is_not_a_number_gives_no_log_probability_and_an_id_in_range(impl, options):
    logits = torch.zeros(6, 131, dtype=torch.float16 if impl == "triton" else torch.float32)
    logits[0, 130] = logits[1] = math.nan
    logits[2] = -math.inf
    logits[3, 5] = math.inf
    logits[4] = -math.inf
    logits[4, 130] = -7.0
    ids, log_probs = draw_tokens(logits, torch.full((6, 2), 0.999, dtype=torch.float64), impl=impl, **options)
    assert (ids >= 0).all() and (ids < 131).all()
    assert log_probs[:4].isnan().all() and (ids[4] == 130).all() and (log_probs[4] == 0).all()
    assert_within_budget(log_probs[5], torch.full((2,), -math.log(131)), torch.full((2,), -math.log(131)).double())


@pytest.mark.parametrize(("impl", "options"), CASES, ids=str)
def test_improbable_tokens_are_drawn_at_the_edges_and_impossible_ones_never(impl, options):
    logits = torch.full((1, 300), -math.inf)
    logits[0, [3, 140, 299]] = torch.tensor([0.0, 0.0, -20.0])
    edges = torch.tensor([[0.0, 1 - 1e-9, 1 - 2**-53]], dtype=torch.float64)
    expected = {"top_p": [3, 140, 140], "top_k": [3, 3, 3] if options.get("top_k") == 1 else [3, 299, 299]}
    if "top_k" in options and "top_p" in options:
        expected["top_k"] = [3, 140, 140]
    ids, _ = draw_tokens(logits, edges, impl=impl, **options)
    assert ids[0].tolist() == expected.get(next(iter(options), "top_k"))


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
def test_rows_may_be_views_and_begin_anywhere():
    whole = randn(6, 150, seed=1, dtype=torch.float16)
    uniform = torch.rand(3, 1, dtype=torch.float64)
    for logits in (
        whole[3:, 17:],
        whole[:3, 1:134],
        whole[::2, :133],
        whole[:1, :133].expand(3, -1),
        whole[:, :3].T.contiguous().T[:3],
    ):
        for options in ({}, {"top_k": 2}):
            expected = draw_tokens(logits.clone(), uniform, impl="torch", **options)
            found = draw_tokens(logits, uniform, impl="triton", **options)
            assert torch.equal(found[0], expected[0])


class Watched(TorchDispatchMode):
    """Refuses sums whose order a GPU does not fix; on the meta device whatever reads a value fails by itself."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "cumsum" in op.name():
            assert not args[0].is_floating_point()
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", ({}, {"temperature": 0}, *CUTS), ids=str)
def test_in_pytorch_an_accelerator_is_never_waited_for_and_adds_up_in_a_fixed_order(options):
    logits = torch.empty(3, 5000, device="meta", dtype=torch.bfloat16)
    uniform = torch.empty(3, 2, device="meta", dtype=torch.float64)
    with Watched():
        ids, log_probs = draw_tokens(logits, uniform, impl="torch", **options)
    assert ids.shape == log_probs.shape == (3, 2)


@pytest.mark.skipif("triton" not in IMPLS, reason="triton is not installed")
@pytest.mark.parametrize(("options", "kernel"), (({}, "draw_kernel"), ({"top_p": 0.9}, "draw_cut_kernel")))
def test_two_launches_draw_all_tokens(options, kernel):
    from bench._targets import GPUS, standing_in

    launched = []
    logits = torch.empty(3, 5000, device="meta", dtype=torch.bfloat16)
    uniform = torch.empty(3, 2, device="meta", dtype=torch.float64)
    with standing_in(GPUS["sm_90"], lambda kernel, *_: launched.append(kernel.__name__)):
        draw_tokens(logits, uniform, impl="triton", **options)
    assert launched == ["draw_blocks_kernel", kernel]


def test_who_draws():
    assert draw_impl("cpu", torch.float32, cut=True) == "torch"
    assert draw_impl("cpu", torch.float32, cut=False) == ("native" if "native" in IMPLS else "torch")
    assert _tiles.draw_tiles.__doc__ and _draw.BLOCK == 128, "the tiles count blocks of this size"
