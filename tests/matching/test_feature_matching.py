"""Rewards and advantages against loops in feature space, rank-deficient groups above all."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ebft_kernels import FeatureMatching, feature_matching
from ebft_kernels.matching import _torch, api
from ebft_kernels.testing import assert_within_budget, feature_inputs, randn

from ..op_checks import assert_compiles, fastest, impls_here

pytestmark = pytest.mark.usefixtures("device")
IMPLS = impls_here("feature_matching")
WHITENINGS = ("none", "sample", "feature")
ESTIMATORS = ("rloo", "reinforce", "group_norm")
EPS = torch.finfo(torch.float64).eps


def pseudo_inverse_root(matrix: Tensor) -> tuple[Tensor, float]:
    """``(matrix^+)^(1/2)`` of a positive semi-definite matrix, and the ratio of its kept eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values.clamp_min(0).sqrt() > 1e-5 * values.clamp_min(0).max().sqrt()
    values, vectors = values[keep], vectors[:, keep]
    condition = float(values.max() / values.min()) if len(values) else 1.0
    return vectors @ torch.diag(values**-0.5) @ vectors.T, condition


def brute_force(x: Tensor, y: Tensor, whitening: str, coefs: tuple[float, float], estimator: str, groups: int):
    """One anchor, rollouts [n, F] and target [F], sample by sample; and how much whitening amplifies rounding."""
    n, condition = len(x), 1.0
    xs, ys = [], []
    for part_x, part_y in zip(x.double().chunk(groups, -1), y.double().chunk(groups, -1), strict=True):
        met = part_y.expand(n, -1)
        if whitening == "sample":
            w, part_condition = pseudo_inverse_root(part_x @ part_x.T)
            part_x, met, condition = w @ part_x, torch.outer(w.sum(1), part_y), max(condition, part_condition)
        if whitening == "feature":
            m, part_condition = pseudo_inverse_root(part_x.T @ part_x)
            part_x, met, condition = part_x @ m, (part_y @ m).expand(n, -1), max(condition, part_condition)
        xs.append(part_x)
        ys.append(met)
    wx, wy = torch.cat(xs, -1), torch.cat(ys, -1)
    alignment = [float(2 * F.cosine_similarity(wx[i], wy[i], dim=0)) for i in range(n)]
    diversity = [sum(2 / (n - 1) * float(wx[i] @ wx[k]) for k in range(n) if k != i) for i in range(n)]
    reward = [coefs[0] * a - coefs[1] * d for a, d in zip(alignment, diversity, strict=True)]
    advantage = list(reward)
    if estimator == "rloo" and n > 1:
        for i in range(n):
            others = [k for k in range(n) if k != i]
            pairs = [float(wx[k] @ wx[m]) for k in others for m in others if m != k]
            without_i = 2 / (n - 1) / (n - 2) * sum(pairs) if n > 2 else 0
            advantage[i] -= coefs[0] * sum(alignment[k] for k in others) / (n - 1) - coefs[1] * without_i
    if estimator == "group_norm":
        mean = sum(reward) / n
        spread = math.sqrt(sum((r - mean) ** 2 for r in reward) / (n - 1)) if n > 1 else 0.0
        advantage = [(r - mean) / (spread + 1e-9) for r in reward]
    loss = float((x.double().mean(0) - y.double()).square().sum())
    return FeatureMatching(loss, alignment, diversity, reward, advantage), condition


def assert_agrees(result: FeatureMatching, x: Tensor, y: Tensor, *options) -> None:
    """Compare one anchor's float64 results with :func:`brute_force`, up to rounding as whitening amplifies it."""
    expected, condition = brute_force(x, y, *options)
    # Inner products are sums of F terms; whitening multiplies their relative error by the condition of what is kept.
    bound = 8 * x.shape[-1] * EPS * condition * max(1.0, float(x.square().sum(-1).max()))
    for name, actual, value in zip(FeatureMatching._fields, result, expected, strict=True):
        value = torch.tensor(value, dtype=torch.float64)
        allowed = bound
        if name == "advantage" and options[2] == "group_norm":
            spread = torch.tensor(expected.reward, dtype=torch.float64).std() if len(x) > 1 else 0
            allowed = bound * (1 + value.abs().max()) / (spread + 1e-9)
        error = (actual - value).abs().max()
        assert error <= allowed, f"{name}: error {error:.1e} exceeds {allowed:.1e}"


