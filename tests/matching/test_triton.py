"""The Triton kernels of matching, compiled or in the interpreter: every option, branch and kind of input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ebft_kernels import feature_matching, mean_embedding_loss
from ebft_kernels._tiles import declines
from ebft_kernels.matching import _triton, api
from ebft_kernels.testing import assert_within_budget, feature_inputs, randn

from .. import op_checks
from ..op_checks import assert_compiles, results_and_gradients, short_dtypes
from . import test_mean_embedding_loss

pytestmark = pytest.mark.usefixtures("device")
FLOAT32 = torch.finfo(torch.float32).eps
# More than 8 rollouts.
MANY = pytest.mark.skipif(bool(declines("feature_matching", {"n": 9})), reason=declines("feature_matching", {"n": 9}))


def recorded_launches(monkeypatch) -> list[tuple[str, dict[str, int]]]:
    """The kernels that are launched from now on, with the sizes of their tiles."""
    launches = []

    def launch(kernel, grid, *args, tiles, **options):
        launches.append((kernel.__name__, dict(tiles[0].sizes)))
        return plain(kernel, grid, *args, tiles=tiles, **options)

    plain = _triton.launch
    monkeypatch.setattr(_triton, "launch", launch)
    return launches


def assert_exact(x: Tensor, y: Tensor, **options) -> None:
    """All is computed in float64 and then rounded to float32, so the results are the reference's but for that.

    That the reference itself is right where groups are rank-deficient is tested against loops elsewhere.
    """
    truth = feature_matching(x.double(), y.double(), impl="reference", **options)
    result = feature_matching(x, y, impl="triton", **options)
    for name, actual, exact in zip(result._fields, result, truth, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == exact.shape
        # group_norm divides what rounding leaves of equal rewards by 1e-9.
        slack = 1e-15 / 1e-9 if options.get("estimator") == "group_norm" and name == "advantage" else 1e-13
        assert (actual - exact).abs().max() <= FLOAT32 / 2 * exact.abs().max() * (1 + 1e-6) + 64 * slack, name


@pytest.mark.parametrize("whitening", api.WHITENINGS)
@pytest.mark.parametrize("n", (1, 2, 3, 4, 7, 8, *(pytest.param(n, marks=MANY) for n in (9, 16, 17))))
def test_every_number_of_rollouts(n, whitening, monkeypatch):
    launches = recorded_launches(monkeypatch)
    x, y = feature_inputs(1, 3 if n < 9 else 2, n, 35, duplicates=True, seed=n)
    assert_exact(x, y, whitening=whitening, alignment_coef=0.7, diversity_coef=1.3)
    assert [name for name, _ in launches] == ["match_fwd_kernel" if n <= 16 else "gram_kernel"]
    if op_checks.INTERPRETED and n <= 16:
        assert launches[0][1]["DISTINCT"] == (n <= 8)


@pytest.mark.parametrize("estimator", api.ESTIMATORS)
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (2, 3), (4, 3), (5, 1)])
def test_estimators_and_groups(n, groups, estimator):
    x, y = feature_inputs(2, 3, n, 36, duplicates=n != 2, seed=n)
    assert_exact(x, y, whitening="sample", estimator=estimator, groups=groups, diversity_coef=0.1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(("n", "size"), [(4, 200), *(pytest.param(n, 70, marks=MANY) for n in (9, 17))])
def test_every_dtype_and_several_tiles(n, size, dtype):
    x, y = feature_inputs(1, 2, n, size, dtype=dtype)
    assert_exact(x, y, whitening="feature")


@pytest.mark.parametrize("whitening", ("sample", "feature"))
@pytest.mark.parametrize("distance", (1e-2, 1e-4, 1e-5, 2e-6, 1e-7))
def test_near_duplicates_on_both_sides_of_the_cut_off(distance, whitening):
    """Within what the float64 error of the Gram matrix, 1e-16, becomes of a squared singular value ``distance^2``."""
    x, y = feature_inputs(1, 3, 4, 36)
    x[:, :, 2] = x[:, :, 1] + distance * randn(1, 3, 36, seed=9, dtype=torch.float32)
    truth = feature_matching(x.double(), y.double(), whitening=whitening, impl="reference")
    result = feature_matching(x, y, whitening=whitening, impl="triton")
    for name, actual, exact in zip(result._fields, result, truth, strict=True):
        bound = FLOAT32 / 2 * exact.abs().max() + 36 * 1e-15 / max(distance, 1e-5) ** 2
        assert (actual - exact).abs().max() <= bound, name


@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_more_rollouts_than_features(whitening):
    assert_exact(*feature_inputs(1, 3, 7, 4), whitening=whitening)


@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_what_whitening_makes_of_duplicates(whitening):
    """Distinct rollouts come out orthonormal, exactly; a pair of equal ones shares one direction."""
    x, y = feature_inputs(1, 2, 4, 30)
    x[:, 1, 3] = x[:, 1, 1]
    result = feature_matching(x, y, whitening=whitening, impl="triton")
    assert (result.diversity[0, 0] == 0).all()
    expected = torch.tensor([0, 1 / 3, 0, 1 / 3])
    assert (result.diversity[0, 1] - expected).abs().max() <= FLOAT32
    assert result.reward[0, 1, 1] == result.reward[0, 1, 3]


@pytest.mark.parametrize("estimator", api.ESTIMATORS)
@pytest.mark.parametrize("whitening", api.WHITENINGS)
def test_zero_features_give_zeros(whitening, estimator):
    x, y = feature_inputs(1, 3, 4, 10)
    x[:, 0] = x[:, 1] = 0
    y[:, 0] = y[:, 2] = 0
    result = feature_matching(x, y, whitening=whitening, estimator=estimator, groups=2, impl="triton")
    assert all(z.isfinite().all() and (z[:, 0] == 0).all() for z in result)
    assert all((z[:, 1] == 0).all() for z in result[1:]) and (result.alignment[:, 2] == 0).all()


@pytest.mark.parametrize("n", (4, *(pytest.param(n, marks=MANY) for n in (9, 17))))
@pytest.mark.parametrize("whitening", api.WHITENINGS)
def test_non_finite_features_stay_in_their_anchor(whitening, n):
    x, y = feature_inputs(1, 4 if n == 4 else 2, n, 10)
    clean = feature_matching(x, y, whitening=whitening, impl="triton")
    broken = torch.tensor([[False, True, False, True]])[:, : x.shape[1]]
    x[0, 1, 2, 3], x[0, -1, 0, 0] = math.nan, math.inf
    result = feature_matching(x, y, whitening=whitening, impl="triton")
    assert result.reward[broken].isnan().any(-1).all()
    assert all(torch.equal(a[~broken], b[~broken]) for a, b in zip(result, clean, strict=True))
    masked = feature_matching(x, y, whitening=whitening, valid=~broken, impl="triton")
    assert all((z[broken] == 0).all() for z in masked)


def test_an_anchor_does_not_depend_on_the_others_of_its_program():
    """Some need more rotations than others. Where rewards are equal, "group_norm" makes the least rounding visible."""
    x, y = feature_inputs(1, 9, 4, 20, duplicates=True)
    x[:, 0], options = x[:, 0] + 1e-6 * x[:, 1], {"whitening": "sample", "estimator": "group_norm", "impl": "triton"}
    whole = feature_matching(x, y, **options)
    for a in range(9):
        alone = feature_matching(x[:, a : a + 1], y[:, a : a + 1], **options)
        assert all(torch.equal(p[:, a : a + 1], q) for p, q in zip(whole, alone, strict=True))


def test_features_per_token_and_strided_inputs():
    x, y = feature_inputs(2, 4, 5, 20)
    wide = randn(2, 2, 3, 2, 21, seed=1, dtype=torch.float32)  # [B, A, n, G, F]
    targets = randn(2, 2, 2, 21, seed=2, dtype=torch.float32)
    views = [
        (x[:, ::2, 1:4:2, 2:].transpose(0, 1), y[:, ::2, 2:].transpose(0, 1)),
        (x[:, :, :1].expand(-1, -1, 3, -1), y),
        (x[..., ::2], y[..., ::2]),
        (wide[..., 1:], targets[..., 1:]),
        (wide.transpose(1, 3).contiguous().transpose(1, 3), targets.transpose(0, 1).contiguous().transpose(0, 1)),
    ]
    for a, b in views:
        view = feature_matching(a, b, whitening="sample", impl="triton")
        dense = feature_matching(a.contiguous(), b.contiguous(), whitening="sample", impl="triton")
        assert all(torch.equal(p, q) for p, q in zip(view, dense, strict=True))
        assert_exact(a, b, whitening="sample")


@pytest.mark.parametrize("n", (4, pytest.param(17, marks=MANY)))
@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_empty_batch(shape, n):
    x, y = torch.empty(*shape, n, 9), torch.empty(*shape, 9)
    result = feature_matching(x, y, whitening="sample", impl="triton")
    assert [z.shape for z in result] == [shape, *[(*shape, n)] * 4]
    assert mean_embedding_loss(x, y, reduction="none", impl="triton").shape == shape


def test_results_repeat_bitwise():
    x, y = feature_inputs(1, 3, 4, 70, duplicates=True)
    first, second = (feature_matching(x, y, whitening="sample", impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, *short_dtypes()))
@pytest.mark.parametrize(
    ("n", "unbiased"), [(n, unbiased) for n in (1, 2, 5, 17) for unbiased in (False, True) if n > 1 or not unbiased]
)
def test_loss_and_its_gradients(n, unbiased, dtype):
    x, y = (z.requires_grad_() for z in feature_inputs(1, 3, n, 131, duplicates=True, dtype=dtype))
    exact = [z.detach().double().requires_grad_() for z in (x, y)]

    options = {"unbiased": unbiased, "reduction": "none"}
    actual = results_and_gradients(mean_embedding_loss(x, y, impl="triton", **options), (x, y))
    plain = results_and_gradients(test_mean_embedding_loss.eager(x, y, unbiased).float(), (x, y))
    truth = results_and_gradients(mean_embedding_loss(*exact, impl="reference", **options), exact)
    assert [z.dtype for z in actual] == [torch.float32, dtype, dtype]
    for name, *tensors in zip(("loss", "grad rollouts", "grad targets"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize("unbiased", (False, True))
def test_loss_of_strided_inputs_repeats_bitwise(unbiased):
    x, y = feature_inputs(2, 6, 8, 20)
    views = (x[:, ::2, 1:7:2, 1:].transpose(0, 1), y[:, ::2, 1:].transpose(0, 1))
    results = []
    for tensors in (views, views, [z.contiguous() for z in views]):
        leaves = [z.detach().requires_grad_() for z in tensors]
        loss = mean_embedding_loss(*leaves, unbiased=unbiased, reduction="none", impl="triton")
        results.append(results_and_gradients(loss, leaves))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_equal_features_have_no_unbiased_loss_but_rounding():
    """Each term is 1e4: a difference of sums of products would leave 1e-3 of them."""
    x = 100 * torch.ones(1, 1, 4, 131)
    loss = mean_embedding_loss(x, x[:, :, 0] + 1e-3, unbiased=True, reduction="none", impl="triton")
    assert abs(loss.item() - 131 * float((x[0, 0, 0, 0] + 1e-3) - 100) ** 2) <= 131 * FLOAT32 * 1e-6


def test_registration():
    x, y = feature_inputs(1, 2, 3, 6)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(api._matching_op, (x, y, "sample", 1.0, 0.5, "rloo", 2, "triton"), **checks)
    torch.library.opcheck(api._mean_embedding_op, (x, y, True, "triton"), **checks)
    grads = (randn(1, 2, seed=1, dtype=torch.float32), x, y, True, "triton")
    torch.library.opcheck(api._mean_embedding_backward_op, grads, **checks)


def test_compiles_without_breaks():
    def match(x, y):
        loss = mean_embedding_loss(x, y, unbiased=True, impl="triton")
        return loss, feature_matching(x, y, impl="triton")

    assert_compiles(match, [feature_inputs(1, 2, 3, 6) for _ in range(2)], graphs=1)
