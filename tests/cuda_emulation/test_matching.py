"""Feature matching and the mean-embedding loss by the CUDA kernels, run by the emulation."""

from __future__ import annotations

import itertools
import math
import mmap

import pytest
import torch
from torch import Tensor

from ebft_kernels import feature_matching, mean_embedding_loss, select_impl
from ebft_kernels.testing import assert_within_budget, feature_inputs, randn

from ..golden import test_matching_golden as golden
from ..golden.loader import case_parameters
from ..matching import test_feature_matching as matching
from ..matching import test_mean_embedding_loss as embedding

pytestmark = pytest.mark.usefixtures("cuda")

WHITENINGS = ("none", "sample", "feature")
ESTIMATORS = ("rloo", "reinforce", "group_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = DTYPES[1:]
EPS = torch.finfo(torch.float64).eps


def match(x: Tensor, y: Tensor, **options):
    return feature_matching(x, y, impl="native", **options)


def loss_and_gradients(x: Tensor, y: Tensor, *, unbiased: bool, impl: str = "native") -> list[Tensor]:
    """The loss [B, A] and, for random upstream gradients, those of both inputs."""
    leaves = [z.detach().requires_grad_() for z in (x, y)]
    loss = mean_embedding_loss(*leaves, unbiased=unbiased, reduction="none", impl=impl)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, randn(*loss.shape, seed=3).to(loss.dtype))]


@pytest.mark.parametrize("name", case_parameters())
def test_recorded_rewards(name):
    golden.test_rewards(name, "native")


@pytest.mark.parametrize("name", case_parameters(golden.advantages_are_comparable))
def test_recorded_advantages(name):
    golden.test_advantages(name, "native")


@pytest.mark.parametrize("n", range(1, 17))
def test_agrees_with_loops(n):
    for number, (whitening, groups) in enumerate(itertools.product(WHITENINGS, (1, 3))):
        estimator = ESTIMATORS[(n + number) % 3]
        x, y = feature_inputs(1, 2, n, 51, duplicates=groups > 1, dtype=torch.float64, seed=n)
        options = {"alignment_coef": 0.7, "diversity_coef": 1.3, "estimator": estimator, "groups": groups}
        result = match(x, y, whitening=whitening, **options)
        for anchor in matching.each_anchor(result, x, y):
            matching.assert_agrees(*anchor, whitening, (0.7, 1.3), estimator, groups)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", (2, 3, 4, 7, 8, 11, 16))
def test_every_dtype_within_the_error_budget(n, dtype):
    x, y = feature_inputs(1, 4, n, 203, duplicates=True, dtype=dtype, seed=n)
    for whitening in WHITENINGS:
        truth = feature_matching(x.double(), y.double(), whitening=whitening, impl="reference")
        eager = matching.eager(x, y, whitening)
        result = match(x, y, whitening=whitening)
        for name, actual, plain, exact in zip(result._fields, result, eager, truth, strict=True):
            assert actual.dtype == torch.float32
            assert_within_budget(actual, plain, exact, f"{whitening} {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", (*range(1, 19), 31, 33, 1023, 1024, 2050))
def test_every_width(features, dtype):
    """One or several warps; whole pieces of 16 bytes and what remains of them."""
    for n, a in ((4, 2), (11, 1)):
        x, y = feature_inputs(1, a, n, features, dtype=dtype, seed=features)
        result, truth = match(x, y), feature_matching(x.double(), y.double(), impl="reference")
        # Unit vectors: inner products of at most 1, each a sum of F terms; then the rounding of the result.
        bound = 16 * (features + n) * EPS
        for actual, exact in zip(result, truth, strict=True):
            rounding = 8 * torch.finfo(actual.dtype).eps * (actual.dtype != torch.float64)
            assert (actual - exact).abs().max() <= bound + rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_alignment_and_any_strides(dtype):
    x, y = feature_inputs(2, 6, 8, 53, dtype=dtype)
    tokens = x.unflatten(1, (3, 2)).movedim(2, 3), y.unflatten(1, (3, 2))  # [B, A, n, G, F], [B, A, G, F]
    padded = [torch.nn.functional.pad(z, (0, 11), value=torch.nan)[..., :53] for z in (x, y)]
    views = [
        (x[:, ::2, 1:7:2, 2:].transpose(0, 1), y[:, ::2, 2:].transpose(0, 1)),
        (x[:, :, :1].expand(-1, -1, 4, -1), y),
        (x[..., ::2], y[..., ::2]),
        tuple(padded),  # rows begin at multiples of 16 bytes, F is odd
        (padded[0], y),
        tokens,
    ]
    assert padded[0].stride(2) * x.element_size() % 16 == 0 and not x[..., 2:].is_contiguous()
    for a, b in views:
        result = match(a, b, whitening="sample")
        truth = feature_matching(a.double(), b.double(), whitening="sample", impl="torch")
        for actual, exact in zip(result, truth, strict=True):
            assert (actual - exact).abs().max() <= 4 * torch.finfo(actual.dtype).eps * (1 + 500 * (dtype == DTYPES[0]))
        if a.ndim == 4:
            for unbiased in (False, True):
                of_view, of_copy = (
                    loss_and_gradients(p, q, unbiased=unbiased) for p, q in ((a, b), (a.clone(), b.clone()))
                )
                for p, q in zip(of_view, of_copy, strict=True):
                    assert (p - q).abs().max() <= 8 * torch.finfo(q.dtype).eps * q.abs().max()


