"""The mean-embedding loss against loops over rollouts, its gradients, and what it does at its edges."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_kernels import mean_embedding_loss
from ebft_kernels.matching import api
from ebft_kernels.testing import assert_within_budget, feature_inputs, randn

from ..op_checks import assert_compiles, impls_here, results_and_gradients

pytestmark = pytest.mark.usefixtures("device")
IMPLS = impls_here("mean_embedding_loss")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def brute_force(rollouts: Tensor, targets: Tensor, unbiased: bool) -> Tensor:
    """[B, A] by loops over pairs of rollouts, in float64."""
    batch, anchors, n, _ = rollouts.shape
    loss = torch.zeros(batch, anchors, dtype=torch.float64)
    for b, a in itertools.product(range(batch), range(anchors)):
        x, y = rollouts[b, a].double(), targets[b, a].double()
        pairs = [(j, k) for j in range(n) for k in range(n) if not (unbiased and j == k)]
        loss[b, a] = sum(x[j] @ x[k] for j, k in pairs) / len(pairs) - 2 * sum(x[j] @ y for j in range(n)) / n + y @ y
    return loss


def eager(rollouts: Tensor, targets: Tensor, unbiased: bool) -> Tensor:
    """The formula in plain PyTorch, all in the dtype of the features."""
    mean = rollouts.mean(2)
    if not unbiased:
        return (mean - targets).square().sum(-1)
    n = rollouts.shape[2]
    products = rollouts @ rollouts.mT
    pairs = products.sum((-2, -1)) - products.diagonal(dim1=-2, dim2=-1).sum(-1)
    return pairs / (n * (n - 1)) - 2 * (mean * targets).sum(-1) + targets.square().sum(-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("n", "unbiased"), [(n, u) for n in (1, 2, 3, 4, 7, 16) for u in (False, True) if n > 1 or not u]
)
def test_agrees_with_loops(n, unbiased, impl):
    x, y = feature_inputs(2, 5, n, 37, duplicates=True, dtype=torch.float64)
    loss = mean_embedding_loss(x, y, unbiased=unbiased, reduction="none", impl=impl)
    # Four means of inner products of unit vectors, each a sum of 37 rounded terms.
    assert (loss - brute_force(x, y, unbiased)).abs().max() <= 4 * 37 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("n", (2, 5))
def test_loss_and_gradients_in_every_dtype(n, unbiased, dtype):
    x, y = (z.requires_grad_() for z in feature_inputs(2, 7, n, 130, duplicates=True, dtype=dtype))
    exact = [z.detach().double().requires_grad_() for z in (x, y)]
    upstream = randn(2, 7, seed=3)

    def run(loss, leaves):
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    actual = run(mean_embedding_loss(x, y, unbiased=unbiased, reduction="none", impl="torch"), (x, y))
    plain = run(eager(x, y, unbiased), (x, y))
    truth = run(mean_embedding_loss(*exact, unbiased=unbiased, reduction="none", impl="reference"), exact)
    assert [z.dtype for z in actual] == [torch.float32, dtype, dtype]
    for name, *tensors in zip(("loss", "grad rollouts", "grad targets"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unbiased", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_gradcheck(reduction, unbiased, impl):
    x, y = (z.requires_grad_() for z in feature_inputs(2, 3, 3, 5, dtype=torch.float64))
    valid = torch.tensor([[True, False, True], [False, False, True]])

    def loss(x, y):
        return mean_embedding_loss(x, y, valid=valid, unbiased=unbiased, reduction=reduction, impl=impl)

    assert torch.autograd.gradcheck(loss, (x, y))


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(impl):
    x, y = feature_inputs(2, 3, 4, 9, dtype=torch.float64)
    valid = torch.tensor([[True, False, True], [False, False, True]])
    each = mean_embedding_loss(x, y, reduction="none", impl=impl)
    total = each[0, 0] + each[0, 2] + each[1, 2]
    rounding = 8 * torch.finfo(torch.float64).eps * each.sum()
    assert torch.equal(mean_embedding_loss(x, y, valid=valid, reduction="none", impl=impl), each * valid)
    assert abs(mean_embedding_loss(x, y, valid=valid, reduction="sum", impl=impl) - total) <= rounding
    assert abs(mean_embedding_loss(x, y, valid=valid, impl=impl) - total / 3) <= rounding
    assert abs(mean_embedding_loss(x, y, impl=impl) - each.sum() / 6) <= rounding


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_no_valid_anchor_gives_zero_and_no_gradient(reduction, impl):
    x, y = (z.requires_grad_() for z in feature_inputs(2, 3, 4, 9))
    valid = torch.zeros(2, 3, dtype=torch.bool)
    loss = mean_embedding_loss(x, y, valid=valid, reduction=reduction, impl=impl)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, y)))


def assert_invalid_weigh_nothing(impl: str, unbiased: bool, n: int) -> None:
    """Bit for bit, whatever the features of anchors that are not valid are."""
    valid = torch.tensor([[True, False, True], [False, True, True]])
    results = []
    for fill in (0.5, float("nan"), float("-inf")):
        rollouts, targets = feature_inputs(2, 3, n, 70)
        rollouts[~valid] = fill
        targets[~valid] = fill
        leaves = [x.requires_grad_() for x in (rollouts, targets)]
        loss = mean_embedding_loss(*leaves, valid=valid, unbiased=unbiased, impl=impl)
        results.append(results_and_gradients(loss, leaves))
        assert not any(x[~valid].any() for x in results[-1][1:])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unbiased", (False, True))
def test_anchors_that_are_not_valid_weigh_nothing(unbiased, impl):
    assert_invalid_weigh_nothing(impl, unbiased, 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_empty_batch(shape, impl):
    x, y = torch.empty(*shape, 4, 9, requires_grad=True), torch.empty(*shape, 9)
    assert mean_embedding_loss(x, y, reduction="none", impl=impl).shape == shape
    loss = mean_embedding_loss(x, y, impl=impl)
    assert loss == 0
    assert torch.autograd.grad(loss, x)[0].shape == x.shape


def test_unbiased_estimate_is_a_u_statistic():
    """Over all subsets of a population its mean is the value of the whole population."""
    x, y = feature_inputs(1, 1, 6, 8, dtype=torch.float64)
    subsets = [list(c) for c in itertools.combinations(range(6), 3)]
    mean = sum(mean_embedding_loss(x[:, :, s], y, unbiased=True) for s in subsets) / len(subsets)
    whole = mean_embedding_loss(x, y, unbiased=True)
    biased = mean_embedding_loss(x, y)
    rounding = 64 * torch.finfo(torch.float64).eps
    assert abs(mean - whole) <= rounding < abs(biased - whole)


@pytest.mark.parametrize("needs", ((True, False), (False, True)))
@pytest.mark.parametrize("unbiased", (False, True))
def test_strided_inputs_and_gradients_for_one_argument(needs, unbiased):
    x, y = feature_inputs(2, 6, 8, 10)
    views = (x[:, ::2, 1:7:2, 1:].movedim(-1, 0).contiguous().movedim(0, -1), y[:, :3, 1:])
    dense = [z.contiguous() for z in views]

    def run(x, y):
        leaves = [z.detach().requires_grad_(need) for z, need in zip((x, y), needs, strict=True)]
        loss = mean_embedding_loss(*leaves, unbiased=unbiased, reduction="none")
        return results_and_gradients(loss, [z for z in leaves if z.requires_grad])

    assert not views[0].is_contiguous()
    for a, b in zip(run(*views), run(*dense), strict=True):
        # Only the order of sums over F may differ: F roundings of values below 4.
        assert (a - b).abs().max() <= 10 * 4 * torch.finfo(torch.float32).eps


def test_expanded_rollouts_and_expanded_upstream_gradient():
    _, y = feature_inputs(2, 6, 1, 10, dtype=torch.float64)
    x = randn(10, seed=4).requires_grad_()
    loss = mean_embedding_loss(x.expand(2, 6, 4, 10), y, reduction="none")
    (grad,) = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=torch.float64).expand(2, 6))
    expected = (6 * (x.detach() - y)).sum((0, 1))
    assert (grad - expected).abs().max() <= 12 * 10 * torch.finfo(torch.float64).eps * expected.abs().max()


def test_results_repeat_bitwise():
    x, y = (z.requires_grad_() for z in feature_inputs(2, 31, 4, 257))
    first, second = (results_and_gradients(mean_embedding_loss(x, y, unbiased=True), (x, y)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    x, y = feature_inputs(2, 6, 4, 33)
    plain = mean_embedding_loss(x, y, unbiased=True, impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(mean_embedding_loss(x, y, unbiased=True, impl=impl), plain)


@pytest.mark.parametrize("unbiased", (False, True))
def test_registration(unbiased):
    x, y = (z.requires_grad_() for z in feature_inputs(2, 3, 4, 5))
    torch.library.opcheck(api._mean_embedding_op, (x, y, unbiased, "torch"))
    grads = (randn(2, 3, seed=1, dtype=torch.float32), x.detach(), y.detach(), unbiased, "torch")
    torch.library.opcheck(api._mean_embedding_backward_op, grads)


def test_compiles_without_breaks_and_without_recompiling_for_sizes():
    def loss(x, y):
        return mean_embedding_loss(x, y, valid=y[..., 0] > 0, unbiased=True)

    sizes = ((2, 5, 3, 33), (3, 6, 4, 35), (4, 9, 5, 50), (5, 8, 6, 40))
    calls = [[z.requires_grad_() for z in feature_inputs(*size)] for size in sizes]
    assert_compiles(loss, calls, graphs=2)  # one for the first sizes, one for all others


BAD = [
    ({"rollout_features": [1.0]}, TypeError, r"rollout_features: expected a tensor \[B, A, n, F\], got list"),
    ({"rollout_features": torch.zeros(2, 3, 5)}, ValueError, "rollout_features: expected shape"),
    ({"rollout_features": torch.zeros(2, 3, 4, 5, dtype=torch.int64)}, TypeError, "rollout_features: expected dtype"),
    ({"rollout_features": torch.zeros(2, 3, 0, 5)}, ValueError, "at least one rollout and one feature"),
    ({"target_features": torch.zeros(2, 3, 6)}, ValueError, r"target_features: expected shape \[B=2, A=3, F=5\]"),
    (
        {"target_features": torch.zeros(2, 3, 5, dtype=torch.float64)},
        TypeError,
        "target_features: expected dtype float32",
    ),
    ({"target_features": torch.zeros(2, 3, 5, device="meta")}, ValueError, "target_features: expected a tensor on cpu"),
    ({"valid": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "valid: expected shape"),
    ({"valid": torch.ones(2, 3)}, TypeError, "valid: expected dtype bool"),
    ({"reduction": "average"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none'; got 'average'"),
    ({"unbiased": "yes"}, ValueError, "unbiased: expected one of False, True; got 'yes'"),
    ({"unbiased": True, "rollout_features": torch.zeros(2, 3, 1, 5)}, ValueError, "unbiased: expected at least n = 2"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    arguments = {"rollout_features": torch.zeros(2, 3, 4, 5), "target_features": torch.zeros(2, 3, 5), **change}
    with pytest.raises(error, match=message):
        mean_embedding_loss(**arguments)
