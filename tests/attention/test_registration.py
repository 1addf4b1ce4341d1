"""torch.library, torch.compile, strange upstream gradients, and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, available_impls, strided_attention, strided_attention_step
from ebft_kernels.attention import api
from ebft_kernels.testing import LAYOUTS, attention_inputs, randn

from .. import op_checks
from ..op_checks import assert_compiles, results_and_gradients

pytestmark = pytest.mark.usefixtures("device")
EPS = torch.finfo(torch.float64).eps


def leaves(layout: StridedLayout, *, dtype: torch.dtype = torch.float64, **sizes: int) -> list[Tensor]:
    """q, k, v and sinks."""
    tensors = [*attention_inputs(layout, dtype=dtype, **sizes), randn(4, seed=3, dtype=dtype)]
    return [x.requires_grad_() for x in tensors]


def geometry(layout: StridedLayout) -> tuple[object, ...]:
    return *layout.key_ranges, layout.length, layout.samples, layout.horizon


@pytest.mark.parametrize(
    ("softcap", "window", "full", "with_sinks"), [(None, None, True, True), (2.0, 5, False, False)]
)
def test_opcheck(softcap, window, full, with_sinks):
    layout = LAYOUTS["odd"]()
    q, k, v, sinks = leaves(layout, dtype=torch.bfloat16)
    sinks = sinks if with_sinks else None
    options = (0.25, softcap, window, full, "torch")
    torch.library.opcheck(api._forward_op, (q, k, v, sinks, *geometry(layout), *options))
    with torch.no_grad():
        out, lse = api._forward_op(q, k, v, sinks, *geometry(layout), *options)
        detached = [x.detach() for x in (q, k, v)]
        torch.library.opcheck(api._backward_op, (out, *detached, sinks, out, lse, *geometry(layout), *options))
        rows = layout.step_rows(detached[0].transpose(1, 2), 1).transpose(1, 2)
        torch.library.opcheck(api._step_op, (rows, *detached[1:], None, *geometry(layout), 1, *options[:3], "torch"))


def test_compiles_without_breaks_and_without_recompiling_for_sizes():
    def attend(q, k, v, sinks, layout):
        return strided_attention(q.exp(), k, v, layout, sinks=sinks, softcap=3.0, window=7).sin()

    calls = []
    for batch, length, horizon, samples in ((2, 30, 3, 2), (3, 35, 4, 3), (4, 43, 5, 4), (5, 52, 7, 5)):
        layout = StridedLayout.strided(batch, length, context=4, stride=3, horizon=horizon, samples=samples)
        calls.append((*leaves(layout), layout))
    assert_compiles(attend, calls, graphs=2)  # one for the first sizes, one for all others


def test_step_compiles_without_breaks_and_without_recompiling_for_steps():
    def attend(q, k, v, layout, step):
        return strided_attention_step(q.exp(), k, v, layout, step).sin()

    layout = LAYOUTS["strided"]()
    q, k, v = attention_inputs(layout)
    rows = [layout.step_rows(q.transpose(1, 2), step).transpose(1, 2) for step in range(layout.horizon)]
    assert_compiles(attend, [(x, k, v, layout, step) for step, x in enumerate(rows)], graphs=2)


@pytest.mark.parametrize("needed", list(itertools.product((False, True), repeat=4))[1:])
def test_gradients_of_every_subset_of_inputs(needed):
    layout = LAYOUTS["odd"]()
    results = []
    for impl in ("torch", "reference"):
        q, k, v, sinks = (x.detach().requires_grad_(y) for x, y in zip(leaves(layout), needed, strict=True))
        out = strided_attention(q, k, v, layout, sinks=sinks, impl=impl)
        results.append(results_and_gradients(out, [x for x in (q, k, v, sinks) if x.requires_grad]))
    assert len(results[0]) == 1 + sum(needed)
    assert all((a - b).abs().max() <= 100 * EPS * b.abs().max() for a, b in zip(*results, strict=True))


def test_upstream_gradients_of_any_strides_and_none():
    layout = LAYOUTS["odd"]()
    tensors = leaves(layout)
    out = strided_attention(*tensors[:3], layout, sinks=tensors[3])
    upstream = {
        "one number": torch.ones((), dtype=out.dtype).expand_as(out),
        "one row": randn(1, 1, 1, out.shape[3], seed=4).expand_as(out),
        "one column": randn(*out.shape[:3], 1, seed=5).expand_as(out),
        "transposed": randn(*out.mT.shape, seed=6).mT,
        "every other": randn(*out.shape[:3], 2 * out.shape[3], seed=7)[..., ::2],
        "heads apart": randn(out.shape[1], *out.shape[:1], *out.shape[2:], seed=8).transpose(0, 1),
    }
    for name, grad in upstream.items():
        assert not grad.is_contiguous(), name
        actual, expected = (torch.autograd.grad(out, tensors, x, retain_graph=True) for x in (grad, grad.contiguous()))
        for a, b in zip(actual, expected, strict=True):
            assert (a - b).abs().max() <= 100 * EPS * b.abs().max(), name


class Severed(torch.autograd.Function):
    """The identity, through which no gradient comes back."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, _grad):
        return None


