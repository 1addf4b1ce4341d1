"""The compiled attention, forward and backward: every instruction set, dtype, kind of mask and head size; refusals."""

from __future__ import annotations

import math

import pytest
import torch

from ebft_kernels import StridedLayout, select_impl
from ebft_kernels.attention import _native
from ebft_kernels.testing import LAYOUTS, attention_inputs

from ..attention import test_strided_attention as attention_tests
from ..attention.checks import assert_as_exact_as_eager, assert_variant_within_budget, attend, attend_inputs, yardsticks
from ..op_checks import results_and_gradients

DTYPES = attention_tests.DTYPES


@pytest.mark.usefixtures("compiled")
def test_it_is_the_choice_on_the_cpu():
    assert all(select_impl("strided_attention", "cpu", dtype) == "native" for dtype in DTYPES)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", attention_tests.VARIANTS)
def test_errors_of_output_and_gradients(variant, dtype):
    names = LAYOUTS if dtype == torch.float32 else attention_tests.SOME
    assert_variant_within_budget(attention_tests.VARIANTS[variant], dtype, "native", names)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("head_dim", (1, 3, 16, 40, 64, 80, 96, 128, 256))
def test_errors_at_head_dims(head_dim, dtype):
    assert_variant_within_budget({}, dtype, "native", ["odd", "one_sample"], head_dim=head_dim)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", attention_tests.VARIANTS)
def test_gradcheck(variant):
    assert attention_tests.gradcheck(variant, "native")


LONG = {
    "prefixes of several blocks": StridedLayout.strided(2, 300, context=30, stride=6, horizon=3, samples=4),
    "rollouts of several blocks": StridedLayout.strided(1, 160, context=3, stride=9, horizon=150, samples=2),
    "more heads to a key than rows in a tile": StridedLayout.strided(1, 40, context=8, stride=8, horizon=8, samples=2),
}


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", ("plain", "window", "softcap", "full"))
@pytest.mark.parametrize("name", LONG)
def test_many_tiles(name, variant):
    layout = LONG[name]
    heads = {"heads": 71, "kv_heads": 1} if "heads" in name else {"heads": 4, "kv_heads": 2}
    tensors, options = attend_inputs(layout, attention_tests.VARIANTS[variant] | heads, torch.float32)
    options |= {"window": 100} if "window" in options else {}
    exact = [x.detach().double().requires_grad_() for x in tensors]
    actual = results_and_gradients(attend(tensors, layout, impl="native", **options), tensors)
    truth = results_and_gradients(attend(exact, layout, impl="reference", **options), exact)
    eager = zip(*yardsticks(tensors, layout, **options), strict=True)
    for of, *results in zip("oqkv", actual, eager, truth, strict=False):
        assert_as_exact_as_eager(*results, of)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("variant", ("plain", "no groups", "window"))
