"""The compiled pooling: every instruction set, dtype, pooling and layout; its gradients; what it refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, pool_features, select_impl
from ebft_kernels.pooling import api
from ebft_kernels.pooling.modes import NORMALIZATIONS, POOLINGS
from ebft_kernels.testing import LAYOUTS, assert_within_budget

from ..op_checks import results_and_gradients
from ..pooling import test_pool_features as pooling_tests

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONS = list(itertools.product(POOLINGS, NORMALIZATIONS))
EPS = torch.finfo(torch.float64).eps


def run(hidden: list[Tensor], layout: StridedLayout, impl: str = "native", **options) -> list[Tensor]:
    """Both results, and the gradients of all hidden states for random upstream gradients."""
    leaves = [h.detach().requires_grad_() for h in hidden]
    return results_and_gradients(pool_features(leaves, layout, impl=impl, **options), leaves)


def test_it_is_the_choice_on_the_cpu(compiled):  # noqa: ARG001
    assert all(select_impl("pool_features", "cpu", dtype) == "native" for dtype in DTYPES)


def test_the_table_of_modes_is_that_of_the_compiled_code(compiled):
    assert [(mode.code, name) for name, mode in POOLINGS.items()] == list(enumerate(compiled.poolings))
    assert list(NORMALIZATIONS) == compiled.normalizations


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("name", LAYOUTS)
def test_results_and_gradients_of_every_layout(name, masked):
    layout = LAYOUTS[name]()
    mask = pooling_tests.random_mask(layout) if masked else None
    for (pooling, normalize), channels in zip(OPTIONS, itertools.cycle((1, 7, 16, 21)), strict=False):
        hidden = pooling_tests.hidden_inputs(layout, channels=channels)
        options = {"pooling": pooling, "normalize": normalize, "token_mask": mask}
        actual, expected = run(hidden, layout, **options), run(hidden, layout, "reference", **options)
        shortest = min([float(h.norm(dim=-1).min()) for h in hidden if h.numel()], default=1.0)
        for a, b in zip(actual, expected, strict=True):
            assert a.shape == b.shape
            # A norm is a sum over at most 3 * 21 numbers; up to 7 gradients of at most 4 overlap and are divided by it.
            assert not a.numel() or (a - b).abs().max() <= 64 * EPS * (1 + 28 / min(shortest, 1))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_features_and_gradients_within_the_error_budget(pooling, normalize, masked, dtype):
    layout = LAYOUTS["overlapping"]()
    hidden = [h.requires_grad_() for h in pooling_tests.hidden_inputs(layout, channels=41, dtype=dtype)]
    mask = pooling_tests.random_mask(layout) if masked else None
    options = {"pooling": pooling, "normalize": normalize, "token_mask": mask}
    eager = [z.float() for z in pooling_tests.eager(hidden, layout, pooling, normalize, mask)]
    actual, plain = run(hidden, layout, **options), results_and_gradients(eager, hidden)
    truth = run([h.double() for h in hidden], layout, "reference", **options)
    assert [z.dtype for z in actual] == [torch.float32] * 2 + [dtype] * 3
    for name, *tensors in zip(("rollouts", "targets", *"123"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_views_give_what_copies_give(pooling, dtype):
    layout = LAYOUTS["odd"]()
    shape = (layout.packed_length, 13, layout.batch_size)
    wide = [pooling_tests.randn(*shape, seed=i, dtype=dtype) for i in range(2)]
    views = [wide[0][:, 1::2].permute(2, 0, 1), wide[1].permute(2, 0, 1)[:, :, 3:9], wide[0][:, :6, :1].movedim(2, 0)]
    views[2] = views[2].expand(layout.batch_size, -1, -1)
    actual, expected = (run(hidden, layout, pooling=pooling) for hidden in (views, [v.contiguous() for v in views]))
    assert not any(v.is_contiguous() for v in views)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_number_of_threads_changes_nothing(pooling):
    """Windows overlap: the rows of a gradient have several contributions, whose order must not change."""
    layout = StridedLayout.strided(2, 96, context=8, stride=2, horizon=8, samples=2)
    hidden = pooling_tests.hidden_inputs(layout, channels=96, dtype=torch.bfloat16)

    def with_threads(threads):
        torch.set_num_threads(threads)
        return run(hidden, layout, pooling=pooling)

    alone = with_threads(1)
    for threads in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(with_threads(threads), alone, strict=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_only_the_needed_rows_are_read_and_get_a_gradient(pooling, normalize):
    layout = LAYOUTS["strided"]()
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


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("size", (0, 1e-14))
def test_hidden_states_too_short_to_normalize(size, normalize):
    pooling_tests.test_hidden_states_too_short_to_normalize(size, normalize, "native")


@pytest.mark.usefixtures("isa")
def test_rows_outside_the_packed_row_are_refused():
    layout = LAYOUTS["odd"]()
    hidden = pooling_tests.hidden_inputs(layout)
    rollouts, targets, _ = api.feature_rows(layout, None, last_only=False)
    native = api.implementation("pool_features", "native")
    for row in (-1, layout.packed_length):
        broken = targets.clone()
        broken[-1, -1, -1] = row
        with pytest.raises(IndexError, match="rows: one is not below S"):
            native.forward(hidden, rollouts, broken, None, "mean", "joint")
        grads = native.forward(hidden, rollouts, targets, None, "mean", "joint")
        with pytest.raises(IndexError, match="rows: one is not below S"):
            native.backward(*grads, hidden, rollouts, broken, None, "mean", "joint")


LAYER = (64, 64, 16)
# B, S, C, A, n, K
CALL = {"isa": 0, "threads": 1, "dtype": 1, "sizes": (1, 4, 4, 1, 1, 2), "layers": [LAYER]}
INDEX = {"rollout_rows": 64, "target_rows": 64, "counted": 0, "pooling": 0, "normalization": 0}
REFUSED = [
    ({"isa": 3}, "isa: expected a number from 0 to"),
    ({"threads": 0}, "threads: expected at least 1"),
    ({"dtype": 4}, "dtype: expected a number from 0 to 3, got 4"),
    ({"sizes": (1, 4, 4)}, "sizes: expected 6"),
    ({"sizes": (1, 4, -4, 1, 1, 2)}, "sizes: expected no negative one"),
    ({"sizes": (1, 4, 4, 1, 0, 2)}, "sizes: expected at least one rollout and one step"),
    ({"sizes": (1, 4, 4, 1, 1, 0)}, "sizes: expected at least one rollout and one step"),
    ({"layers": []}, "layers: expected at least one"),
    ({"layers": [LAYER, (0, 64, 16)]}, "address: expected that of a tensor, got 0"),
    ({"rollout_rows": 0}, "address: expected that of a tensor, got 0"),
    ({"target_rows": 0}, "address: expected that of a tensor, got 0"),
    ({"pooling": 4}, "pooling: expected a number from 0 to 3, got 4"),
    ({"normalization": -1}, "normalization: expected a number from 0 to 2, got -1"),
    ({"rollouts": 0}, "address: expected that of a tensor, got 0"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_bad_calls_are_refused(change, message, compiled):
    with pytest.raises(ValueError, match=message):
        compiled.pool_features(*{**CALL, **INDEX, "rollouts": 64, "targets": 64, **change}.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads: expected one for each layer"),
        ({"grads": [(0, 64, 16)]}, "address: expected that of a tensor, got 0"),
        ({"grad_rollouts": 0}, "address: expected that of a tensor, got 0"),
    ],
)
def test_bad_calls_of_the_backward_pass_are_refused(change, message, compiled):
    arguments = {**CALL, **INDEX, "grad_rollouts": 64, "grad_targets": 64, "grads": [LAYER], **change}
    with pytest.raises(ValueError, match=message):
        compiled.pool_features_backward(*arguments.values())
