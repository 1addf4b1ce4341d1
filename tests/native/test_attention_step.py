"""The compiled decoding step: every instruction set, dtype, head size and number of heads. What it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, select_impl, strided_attention, strided_attention_step
from ebft_kernels.attention import _native
from ebft_kernels.testing import LAYOUTS, assert_within_budget, attention_inputs, eager_attention

from ..attention import test_strided_attention_step as step_tests

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DOCUMENTS = torch.stack([torch.zeros(300), torch.tensor([0] * 150 + [1] * 83 + [2] * 67)]).long()


def attend(
    layout: StridedLayout, step: int, q: Tensor, k: Tensor, v: Tensor, impl: str = "native", **options
) -> Tensor:
    """The rows of one step, over caches whose later rows are NaN."""
    rows, caches = step_tests.rows_of(layout, q, step), step_tests.caches_at(layout, step, k, v)
    return strided_attention_step(rows, *caches, layout, step, impl=impl, **options)


def long_layout() -> StridedLayout:
    """Prefixes of up to 300 tokens, several blocks of keys, that begin and end anywhere; 45 anchors in two rows."""
    return StridedLayout.strided(2, 300, context=30, stride=6, horizon=3, samples=4, document_ids=DOCUMENTS)


@pytest.mark.usefixtures("compiled")
def test_it_is_the_choice_on_the_cpu():
    assert all(select_impl("strided_attention_step", "cpu", dtype) == "native" for dtype in DTYPES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("variant", step_tests.VARIANTS)
def test_all_steps_of_every_layout(variant, dtype):
    step_tests.assert_steps_within_budget(variant, dtype, "native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", step_tests.VARIANTS)
def test_float64_steps_are_the_rows_of_the_whole(variant):
    step_tests.test_float64_steps_are_the_rows_of_the_whole(variant, "native")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    ("key_size", "value_size", "heads", "kv_heads"),
    [(16, 16, 2, 1), (40, 40, 6, 2), (64, 64, 3, 3), (80, 80, 2, 2), (96, 7, 5, 1), (128, 128, 7, 1), (256, 64, 2, 1)]
    + [(1, 1, 4, 2), (3, 130, 2, 1)],
)
def test_head_sizes_and_long_prefixes(key_size, value_size, heads, kv_heads, dtype):
    layout = long_layout()
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": key_size, "value_dim": value_size}
    q, k, v = attention_inputs(layout, dtype=dtype, **sizes)
    for window in (None, 70):
        truth = strided_attention(q.double(), k.double(), v.double(), layout, impl="reference", window=window)
        eager = eager_attention(q, k, v, layout.dense_mask(window), scale=key_size**-0.5)
        result = attend(layout, 2, q, k, v, window=window)
        assert result.dtype == dtype
        assert_within_budget(result, *(step_tests.rows_of(layout, x, 2) for x in (eager, truth)))


@pytest.mark.usefixtures("isa")
def test_own_rollouts_longer_than_a_block_of_keys():
    layout = StridedLayout.strided(1, 160, context=3, stride=9, horizon=150, samples=2)
    q, k, v = attention_inputs(layout)
    for step, window in ((149, None), (149, 100), (63, None), (64, None)):
        truth = strided_attention(q.double(), k.double(), v.double(), layout, impl="reference", window=window)
        eager = eager_attention(q, k, v, layout.dense_mask(window), scale=0.25)
        result = attend(layout, step, q, k, v, window=window)
        assert_within_budget(result, *(step_tests.rows_of(layout, x, step) for x in (eager, truth)))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("softcap", (None, 20.0))
@pytest.mark.parametrize("scale", (1e-6, 1e-2, 3.0, 1e3, 1e30))
def test_scores_of_any_size(scale, softcap, dtype):
    """Weights from equal to one-hot; a score of 1e30 overflows no exponential."""
    layout = long_layout()
    q, k, v = attention_inputs(layout, heads=2, kv_heads=1, head_dim=8, dtype=dtype)
    truth = attend(layout, 1, q.double(), k.double(), v.double(), impl="reference", scale=scale, softcap=softcap)
    result = attend(layout, 1, q, k, v, scale=scale, softcap=softcap)
    if scale < 10 or softcap:
        rounding = torch.finfo(dtype).eps * (1 + (min(scale * 30, softcap or math.inf)))
        assert (result - truth).abs().max() <= 40 * rounding * v.abs().max()
    else:  # the highest score takes all, unless the second is as high but for rounding
        assert ((result - truth).abs().amax(-1) <= 1e-3).double().mean() > 0.95
    assert result.isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_row(dtype):
    layout = long_layout()
    q, k, v = attention_inputs(layout, dtype=dtype)
    clean = attend(layout, 1, q, k, v)
    rows = step_tests.rows_of(layout, q, 1)
    rows[0, 1, 5], rows[1, 2, 9, 3] = math.nan, math.inf
    result = attend(layout, 1, q, k, v)
    broken = torch.zeros(result.shape[:3], dtype=torch.bool)
    broken[0, 1, 5] = broken[1, 2, 9] = True
    assert result[broken].isnan().all() and torch.equal(result[~broken], clean[~broken])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("sink", (-math.inf, -1e4, 0.0, 1e4))
def test_sinks_of_any_size(sink):
    layout = long_layout()
    q, k, v = attention_inputs(layout)
    sinks = torch.tensor([sink, 0.5, sink, -0.5])
    result, truth = (
        attend(layout, 1, *(x.to(dtype) for x in (q, k, v)), sinks=sinks, impl=impl)
        for impl, dtype in (("native", torch.float32), ("reference", torch.float64))
    )
    assert (result - truth).abs().max() <= 100 * torch.finfo(torch.float32).eps
    assert (result[:, ::2] == 0).all() == (sink == 1e4)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", (None, 70))
def test_the_number_of_threads_changes_nothing(window, dtype):
    layout = long_layout()
    q, k, v = attention_inputs(layout, heads=8, dtype=dtype)

    def run(threads):
        torch.set_num_threads(threads)
        return attend(layout, 2, q, k, v, window=window, softcap=4.0)

    alone = run(1)
    assert all(torch.equal(run(threads), alone) for threads in (2, 3, 5))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    """Rows are worked on together, by blocks of keys that some of them see; here those of one anchor are alone."""
    layout = long_layout()
    tensors = attention_inputs(layout, dtype=dtype)
    row, anchor = 1, 30
    single = StridedLayout.from_anchors(
        layout.anchors[row:, anchor : anchor + 1], 300, horizon=3, samples=4, document_ids=DOCUMENTS[row:]
    )
    packed = torch.arange(layout.packed_length).expand(2, -1)
    taken = single.pack(packed[row:, :300], layout.rollouts(packed)[row:, anchor : anchor + 1])[0]
    alone = attend(single, 1, *(x[row:, :, taken] for x in tensors))
    together = attend(layout, 1, *tensors).unflatten(2, (layout.num_anchors, 4))
    assert torch.equal(alone, together[row:, :, anchor])


@pytest.mark.usefixtures("isa")
def test_rows_further_apart_than_32_bits_can_count(tmp_path):
    """In a file with holes, which takes no space."""
    layout = StridedLayout.strided(1, 12, context=4, stride=4, horizon=2, samples=2)
    q, k, v = attention_inputs(layout, heads=2, kv_heads=1, dtype=torch.bfloat16)
    size = (1 << 27) * layout.packed_length
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    far = [memory.as_strided(x.shape, (0, 0, 1 << 27, 1), offset).copy_(x) for offset, x in ((0, k), (32, v))]
    rows = step_tests.rows_of(layout, q, 1)
    results = (strided_attention_step(rows, *caches, layout, 1, impl="native") for caches in ((k, v), far))
    assert torch.equal(*results)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("name", "value"), [("prefix_start", -1), ("prefix_end", 42), ("own_start", 185), ("own_start", 187)]
)
def test_ranges_that_no_rollout_can_see_are_refused(name, value):
    layout = LAYOUTS["odd"]()  # P = 41; the last rollout begins at row 186
    q, k, v = attention_inputs(layout)
    broken = getattr(layout.key_ranges, name).clone()
    layout.step_rows(broken, 0)[-1, -1] = value
    ranges = layout.key_ranges._replace(**{name: broken})
    arguments = (layout.length, layout.samples, layout.horizon, 0, 0.25, None, None)
    with pytest.raises(IndexError, match="key ranges: expected keys that a rollout can see"):
        _native.step(step_tests.rows_of(layout, q, 0), k, v, None, ranges, *arguments)
