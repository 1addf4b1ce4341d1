"""Pooling against loops over rollouts, its gradients, and what it reads and does not read."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, feature_matching, pool_features
from ebft_kernels.pooling import _torch, api
from ebft_kernels.testing import LAYOUTS, assert_within_budget, randn

from ..op_checks import assert_compiles, fastest, impls_here, results_and_gradients, seeded

pytestmark = pytest.mark.usefixtures("device")
IMPLS = impls_here("pool_features")
EPS = torch.finfo(torch.float64).eps
OPTIONS = list(itertools.product(api.POOLINGS, api.NORMALIZATIONS))


def hidden_inputs(
    layout: StridedLayout, *, layers: int = 3, channels: int = 6, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shape = (layout.batch_size, layout.packed_length, channels)
    return [randn(*shape, seed=i, dtype=dtype) for i in range(layers)]


def random_mask(layout: StridedLayout) -> Tensor:
    """Two thirds of the tokens count, and none of the first few, so that some windows have none that does."""
    mask = seeded(torch.rand, layout.batch_size, layout.length, seed=3) < 0.66
    mask[:, :14] = False
    return mask


def brute_force(tokens: list[list[Tensor]], counted: list[bool], pooling: str, normalize: str) -> Tensor:
    """The feature of one rollout or window: ``tokens[g][l]`` is the hidden state [C] of token g at layer l."""
    done = []
    for layers, counts in zip(tokens, counted, strict=True):
        joint = torch.cat(layers)
        if normalize == "joint":
            joint = joint / max(float(joint.norm()), 1e-12)
        if normalize == "per_layer":
            joint = torch.cat([layer / max(float(layer.norm()), 1e-12) for layer in layers])
        done.append(joint if counts else torch.zeros_like(joint))
    if pooling == "mean":
        return sum(done) / len(done)
    if pooling == "token":
        return torch.stack(done)
    if pooling == "concat":
        size = len(done[0]) // len(tokens[0])
        return torch.cat([x[i * size : (i + 1) * size] for i in range(len(tokens[0])) for x in done])
    last = [x for x, counts in zip(done, counted, strict=True) if counts]
    return last[-1] if last else torch.zeros_like(done[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(
    ("name", "pooling", "normalize"),
    [(name, pooling, "joint") for name in LAYOUTS for pooling in api.POOLINGS]
    + [("overlapping", pooling, normalize) for pooling, normalize in OPTIONS if normalize != "joint"],
)
def test_agrees_with_loops(name, pooling, normalize, masked, impl):
    layout = LAYOUTS[name]()
    hidden = hidden_inputs(layout)
    mask = random_mask(layout) if masked else None
    rollouts, targets = pool_features(hidden, layout, pooling=pooling, normalize=normalize, token_mask=mask, impl=impl)
    width = {"concat": (layout.horizon * 18,), "token": (layout.horizon, 18)}.get(pooling, (18,))
    assert rollouts.shape == (*layout.anchors.shape, layout.samples, *width)
    assert targets.shape == (*layout.anchors.shape, *width)
    steps = range(layout.horizon)
    for b, a in layout.valid.nonzero().tolist():
        window = [int(layout.anchors[b, a]) + g for g in steps]
        counted = [mask is None or bool(mask[b, i]) for i in window]
        expected = brute_force([[h[b, i] for h in hidden] for i in window], counted, pooling, normalize)
        assert (targets[b, a] - expected).abs().max() <= 20 * EPS
        for j in range(layout.samples):
            rows = [layout.length + (a * layout.samples + j) * layout.horizon + g for g in steps]
            expected = brute_force([[h[b, i] for h in hidden] for i in rows], counted, pooling, normalize)
            assert (rollouts[b, a, j] - expected).abs().max() <= 20 * EPS


def ended_at(layout: StridedLayout) -> Tensor:
    """[B, A, n, G]: rollouts that end anywhere, some before their first token."""
    steps = seeded(torch.randint, layout.horizon + 1, layout.anchors.shape + (layout.samples, 1), seed=4)
    return torch.arange(layout.horizon) < steps


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_every_rollout_counts_by_its_own_mask(pooling, masked, impl):
    layout = LAYOUTS["overlapping"]()
    hidden = hidden_inputs(layout)
    mask, own = random_mask(layout) if masked else None, ended_at(layout)
    options = {"pooling": pooling, "token_mask": mask, "impl": impl}
    rollouts, targets = pool_features(hidden, layout, rollout_mask=own, **options)
    shared, same = pool_features(hidden, layout, **options)
    assert rollouts.shape == shared.shape and rollouts.dtype == shared.dtype
    assert (targets - same).abs().max() <= 20 * EPS
    for b, a in layout.valid.nonzero().tolist():
        for j in range(layout.samples):
            rows = [layout.length + (a * layout.samples + j) * layout.horizon + g for g in range(layout.horizon)]
            tokens = [[h[b, i] for h in hidden] for i in rows]
            expected = brute_force(tokens, own[b, a, j].tolist(), pooling, "joint")
            assert (rollouts[b, a, j] - expected).abs().max() <= 20 * EPS
    whole = torch.ones_like(own) if mask is None else layout.windows(mask)[:, :, None].expand_as(own)
    for x, y in zip(pool_features(hidden, layout, rollout_mask=whole, **options), (shared, same), strict=True):
        assert (x - y).abs().max() <= 20 * EPS


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_gradients_where_every_rollout_has_its_own_mask(pooling, impl):
    layout = StridedLayout.strided(2, 6, context=2, stride=1, horizon=2, samples=2)
    hidden = [h.requires_grad_() for h in hidden_inputs(layout, layers=2, channels=2)]
    own = ended_at(layout)

    def pool(*hidden):
        return pool_features(hidden, layout, pooling=pooling, rollout_mask=own, impl=impl)

    assert torch.autograd.gradcheck(pool, hidden)


def eager(hidden: list[Tensor], layout: StridedLayout, pooling: str, normalize: str, mask: Tensor | None):
    """Plain PyTorch in the dtype of the hidden states, over all tokens."""
    x = torch.stack(hidden, 2)  # [B, S, L, C]
    if normalize != "none":
        dim = (-2, -1) if normalize == "joint" else -1
        x = x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp_min(1e-12)
    counted = layout.windows(torch.ones_like(x[:, : layout.length, 0, 0], dtype=torch.bool) if mask is None else mask)
    results = []
    for tokens, weight in ((layout.rollouts(x), counted[:, :, None]), (layout.windows(x), counted)):
        tokens = tokens * weight[..., None, None]
        if pooling == "mean":
            tokens = tokens.mean(-3).flatten(-2)
        elif pooling == "concat":
            tokens = tokens.movedim(-2, -3).flatten(-3)
        elif pooling == "token":
            tokens = tokens.flatten(-2)
        else:
            steps = torch.arange(layout.horizon)
            is_last = (steps == torch.where(weight, steps, -1).amax(-1, keepdim=True))[..., None, None]
            tokens = (tokens * is_last).sum(-3).flatten(-2)
        results.append(tokens)
    return results


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_features_and_gradients_in_every_dtype(pooling, normalize, masked, dtype):
    layout = LAYOUTS["overlapping"]()
    hidden = [h.requires_grad_() for h in hidden_inputs(layout, channels=40, dtype=dtype)]
    exact = [h.detach().double().requires_grad_() for h in hidden]
    mask = random_mask(layout) if masked else None
    options = {"pooling": pooling, "normalize": normalize, "token_mask": mask}
    actual = results_and_gradients(pool_features(hidden, layout, impl="torch", **options), hidden)
    # The same upstream gradients for all: rounded to the dtype of the features, float32 or better.
    plain = results_and_gradients([z.float() for z in eager(hidden, layout, pooling, normalize, mask)], hidden)
    truth = results_and_gradients(pool_features(exact, layout, impl="reference", **options), exact)
    assert [z.dtype for z in actual] == [torch.float32] * 2 + [dtype] * 3
    for name, *tensors in zip(("rollouts", "targets", *"123"), actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_gradcheck_where_windows_overlap(pooling, normalize, masked, impl):
    layout = StridedLayout.strided(1, 6, context=2, stride=1, horizon=2, samples=2)
    hidden = [h.requires_grad_() for h in hidden_inputs(layout, layers=2, channels=2)]
    mask = torch.tensor([[True, True, True, False, False, True]]) if masked else None

    def pool(*hidden):
        return pool_features(hidden, layout, pooling=pooling, normalize=normalize, token_mask=mask, impl=impl)

    assert torch.autograd.gradcheck(pool, hidden)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalize", api.NORMALIZATIONS)
@pytest.mark.parametrize("size", (0, 1e-14))
def test_hidden_states_too_short_to_normalize(size, normalize, impl):
    """They are divided by 1e-12, and so is their gradient."""
    layout = LAYOUTS["one_step"]()
    hidden = [(size * h).requires_grad_() for h in hidden_inputs(layout)]
    rollouts, targets = pool_features(hidden, layout, normalize=normalize, impl=impl)
    assert rollouts.abs().max() <= 5 * size * 1e12 and targets.abs().max() <= 5 * size * 1e12
    grads = torch.autograd.grad(rollouts, hidden, torch.ones_like(rollouts))
    for grad in grads:
        expected = 1.0 if normalize == "none" else 1e12
        assert (layout.rollouts(grad) - expected).abs().max() <= expected * EPS


def assert_what_does_not_count_weighs_nothing(
    impl: str, pooling: str, normalize: str, layout: StridedLayout, mask: Tensor, **sizes: int
) -> None:
    """Features and gradients, bit for bit, whatever stands where tokens do not count."""
    in_rollouts = layout.windows(mask)[:, :, None].expand(-1, -1, layout.samples, -1)
    counted = layout.pack(mask, in_rollouts)[..., None]  # [B, S, 1]
    results = []
    for fill in (None, float("nan"), float("inf")):
        hidden = hidden_inputs(layout, dtype=torch.float32, **sizes)
        if fill is not None:
            hidden = [x.where(counted, fill) for x in hidden]
        leaves = [x.requires_grad_() for x in hidden]
        features = pool_features(leaves, layout, pooling=pooling, normalize=normalize, token_mask=mask, impl=impl)
        results.append(results_and_gradients(features, leaves))
    for other in results[1:]:
        for clean, filled in zip(results[0], other, strict=True):
            assert torch.equal(clean, filled)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("pooling", "normalize"), OPTIONS)
def test_what_does_not_count_weighs_nothing(pooling, normalize, impl):
    layout = LAYOUTS["documents"]()
    assert_what_does_not_count_weighs_nothing(impl, pooling, normalize, layout, random_mask(layout))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_where_no_token_counts_features_are_zero(pooling, impl):
    layout = LAYOUTS["odd"]()
    mask = torch.zeros(layout.batch_size, layout.length, dtype=torch.bool)
    mask[0] = True
    features = pool_features(hidden_inputs(layout), layout, pooling=pooling, token_mask=mask, impl=impl)
    assert all((z[1] == 0).all() and (z[0] != 0).any(-1).all() for z in features)


def test_only_the_needed_rows_are_read_and_get_a_gradient():
    layout = LAYOUTS["strided"]()
    hidden = [h.requires_grad_() for h in hidden_inputs(layout)]
    needed = torch.zeros(layout.batch_size, layout.packed_length, dtype=torch.bool)
    layout.rollouts(needed)[..., -1] = True
    needed[torch.arange(layout.batch_size)[:, None], layout.anchors.long() + layout.horizon - 1] = True
    clean = results_and_gradients(pool_features(hidden, layout), hidden)
    poisoned = [h.detach().masked_fill(~needed[..., None], torch.nan).requires_grad_() for h in hidden]
    results = results_and_gradients(pool_features(poisoned, layout), poisoned)
    assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))
    assert all((grad[~needed] == 0).all() and (grad[needed] != 0).any(-1).all() for grad in results[2:])


@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_gradient_of_one_result_and_of_some_layers(pooling):
    layout = LAYOUTS["odd"]()
    hidden = hidden_inputs(layout)
    hidden[1].requires_grad_()
    for i in range(2):
        actual, expected = (
            torch.autograd.grad(pool_features(hidden, layout, pooling=pooling, impl=impl)[i].sum(), hidden[1])[
                0
            ]  # the upstream gradient of a sum is one number, expanded
            for impl in ("torch", "reference")
        )
        assert (actual - expected).abs().max() <= 100 * EPS


@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_strided_inputs_and_upstream_gradients(pooling):
    layout = LAYOUTS["odd"]()
    wide = [randn(layout.packed_length, 13, layout.batch_size, seed=i) for i in range(3)]
    views = [w[:, 1::2].permute(2, 0, 1) for w in wide]
    results = []
    for tensors in (views, [v.contiguous() for v in views]):
        leaves = [t.detach().requires_grad_() for t in tensors]
        features = pool_features(leaves, layout, pooling=pooling)
        upstream = [randn(*f.shape[::-1], seed=5).permute(*range(f.ndim)[::-1]) for f in features]
        results.append([*features, *torch.autograd.grad(features, leaves, upstream)])
    assert not views[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_are_outermost_so_that_groups_match_them_apart():
    layout = LAYOUTS["odd"]()
    hidden = hidden_inputs(layout)
    together = pool_features(hidden, layout, pooling="concat", normalize="per_layer")
    for i, layer in enumerate(hidden):
        alone = pool_features([layer], layout, pooling="concat", normalize="per_layer")
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(whole.chunk(3, -1)[i], part)
    matches = [
        feature_matching(*pool_features(h, layout, pooling="concat", normalize="per_layer"), groups=len(h)).loss
        for h in (hidden, hidden[:1], hidden[1:2], hidden[2:])
    ]
    assert (matches[0] - sum(matches[1:])).abs().max() <= 100 * EPS * matches[0].max()


@pytest.mark.parametrize("tile_bytes", (1, 3000))
@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_tiles_change_nothing(pooling, tile_bytes, monkeypatch):
    layout = LAYOUTS["overlapping"]()
    hidden = [h.requires_grad_() for h in hidden_inputs(layout)]
    expected = results_and_gradients(pool_features(hidden, layout, pooling=pooling), hidden)
    monkeypatch.setattr(_torch, "CPU_TILE_BYTES", tile_bytes)
    actual = results_and_gradients(pool_features(hidden, layout, pooling=pooling), hidden)
    # Sums over a token's 18 numbers may be taken in another order.
    assert all((a - b).abs().max() <= 18 * EPS * b.abs().max() for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_results_repeat_bitwise(pooling):
    layout = LAYOUTS["overlapping"]()
    hidden = [h.requires_grad_() for h in hidden_inputs(layout, channels=64, dtype=torch.float32)]
    torch.use_deterministic_algorithms(False)
    first, second = (results_and_gradients(pool_features(hidden, layout, pooling=pooling), hidden) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl, device):
    layout = LAYOUTS["odd"]()
    hidden = hidden_inputs(layout, dtype=torch.bfloat16)
    plain = pool_features(hidden, layout, pooling="mean", impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        cast = pool_features(hidden, layout, pooling="mean", impl=impl)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(cast, plain, strict=True))


@pytest.mark.parametrize(
    ("pooling", "masked"), [("last_token", False), ("last_token", True), ("concat", True), ("token", False)]
)
def test_registration(pooling, masked):
    layout = LAYOUTS["odd"]()
    hidden = [h.requires_grad_() for h in hidden_inputs(layout, dtype=torch.bfloat16)]
    mask = random_mask(layout) if masked else None
    rows = api.feature_rows(layout, mask, last_only=pooling == "last_token")
    torch.library.opcheck(api._forward_op, (hidden, *rows, pooling, "joint", "torch"))
    with torch.no_grad():
        features = pool_features(hidden, layout, pooling=pooling, token_mask=mask)
    detached = [h.detach() for h in hidden]
    torch.library.opcheck(api._backward_op, (*features, detached, *rows, pooling, "joint", "torch"))


@pytest.mark.parametrize("pooling", ("last_token", "concat"))
def test_compiles_without_breaks_and_without_recompiling_for_sizes(pooling):
    def pool(hidden, layout, mask):
        return pool_features(hidden, layout, pooling=pooling, token_mask=mask)

    calls = []
    for batch, length, horizon, samples in ((2, 30, 3, 2), (3, 35, 4, 3), (4, 43, 5, 4), (5, 52, 7, 5)):
        layout = StridedLayout.strided(batch, length, context=4, stride=3, horizon=horizon, samples=samples)
        hidden = [h.requires_grad_() for h in hidden_inputs(layout)]
        calls.append((hidden, layout, random_mask(layout)))
    assert_compiles(pool, calls, graphs=2)  # one for the first sizes, one for all others


@pytest.mark.speed
def test_much_faster_than_all_tokens():
    layout = StridedLayout.strided(1, 512, context=8, stride=8, horizon=8, samples=4)
    hidden = hidden_inputs(layout, channels=512, dtype=torch.float32)
    plain, fast = fastest(
        lambda: eager(hidden, layout, "last_token", "joint", None), lambda: pool_features(hidden, layout), rounds=5
    )
    assert plain > 4 * fast


LAYOUT = StridedLayout.strided(2, 12, context=4, stride=4, horizon=2, samples=2)
ROWS = torch.zeros(2, LAYOUT.packed_length, 3)
BAD = [
    ({"layout": 3}, TypeError, "layout: expected a StridedLayout, got int"),
    (
        {"layout": StridedLayout.strided(2, 9, context=4, stride=4, horizon=1, samples=1).without_last_step()},
        ValueError,
        "layout: expected a horizon of at least 1, got 0",
    ),
    ({"hidden_states": ROWS}, TypeError, "hidden_states: expected a sequence of tensors, got Tensor"),
    ({"hidden_states": None}, TypeError, "hidden_states: expected a sequence of tensors, got NoneType"),
    ({"hidden_states": []}, ValueError, "hidden_states: expected at least one tensor, got an empty sequence"),
    ({"hidden_states": [ROWS, ROWS[:, :-1]]}, ValueError, r"hidden_states\[1\]: expected shape \[B=2, S=20, C=3\]"),
    ({"hidden_states": [ROWS, ROWS.double()]}, TypeError, r"hidden_states\[1\]: expected dtype float32, got float64"),
    ({"hidden_states": [ROWS.long()]}, TypeError, r"hidden_states\[0\]: expected dtype float64 or"),
    (
        {"hidden_states": [ROWS.to("meta")]},
        ValueError,
        r"hidden_states\[0\]: expected a tensor on cpu, got one on meta",
    ),
    ({"token_mask": torch.ones(2, 11, dtype=torch.bool)}, ValueError, r"token_mask: expected shape \[B=2, P=12\]"),
    ({"token_mask": torch.ones(2, 12)}, TypeError, "token_mask: expected dtype bool, got float32"),
    (
        {"rollout_mask": torch.ones(2, 2, 2, dtype=torch.bool)},
        ValueError,
        r"rollout_mask: expected shape \[B=2, A=2, n=2, G=2\]",
    ),
    ({"rollout_mask": torch.ones(2, 2, 2, 2)}, TypeError, "rollout_mask: expected dtype bool, got float32"),
    ({"pooling": "max"}, ValueError, "pooling: expected one of 'last_token', 'mean', 'concat', 'token'; got 'max'"),
    ({"normalize": True}, ValueError, "normalize: expected one of 'joint', 'per_layer', 'none'; got True"),
    ({"impl": "fast"}, ValueError, "impl: expected one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    arguments = {"hidden_states": [ROWS], "layout": LAYOUT, **change}
    with pytest.raises(error, match=message):
        pool_features(arguments.pop("hidden_states"), arguments.pop("layout"), **arguments)
