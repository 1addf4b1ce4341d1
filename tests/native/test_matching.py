"""The compiled feature matching and mean-embedding loss: every instruction set, dtype, number of rollouts and width."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ebft_kernels import feature_matching, mean_embedding_loss, select_impl
from ebft_kernels.testing import assert_within_budget, feature_inputs, randn

from ..matching import test_feature_matching as matching
from ..matching import test_mean_embedding_loss as embedding

WHITENINGS = ("none", "sample", "feature")
ESTIMATORS = ("rloo", "reinforce", "group_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.float32, torch.bfloat16, torch.float16)
# Up to 6 rows (with the target) one block of registers suffices; from there blocks of 3 or 4 and what remains of them.
SAMPLES = (*range(1, 17), 17, 40)
EPS = torch.finfo(torch.float64).eps


def match(x: Tensor, y: Tensor, **options):
    return feature_matching(x, y, impl="native", **options)


def test_it_is_the_choice_on_the_cpu(compiled):  # noqa: ARG001
    for op, dtype in itertools.product(("feature_matching", "mean_embedding_loss"), DTYPES):
        assert select_impl(op, "cpu", dtype) == "native"


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("n", SAMPLES)
def test_agrees_with_loops(n, whitening):
    for number, (groups, duplicates) in enumerate(((1, True), (3, True), (1, False))):
        estimator = ESTIMATORS[(n + number) % 3]
        x, y = feature_inputs(1, 2, n, 51, duplicates=duplicates, dtype=torch.float64, seed=n)
        options = {"alignment_coef": 0.7, "diversity_coef": 1.3, "estimator": estimator, "groups": groups}
        result = match(x, y, whitening=whitening, **options)
        for anchor in matching.each_anchor(result, x, y):
            matching.assert_agrees(*anchor, whitening, (0.7, 1.3), estimator, groups)
            if n > 8:
                break


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", [n for n in SAMPLES if n > 1])
def test_every_dtype_within_the_error_budget(n, dtype):
    x, y = feature_inputs(2, 4, n, 203, duplicates=True, dtype=dtype, seed=n)
    for whitening in WHITENINGS:
        truth = feature_matching(x.double(), y.double(), whitening=whitening, impl="reference")
        eager = matching.eager(x, y, whitening)
        result = match(x, y, whitening=whitening)
        for name, actual, plain, exact in zip(result._fields, result, eager, truth, strict=True):
            assert actual.dtype == torch.float32
            assert_within_budget(actual, plain, exact, f"{whitening} {name}")


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", (*range(1, 19), 31, 33, 1023, 1025, 2050))
def test_every_width(features, dtype):
    """What remains of F beyond whole vectors, and beyond the pieces of 1024 columns that many rollouts are taken in."""
    for n in (4, 11):
        x, y = feature_inputs(1, 2, n, features, dtype=dtype, seed=features)
        for unbiased in (False, True):
            loss = mean_embedding_loss(x, y, unbiased=unbiased, reduction="none", impl="native")
            truth = mean_embedding_loss(x.double(), y.double(), unbiased=unbiased, reduction="none", impl="reference")
            # Unit vectors: four inner products of at most 1, each a sum of F terms; then the rounding of the result.
            assert (loss - truth).abs().max() <= 4 * (features + n) * EPS + torch.finfo(loss.dtype).eps
        result, truth = match(x, y), feature_matching(x.double(), y.double(), impl="reference")
        for actual, exact in zip(result, truth, strict=True):
            bound = 16 * (features + n) * EPS + 8 * torch.finfo(actual.dtype).eps * (actual.dtype != torch.float64)
            assert (actual - exact).abs().max() <= bound


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("distance", (1e-2, 1e-4, 1e-5, 2e-6, 1e-7, 1e-12))
@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_near_duplicates_on_both_sides_of_the_cut_off(whitening, distance):
    for n in (3, 4, 8, 11):
        x, y = feature_inputs(1, 2, n, 36, dtype=torch.float64)
        x[:, :, 2] = x[:, :, 1] + distance * randn(1, 2, 36, seed=9)
        for anchor in matching.each_anchor(match(x, y, whitening=whitening), x, y):
            matching.assert_agrees(*anchor, whitening, (1.0, 1.0), "rloo", 1)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("whitening", ("sample", "feature"))
@pytest.mark.parametrize("scale", (1e-150, 1e-30, 1e30, 1e140))
def test_the_size_of_the_features_does_not_matter(scale, whitening):
    """Even where products of elements of the Gram matrix would overflow, or vanish."""
    x, y = feature_inputs(1, 2, 4, 36, duplicates=True, dtype=torch.float64)
    plain, scaled = match(x, y, whitening=whitening), match(x * scale, y * scale, whitening=whitening)
    assert (scaled.diversity - plain.diversity).abs().max() <= 1e4 * EPS
    if scale >= 1 or whitening == "feature":  # else the target, which is not whitened, is below the eps of the cosine
        assert (scaled.alignment - plain.alignment).abs().max() <= 1e6 * EPS


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_strided_and_expanded_inputs(whitening, dtype):
    x, y = feature_inputs(2, 6, 8, 45, dtype=dtype)
    sliced, target = x[:, ::2, 1:7:2, 2:].transpose(0, 1), y[:, ::2, 2:].transpose(0, 1)
    repeated = x[:, :, :1].expand(-1, -1, 4, -1)
    tokens = x.unflatten(1, (3, 2)).movedim(2, 3), y.unflatten(1, (3, 2))  # [B, A, n, G, F], [B, A, G, F]
    every_second = x[..., ::2], y[..., ::2]
    constant = x[..., :1].expand_as(x), y[..., :1].expand_as(y)
    for a, b in ((sliced, target), (repeated, y), tokens, every_second, constant):
        views = match(a, b, whitening=whitening)
        dense = match(a.contiguous(), b.contiguous(), whitening=whitening)
        assert all(torch.equal(p, q) for p, q in zip(views, dense, strict=True))


@pytest.mark.usefixtures("compiled")
def test_rows_further_apart_than_32_bits_can_count(tmp_path):
    """In a file with holes, which takes no space."""
    size = (2 << 31) + (3 << 29) + 40
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    x, y = feature_inputs(1, 3, 4, 40, dtype=torch.bfloat16)
    far_x = memory.as_strided(x.shape, (0, 1 << 31, 1 << 29, 1)).copy_(x)
    far_y = memory.as_strided(y.shape, (0, 1 << 31, 1), 1 << 10).copy_(y)
    assert all(torch.equal(a, b) for a, b in zip(match(far_x, far_y), match(x, y), strict=True))
    losses = (mean_embedding_loss(*z, unbiased=True, impl="native") for z in ((far_x, far_y), (x, y)))
    assert torch.equal(*losses)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", (False, True))
def test_gradients_through_views_equal_those_of_copies(unbiased, dtype):
    x, y = feature_inputs(2, 6, 8, 23, dtype=dtype)
    views = (x[:, ::2, 1:7:2, 1:].transpose(0, 1), y[:, :3, 1:].transpose(0, 1))
    upstream = randn(3, 1, seed=3).expand(3, 2)

    def run(*inputs):
        leaves = [z.detach().requires_grad_() for z in inputs]
        loss = mean_embedding_loss(*leaves, unbiased=unbiased, reduction="none", impl="native")
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    assert not views[0].is_contiguous()
    dense = run(*(z.contiguous() for z in views))
    assert all(torch.equal(a, b) for a, b in zip(run(*views), dense, strict=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("n", (2, 4, 7, 17))
def test_loss_and_gradients_within_the_error_budget(n, unbiased, dtype):
    x, y = (z.requires_grad_() for z in feature_inputs(2, 5, n, 131, duplicates=True, dtype=dtype))
    exact = [z.detach().double().requires_grad_() for z in (x, y)]
    upstream = randn(2, 5, seed=3)

    def run(loss, leaves):
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    actual = run(mean_embedding_loss(x, y, unbiased=unbiased, reduction="none", impl="native"), (x, y))
    plain = run(embedding.eager(x, y, unbiased), (x, y))
    truth = run(mean_embedding_loss(*exact, unbiased=unbiased, reduction="none", impl="reference"), exact)
    assert [z.dtype for z in actual] == [torch.float32, dtype, dtype]
    for name, *tensors in zip(("loss", "grad rollouts", "grad targets"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("unbiased", (False, True))
def test_gradcheck(unbiased):
    for n in (2, 5):
        x, y = (z.requires_grad_() for z in feature_inputs(1, 2, n, 9, dtype=torch.float64))
        valid = torch.tensor([[True, False]])
        assert torch.autograd.gradcheck(
            lambda x, y, valid=valid: mean_embedding_loss(x, y, valid=valid, unbiased=unbiased, impl="native"), (x, y)
        )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_every_16_bit_number_is_read_right(dtype):
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = x[x.isfinite()]
    leaf = x.view(1, 1, 1, -1).float().to(dtype)
    # With one rollout and a target of zeros, the gradient of the target is -2 x times the upstream gradient.
    target = torch.zeros_like(leaf[:, :, 0]).requires_grad_()
    module = matching.api.implementation("mean_embedding_loss", "native")
    _, difference = module.mean_embedding_forward(leaf, target, False)
    assert torch.equal(difference.flatten(), x.float())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_results_are_rounded_to_nearest_even(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middle = (every[1:].double() + every[:-1].double()).div(2).float()  # ties
    numbers = torch.cat([every, middle, middle.nextafter(every[1:]), middle.nextafter(every[:-1])])
    numbers = torch.cat([numbers, torch.tensor([1e30, -1e30, math.inf, -math.inf, 65519.0, 65520.0])])
    module = matching.api.implementation("mean_embedding_loss", "native")
    like = torch.zeros(1, 1, 1, len(numbers), dtype=dtype)
    grad = torch.full((1, 1), -0.5)
    _, rounded = module.mean_embedding_backward(grad, like, numbers.view(1, 1, -1), False)
    assert torch.equal(rounded.flatten(), numbers.to(dtype))
    # The sign and the payload of NaN vary; rounding the largest payload up would make it a zero.
    nans = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    _, nothing = module.mean_embedding_backward(grad, like[..., :5], nans.view(1, 1, 5), False)
    assert nothing.isnan().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype):
    """The features of 61 anchors are large enough to be given to 5 threads."""
    x, y = feature_inputs(1, 61, 4, 1400, duplicates=True, dtype=dtype)
    leaves = [z.requires_grad_() for z in (x, y)]

    def run(threads):
        torch.set_num_threads(threads)
        loss = mean_embedding_loss(x, y, unbiased=True, impl="native")
        return [*match(x, y, whitening="sample", groups=2), loss, *torch.autograd.grad(loss, leaves)]

    alone = run(1)
    for threads in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(run(threads), alone, strict=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_empty_batch(shape):
    x, y = torch.empty(*shape, 4, 9, requires_grad=True), torch.empty(*shape, 9)
    assert [z.shape for z in match(x, y, whitening="sample")] == [shape, *[(*shape, 4)] * 4]
    loss = mean_embedding_loss(x, y, unbiased=True, impl="native")
    assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == x.shape


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("broken", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_non_finite_features_stay_in_their_anchor_and_are_as_in_torch(whitening, broken):
    for n, rollout in itertools.product((1, 4, 7), (True, False)):
        x, y = feature_inputs(2, 4, n, 12)
        clean = match(x, y, whitening=whitening, groups=2)
        (x[0, 1, n // 2] if rollout else y[0, 1])[3] = broken
        result = match(x, y, whitening=whitening, groups=2)
        for actual, before in zip(result, clean, strict=True):
            actual, before = actual.flatten(0, 1), before.flatten(0, 1)
            assert torch.equal(actual[2:], before[2:]) and torch.equal(actual[0], before[0])
        assert result.alignment[0, 1, n // 2].isnan()
        expected = feature_matching(x, y, whitening=whitening, groups=2, impl="torch")
        assert torch.equal(result.alignment.isnan(), expected.alignment.isnan())
        # Unwhitened, the torch implementation takes infinity from infinity; a part that is not finite is whitened away.
        if whitening != "none":
            assert torch.equal(result.diversity.isnan(), expected.diversity.isnan())
        assert torch.equal(result.loss.isfinite(), expected.loss.isfinite())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_zero_features_give_zeros(whitening):
    for n, estimator in itertools.product((2, 3, 4, 8), ESTIMATORS):
        x, y = feature_inputs(1, 3, n, 10)
        x[:, :2] = y[:, 0] = y[:, 2] = 0
        result = match(x, y, whitening=whitening, estimator=estimator, groups=2)
        assert all(z.isfinite().all() for z in result)
        assert all((z[:, 0] == 0).all() for z in result)
        assert all((z[:, 1] == 0).all() for z in result[1:])
        assert (result.alignment[:, 2] == 0).all()


@pytest.mark.usefixtures("isa")
def test_the_loss_is_never_negative():
    """Where the rollouts are the target, it is the rounding of a difference."""
    for n in (3, 7):
        _, y = feature_inputs(1, 200, n, 21, dtype=torch.float64)
        loss = match(y[:, :, None].expand(-1, -1, n, -1), y).loss
        assert (loss == 0).any() and (loss >= 0).all() and loss.max() <= 100 * EPS


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_what_whitening_makes_of_duplicates(whitening):
    for n in (4, 5, 8):
        x, y = feature_inputs(1, 2, n, 300)
        x[:, 1, 3] = x[:, 1, 1]
        result = match(x, y, whitening=whitening)
        expected = torch.zeros(n)
        expected[1] = expected[3] = 1 / (n - 1)
        assert (result.diversity[0, 0] == 0).all()
        assert (result.diversity[0, 1] - expected).abs().max() <= torch.finfo(torch.float32).eps
        assert result.reward[0, 1, 1] == result.reward[0, 1, 3]


@pytest.mark.usefixtures("isa")
def test_results_fill_their_whole_memory():
    """The fixture of all tests fills new tensors with NaN; none may be left."""
    x, y = (z.requires_grad_() for z in feature_inputs(3, 5, 6, 77))
    assert all(z.isfinite().all() for z in match(x, y, whitening="feature"))
    loss = mean_embedding_loss(x, y, unbiased=True, impl="native")
    assert all(z.isfinite().all() for z in torch.autograd.grad(loss, (x, y)))


@pytest.mark.speed
@pytest.mark.usefixtures("compiled")
def test_much_faster_than_feature_space():
    """At the size of a real step. The goal is 20 times."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    x, y = feature_inputs(1, 127, 4, 4608)
    plain, fast = matching.fastest(
        lambda: matching.eager(x, y, "sample"), lambda: match(x, y, whitening="sample"), rounds=5
    )
    assert plain > 20 * fast