def test_no_upstream_gradient_gives_none():
    layout = LAYOUTS["odd"]()
    tensors = leaves(layout)
    out = strided_attention(*tensors[:3], layout, sinks=tensors[3])
    Severed.apply(out).sum().backward()
    assert all(x.grad is None for x in tensors)
    _, lse = api._forward_op(*tensors, *geometry(layout), 0.25, None, None, False, "torch")
    assert not lse.requires_grad


@pytest.mark.parametrize("needed", ((True, True, True, True), (False, True, False, False), (False, False, False, True)))
@pytest.mark.parametrize(
    "impl", [x for x in available_impls("strided_attention", op_checks.DEVICE) if x != "reference"]
)
def test_what_is_computed_already_has_the_gradient_of_what_is_computed(impl, needed):
    """Output and log-sum-exp are what was given; the gradient is the op's, to the last bit."""
    layout, options = LAYOUTS["odd"](), {"softcap": 2.0, "window": 9, "impl": impl}
    tensors = leaves(layout, dtype=torch.float32)
    results = []
    for computed in (False, True):
        q, k, v, sinks = (x.detach().requires_grad_(y) for x, y in zip(tensors, needed, strict=True))
        out, lse = strided_attention(q, k, v, layout, sinks=sinks, return_lse=True, **options)
        if computed:
            given = (out.detach().clone(), lse.clone())
            out, lse = strided_attention(q, k, v, layout, sinks=sinks, return_lse=True, computed=given, **options)
            assert out.data_ptr() == given[0].data_ptr() and lse.data_ptr() == given[1].data_ptr()
            assert out.requires_grad and not lse.requires_grad and not given[0].requires_grad
        results.append(results_and_gradients(out, [x for x in (q, k, v, sinks) if x.requires_grad]))
    assert len(results[0]) == 1 + sum(needed)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("impl", ("reference", "torch"))
def test_inputs_of_any_strides(impl):
    """Also heads and rows that share memory."""
    layout = LAYOUTS["odd"]()
    tensors = [x.detach() for x in leaves(layout)]
    ways = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        lambda x: x[:, :1].expand_as(x),
        lambda x: x[:, :, :1].expand_as(x),
        lambda x: x[..., :1].expand_as(x),
    ]
    for way in ways:
        results = []
        for make in (way, lambda x, way=way: way(x).contiguous()):
            views = [make(x).requires_grad_() for x in tensors[:3]]
            out = strided_attention(*views, layout, sinks=tensors[3], impl=impl)
            assert impl == "reference" or out.transpose(1, 2).is_contiguous()
            results.append(results_and_gradients(out, views))
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 100 * EPS * b.abs().max()


def test_sinks_of_another_precision():
    """As float32 parameters under autocast are: their gradient comes in their own precision."""
    layout = LAYOUTS["odd"]()
    q, k, v, sinks = leaves(layout, dtype=torch.bfloat16)
    single = sinks.detach().float().requires_grad_()
    results = [results_and_gradients(strided_attention(q, k, v, layout, sinks=x), [q, x]) for x in (sinks, single)]
    assert results[1][2].dtype == torch.float32
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*results, strict=True))


