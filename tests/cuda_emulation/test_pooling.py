"""Pooling by the CUDA kernels, run by the emulation."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, pool_features
from ebft_kernels.pooling import api
from ebft_kernels.pooling.modes import NORMALIZATIONS, POOLINGS
from ebft_kernels.testing import LAYOUTS, assert_within_budget

from ..op_checks import results_and_gradients
from ..pooling import test_pool_features as pooling_tests

pytestmark = pytest.mark.usefixtures("cuda")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS = list(itertools.product(POOLINGS, NORMALIZATIONS))
EPS = torch.finfo(torch.float64).eps


def run(hidden: list[Tensor], layout: StridedLayout, impl: str = "native", **options) -> list[Tensor]:
    """Both results, and the gradients of all hidden states for random upstream gradients."""
    leaves = [h.detach().requires_grad_() for h in hidden]
    return results_and_gradients(pool_features(leaves, layout, impl=impl, **options), leaves)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", LAYOUTS)
def test_results_and_gradients_of_every_layout(name, masked):
    layout = LAYOUTS[name]()
    mask = pooling_tests.random_mask(layout) if masked else None
    # In turn, so that each pooling and each normalization meets some layouts.
    options = OPTIONS[list(LAYOUTS).index(name) % 3 :: 3]
    for (pooling, normalize), channels in zip(options, itertools.cycle((7, 16, 1)), strict=False):
        hidden = pooling_tests.hidden_inputs(layout, channels=channels)
        arguments = {"pooling": pooling, "normalize": normalize, "token_mask": mask}
        actual, expected = run(hidden, layout, **arguments), run(hidden, layout, "reference", **arguments)
        shortest = min([float(h.norm(dim=-1).min()) for h in hidden if h.numel()], default=1.0)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            # A norm is a sum over at most 3 * 16 numbers; up to 7 gradients of at most 4 overlap and are divided by it.
            assert not a.numel() or (a - b).abs().max() <= 64 * EPS * (1 + 28 / min(shortest, 1))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_features_and_gradients_within_the_error_budget(pooling, normalize, masked, dtype):
    layout = StridedLayout.strided(1, 18, context=1, stride=2, horizon=5, samples=2)
    channels = 41 if masked else 48  # unaligned rows, and aligned ones
    hidden = [h.requires_grad_() for h in pooling_tests.hidden_inputs(layout, channels=channels, dtype=dtype)]
    mask = pooling_tests.random_mask(layout) if masked else None
    options = {"pooling": pooling, "normalize": normalize, "token_mask": mask}
    eager = [z.float() for z in pooling_tests.eager(hidden, layout, pooling, normalize, mask)]
    actual, plain = run(hidden, layout, **options), results_and_gradients(eager, hidden)
    truth = run([h.double() for h in hidden], layout, "reference", **options)
    assert [z.dtype for z in actual] == [torch.float32] * 2 + [dtype] * 3
    for name, *tensors in zip(("rollouts", "targets", *"123"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_any_alignment_and_any_strides(pooling, dtype):
    layout = StridedLayout.strided(2, 12, context=2, stride=3, horizon=3, samples=2)
    rows, batch = layout.packed_length, layout.batch_size
    wide = pooling_tests.randn(rows, 41, batch, seed=1, dtype=dtype)
    views = [wide[:, 1::2].permute(2, 0, 1), wide.permute(2, 0, 1)[:, :, 3:23]]
    views.append(wide[:, :20, :1].movedim(2, 0).expand(batch, -1, -1))
    views.append(torch.nn.functional.pad(wide.permute(2, 0, 1), (0, 7))[..., :20])
    actual, expected = (run(hidden, layout, pooling=pooling) for hidden in (views, [v.contiguous() for v in views]))
    assert not any(v.is_contiguous() for v in views)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 8 * torch.finfo(b.dtype).eps * b.abs().max()


@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_the_order_in_which_threads_run_changes_nothing(cuda, pooling, normalize):
    """Several warps for each row; overlapping windows, whose gradients add up."""
    layout = StridedLayout.strided(1, 8, context=2, stride=1, horizon=3, samples=1)
    hidden = pooling_tests.hidden_inputs(layout, layers=2, channels=160, dtype=torch.float32)

    def in_order(order):
        cuda.set_order(order)
        return run(hidden, layout, pooling=pooling, normalize=normalize)

    ascending = in_order(0)
    for order in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(in_order(order), ascending, strict=True))


@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_only_the_needed_rows_are_read_and_get_a_gradient(pooling, normalize):
    layout = StridedLayout.strided(2, 20, context=3, stride=5, horizon=4, samples=2)
    hidden = pooling_tests.hidden_inputs(layout)
    steps = torch.arange(layout.horizon)[-1 if pooling == "last_token" else 0 :]
    needed = torch.zeros(layout.batch_size, layout.packed_length, dtype=torch.bool)
    layout.rollouts(needed)[..., steps] = True
    needed[torch.arange(layout.batch_size)[:, None, None], layout.anchors.long()[..., None] + steps] = True
    clean = run(hidden, layout, pooling=pooling, normalize=normalize)
    poisoned = [h.masked_fill(~needed[..., None], torch.nan) for h in hidden]
    results = run(poisoned, layout, pooling=pooling, normalize=normalize)
    assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))
    assert all((grad[~needed] == 0).all() and (grad[needed] != 0).any(-1).all() for grad in results[2:])


@pytest.mark.parametrize("pooling", ("mean", "token"))
def test_a_row_that_is_used_more_often_than_is_kept_in_shared_memory(pooling):
    """The windows of anchors that are absent all start at row 0."""
    anchors = torch.full((1, 40), -1)
    anchors[0, :2] = torch.tensor([1, 3])
    layout = StridedLayout.from_anchors(anchors, 9, horizon=2, samples=1)
    hidden = pooling_tests.hidden_inputs(layout, channels=5)
    mask = pooling_tests.random_mask(layout)
    for token_mask in (None, mask.fill_(True)):
        options = {"pooling": pooling, "token_mask": token_mask}
        for a, b in zip(run(hidden, layout, **options), run(hidden, layout, "reference", **options), strict=True):
            assert (a - b).abs().max() <= 1000 * EPS * max(float(b.abs().max()), 1)


def test_a_row_that_does_not_exist_is_nan():
    layout = LAYOUTS["odd"]()
    hidden = pooling_tests.hidden_inputs(layout)
    rollouts, targets, _ = api.feature_rows(layout, None, last_only=False)
    native = api.implementation("pool_features", "native")
    clean = native.forward(hidden, rollouts, targets, None, "mean", "joint")
    for row in (-1, layout.packed_length):
        broken = targets.clone()
        broken[-1, -1, -1] = row
        results = native.forward(hidden, rollouts, broken, None, "mean", "joint")
        assert torch.equal(results[0], clean[0])
        assert results[1][-1, -1].isnan().all() and torch.equal(results[1][:-1], clean[1][:-1])


def test_strides_beyond_2_to_the_31_elements():
    layout = StridedLayout.strided(2, 3, context=1, stride=1, horizon=1, samples=1)
    far, channels = (1 << 31) + 64, 24
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    flat = torch.frombuffer(mmap.mmap(-1, 2 * 6 * far, flags=flags), dtype=torch.bfloat16)
    wide = flat.as_strided((2, layout.packed_length, channels), (far // 2, far, 1))
    narrow = pooling_tests.hidden_inputs(layout, layers=1, channels=channels, dtype=torch.bfloat16)
    wide.copy_(narrow[0])
    for a, b in zip(run([wide], layout), run(narrow, layout), strict=True):
        assert torch.equal(a, b)


def test_more_layers_or_tokens_than_the_kernels_take_are_declined_and_left_to_others():
    layout = LAYOUTS["one_anchor"]()
    hidden = pooling_tests.hidden_inputs(layout, layers=65, channels=2)
    with pytest.raises(ValueError, match="'native' .* at most L = 64, got 65.*; available there: torch, reference"):
        pool_features(hidden, layout, impl="native")
    for a, b in zip(pool_features(hidden, layout), pool_features(hidden, layout, impl="torch"), strict=True):
        assert torch.equal(a, b)
    results = run(hidden[:64], layout)
    for a, b in zip(results, run(hidden[:64], layout, "reference"), strict=True):
        assert (a - b).abs().max() <= 1000 * EPS


def test_a_mean_of_more_tokens_than_the_kernels_take_is_declined_and_left_to_others():
    layout = StridedLayout.strided(1, 1282, context=1, stride=1, horizon=1281, samples=1)
    hidden = [pooling_tests.randn(1, layout.packed_length, 1, seed=i) for i in range(2)]
    with pytest.raises(ValueError, match=r"at most L\*K = 2560, got 2562"):
        pool_features(hidden, layout, pooling="mean", impl="native")
    pool_features(hidden, layout, pooling="mean")
    pool_features(hidden, layout, pooling="token", impl="native")
    results = (run(hidden[:1], layout, impl, pooling="mean") for impl in ("native", "reference"))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1000 * EPS
