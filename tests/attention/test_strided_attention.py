"""Strided attention against each rollout run alone, its error in every dtype, its gradients and what it keeps."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ebft_kernels import StridedLayout, available_impls, strided_attention, strided_attention_step
from ebft_kernels.attention import _plan, _torch
from ebft_kernels.testing import (
    LAYOUTS,
    assert_within_budget,
    attention_inputs,
    randn,
)

from .. import op_checks
from ..op_checks import impls_here, results_and_gradients
from .checks import assert_as_exact_as_eager, assert_variant_within_budget, attend, attend_inputs, yardsticks

pytestmark = pytest.mark.usefixtures("device")
IMPLS = impls_here("strided_attention")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SOME = ("odd", "arbitrary", "documents", "padded")
VARIANTS = {
    "plain": {},
    "no groups": {"kv_heads": 4},
    "one group": {"kv_heads": 1},
    "softcap": {"softcap": 1.5},
    "window": {"window": 6},
    "narrow window": {"window": 1},
    "sinks": {"sinks": True},
    "wide values": {"value_dim": 24},
    "narrow values": {"value_dim": 8, "window": 9, "sinks": True, "softcap": 3.0},
    "scale": {"scale": 0.4, "sinks": True},
    "full": {"block": "full", "sinks": True},
    "full in a window": {"block": "full", "window": 3},
}


TILINGS = ("whole", "cut up", "unfused")


@pytest.fixture
def tiling(request, monkeypatch):
    """The layouts of the tests fit into few tiles; cut up, they reach every kind of tile and part."""
    if request.param == "cut up":
        monkeypatch.setattr(_torch, "_TILE_ROWS", 16)
        monkeypatch.setattr(_plan, "_PROMPT_ROWS", 8)
        monkeypatch.setattr(_plan, "_SMALL_MASK", 0)
    if request.param == "unfused":
        monkeypatch.setattr(_torch, "_FUSED", None)
        monkeypatch.setattr(_torch, "_MAX_SCORES", 4000)


def rollout_alone(q: Tensor, k: Tensor, v: Tensor, layout: StridedLayout, row: int, rollout: int) -> Tensor:
    """Plain causal attention over ``x[start .. anchor) + rollout``: its rollout rows [H, G, D]."""
    anchor = max(int(layout.anchors[row, rollout // layout.samples]), 0)
    start = int(layout.prompt_start[row, anchor - 1]) if anchor else 0
    first = layout.length + rollout * layout.horizon
    tokens = [*range(start, anchor), *range(first, first + layout.horizon)]
    q, k, v = (x[row, :, tokens].repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True)[:, anchor - start :]


@pytest.mark.parametrize("impl", available_impls("strided_attention", op_checks.DEVICE))
@pytest.mark.parametrize("window", (2**31, 2**32 + 1, 2**63 - 1, 2**70))
def test_a_window_longer_than_every_sequence_is_no_window(window, impl):
    layout = LAYOUTS["arbitrary"]()
    inputs = [x.requires_grad_() for x in attention_inputs(layout)]
    with_it, without = (
        results_and_gradients(strided_attention(*inputs, layout, impl=impl, window=x), inputs) for x in (window, None)
    )
    assert all(map(torch.equal, with_it, without))
    q, caches = layout.step_rows(inputs[0].transpose(1, 2), 1).transpose(1, 2), inputs[1:]
    with_it, without = (strided_attention_step(q, *caches, layout, 1, impl=impl, window=x) for x in (window, None))
    assert torch.equal(with_it, without)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_every_rollout_run_alone(name, impl):
    layout = LAYOUTS[name]()
    inputs = attention_inputs(layout)
    actual = strided_attention(*inputs, layout, impl=impl)
    single, double = torch.zeros_like(actual), torch.zeros_like(actual, dtype=torch.float64)
    for target, tensors in ((single, inputs), (double, [x.double() for x in inputs])):
        for row in range(layout.batch_size):
            for rollout in range(layout.num_anchors * layout.samples):
                first = layout.length + rollout * layout.horizon
                alone = rollout_alone(*tensors, layout, row, rollout)
                target[row, :, first : first + layout.horizon] = alone
            for start in layout.prompt_start[row].unique().tolist():
                tokens = (layout.prompt_start[row] == start).nonzero()[:, 0]
                q, k, v = (x[row, :, tokens].repeat_interleave(4 // x.shape[1], 0) for x in tensors)
                target[row, :, tokens] = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_within_budget(actual, single, double)


@pytest.mark.parametrize(
    ("tiling", "dtype"),
    [(tiling, dtype) for tiling in TILINGS for dtype in DTYPES if tiling == "whole" or dtype.itemsize > 2],
    indirect=["tiling"],
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("tiling")
def test_errors_of_output_and_gradients(variant, dtype):
    assert_variant_within_budget(VARIANTS[variant], dtype, "torch", LAYOUTS if dtype == torch.float32 else SOME)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_of_the_reference(variant, dtype):
    assert_variant_within_budget(VARIANTS[variant], dtype, "reference", SOME)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (1, 16, 40, 64, 80, 96, 128, 256))
def test_errors_at_head_dims(head_dim, dtype):
    assert_variant_within_budget({}, dtype, "torch", ["odd", "one_sample"], head_dim=head_dim)


@pytest.mark.parametrize("window", (None, 1, 3))
@pytest.mark.parametrize("name", ("odd", "documents", "arbitrary"))
def test_a_full_block_adds_the_later_tokens_of_the_own_rollout(name, window):
    layout = LAYOUTS[name]()
    rollout = torch.arange(layout.packed_length) - layout.length
    rollout = (rollout // layout.horizon).where(rollout >= 0, -1)
    row = torch.arange(layout.packed_length)
    later = (rollout[:, None] == rollout) & (rollout >= 0) & (row > row[:, None])
    full = layout.dense_mask(window, block="full")
    assert later.any() and torch.equal(full, layout.dense_mask(window) | later)
    batch, query, key = torch.meshgrid(torch.arange(layout.batch_size), row, row, indexing="ij")
    assert torch.equal(layout.mask_mod(window, block="full")(batch, None, query, key), full[:, 0])
    with pytest.raises(ValueError, match="block: expected one of 'causal', 'full'; got 'half'"):
        layout.dense_mask(block="half")


def gradcheck(variant: str, impl: str) -> bool:
    layout = StridedLayout.from_anchors(torch.tensor([[2, 5], [3, -1]]), 7, horizon=2, samples=2)
    tensors, options = attend_inputs(layout, VARIANTS[variant], torch.float64, head_dim=3)
    return torch.autograd.gradcheck(lambda *x: attend(list(x), layout, impl=impl, **options), tensors, fast_mode=True)


@pytest.mark.parametrize("tiling", TILINGS, indirect=True)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("tiling")
def test_gradcheck(variant):
    assert gradcheck(variant, "torch")


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_the_reference(variant):
    assert gradcheck(variant, "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "layout",
    (
        LAYOUTS["one_step"]().without_last_step(),
        LAYOUTS["padded"]().without_last_step(),
        StridedLayout.from_anchors(torch.full((2, 1), -1), 0, horizon=3, samples=2),
        StridedLayout.strided(1, 300, context=1, stride=1, horizon=1, samples=1),
    ),
    ids=("no rollout tokens", "shorter rollouts", "no prompt", "an anchor at every token"),
)
def test_geometries_at_the_limits(layout, impl, device):
    layout = layout.to(device)
    tensors, _ = attend_inputs(layout, VARIANTS["plain"], torch.float32)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = results_and_gradients(attend(tensors, layout, impl=impl), tensors)
    truth = results_and_gradients(attend(exact, layout, impl="reference"), exact)
    eager = zip(*yardsticks(tensors, layout), strict=True)
    for of, *results in zip("oqkv", actual, eager, truth, strict=True):
        assert_as_exact_as_eager(*results, of)


@pytest.mark.parametrize("variant", ("plain", "window", "softcap"))
def test_a_long_row_and_what_is_kept_of_it(variant, monkeypatch):
    """Many tiles, no S x S tensor, and only q, k, v, the output, its log-sum-exps and the layout kept for backward."""
    layout = StridedLayout.strided(1, 360, context=20, stride=5, horizon=4, samples=3)
    tensors, options = attend_inputs(layout, VARIANTS[variant], torch.float32, heads=2, kv_heads=1)
    options |= {"window": 150} if "window" in options else {}
    kept, largest = [], Largest()
    for name in ("forward", "backward"):
        monkeypatch.setattr(_torch, name, largest.watching(getattr(_torch, name)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        actual = results_and_gradients(attend(tensors, layout, impl="torch", **options), tensors)
    assert largest.elements >= layout.packed_length * 2 * 16  # it has seen the output
    assert largest.elements < layout.packed_length**2 / 8
    known = [*tensors, actual[0], *layout.key_ranges]
    others = [x for x in kept if x.data_ptr() not in {y.data_ptr() for y in known}]
    assert [x.shape for x in others] == [(1, 2, layout.packed_length)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    truth = results_and_gradients(attend(exact, layout, impl="reference", **options), exact)
    eager = zip(*yardsticks(tensors, layout, **options), strict=True)
    for of, *results in zip("oqkv", actual, eager, truth, strict=True):
        assert_as_exact_as_eager(*results, of)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def watching(self, function):
        """``function``, watched: a mode that is entered outside a custom op does not see into it."""

        def watched(*args):
            with self:
                return function(*args)

        return watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize(
    ("tiling", "impl"), [*((x, "torch") for x in TILINGS), ("whole", IMPLS[0])], indirect=["tiling"]
)
@pytest.mark.parametrize("name", ("odd", "arbitrary"))
@pytest.mark.usefixtures("tiling")
def test_rollouts_do_not_see_each_other(name, impl):
    """Other tokens in one rollout change nothing anywhere else, to the last bit, and get no gradient from elsewhere."""
    layout = LAYOUTS[name]()
    tensors, _ = attend_inputs(layout, VARIANTS["plain"], torch.float32)
    before = attend(tensors, layout, impl=impl)
    index = torch.arange(layout.packed_length).expand(layout.batch_size, -1)
    changed = torch.zeros(layout.batch_size, layout.packed_length, dtype=torch.bool)
    changed[0, layout.rollouts(index)[0, 1, 1]] = True
    others = [torch.where(changed[:, None, :, None], x * 3 - 1, x) for x in tensors]
    after = attend(others, layout, impl=impl)
    assert torch.equal(after.transpose(1, 2)[~changed], before.transpose(1, 2)[~changed])
    assert (after.transpose(1, 2)[changed] != before.transpose(1, 2)[changed]).any()
    elsewhere = torch.where(changed[:, None, :, None], 0, randn(*after.shape, seed=5, dtype=torch.float32))
    for grad in torch.autograd.grad(after, others, elsewhere):
        assert (grad.transpose(1, 2)[changed] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_repeat_bitwise(variant, impl):
    layout = StridedLayout.strided(2, 150, context=8, stride=8, horizon=8, samples=4)
    tensors, options = attend_inputs(layout, VARIANTS[variant], torch.float32)
    first, second = (results_and_gradients(attend(tensors, layout, impl=impl, **options), tensors) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_plan_is_made_once_and_dies_with_its_layout(monkeypatch):
    built = []
    monkeypatch.setattr(_plan, "_stripes", lambda *args, real=_plan._stripes: built.append(args) or real(*args))
    layout = LAYOUTS["odd"]()
    tensors, _ = attend_inputs(layout, VARIANTS["plain"], torch.float32)
    for _ in range(3):
        results_and_gradients(attend(tensors, layout, impl="torch"), tensors)
        results_and_gradients(attend(tensors, layout, impl="torch", window=4), tensors)
    assert len(built) == 2
    del built[:]
    gc.collect()
    plans = len(_plan._PLANS)
    del layout
    gc.collect()
    assert len(_plan._PLANS) == plans - 1


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_queries_keys_and_values(impl, device):
    layout = LAYOUTS["odd"]()
    tensors, _ = attend_inputs(layout, VARIANTS["sinks"], torch.float32)
    mixed = [tensors[0], tensors[1].detach().bfloat16().requires_grad_(), *tensors[2:]]
    low = [*(x.detach().bfloat16().requires_grad_() for x in tensors[:3]), tensors[3]]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = attend(mixed, layout, impl=impl)
    cast, expected = (
        results_and_gradients(out, x) for out, x in ((cast, mixed), (attend(low, layout, impl=impl), low))
    )
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(cast, expected, strict=True))
    assert [x.dtype for x in cast[1:]] == [x.dtype for x in mixed]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert attend([x.double() for x in tensors], layout, impl=impl).dtype == torch.float64


def test_autocast_ends_where_the_implementation_begins(monkeypatch, device):
    inside = []
    for name in ("forward", "backward", "step"):
        real = getattr(_torch, name)
        monkeypatch.setattr(
            _torch, name, lambda *args, real=real: inside.append(torch.is_autocast_enabled(device.type)) or real(*args)
        )
    layout = LAYOUTS["odd"]()
    tensors, _ = attend_inputs(layout, VARIANTS["plain"], torch.float32)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        attend(tensors, layout, impl="torch").sum().backward()
        rows = layout.step_rows(tensors[0].transpose(1, 2), 0).transpose(1, 2)
        strided_attention_step(rows, *tensors[1:], layout, 0, impl="torch")
    assert inside == [False] * 3
