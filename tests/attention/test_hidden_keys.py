"""Keys and values that a row does not see weigh exactly nothing, whatever they hold; scores that are all -inf."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, available_impls, strided_attention, strided_attention_step
from ebft_kernels.testing import LAYOUTS, attention_inputs, randn

pytestmark = pytest.mark.usefixtures("device")
IMPLS = [impl for impl in available_impls("strided_attention", "cpu") if impl != "triton"]
# float32's largest number but for a factor: scores that overflow, or that no offset of a mask outweighs.
FILLS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 1e36}


def broken(layout: StridedLayout) -> Tensor:
    """[B, S] bool: some keys of everything, of the first prompt tokens none, so that there are rows that see none."""
    hit = torch.rand(layout.batch_size, layout.packed_length, generator=torch.Generator().manual_seed(5)) < 0.06
    hit[:, :2] = False
    hit[:, -1] = True
    return hit


def assert_hidden_weigh_nothing(impl: str, layout: StridedLayout, fill: float, where: str, **options: object) -> None:
    """Output and gradients of all that sees no broken key are those without any."""
    q, k, v = attention_inputs(layout, value_dim=8 if where == "v" else None)
    hit = broken(layout)
    seen = layout.dense_mask(options.get("window"), block=options.get("block", "causal"))[:, 0]  # [B, S, S]
    rows = ~(seen & hit[:, None]).any(-1)  # [B, S], which see none
    keys = ~(seen & ~rows[:, :, None]).any(1)  # [B, S], which are seen by such rows alone
    assert rows[:, layout.length :].any() and not rows.all() and keys.any()
    results = []
    for value in (0.0, fill):
        filled = {"k": k, "v": v}
        filled[where] = filled[where].clone().masked_fill_(hit[:, None, :, None], value)
        leaves = [x.clone().requires_grad_() for x in (q, filled["k"], filled["v"])]
        out = strided_attention(*leaves, layout, impl=impl, **options)
        results.append([out, *torch.autograd.grad(out, leaves, randn(*out.shape, seed=9, dtype=torch.float32))])
    for name, clean, dirty, kept in zip(("out", "q", "k", "v"), *results, (rows, rows, keys, keys), strict=True):
        pair = [x.transpose(1, 2)[kept] for x in (clean, dirty)]
        # Where there is something to leave out, sums may be made in another order.
        assert (pair[0] - pair[1]).abs().max() <= 1e-5 * pair[0].abs().max(), (name, fill)
    if where == "v":
        assert not results[1][0].transpose(1, 2)[~rows].isfinite().all(-1).any() or fill == FILLS["huge"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("where", ("k", "v"))
@pytest.mark.parametrize("name", ("odd", "padded", "documents"))
def test_what_is_not_seen_weighs_nothing(name, where, fill, impl):
    assert_hidden_weigh_nothing(impl, LAYOUTS[name](), FILLS[fill], where)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ({"softcap": 3.0}, {"window": 4}, {"block": "full"}))
def test_with_options(options, impl):
    for where in ("k", "v"):
        assert_hidden_weigh_nothing(impl, LAYOUTS["odd"](), math.nan, where, **options)


@pytest.mark.parametrize("fill", FILLS)
def test_hidden_keys_weigh_nothing_in_the_output_of_triton(fill):
    """What docs/kernels.md promises of it: of keys, not of values, and of the output alone."""
    pytest.importorskip("triton")
    layout = StridedLayout.strided(1, 14, context=3, stride=4, horizon=3, samples=2)
    q, k, v = attention_inputs(layout)
    hit = broken(layout)
    rows = ~(layout.dense_mask()[:, 0] & hit[:, None]).any(-1)
    filled = k.masked_fill(hit[:, None, :, None], FILLS[fill])
    clean, dirty = (strided_attention(q, x, v, layout, impl="triton").transpose(1, 2)[rows] for x in (k, filled))
    assert rows[:, layout.length :].any() and not rows.all() and torch.equal(clean, dirty)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_decoding_step(impl):
    """Rollouts of one anchor whose caches hold NaN, prompts with NaN at and after the last anchor."""
    layout = StridedLayout.strided(2, 26, context=4, stride=5, horizon=3, samples=2)
    q, k, v = attention_inputs(layout)
    step, steps = 1, layout.num_anchors * layout.samples
    q = q[:, :, :steps]
    own = layout.rollouts(torch.arange(layout.packed_length).expand(2, -1))[:, 1]  # the rows of the second anchor
    clean = strided_attention_step(q, k, v, layout, step, impl="reference")
    k, v = k.clone(), v.clone()
    for x in (k, v):
        x.transpose(1, 2).scatter_(1, own.reshape(2, -1, 1, 1).expand(-1, -1, *x.shape[1::2]), math.nan)
        x[:, :, int(layout.anchors[0, -1]) : layout.length] = math.inf
        x[:, :, layout.length :].unflatten(2, (-1, 3))[:, :, :, step + 1 :] = math.nan
    dirty = strided_attention_step(q, k, v, layout, step, impl=impl)
    kept = [i for i in range(steps) if i // layout.samples != 1]
    assert (dirty - clean)[:, :, kept].abs().max() <= 1e-5
    assert dirty[:, :, 2:4].isnan().all()


@pytest.mark.parametrize(
    ("impl", "with_sinks"), [("triton", False), *((impl, sinks) for impl in IMPLS for sinks in (False, True))]
)
def test_scores_that_are_all_minus_infinity(impl, with_sinks):
    """Rows whose visible keys all score -inf give 0, as rows that see nothing would; others leave such keys out."""
    layout = StridedLayout.strided(1, 9, context=2, stride=3, horizon=2, samples=2)
    q, k, v = attention_inputs(layout)
    q, k = q.abs(), k.clone()
    dead = torch.zeros(layout.packed_length, dtype=torch.bool)
    dead[:3] = dead[6] = dead[layout.length] = True  # all that the first anchor's first token sees, and others
    k[:, :, dead] = -math.inf
    sinks = torch.tensor([0.5, -math.inf, 2.0, -1.0]) if with_sinks else None
    out = strided_attention(q, k, v, layout, sinks=sinks, impl=impl)
    alive = layout.dense_mask() & ~dead
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.where(k.isfinite(), 0).repeat_interleave(2, 1)) / 4
    weights = scores.exp() * alive
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    expected = weights / total.where(total > 0, 1) @ v.repeat_interleave(2, 1)
    assert (out - expected).abs().max() <= 1e-5 and not out[:, :, 0].any() and not out[:, :, layout.length].any()
    step = strided_attention_step(q[:, :, layout.length :: 2], k, v, layout, 0, sinks=sinks, impl=impl)
    assert (step - expected[:, :, layout.length :: 2]).abs().max() <= 1e-5