def test_the_number_of_threads_changes_nothing(variant):
    layout = LONG["prefixes of several blocks"]
    tensors, options = attend_inputs(layout, attention_tests.VARIANTS[variant], torch.float32)
    before = torch.get_num_threads()

    def run(threads):
        torch.set_num_threads(threads)
        return results_and_gradients(attend(tensors, layout, impl="native", **options), tensors)

    try:
        alone = run(1)
        for threads in (2, 3, 5):
            assert all(torch.equal(a, b) for a, b in zip(run(threads), alone, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("isa")
def test_views_of_any_stride_and_expanded_gradients():
    layout = LAYOUTS["odd"]()
    dense, _ = attend_inputs(layout, {}, torch.float32)
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in dense]
    views[1] = dense[1].detach().repeat_interleave(2, -1)[..., ::2].requires_grad_()
    results = []
    for tensors in (dense, views):
        out = attend(tensors, layout, impl="native")
        results.append([out, *torch.autograd.grad(out, tensors, torch.ones(()).expand(out.shape))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("isa")
def test_what_is_not_finite_stays_in_its_row():
    layout = LONG["prefixes of several blocks"]
    (q, k, v), _ = attend_inputs(layout, {}, torch.float32)
    clean = attend([q, k, v], layout, impl="native")
    broken = q.detach().clone()
    broken[0, 1, 205], broken[1, 2, 309, 3] = math.nan, math.inf
    result = attend([broken, k, v], layout, impl="native")
    rows = torch.zeros(result.shape[:3], dtype=torch.bool)
    rows[0, 1, 205] = rows[1, 2, 309] = True
    assert result[rows].isnan().all() and torch.equal(result[~rows], clean[~rows])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("name", "row", "value"),
    [("prefix_start", 3, -1), ("prefix_end", 3, 42), ("prefix_end", 3, 0), ("own_start", 3, 5), ("own_start", -1, 185)],
)
def test_ranges_that_no_row_can_see_are_refused(name, row, value):
    layout = LAYOUTS["odd"]()  # P = 41; the last rollout begins at row 186
    q, k, v = attention_inputs(layout)
    broken = getattr(layout.key_ranges, name).clone()
    broken[-1, row] = value
    ranges = layout.key_ranges._replace(**{name: broken})
    arguments = (layout.length, layout.samples, layout.horizon, 0.25, None, None, False)
    with pytest.raises(IndexError, match="key ranges: expected keys that a rollout can see"):
        _native.forward(q, k, v, None, ranges, *arguments)


SIZES = (1, 2, 1, 8, 8, 4, 2, 2)  # B, H, Hkv, D, Dv, P, A*n, G
TENSOR = (64,) * 4
CALL = {"isa": 0, "threads": 1, "dtype": 1, "sizes": SIZES, "step": 0, "q": TENSOR, "k": TENSOR, "v": TENSOR}
INT32 = (64, "torch.int32", (1, 8), (8, 1))  # [B, S]
CALL |= {"ranges": (INT32,) * 3, "full": False, "scale": 1.0, "softcap": 0.0, "sinks": 0, "out": TENSOR, "lse": 64}
NULL = "address: expected that of a tensor, got 0"


def sizes_with(index: int, value: int) -> dict:
    return {"sizes": (*SIZES[:index], value, *SIZES[index + 1 :])}


BAD = [
    ({"isa": 3}, "isa: expected a number from 0 to"),
    ({"threads": 0}, "threads: expected at least 1"),
    ({"dtype": 4}, "dtype: expected a number from 0 to 3, got 4"),
    ({"sizes": SIZES[:-1]}, "sizes: expected 8"),
    *((sizes_with(index, -1), "sizes: expected no negative one") for index in range(8)),
    (sizes_with(1, 0), "sizes: expected key heads that divide the query heads"),
    (sizes_with(2, 0), "sizes: expected key heads that divide the query heads"),
    (sizes_with(2, 4), "sizes: expected key heads that divide the query heads"),
    (sizes_with(3, 0), "sizes: expected heads of at least one number"),
    (sizes_with(4, 0), "sizes: expected heads of at least one number"),
    ({"step": 2}, "step: expected less than the horizon"),
    ({"step": -2}, "step: expected less than the horizon"),
    ({"softcap": -1.0}, "softcap: expected none"),
    ({"softcap": math.nan}, "softcap: expected none"),
    ({"ranges": (INT32, INT32)}, "ranges: expected 3"),
    *(({"ranges": (INT32,) * i + ((0, *INT32[1:]),) + (INT32,) * (2 - i)}, NULL) for i in range(3)),
    *(({name: (0, 64, 64, 64)}, NULL) for name in ("q", "k", "v", "out")),
    ({"lse": 0, "step": -1}, NULL),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_calls_are_refused(change, message, compiled):
    with pytest.raises(ValueError, match=message):
        compiled.strided_attention(*{**CALL, **change}.values())


BACKWARD = {name: CALL[name] for name in CALL if name not in ("step", "sinks", "out", "lse")}
BACKWARD |= {"out": TENSOR, "lse": 64, "grad": TENSOR, "grad_q": TENSOR, "grad_k": TENSOR, "grad_v": TENSOR}


@pytest.mark.parametrize(
    ("change", "message"),
    [(change, message) for change, message in BAD if "step" not in change]
    + [({"lse": 0}, NULL), *(({name: (0, 64, 64, 64)}, NULL) for name in ("grad", "grad_q", "grad_k", "grad_v"))],
)
def test_bad_backward_calls_are_refused(change, message, compiled):
    with pytest.raises(ValueError, match=message):
        compiled.strided_attention_backward(*{**BACKWARD, **change}.values())