LAYOUT = StridedLayout.strided(2, 12, context=4, stride=4, horizon=2, samples=3)  # S = 12 + 2*3*2 = 24
Q, K, V = attention_inputs(LAYOUT, value_dim=8)
OUT, LSE = Q[..., :8], Q[..., 0]
BAD = [
    ({"layout": 3}, TypeError, "layout: expected a StridedLayout, got int"),
    ({"q": None}, TypeError, r"q: expected a tensor \[B, H, rows, D\], got NoneType"),
    ({"q": Q[0]}, ValueError, r"q: expected shape \[B=2, H, rows=24, D\], got \[4, 24, 16\]"),
    ({"q": Q[:, :, :-1]}, ValueError, r"q: expected shape \[B=2, H, rows=24, D\], got \[2, 4, 23, 16\]"),
    ({"q": Q.long()}, TypeError, "q: expected dtype float64 or float32 or bfloat16 or float16, got int64"),
    ({"q": Q.to("meta")}, ValueError, "q: expected a tensor on cpu, got one on meta"),
    ({"k": K.double()}, TypeError, "k: expected dtype float32, got float64"),
    ({"k": K[..., :8]}, ValueError, r"k: expected shape \[B=2, Hkv, S=24, D=16\], got \[2, 2, 24, 8\]"),
    ({"k": K[:, :, :-1]}, ValueError, r"k: expected shape \[B=2, Hkv, S=24, D=16\], got \[2, 2, 23, 16\]"),
    ({"v": V[:, :1]}, ValueError, r"v: expected shape \[B=2, Hkv=2, S=24, Dv\], got \[2, 1, 24, 8\]"),
    ({"v": V.bfloat16()}, TypeError, "v: expected dtype float32, got bfloat16"),
    ({"v": V[..., :0]}, ValueError, "v: expected at least one head of size 1, got shape"),
    ({"q": Q[:, :3]}, ValueError, "k: expected a number of heads that divides q's 3, got 2"),
    ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \[H=4\], got \[3\]"),
    ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "sinks: expected dtype float64 or"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a finite number above 0, got 0.0"),
    ({"softcap": "2"}, TypeError, "softcap: expected a number, got str"),
    ({"softcap": 1e39}, ValueError, "softcap: expected what float32 can hold"),
    ({"scale": 1e-40}, ValueError, "scale: expected what float32 can hold"),
    ({"scale": 1e30, "softcap": 1e-30}, ValueError, "scale / softcap: expected what float32 can hold"),
    ({"scale": -1.0}, ValueError, "scale: expected a finite number above 0, got -1.0"),
    ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
    ({"window": 2.0}, TypeError, "window: expected an int, got float"),
    ({"computed": Q}, TypeError, "computed: expected a tuple of an output and a log-sum-exp, got Tensor"),
    ({"computed": (Q, LSE)}, ValueError, r"computed\[0\]: expected shape \[B=2, H=4, S=24, Dv=8\], got"),
    ({"computed": (OUT, LSE[:1])}, ValueError, r"computed\[1\]: expected shape \[B=2, H=4, S=24\], got"),
    ({"computed": (OUT.bfloat16(), LSE)}, TypeError, r"computed\[0\]: expected dtype float32, got bfloat16"),
    ({"computed": (OUT, LSE.double())}, TypeError, r"computed\[1\]: expected dtype float32, got float64"),
    ({"computed": (OUT, LSE), "impl": "reference"}, ValueError, "computed: expected None with impl='reference'"),
    ({"block": "both"}, ValueError, "block: expected one of 'causal', 'full'; got 'both'"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
]
BAD_STEP = [
    ({"step": 2}, ValueError, "step: expected less than horizon = 2, got 2"),
    ({"step": -1}, ValueError, "step: expected at least 0, got -1"),
    ({"step": True}, TypeError, "step: expected an int, got bool"),
    ({"q": Q[:, :, :7]}, ValueError, r"q: expected shape \[B=2, H, rows=6, D\], got \[2, 4, 7, 16\]"),
    ({"k_cache": K[:, :, :22]}, ValueError, r"k_cache: expected shape \[B=2, Hkv, S=24, D=16\]"),
    ({"v_cache": V.double()}, TypeError, "v_cache: expected dtype float32, got float64"),
    ({"layout": None}, TypeError, "layout: expected a StridedLayout, got NoneType"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    arguments = {"q": Q, "k": K, "v": V, "layout": LAYOUT, **change}
    with pytest.raises(error, match=message):
        strided_attention(*[arguments.pop(name) for name in ("q", "k", "v", "layout")], **arguments)


@pytest.mark.parametrize(("change", "error", "message"), BAD_STEP)
def test_bad_input_of_a_step_is_named(change, error, message):
    arguments = {"q": Q[:, :, :6], "k_cache": K, "v_cache": V, "layout": LAYOUT, "step": 0, **change}
    names = ("q", "k_cache", "v_cache", "layout", "step")
    with pytest.raises(error, match=message):
        strided_attention_step(*[arguments.pop(name) for name in names], **arguments)
