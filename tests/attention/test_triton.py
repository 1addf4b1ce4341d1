"""The Triton kernels of strided attention, compiled or in the interpreter, where it is counted what they visit too."""

from __future__ import annotations

import ast
import collections
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from ebft_kernels import StridedLayout, strided_attention, strided_attention_step
from ebft_kernels._tiles import attention_tiles
from ebft_kernels._triton import Target
from ebft_kernels.attention import _triton, _triton_backward, _triton_core, _triton_step
from ebft_kernels.attention._visits import visited_tiles
from ebft_kernels.layout import KeyRanges
from ebft_kernels.testing import LAYOUTS, assert_within_budget, attention_inputs, eager_attention, randn

from .. import op_checks
from ..op_checks import results_and_gradients, short_dtypes
from .checks import assert_as_exact_as_eager, assert_variant_within_budget, attend, attend_inputs, yardsticks

pytestmark = pytest.mark.usefixtures("device")
INTERPRETED = Target("interpreter", 4, 64 << 10)
PATCHED: set[str] = set()


@pytest.fixture
def interpreted() -> None:
    """For tests that look inside the kernels."""
    if not op_checks.INTERPRETED:
        pytest.skip("it is about the interpreter")


@pytest.fixture(autouse=True)
def _interpreter_at_twice_the_speed(monkeypatch):
    """The interpreter prepares triton.language anew for every call of a device function; once per module will do."""

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in PATCHED:
            PATCHED.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture
def calls(monkeypatch):
    """How often the device functions that compute scores are called: "unmasked" or "masked", by kernel.

    None of compiled kernels, which call no Python.
    """
    if not op_checks.INTERPRETED:
        return None
    counts = collections.Counter()

    def counting(module, name, kind):
        real = getattr(module, name)

        def wrapper(*args, **kwargs):
            counts[kind(args)] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    counting(_triton_core, "accumulate", lambda _: "all of forward")
    counting(_triton_core, "seen_keys", lambda _: "masked of forward")
    counting(_triton_backward, "query_gradient", lambda args: "masked of dq" if args[-1] else "unmasked of dq")
    counting(_triton_backward, "key_gradients", lambda args: "masked of dkdv" if args[-1] else "unmasked of dkdv")
    return counts


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_the_tiles_it_visits(name, calls):
    """Three heads per group; the walks are those that are counted without running them."""
    assert_variant_within_budget({}, torch.float32, "triton", [name], heads=3, kv_heads=1)
    if calls is None:
        return
    layout = LAYOUTS[name]()
    visits = {
        kernel: visited_tiles(layout, kernel, 3, attention_tiles(kernel, INTERPRETED, 16, 16, 4)[0].sizes)
        for kernel in ("forward", "dq", "dkdv", "own")
    }
    assert calls["masked of forward"] == visits["forward"].masked
    assert calls["all of forward"] == visits["forward"].masked + visits["forward"].unmasked
    assert calls["masked of dq"] == visits["dq"].masked
    assert calls["unmasked of dq"] == visits["dq"].unmasked
    assert calls["masked of dkdv"] == visits["dkdv"].masked + visits["own"].masked
    assert calls["unmasked of dkdv"] == visits["dkdv"].unmasked
    if name in ("strided", "documents", "padded"):
        assert all(visits[kernel].unmasked and visits[kernel].masked for kernel in ("forward", "dq", "dkdv"))