@pytest.mark.parametrize("distance", (1e-2, 1e-4, 1e-5, 2e-6, 1e-7, 1e-12))
@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_near_duplicates_on_both_sides_of_the_cut_off(whitening, distance):
    for n in (3, 4, 11):
        x, y = feature_inputs(1, 2, n, 36, dtype=torch.float64)
        x[:, :, 2] = x[:, :, 1] + distance * randn(1, 2, 36, seed=9)
        for anchor in matching.each_anchor(match(x, y, whitening=whitening), x, y):
            matching.assert_agrees(*anchor, whitening, (1.0, 1.0), "rloo", 1)


@pytest.mark.parametrize("broken", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_non_finite_features_stay_in_their_anchor_and_are_as_in_torch(whitening, broken):
    for n, rollout in itertools.product((1, 4, 7), (True, False)):
        x, y = feature_inputs(1, 4, n, 12)
        clean = match(x, y, whitening=whitening, groups=2)
        (x[0, 1, n // 2] if rollout else y[0, 1])[3] = broken
        result = match(x, y, whitening=whitening, groups=2)
        for actual, before in zip(result, clean, strict=True):
            assert torch.equal(actual[0, [0, 2, 3]], before[0, [0, 2, 3]])
        assert result.alignment[0, 1, n // 2].isnan()
        expected = feature_matching(x, y, whitening=whitening, groups=2, impl="torch")
        assert torch.equal(result.alignment.isnan(), expected.alignment.isnan())
        assert torch.equal(result.loss.isfinite(), expected.loss.isfinite())


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


def test_zero_features_give_zeros():
    x, y = torch.zeros(1, 2, 4, 10), torch.zeros(1, 2, 10)
    for whitening, estimator in itertools.product(WHITENINGS, ESTIMATORS):
        assert all((z == 0).all() for z in match(x, y, whitening=whitening, estimator=estimator, groups=2))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize(("n", "features"), ((2, 131), (4, 128), (7, 1), (17, 1030)))
def test_loss_and_gradients_within_the_error_budget(n, features, unbiased, dtype):
    x, y = (z.requires_grad_() for z in feature_inputs(2, 3, n, features, duplicates=True, dtype=dtype))
    actual = loss_and_gradients(x, y, unbiased=unbiased)
    plain = embedding.eager(x, y, unbiased)
    upstream = randn(2, 3, seed=3).to(plain.dtype)
    plain = [plain.detach(), *torch.autograd.grad(plain, (x, y), upstream)]
    truth = loss_and_gradients(x.double(), y.double(), unbiased=unbiased, impl="reference")
    assert [z.dtype for z in actual] == [torch.float32, dtype, dtype]
    for name, *tensors in zip(("loss", "grad rollouts", "grad targets"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_numbers_are_read_right_and_rounded_to_nearest_even(dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    every = every[every.isfinite()]
    module = matching.api.implementation("mean_embedding_loss", "native")
    like = every.view(1, 1, 1, -1)
    _, difference = module.mean_embedding_forward(like, torch.zeros_like(like[:, 0]), False)
    assert torch.equal(difference.flatten(), every.float())
    numbers = every.float().sort().values
    middle = (numbers[1:].double() + numbers[:-1].double()).div(2).float()  # ties
    numbers = torch.cat([numbers, middle, middle.nextafter(numbers[1:]), middle.nextafter(numbers[:-1])])
    numbers = torch.cat([numbers, torch.tensor([1e30, -1e30, math.inf, -math.inf, 65519.0, 65520.0])])
    grad, like = torch.full((1, 1), -0.5), torch.zeros(1, 1, 1, len(numbers), dtype=dtype)
    _, rounded = module.mean_embedding_backward(grad, like, numbers.view(1, 1, -1), False)
    assert torch.equal(rounded.flatten(), numbers.to(dtype))


@pytest.mark.parametrize("unbiased", (False, True))
def test_gradcheck(unbiased):
    x, y = (z.requires_grad_() for z in feature_inputs(1, 2, 3, 5, dtype=torch.float64))
    valid = torch.tensor([[True, False]])
    assert torch.autograd.gradcheck(
        lambda x, y: mean_embedding_loss(x, y, valid=valid, unbiased=unbiased, impl="native"), (x, y)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_in_which_threads_run_changes_nothing(cuda, dtype):
    """One or four warps, one or several tiles, aligned or not."""
    cases = [feature_inputs(1, 2, n, features, dtype=dtype) for n, features in ((4, 77), (4, 1100), (12, 640))]

    def run(order):
        cuda.set_order(order)
        results = [z for case in cases for z in match(*case, whitening="sample")]
        return results + [z for case in cases[:2] for z in loss_and_gradients(*case, unbiased=True)]

    ascending = run(0)
    for order in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(run(order), ascending, strict=True))


@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_empty_batch(shape):
    x, y = torch.empty(*shape, 4, 9, requires_grad=True), torch.empty(*shape, 9)
    assert [z.shape for z in match(x, y, whitening="sample")] == [shape, *[(*shape, 4)] * 4]
    loss = mean_embedding_loss(x, y, unbiased=True, impl="native")
    assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == x.shape


def test_17_rollouts_are_declined_and_left_to_others():
    x, y = feature_inputs(1, 1, 17, 9)
    with pytest.raises(ValueError, match="'native' .* at most n = 16, got 17.*; available there: torch, reference"):
        match(x, y)
    assert select_impl("feature_matching", "cpu", x.dtype, sizes={"n": 16}) == "native"
    assert select_impl("feature_matching", "cpu", x.dtype, sizes={"n": 17}) == "torch"
    for a, b in zip(feature_matching(x, y), feature_matching(x, y, impl="torch"), strict=True):
        assert torch.equal(a, b)


def test_an_error_of_cuda_comes_with_the_name_of_the_kernel_and_the_launch_geometry(cuda):
    """2^31 anchors are more blocks than a grid may have: no address is looked at."""
    sizes = (1 << 31, 1, 1)
    message = (
        r"^mean_embedding_fwd_kernel \(2147483648 blocks of 32 threads, 0 bytes of shared memory\): cudaErrorInvalid"
    )
    with pytest.raises(RuntimeError, match=message):
        cuda.module.mean_embedding_forward(0, 1, sizes, 64, (4, 4), 64, (4,), False, 64, 64)


def test_strides_beyond_2_to_the_31_elements():
    """Rollouts and anchors so far apart that their offsets in elements, and in bytes, need 64 bits."""
    far, features = (1 << 31) + 64, 40
    # Pages that nobody touches take no memory.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    flat = torch.frombuffer(mmap.mmap(-1, 2 * 4 * far, flags=flags), dtype=torch.bfloat16)
    wide_x = flat.as_strided((1, 2, 2, features), (0, 2 * far, far, 1))
    wide_y = flat.as_strided((1, 2, features), (0, 2 * far, 1), 48)
    x, y = feature_inputs(1, 2, 2, features, dtype=torch.bfloat16)
    wide_x.copy_(x)
    wide_y.copy_(y)
    for a, b in zip(match(wide_x, wide_y, whitening="sample"), match(x, y, whitening="sample"), strict=True):
        assert (a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps
    for unbiased in (False, True):
        results = (loss_and_gradients(*pair, unbiased=unbiased) for pair in ((wide_x, wide_y), (x, y)))
        for a, b in zip(*results, strict=True):
            assert (a - b).abs().max() <= 2 * torch.finfo(b.dtype).eps * b.abs().max()
