"""The layout's tensors as the compiled module writes them, against those of plain PyTorch; what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ebft_kernels import StridedLayout, _layout_native, layout, strided_attention
from ebft_kernels.testing import LAYOUTS, attention_inputs

CHANGES = ("", "without_last_step", "prompt_only")


@pytest.fixture
def plain(monkeypatch, compiled):  # noqa: ARG001
    """Layouts are written by plain PyTorch."""
    monkeypatch.setattr(layout, "_kernels", lambda _: None)


def all_layouts() -> list[StridedLayout]:
    made = [build() for build in LAYOUTS.values()]
    large = StridedLayout.strided(3, 300, context=5, stride=3, horizon=9, samples=3)  # worked on by several threads
    return [getattr(x, change)() if change else x for x in (*made, large) for change in CHANGES]


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("threads", (1, 3))
def test_positions_and_key_ranges(threads):
    torch.set_num_threads(threads)
    for expected in all_layouts():
        arguments = (expected.anchors, expected.prompt_start, expected.horizon, expected.samples)
        positions, ranges = _layout_native.geometry(*arguments)
        assert positions.dtype == torch.int64 and torch.equal(positions, expected.position_ids)
        for actual, of_torch in zip(ranges, expected.key_ranges, strict=True):
            assert actual.dtype == torch.int32 and torch.equal(actual, of_torch)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("full", (False, True))
@pytest.mark.parametrize("window", (None, 1, 4))
def test_dense_mask(window, full, threads):
    torch.set_num_threads(threads)
    for made in all_layouts():
        expected = made.dense_mask(window, block="full" if full else "causal")
        ranges = made.visible_keys(window)
        actual = _layout_native.dense_mask(*ranges, length=made.length, horizon=made.horizon, full=full)
        assert actual.dtype == torch.bool and torch.equal(actual, expected)
        assert (actual.view(torch.uint8) <= 1).all()  # other bytes are no bool, though they may pass for True


@pytest.mark.usefixtures("compiled")
def test_layouts_on_the_cpu_are_written_by_it(monkeypatch):
    written = []
    for name, function in [(name, getattr(_layout_native, name)) for name in ("geometry", "dense_mask")]:
        monkeypatch.setattr(
            _layout_native,
            name,
            lambda *x, name=name, function=function, **y: written.append(name) or function(*x, **y),
        )
    LAYOUTS["odd"]().dense_mask()
    assert written == ["geometry", "dense_mask"]


def test_the_kernels_of_each_device(monkeypatch):
    from ebft_kernels import _layout_triton

    there = {"cpu": True, "cuda": True}
    for module in (layout._triton, layout._native):
        monkeypatch.setattr(module, "why_not", lambda device: "" if there[device] else "not here")
    on_cpu = torch.zeros(1)
    with FakeTensorMode():
        traced = torch.zeros(1), torch.zeros(1, device="cuda")
    assert layout._kernels(on_cpu) is _layout_native
    assert all(layout._kernels(x) is None for x in traced)
    monkeypatch.setattr(layout, "type", lambda _: Tensor, raising=False)  # a GPU's tensor, as far as one can be had
    assert layout._kernels(traced[1]) is _layout_triton
    monkeypatch.setattr(layout._triton, "why_not", lambda _: "not here")
    assert layout._kernels(traced[1]) is _layout_native
    there |= {"cpu": False, "cuda": False}
    assert layout._kernels(on_cpu) is None and layout._kernels(traced[1]) is None


@pytest.mark.usefixtures("compiled")
def test_anchors_beyond_the_prompt_are_refused():
    prompt_start = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(IndexError, match="anchors: one is beyond the prompt"):
        _layout_native.geometry(torch.tensor([[2, 5]], dtype=torch.int32), prompt_start, 2, 2)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("index", "value"), [(0, -1), (1, -1), (1, 20), (2, 3), (2, 9)])
def test_key_ranges_that_would_write_elsewhere_are_refused(index, value):
    made = StridedLayout.strided(1, 6, context=4, stride=1, horizon=2, samples=1)
    ranges = [x.clone() for x in made.key_ranges]
    ranges[index][0, 7] = value  # the last row of 8, which sees [0, 4) and [6, 8)
    with pytest.raises(IndexError, match="key ranges: expected a prefix before the row's own tokens"):
        _layout_native.dense_mask(*ranges, length=6, horizon=2, full=False)


def int32(*sizes: int, address: int = 64) -> tuple:
    """A contiguous tensor as the modules are told of it."""
    return address, "torch.int32", sizes, tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


# B, P, A, n, G: S = 8
GEOMETRY = {"isa": 0, "threads": 1, "sizes": (1, 4, 1, 2, 2), "anchors": int32(1, 1), "prompt_start": int32(1, 4)}
GEOMETRY |= {"positions": 64, "prefix_start": int32(1, 8), "prefix_end": int32(1, 8), "own_start": int32(1, 8)}
MASK = {name: GEOMETRY[name] for name in ("isa", "threads", "sizes", "prefix_start", "prefix_end", "own_start")}
MASK |= {"full": False, "mask": 64}
REFUSED = [
    ({"threads": 0}, "threads: expected at least 1"),
    ({"sizes": (1, 4, 1, 2)}, "sizes: expected 5"),
    ({"sizes": (1, 4, -1, 2, 2)}, "sizes: expected no negative one"),
    ({"sizes": (1, 4, 1 << 16, 1 << 15, 2)}, "sizes: expected fewer than 2\\^31 tokens in a packed row"),
]
NULL = "address: expected that of a tensor, got 0"


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        *(("layout_geometry", *x) for x in REFUSED),
        *(("layout_mask", *x) for x in REFUSED),
        ("layout_geometry", {"positions": 0}, NULL),
        ("layout_mask", {"mask": 0}, NULL),
        *(
            (call, {name: wrong}, message)
            for call, arguments in (("layout_geometry", GEOMETRY), ("layout_mask", MASK))
            for name, good in arguments.items()
            if isinstance(good, tuple) and name != "sizes"
            for wrong, message in (
                ((0, *good[1:]), NULL),
                (
                    (64, "torch.int64", *good[2:]),
                    f"{name}: expected a contiguous torch.int32 tensor .*got a torch.int64",
                ),
                (int32(2, *good[2][1:]), rf"{name}: expected .* tensor \[1, .*\], got .* tensor \[2, "),
                (int32(*good[2], 1), rf"{name}: expected .* tensor "),
            )
        ),
        ("layout_mask", {"own_start": (64, "torch.int32", (1, 8), (8, 2))}, r"own_start: .* with strides \[8, 2\]"),
        ("layout_mask", {"own_start": (64, "torch.int32", (1, 8), (8, 0))}, r"own_start: .* with strides \[8, 0\]"),
    ],
)
def test_bad_calls_are_refused(call, change, message, compiled):
    arguments = {"layout_geometry": GEOMETRY, "layout_mask": MASK}[call] | change
    with pytest.raises(ValueError, match=message):
        getattr(compiled, call)(*arguments.values())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", ("prefix_start", "prefix_end", "own_start"))
def test_a_layout_whose_tensors_were_replaced_is_not_read_beyond_their_ends(name):
    """As one that was unpickled from elsewhere, or whose __dict__ somebody wrote to."""
    for wrong in (lambda x: x[:, :-1], lambda x: x.long(), lambda x: x[:1]):
        made = LAYOUTS["odd"]()
        q, k, v = attention_inputs(made)
        broken = made.key_ranges._replace(**{name: wrong(getattr(made.key_ranges, name))})
        made.__dict__.update(key_ranges=broken)
        made.__dict__.update(_versions=made._tensor_versions())
        for call in (
            lambda made=made, q=q, k=k, v=v: strided_attention(q, k, v, made, impl="native"),
            lambda made=made: made.dense_mask(),
        ):
            with pytest.raises(ValueError, match=r"(prefix|own)_\w+: expected a contiguous torch.int32 tensor"):
                call()


@pytest.mark.usefixtures("compiled")
def test_values_of_a_layout_that_lead_elsewhere_are_refused():
    """Written behind torch's back, where it does not count writes."""
    made = LAYOUTS["odd"]()
    q, k, v = attention_inputs(made)
    made.key_ranges.prefix_end.data[0, -1] = 2**30
    with pytest.raises(IndexError, match="key ranges: expected keys that a rollout can see"):
        strided_attention(q, k, v, made, impl="native")
    with pytest.raises(IndexError, match="key ranges: expected a prefix before the row's own tokens"):
        made.dense_mask()
    made.anchors.data[0, 0] = 2**30
    with pytest.raises(IndexError, match="anchors: one is beyond the prompt"):
        made.without_last_step()