VARIANTS = {
    "no groups": {"heads": 2, "kv_heads": 2},
    "two groups of two": {"heads": 4, "kv_heads": 2},
    "groups of four": {"heads": 4, "kv_heads": 1},
    "softcap": {"softcap": 1.5},
    "a softcap that does nothing": {"softcap": 1e4},
    "window": {"window": 6},
    "narrow window": {"window": 1},
    "sinks": {"sinks": True, "scale": 0.4},
    "everything": {"value_dim": 8, "window": 9, "sinks": True, "softcap": 3.0, "block": "full"},
    "wide values": {"value_dim": 24},
    "full": {"block": "full"},
    "full in a window": {"block": "full", "window": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options(variant, calls):
    options = {"heads": 2, "kv_heads": 1, **VARIANTS[variant]}
    assert_variant_within_budget(options, torch.float32, "triton", ["arbitrary"])
    if calls is None:
        return
    sizes = attention_tiles("forward", INTERPRETED, 16, 16, 4)[0].sizes
    walk = {name: options[name] for name in ("window", "block") if name in options}
    visits = visited_tiles(LAYOUTS["arbitrary"](), "forward", options["heads"] // options["kv_heads"], sizes, **walk)
    assert calls["masked of forward"] == options["kv_heads"] * visits.masked
    own = visited_tiles(LAYOUTS["arbitrary"](), "own", 2, {"BLOCK_M": 32, "BLOCK_N": 16}, **walk)
    assert own.masked > 0


@pytest.mark.parametrize("dtype", short_dtypes())
@pytest.mark.parametrize("options", ({}, VARIANTS["everything"]), ids=("plain", "everything"))
def test_16_bits(options, dtype):
    assert_variant_within_budget(options, dtype, "triton", ["documents"], heads=2, kv_heads=1)


@pytest.mark.parametrize("dtype", (torch.float32, *short_dtypes()))
@pytest.mark.parametrize("head_dim", (40, 80, 96, *(() if op_checks.INTERPRETED else (64, 128, 256))))
def test_head_dims(head_dim, dtype):
    assert_variant_within_budget({}, dtype, "triton", ["one_anchor"], head_dim=head_dim, heads=2, kv_heads=1)


# A pipeline of three stages is in its steady state only after several tiles of 64 or 128 keys.
LONG = (104, 24) if op_checks.INTERPRETED else (1024, 128)


@pytest.mark.parametrize("dtype", short_dtypes())
@pytest.mark.parametrize("options", ({}, {"window": 70}, {"softcap": 3.0, "sinks": True}), ids=str)
def test_long_rows_of_wide_heads(options, dtype):
    """Output, gradients and the last decoding step of prompts of many tiles."""
    length, head_dim = LONG
    layout = StridedLayout.strided(1, length, context=length // 2, stride=length // 8, horizon=4, samples=2)
    tensors, given = attend_inputs(layout, options, dtype, heads=2, kv_heads=1, head_dim=head_dim)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = results_and_gradients(attend(tensors, layout, impl="triton", **given), tensors)
    truth = results_and_gradients(attend(exact, layout, impl="reference", **given), exact)
    ways = yardsticks(tensors, layout, **given)
    for of, *results in zip(("output", *"qkv", "sinks"), actual, zip(*ways, strict=True), truth, strict=False):
        assert_as_exact_as_eager(*results, of)
    q, k, v, *sinks = (x.detach() for x in tensors)
    outputs = (q, truth[0], *(way[0] for way in ways))
    q, exact, *eager = (layout.step_rows(x.transpose(1, 2), 3).transpose(1, 2) for x in outputs)
    last = strided_attention_step(q, k, v, layout, 3, impl="triton", sinks=sinks[0] if sinks else None, **given)
    assert_as_exact_as_eager(last, eager, exact, "step")


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + index, tl.dot(tl.load(a + index), tl.load(b + index)))


@pytest.mark.usefixtures("interpreted")
def test_the_interpreter_is_right_about_float16_and_wrong_about_bfloat16():
    """It takes the bits of bfloat16 for integers. When it no longer does, short_dtypes should have bfloat16 too."""
    for dtype, right in ((torch.float16, True), (torch.bfloat16, False)):
        a, b = (randn(16, 16, seed=seed, dtype=dtype) for seed in (0, 1))
        out = torch.empty(16, 16)
        product_kernel[(1,)](a, b, out, SIZE=16)
        assert ((out - a.float() @ b.float()).abs().max() < 1e-4) == right


@pytest.mark.parametrize(
    "layout",
    (
        LAYOUTS["one_step"]().without_last_step(),
        LAYOUTS["one_anchor"]().without_last_step(),
        StridedLayout.from_anchors(torch.full((2, 1), -1), 0, horizon=3, samples=2),
        StridedLayout.strided(1, 60, context=1, stride=1, horizon=1, samples=1),
    ),
    ids=("no rollout tokens", "shorter rollouts", "no prompt", "an anchor at every token"),
)
def test_geometries_at_the_limits(layout, device):
    layout = layout.to(device)
    tensors, _ = attend_inputs(layout, {}, torch.float32, heads=2, kv_heads=1)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = results_and_gradients(attend(tensors, layout, impl="triton"), tensors)
    truth = results_and_gradients(attend(exact, layout, impl="reference"), exact)
    eager = zip(*yardsticks(tensors, layout), strict=True)
    for of, *results in zip("oqkv", actual, eager, truth, strict=True):
        assert_as_exact_as_eager(*results, of)


def test_rows_that_see_nothing():
    """No layout has them; still they give 0, a log-sum-exp that weighs nothing, and no gradient."""
    layout = LAYOUTS["one_anchor"]()
    blind = layout.key_ranges.prefix_end.clone()
    blind[:, 3:5] = 0
    ranges = KeyRanges(layout.key_ranges.prefix_start, blind, layout.key_ranges.own_start)
    q, k, v = attention_inputs(layout, heads=2, kv_heads=1)
    geometry = (ranges, layout.length, layout.samples, layout.horizon, 0.25, None, None, False)
    out, lse = _triton.forward(q, k, v, None, *geometry)
    assert (out[:, :, 3:5] == 0).all() and (lse[:, :, 3:5] < -1e29).all()
    assert out.isfinite().all() and (lse[:, :, 5:] > -100).all()
    grad_q, *others = _triton.backward(torch.ones_like(out), q, k, v, out, lse, *geometry)
    assert (grad_q[:, :, 3:5] == 0).all() and all(x.isfinite().all() for x in (grad_q, *others))


def test_inputs_and_upstream_gradients_of_any_strides():
    layout = LAYOUTS["one_anchor"]()
    tensors = attention_inputs(layout, heads=4, kv_heads=2)
    grad = randn(*tensors[0].shape, seed=9, dtype=torch.float32)
    ways = {
        "rows first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "columns apart": lambda x: x.mT.contiguous().mT,
        "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        "one head": lambda x: x[:, :1].expand_as(x),
        "one row": lambda x: x[:, :, :1].expand_as(x),
        "one number": lambda x: x[..., :1].expand_as(x),
    }
    for name, way in ways.items():
        results = []
        for make in (way, lambda x, way=way: way(x).contiguous()):
            views = [make(x).requires_grad_() for x in tensors]
            out = strided_attention(*views, layout, impl="triton")
            assert out.transpose(1, 2).is_contiguous(), name
            results.append([out, *torch.autograd.grad(out, views, make(grad))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def zeros(size: int) -> torch.Tensor:
    if not op_checks.INTERPRETED:
        return torch.zeros(size, dtype=torch.float16)
    return torch.from_numpy(np.zeros(size, np.float16))  # torch would write them


def test_offsets_beyond_32_bits():
    """Three batch rows 2^30 elements apart, in memory of which only what is used exists; on a GPU all 4 GB."""
    layout = StridedLayout.strided(3, 12, context=4, stride=4, horizon=2, samples=2)
    far = zeros(2**31 + 2**16)
    tensors = attention_inputs(layout, heads=2, kv_heads=1, dtype=torch.float16)
    views, first = [], 0
    for x in tensors:
        views.append(far[first:].as_strided(x.shape, (2**30, x.stride(1), x.stride(2), 1)))
        views[-1].copy_(x)
        first += x[0].numel()
    geometry = (layout.key_ranges, layout.length, layout.samples, layout.horizon)
    options = (0.25, None, None)
    near, distant = (_triton.forward(*x, None, *geometry, *options, False) for x in (tensors, views))
    assert all(torch.equal(a, b) for a, b in zip(near, distant, strict=True))
    grads = [_triton.backward(near[0], *x, *near, *geometry, *options, False) for x in (tensors, views)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    steps = [_triton.step(x[0][:, :, 1:9:2], *x[1:], None, *geometry, 1, *options) for x in (tensors, views)]
    assert all(map(torch.equal, *steps))


def test_results_repeat_bitwise(monkeypatch):
    """Programs run in any order; in the interpreter they are made to."""
    layout = StridedLayout.strided(1, 64, context=8, stride=8, horizon=4, samples=2)
    tensors, options = attend_inputs(layout, {"sinks": True}, torch.float32, heads=2, kv_heads=1)
    first = results_and_gradients(attend(tensors, layout, impl="triton", **options), tensors)
    order = reverse_programs(monkeypatch) if op_checks.INTERPRETED else None
    for _ in range(1 if order is not None else 20):
        again = results_and_gradients(attend(tensors, layout, impl="triton", **options), tensors)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert order is None or len(order) > 20


def reverse_programs(monkeypatch) -> list[int]:
    """The interpreter runs programs last to first from now on; the list says which it ran."""
    real, order, last = interpreter.GridExecutor.__call__, [], [0]

    def set_grid_index(_, x, y, z):
        order.append(x)
        executor.grid_idx = (last[0] - x, y, z)

    executor = interpreter.interpreter_builder

    def call(self, *args, **kwargs):
        last[0] = self.grid[0] - 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(type(executor), "set_grid_idx", set_grid_index)
    return order


STEPS = {
    "plain": {"heads": 3, "kv_heads": 1},
    "no groups": {"heads": 2, "kv_heads": 2},
    "everything": {
        "heads": 4,
        "kv_heads": 2,
        "value_dim": 24,
        "window": 40,
        "softcap": 3.0,
        "sinks": True,
        "scale": 0.4,
    },
    "sinks": {"heads": 2, "kv_heads": 1, "sinks": True},
}


@pytest.mark.parametrize("split_keys", (8, 10**6), ids=("split", "whole"))
@pytest.mark.parametrize("variant", STEPS)
def test_steps(variant, split_keys, monkeypatch, calls):
    """The first, a middle and the last step over caches whose unwritten rows are NaN, against the whole attention."""
    monkeypatch.setattr(_triton_step, "_SPLIT_KEYS", split_keys)
    launched, real = [], _triton_step.launch
    monkeypatch.setattr(
        _triton_step, "launch", lambda *args, **kw: launched.append(args[0].__name__) or real(*args, **kw)
    )
    actual, eager, truth, visits = [], [], [], 0
    names = ("odd", "one_anchor", "one_step", "empty_batch") if variant == "plain" else ()
    # The last layout's keys make four parts, which differ in what they hold.
    long = StridedLayout.strided(1, 66, context=53, stride=8, horizon=4, samples=2)
    for layout in (*(LAYOUTS[name]() for name in names), long):
        tensors, options = attend_inputs(layout, STEPS[variant], torch.float32)
        q, k, v, *sinks = (x.detach() for x in tensors)
        options["sinks"] = sinks[0] if sinks else None
        whole = strided_attention(q.double(), k.double(), v.double(), layout, impl="reference", **options)
        window = options.get("window")
        scale = options.get("scale", 0.25)
        cap = options.get("softcap")
        dense = eager_attention(q, k, v, layout.dense_mask(window), scale=scale, softcap=cap, sinks=options["sinks"])
        for step in sorted({0, layout.horizon // 2, layout.horizon - 1}):
            caches = [x.clone() for x in (k, v)]
            for x in caches:
                layout.rollouts(x.transpose(1, 2))[:, :, :, step + 1 :] = torch.nan
            rows, *expected = (layout.step_rows(x.transpose(1, 2), step).transpose(1, 2) for x in (q, dense, whole))
            result = strided_attention_step(rows, *caches, layout, step, impl="triton", **options)
            assert result.numel() == 0 or result.transpose(1, 2).is_contiguous()
            for to, x in zip((actual, eager, truth), (result, *expected), strict=True):
                to.append(x.flatten())
            sizes = attention_tiles("step", INTERPRETED, 16, 16, 4)[0].sizes
            walk = visited_tiles(layout, "step", q.shape[1] // k.shape[1], sizes, step=step, window=window)
            visits += k.shape[1] * (walk.masked + walk.unmasked)
    assert_within_budget(*(torch.cat(x) for x in (actual, eager, truth)))
    split = "strided_attention_combine_kernel" in launched
    if calls is not None:
        assert split == (split_keys == 8)
        assert split or calls["all of forward"] == visits


TARGETS = {
    arch: Target(arch, 100, kilobytes << 10)
    for arch, kilobytes in (
        ("sm_80", 163),
        ("sm_86", 99),
        ("sm_90", 227),
        ("sm_100", 227),
        ("sm_120", 99),
        ("gfx942", 64),
    )
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("repeat", "size"), ((6, 128), (4, 64), (4, 128)))
def test_little_is_computed_in_vain(repeat, size, target):
    """At the method's usual sizes; dK/dV sums over tiles of keys, of which the last that a row sees is seen in part."""
    layout = StridedLayout.strided(1, 1024, context=8, stride=8, horizon=8, samples=4)
    needed = repeat * int(layout.dense_mask().sum())
    scores = {
        kernel: visited_tiles(layout, kernel, repeat, attention_tiles(kernel, target, size, size, 2)[0].sizes).scores
        for kernel in ("forward", "dq", "dkdv", "own")
    }
    assert needed <= scores["forward"] <= 1.15 * needed
    assert needed <= scores["dq"] <= 1.15 * needed
    assert needed <= scores["dkdv"] + scores["own"] <= 1.17 * needed


TEN_GEOMETRIES = """
import collections
import torch
from bench._targets import GPUS, compiling
from ebft_kernels import StridedLayout
from ebft_kernels.attention import _triton
from ebft_kernels.testing import LAYOUTS, attention_inputs

layouts = [build() for name, build in LAYOUTS.items() if name != "empty_batch"]
layouts.append(StridedLayout.strided(1, 601, context=9, stride=61, horizon=16, samples=1))
assert len(layouts) == 10
with compiling(GPUS["sm_90"]) as launches:
    for index, layout in enumerate(layouts):
        q, k, v = attention_inputs(layout, heads=6, kv_heads=2, dtype=torch.bfloat16)
        ranges, sizes = layout.key_ranges, (layout.length, layout.samples, layout.horizon)
        options = (0.1 * index + 0.1, None, index + 1)
        out, lse = _triton.forward(q, k, v, None, ranges, *sizes, *options, False)
        _triton.backward(out, q, k, v, out, lse, ranges, *sizes, *options, False)
        rows = layout.step_rows(q.transpose(1, 2), layout.horizon - 1).transpose(1, 2)
        _triton.step(rows, k, v, None, ranges, *sizes, layout.horizon - 1, *options)
compiled = collections.defaultdict(set)
for launch in launches:
    compiled[launch.kernel].add(id(launch.compiled))
print(len(launches), {name: len(kernels) for name, kernels in compiled.items()})
"""


@pytest.mark.heavy
def test_one_compiled_kernel_serves_ten_geometries(tmp_path):
    """Compiled for a GPU that is not there, in a process without the interpreter; nothing is run."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", TEN_GEOMETRIES]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    count, kernels = result.stdout.split(maxsplit=1)
    assert int(count) == 61  # forward, preparation, dQ, dK/dV twice and step, and one step that is split
    once = ("fwd", "prepare", "dq", "combine")
    twice = ("dkdv", "step")  # over prompt keys and over the rollouts' keys; whole and split
    assert ast.literal_eval(kernels) == {
        f"strided_attention_{name}_kernel": number for names, number in ((once, 1), (twice, 2)) for name in names
    }


def test_sinks_of_any_strides(device):
    """Expanded and sliced: the kernels read one number per head, one after the other."""
    layout = StridedLayout.strided(1, 5, context=2, stride=2, horizon=2, samples=1)
    q, k, v = attention_inputs(layout)
    for sinks in (torch.tensor([1.5], device=device).expand(4), torch.arange(8.0, device=device)[::2]):
        out, plain = (strided_attention(q, k, v, layout, sinks=x, impl="triton") for x in (sinks, sinks.clone()))
        assert torch.equal(out, plain)
        rows = q[:, :, layout.length :: 2]
        step, plain = (
            strided_attention_step(rows, k, v, layout, 0, sinks=x, impl="triton") for x in (sinks, sinks.clone())
        )
        assert torch.equal(step, plain)
