"""The decoding step against the rows of the whole attention, over caches whose unwritten rows are NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, available_impls, strided_attention, strided_attention_step
from ebft_kernels.attention import _plan, _torch
from ebft_kernels.testing import LAYOUTS, assert_within_budget, attention_inputs, eager_attention, randn

from ..op_checks import DEVICE, impls_here
from .checks import assert_as_exact_as_eager

pytestmark = pytest.mark.usefixtures("device")
STEP = "strided_attention_step"
IMPLS = impls_here(STEP)
VARIANTS = {
    "plain": {},
    "no groups": {"kv_heads": 4},
    "softcap": {"softcap": 1.5},
    "window": {"window": 6},
    "narrow window": {"window": 1},
    "sinks": {"sinks": True},
    "wide values": {"value_dim": 24, "scale": 0.4},
    "narrow values": {"value_dim": 8, "window": 9, "sinks": True, "softcap": 3.0},
}


@pytest.fixture(params=("whole", "cut up", "unfused"))
def _tiling(request, monkeypatch):
    """The layouts of the tests fit into few tiles; cut up, they reach every kind of tile and part."""
    if request.param == "cut up":
        monkeypatch.setattr(_torch, "_STEP_ROWS", 8)
        monkeypatch.setattr(_plan, "_SMALL_MASK", 0)
    if request.param == "unfused":
        monkeypatch.setattr(_torch, "_FUSED", None)
        monkeypatch.setattr(_torch, "_MAX_SCORES", 500)


def inputs_and_options(layout: StridedLayout, variant: str, dtype: torch.dtype) -> tuple[list[Tensor], dict]:
    options = dict(VARIANTS[variant])
    sizes = {name: options.pop(name) for name in ("kv_heads", "value_dim") if name in options}
    if "sinks" in options:
        options["sinks"] = randn(4, seed=3, dtype=dtype)
    return list(attention_inputs(layout, dtype=dtype, **sizes)), options


def caches_at(layout: StridedLayout, step: int, *tensors: Tensor) -> list[Tensor]:
    """Copies whose rows of later steps are NaN."""
    caches = [x.clone() for x in tensors]
    for x in caches:
        layout.rollouts(x.transpose(1, 2))[:, :, :, step + 1 :] = torch.nan
    return caches


def rows_of(layout: StridedLayout, x: Tensor, step: int) -> Tensor:
    return layout.step_rows(x.transpose(1, 2), step).transpose(1, 2)


def assert_steps_within_budget(variant: str, dtype: torch.dtype, impl: str) -> None:
    """All steps of all layouts together against float64, with eager PyTorch over the whole rows as the yardstick."""
    actual, eager, truth = [], [], []
    for build in LAYOUTS.values():
        layout = build()
        (q, k, v), options = inputs_and_options(layout, variant, dtype)
        doubles = [x.double() for x in (q, k, v)]
        truth.append(strided_attention(*doubles, layout, impl="reference", **options))
        actual.append(torch.full_like(truth[-1], torch.nan, dtype=dtype))
        for step in range(layout.horizon):
            caches = caches_at(layout, step, k, v)
            result = strided_attention_step(rows_of(layout, q, step), *caches, layout, step, impl=impl, **options)
            rows_of(layout, actual[-1], step)[:] = result
        mask = layout.dense_mask(options.pop("window", None))
        options = {"scale": q.shape[-1] ** -0.5, **options}
        eager.append(eager_attention(q, k, v, mask, **options))
        for kind in (actual, eager, truth):
            kind[-1] = kind[-1][:, :, layout.length :].flatten()
    actual, eager, truth = (torch.cat(x) for x in (actual, eager, truth))
    assert (eager - truth).abs().max() <= torch.finfo(dtype).eps ** 0.5 * truth.abs().max()
    assert_within_budget(actual, eager, truth)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("_tiling")
def test_steps_equal_the_whole(variant):
    assert_steps_within_budget(variant, torch.float32, "torch")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_in_low_precision(variant, dtype):
    assert_steps_within_budget(variant, dtype, "torch")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_of_the_reference(variant, dtype):
    assert_steps_within_budget(variant, dtype, "reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_steps_are_the_rows_of_the_whole(variant, impl):
    """The two compute the same numbers, but in tiles of other sizes."""
    for build in LAYOUTS.values():
        layout = build()
        (q, k, v), options = inputs_and_options(layout, variant, torch.float64)
        whole = strided_attention(q, k, v, layout, impl="torch" if impl == "native" else impl, **options)
        for step in range(layout.horizon):
            caches = caches_at(layout, step, k, v)
            result = strided_attention_step(rows_of(layout, q, step), *caches, layout, step, impl=impl, **options)
            expected = rows_of(layout, whole, step)
            largest = expected.abs().max() if expected.numel() else 0
            assert ((result - expected).abs() <= 20 * torch.finfo(torch.float64).eps * largest).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_long_rows_in_many_tiles(impl):
    layout = StridedLayout.strided(2, 320, context=20, stride=5, horizon=2, samples=4)
    (q, k, v), _ = inputs_and_options(layout, "plain", torch.float32)
    for window in (None, 120):
        truth = strided_attention(q.double(), k.double(), v.double(), layout, impl="reference", window=window)
        eager = eager_attention(q, k, v, layout.dense_mask(window), scale=0.25, how="normalize last")
        caches = caches_at(layout, 1, k, v)
        result = strided_attention_step(rows_of(layout, q, 1), *caches, layout, 1, window=window, impl=impl)
        assert_within_budget(result, rows_of(layout, eager, 1), rows_of(layout, truth, 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_caches_of_any_strides(impl):
    layout = LAYOUTS["odd"]()
    (q, k, v), _ = inputs_and_options(layout, "plain", torch.float32)
    q = rows_of(layout, q, 2)
    expected = strided_attention_step(q, k, v, layout, 2, impl=impl)
    ways = [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT]
    ways.append(lambda x: torch.cat([x, x], 3)[..., : x.shape[3]])
    for way in ways:
        views = [way(x) for x in (q, k, v)]
        assert any(a.stride() != b.stride() for a, b in zip(views, (q, k, v), strict=True))
        actual = strided_attention_step(*views, layout, 2, impl=impl)
        assert (actual - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert impl == "reference" or expected.transpose(1, 2).is_contiguous()


def eager_log_sum_exp(q: Tensor, k: Tensor, layout: StridedLayout, options: dict) -> Tensor:
    """[B, H, S] as eager PyTorch has it, in the dtype of its inputs."""
    k, softcap, sinks = k.repeat_interleave(q.shape[1] // k.shape[1], 1), options.get("softcap"), options.get("sinks")
    scores = torch.matmul(q, k.mT) * options.get("scale", q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~layout.dense_mask(options.get("window")), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)], -1)
    return scores.logsumexp(-1)


@pytest.mark.parametrize(
    ("variant", "impl"),
    [(variant, impl) for variant in VARIANTS for impl in IMPLS]
    + [(variant, "triton") for variant in ("plain", "narrow values") if "triton" in available_impls(STEP, DEVICE)],
)
def test_log_sum_exps_of_steps_and_of_the_whole(variant, impl):
    layouts = [LAYOUTS[name]() for name in ("odd", "documents", "one_sample")]
    if impl == "triton":  # in an interpreter; long enough for two splits of the keys, and for one
        length = 520 if variant == "plain" else 24
        layouts = [StridedLayout.strided(1, length, context=6, stride=length - 8, horizon=2, samples=2)]
    found: list[list[Tensor]] = [[], [], [], [], []]
    for layout in layouts:
        (q, k, v), options = inputs_and_options(layout, variant, torch.float32)
        out, lse = strided_attention(q, k, v, layout, impl=impl, return_lse=True, **options)
        assert torch.equal(out, strided_attention(q, k, v, layout, impl=impl, **options))
        assert lse.dtype == torch.float32 and not lse.requires_grad
        by_steps = torch.full_like(lse, torch.nan)
        by_steps[:, :, : layout.length] = lse[:, :, : layout.length]
        for step in range(layout.horizon):
            inputs = rows_of(layout, q, step), *caches_at(layout, step, k, v), layout, step
            result, of_step = strided_attention_step(*inputs, impl=impl, return_lse=True, **options)
            assert torch.equal(result, strided_attention_step(*inputs, impl=impl, **options))
            by_steps[:, :, layout.length + step :: layout.horizon] = of_step
        eager = (eager_log_sum_exp(*x, layout, options) for x in ((q, k), (q.flip(-1), k.flip(-1))))
        doubles = options | ({"sinks": options["sinks"].double()} if "sinks" in options else {})
        results = lse, by_steps, *eager, eager_log_sum_exp(q.double(), k.double(), layout, doubles)
        for parts, x in zip(found, results, strict=True):
            parts.append(x.flatten())
    lse, by_steps, *eager, truth = (torch.cat(x) for x in found)
    for x in (lse, by_steps):
        assert_as_exact_as_eager(x, eager, truth, "log-sum-exp")


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient(impl):
    layout = LAYOUTS["odd"]()
    tensors, _ = inputs_and_options(layout, "plain", torch.float32)
    q, k, v = (x.requires_grad_() for x in tensors)
    assert not strided_attention_step(rows_of(layout, q, 0), k, v, layout, 0, impl=impl).requires_grad


def test_one_plan_serves_all_steps_and_layers(monkeypatch):
    built = []
    monkeypatch.setattr(_plan, "_stripes", lambda *args, real=_plan._stripes: built.append(args) or real(*args))
    layout = LAYOUTS["odd"]()
    (q, k, v), _ = inputs_and_options(layout, "plain", torch.float32)
    for _ in range(2):
        for step in range(layout.horizon):
            strided_attention_step(rows_of(layout, q, step), k, v, layout, step, impl="torch")
    assert len(built) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_queries_and_caches(impl, device):
    layout = LAYOUTS["odd"]()
    (q, k, v), _ = inputs_and_options(layout, "plain", torch.float32)
    q = rows_of(layout, q, 1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = strided_attention_step(q, k.bfloat16(), v, layout, 1, impl=impl)
    expected = strided_attention_step(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, 1, impl=impl)
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, expected)