def each_anchor(result: FeatureMatching, x: Tensor, y: Tensor):
    for b in range(x.shape[0]):
        for a in range(x.shape[1]):
            yield FeatureMatching(*(z[b, a] for z in result)), x[b, a], y[b, a]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("n", (1, 2, 3, 4, 7, 16))
def test_agrees_with_loops(n, whitening, estimator, impl):
    for groups, duplicates in ((1, False), (1, True), (3, True)):
        x, y = feature_inputs(2, 4, n, 36, duplicates=duplicates, dtype=torch.float64, seed=n)
        options = {"whitening": whitening, "alignment_coef": 0.7, "diversity_coef": 1.3, "estimator": estimator}
        result = feature_matching(x, y, groups=groups, impl=impl, **options)
        for anchor in each_anchor(result, x, y):
            assert_agrees(*anchor, whitening, (0.7, 1.3), estimator, groups)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("whitening", ("sample", "feature"))
@pytest.mark.parametrize("distance", (1e-2, 1e-4, 1e-5, 2e-6, 1e-7, 1e-12))
def test_near_duplicates_on_both_sides_of_the_cut_off(distance, whitening, impl):
    x, y = feature_inputs(1, 3, 4, 36, dtype=torch.float64)
    # The smallest singular value becomes about 2.2 * distance of the largest; the cut-off is at 1e-5.
    x[:, :, 2] = x[:, :, 1] + distance * randn(1, 3, 36, seed=9)
    result = feature_matching(x, y, whitening=whitening, impl=impl)
    for anchor in each_anchor(result, x, y):
        assert_agrees(*anchor, whitening, (1.0, 1.0), "rloo", 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_more_rollouts_than_features(whitening, impl):
    x, y = feature_inputs(1, 3, 7, 4, dtype=torch.float64)
    result = feature_matching(x, y, whitening=whitening, impl=impl)
    for anchor in each_anchor(result, x, y):
        assert_agrees(*anchor, whitening, (1.0, 1.0), "rloo", 1)


def eager(x: Tensor, y: Tensor, whitening: str) -> FeatureMatching:
    """Feature space, SVD and float32 throughout: what one writes in plain PyTorch, estimator "rloo"."""
    x, y = x.float(), y.float()
    n = x.shape[-2]
    wx, wy = x, y[..., None, :].expand_as(x)
    if whitening != "none":
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        inverse = torch.where(s > 1e-5 * s[..., :1], 1 / s, 0)[..., None, :]
        w = (u * inverse) @ u.mT
        wx = w @ x if whitening == "sample" else u * (inverse > 0) @ vh
        wy = w.sum(-1, keepdim=True) * wy if whitening == "sample" else ((wy @ vh.mT) * inverse) @ vh
    alignment = 2 * F.cosine_similarity(wx, wy, dim=-1)
    products = wx @ wx.mT
    diversity = 2 / (n - 1) * (products.sum(-1) - products.diagonal(dim1=-2, dim2=-1))
    reward = alignment - diversity
    others_alignment = (alignment.sum(-1, keepdim=True) - alignment) / (n - 1)
    others_diversity = (diversity.sum(-1, keepdim=True) - 2 * diversity) / max(n - 2, 1) * (n > 2)
    advantage = reward - (others_alignment - others_diversity)
    return FeatureMatching((x.mean(-2) - y).square().sum(-1), alignment, diversity, reward, advantage)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("n", (2, 4, 7))
def test_every_dtype_within_the_error_budget(n, whitening, dtype):
    x, y = feature_inputs(2, 9, n, 200, duplicates=True, dtype=dtype)
    truth = feature_matching(x.double(), y.double(), whitening=whitening, impl="reference")
    for impl in IMPLS:
        result = feature_matching(x, y, whitening=whitening, impl=impl)
        for name, actual, plain, exact in zip(result._fields, result, eager(x, y, whitening), truth, strict=True):
            assert actual.dtype == torch.float32
            assert_within_budget(actual, plain, exact, f"{impl} {name}")


@pytest.mark.parametrize("whitening", ("sample", "feature"))
@pytest.mark.parametrize("distance", (1e-2, 1e-3, 1e-6))
def test_float32_features_need_a_float64_gram_matrix(distance, whitening):
    """A singular value d of the features is d^2 in the Gram matrix: float32 sums would lose what the features have."""
    x, y = feature_inputs(1, 20, 4, 300)
    x[:, :, 2] = x[:, :, 1] + distance * randn(1, 20, 300, seed=9, dtype=torch.float32) / 300**0.5
    truth = feature_matching(x.double(), y.double(), whitening=whitening, impl="reference")
    result = feature_matching(x, y, whitening=whitening, impl="torch")
    for name, *tensors in zip(result._fields, result, eager(x, y, whitening), truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("whitening", ("sample", "feature"))
def test_what_whitening_makes_of_duplicates(whitening, dtype, impl):
    """Distinct rollouts come out orthonormal; a pair of equal ones shares one direction."""
    x, y = feature_inputs(1, 2, 4, 300, dtype=dtype)
    x[:, 1, 3] = x[:, 1, 1]
    result = feature_matching(x, y, whitening=whitening, impl=impl)
    rounding = 300 * EPS * 100 if dtype == torch.float64 else torch.finfo(torch.float32).eps
    expected = torch.tensor([[0, 0, 0, 0], [0, 1 / 3, 0, 1 / 3]], dtype=dtype)
    assert (result.diversity[0] - expected).abs().max() <= rounding
    assert result.reward[0, 1, 1] == result.reward[0, 1, 3] or dtype == torch.float64
    if impl == "torch":
        assert (result.diversity[0, 0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("whitening", WHITENINGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_zero_features_give_zeros(estimator, whitening, impl):
    x, y = feature_inputs(1, 3, 4, 10)
    x[:, 0] = 0
    y[:, 0] = 0
    x[:, 1] = 0
    y[:, 2] = 0
    result = feature_matching(x, y, whitening=whitening, estimator=estimator, groups=2, impl=impl)
    assert all(z.isfinite().all() for z in result)
    assert all((z[:, 0] == 0).all() for z in result)
    assert all((z[:, 1] == 0).all() for z in result[1:])
    assert (result.alignment[:, 2] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_one_rollout_of_zeros(whitening, impl):
    x, y = feature_inputs(1, 2, 4, 10, dtype=torch.float64)
    x[:, :, 2] = 0
    result = feature_matching(x, y, whitening=whitening, impl=impl)
    # Its whitened norm is rounding below the eps of the cosine, 1e-8, which bounds what the quotient can be.
    assert result.alignment[:, :, 2].abs().max() <= 2e-8
    for anchor in each_anchor(result, x, y):
        reward = torch.tensor(brute_force(*anchor[1:], whitening, (1.0, 1.0), "rloo", 1)[0].reward, dtype=torch.float64)
        assert (anchor[0].reward - reward).abs().max() <= 4e-8


@pytest.mark.parametrize("n", (2, 3, 4, 7))
def test_the_baseline_of_a_rollout_does_not_depend_on_it(n):
    x, y = feature_inputs(1, 3, n, 12, dtype=torch.float64)
    other = x.clone()
    other[:, :, 1] = randn(1, 3, 12, seed=5)
    before, after = (feature_matching(z, y, diversity_coef=0.6) for z in (x, other))
    change = ((before.reward - before.advantage) - (after.reward - after.advantage)).abs()
    assert change[:, :, 1].max() <= 100 * EPS
    assert change[:, :, 0].min() > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_group_norm(impl):
    x, y = feature_inputs(2, 3, 5, 12, dtype=torch.float64)
    x[:, 1] = x[:, 1, :1]
    advantage = feature_matching(x, y, estimator="group_norm", impl=impl).advantage
    distinct = advantage[:, ::2]
    assert distinct.mean(-1).abs().max() <= 100 * EPS
    assert (distinct.std(-1) - 1).abs().max() <= 1e-6
    assert advantage[:, 1].abs().max() <= 100 * EPS / 1e-9
    single = feature_matching(x[:, :, :1], y, estimator="group_norm", impl=impl).advantage
    assert (single == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_invalid_anchors_are_zero_and_touch_nothing(whitening, impl):
    x, y = feature_inputs(2, 4, 4, 10)
    valid = torch.tensor([[True, False, True, True], [False, True, True, False]])
    whole = feature_matching(x, y, whitening=whitening, impl=impl)
    result = feature_matching(x, y, whitening=whitening, valid=valid, impl=impl)
    for masked, plain in zip(result, whole, strict=True):
        assert (masked[~valid] == 0).all()
        assert torch.equal(masked[valid], plain[valid])


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_non_finite_features_stay_in_their_anchor(whitening):
    x, y = feature_inputs(2, 4, 4, 10)
    clean = feature_matching(x, y, whitening=whitening)
    broken = torch.zeros(2, 4, dtype=torch.bool)
    broken[0, 1] = broken[1, 2] = True
    x[0, 1, 2, 3], x[1, 2, 0, 0] = math.nan, math.inf
    result = feature_matching(x, y, whitening=whitening)
    assert result.reward[broken].isnan().any(-1).all()
    assert all(torch.equal(a[~broken], b[~broken]) for a, b in zip(result, clean, strict=True))
    masked = feature_matching(x, y, whitening=whitening, valid=~broken)
    assert all((z[broken] == 0).all() for z in masked)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("whitening", WHITENINGS)
def test_features_per_token_are_anchors_of_their_own(whitening, impl):
    steps = 3
    x, y = feature_inputs(2, 5 * steps, 4, 10, duplicates=True)
    valid = torch.tensor([[True, True, False, True, True], [True, False, True, True, False]])
    flat = feature_matching(x, y, whitening=whitening, valid=valid.repeat_interleave(steps, 1), impl=impl)
    per_token = x.unflatten(1, (5, steps)).movedim(2, 3).contiguous()  # [B, A, n, G, F]
    result = feature_matching(per_token, y.unflatten(1, (5, steps)), whitening=whitening, valid=valid, impl=impl)
    assert result.loss.shape == (2, 5, steps) and result.reward.shape == (2, 5, 4, steps)
    assert torch.equal(result.loss, flat.loss.view(2, 5, steps))
    for actual, expected in zip(result[1:], flat[1:], strict=True):
        assert torch.equal(actual, expected.unflatten(1, (5, steps)).movedim(2, 3))


def test_groups_are_whitened_apart_and_compared_together():
    x, y = feature_inputs(1, 3, 4, 12, dtype=torch.float64)
    x[:, :, :, :4] *= 100  # a loud part would drown the others if all were whitened together
    together, apart = (feature_matching(x, y, whitening="feature", groups=g) for g in (1, 3))
    parts = [feature_matching(a, b, whitening="feature") for a, b in zip(x.chunk(3, -1), y.chunk(3, -1), strict=True)]
    assert (apart.diversity - sum(p.diversity for p in parts)).abs().max() <= 1e4 * EPS
    assert (apart.alignment - together.alignment).abs().max() > 1e-2
    assert torch.equal(apart.loss, feature_matching(x, y, groups=3).loss)


@pytest.mark.parametrize("tile_bytes", (1, 5000, 1 << 30))
@pytest.mark.parametrize("shape", ((2, 7), (3, 1), (1, 13)))
def test_tiles_change_nothing(shape, tile_bytes, monkeypatch):
    x, y = feature_inputs(*shape, 4, 24, duplicates=True)
    expected = feature_matching(x, y, whitening="sample", groups=2)
    monkeypatch.setattr(_torch, "CPU_TILE_BYTES", tile_bytes)
    for actual, plain in zip(feature_matching(x, y, whitening="sample", groups=2), expected, strict=True):
        assert (actual - plain).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", ((0, 3), (2, 0)))
def test_empty_batch(shape, impl):
    result = feature_matching(torch.empty(*shape, 4, 9), torch.empty(*shape, 9), whitening="sample", impl=impl)
    assert [z.shape for z in result] == [shape, *[(*shape, 4)] * 4]


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_flows(impl):
    x, y = (z.requires_grad_() for z in feature_inputs(1, 3, 4, 9))
    assert not any(z.requires_grad for z in feature_matching(x, y, whitening="sample", impl=impl))


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_strided_and_expanded_inputs(whitening):
    x, y = feature_inputs(2, 6, 8, 20)
    sliced, target = x[:, ::2, 1:7:2, 2:].transpose(0, 1), y[:, ::2, 2:].transpose(0, 1)
    repeated = x[:, :, :1].expand(-1, -1, 4, -1)
    for a, b in ((sliced, target), (repeated, y), (x[..., :1].expand_as(x), y[..., :1].expand_as(y))):
        views = feature_matching(a, b, whitening=whitening)
        dense = feature_matching(a.contiguous(), b.contiguous(), whitening=whitening)
        assert all(torch.equal(p, q) for p, q in zip(views, dense, strict=True))


def test_results_repeat_bitwise():
    x, y = feature_inputs(2, 61, 4, 257, duplicates=True)
    first, second = (feature_matching(x, y, whitening="sample") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    x, y = feature_inputs(2, 6, 4, 33, duplicates=True)
    plain = feature_matching(x, y, whitening="sample", impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = feature_matching(x, y, whitening="sample", impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_two_results_share_memory(estimator, n):
    """Where nothing is cast and no baseline is taken off, they could; custom operators must not return aliases."""
    x, y = feature_inputs(1, 2, n, 6, dtype=torch.float64)
    torch.library.opcheck(api._matching_op, (x, y, "none", 1.0, 1.0, estimator, 1, "torch"), test_utils="test_schema")
    results = feature_matching(x, y, estimator=estimator)
    assert len({z.untyped_storage().data_ptr() for z in results}) == len(results)


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_registration(whitening):
    x, y = feature_inputs(2, 3, 4, 6)
    torch.library.opcheck(api._matching_op, (x, y, whitening, 1.0, 0.5, "rloo", 2, "torch"))
    per_token = x.unflatten(1, (1, 3)).movedim(2, 3), y.unflatten(1, (1, 3))
    torch.library.opcheck(
        api._matching_op, (per_token[0].movedim(2, -2), per_token[1], whitening, 1.0, 0.5, "group_norm", 1, "torch")
    )


def test_compiles_without_breaks_and_without_recompiling_for_sizes():
    def match(x, y):
        return feature_matching(x, y, whitening="sample", valid=y[..., 0] > 0)

    sizes = ((2, 5, 3, 33), (3, 6, 4, 35), (4, 9, 5, 50), (5, 8, 6, 40))
    assert_compiles(match, [feature_inputs(*size) for size in sizes], graphs=2)  # the first sizes, all others


@pytest.mark.speed
@pytest.mark.parametrize("impl", IMPLS[: IMPLS.index("reference")])
def test_much_faster_than_feature_space(impl):
    """At the size of a real step, on two threads. Plain PyTorch reaches 10 to 13 alone; its bound is for busy days."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x, y = feature_inputs(1, 127, 4, 4608)
        match = functools.partial(feature_matching, x, y, whitening="sample", impl=impl)
        plain, fast = fastest(lambda: eager(x, y, "sample"), match, rounds=5)
    finally:
        torch.set_num_threads(threads)
    assert plain > {"native": 20, "torch": 5}[impl] * fast


ARGUMENTS = {"rollout_features": torch.zeros(2, 3, 4, 6), "target_features": torch.zeros(2, 3, 6)}
BAD = [
    ({"rollout_features": [1.0]}, TypeError, r"rollout_features: expected a tensor \[B, A, n, F\], got list"),
    ({"rollout_features": torch.zeros(2, 3, 6)}, ValueError, r"rollout_features: expected shape \[B, A, n, F\]"),
    ({"rollout_features": torch.zeros(2, 3, 4, 5, 6)}, ValueError, r"target_features: expected shape \[B=2, A=3, G=5"),
    ({"rollout_features": torch.zeros(2, 3, 4, 6).int()}, TypeError, "rollout_features: expected dtype"),
    ({"rollout_features": torch.zeros(2, 3, 0, 6)}, ValueError, "at least one rollout and one feature"),
    ({"target_features": torch.zeros(2, 3, 5)}, ValueError, r"target_features: expected shape \[B=2, A=3, F=6\]"),
    ({"target_features": torch.zeros(2, 3, 6).half()}, TypeError, "target_features: expected dtype float32"),
    ({"target_features": torch.zeros(2, 3, 6, device="meta")}, ValueError, "target_features: expected a tensor on cpu"),
    ({"valid": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "valid: expected shape"),
    ({"valid": torch.ones(2, 3)}, TypeError, "valid: expected dtype bool"),
    ({"whitening": True}, ValueError, "whitening: expected one of 'none', 'sample', 'feature'; got True"),
    ({"estimator": "grpo"}, ValueError, "estimator: expected one of 'rloo', 'reinforce', 'group_norm'; got 'grpo'"),
    ({"alignment_coef": "1"}, TypeError, "alignment_coef: expected a number, got str"),
    ({"diversity_coef": math.nan}, ValueError, "diversity_coef: expected a finite number, got nan"),
    ({"groups": 0}, ValueError, "groups: expected at least 1, got 0"),
    ({"groups": 2.0}, TypeError, "groups: expected an int, got float"),
    ({"groups": 4}, ValueError, "groups: expected a divisor of F = 6, got 4"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        feature_matching(**{**ARGUMENTS, **change})
