"""The Triton kernels of pooling, compiled or in the interpreter: every option, branch and kind of input."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from ebft_kernels import StridedLayout, pool_features
from ebft_kernels.pooling import _triton, api
from ebft_kernels.testing import LAYOUTS, assert_within_budget, randn

from .. import op_checks
from ..op_checks import results_and_gradients, short_dtypes
from .test_pool_features import eager

pytestmark = pytest.mark.usefixtures("device")
OPTIONS = list(itertools.product(api.POOLINGS, api.NORMALIZATIONS))


def small_layout(samples: int = 2) -> StridedLayout:
    """Two anchors whose windows overlap."""
    return StridedLayout.strided(2, 5, context=2, stride=1, horizon=2, samples=samples)


def hidden_inputs(layout: StridedLayout, *, layers: int = 2, channels: int = 5, dtype=torch.float32) -> list[Tensor]:
    shape = (layout.batch_size, layout.packed_length, channels)
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i in range(layers)]


def some_tokens(layout: StridedLayout) -> Tensor:
    """In the first row no token of the first window counts, of the second the last; in the second row all others."""
    mask = torch.tensor([[False, False, False, False, True], [True, True, True, True, False]])
    return mask[: layout.batch_size]


def recorded_launches(monkeypatch) -> list[tuple[str, dict[str, int]]]:
    """The kernels that are launched from now on, with the sizes of their tiles."""
    launches = []

    def launch(kernel, grid, *args, tiles, **options):
        launches.append((kernel.__name__, dict(tiles[0].sizes)))
        return plain(kernel, grid, *args, tiles=tiles, **options)

    plain = _triton.launch
    monkeypatch.setattr(_triton, "launch", launch)
    return launches


def assert_right(
    layout: StridedLayout, hidden: list[Tensor], pooling: str, normalize: str, mask: Tensor | None
) -> None:
    """Features and gradients within the error budget."""
    exact = [h.detach().double().requires_grad_() for h in hidden]
    options = {"pooling": pooling, "normalize": normalize, "token_mask": mask}
    actual = results_and_gradients(pool_features(hidden, layout, impl="triton", **options), hidden)
    plain = results_and_gradients([z.float() for z in eager(hidden, layout, pooling, normalize, mask)], hidden)
    truth = results_and_gradients(pool_features(exact, layout, impl="reference", **options), exact)
    assert [z.dtype for z in actual] == [torch.float32] * 2 + [h.dtype for h in hidden]
    names = ("rollouts", "targets", *(f"gradient of layer {i}" for i in range(len(hidden))))
    for name, *tensors in zip(names, actual, plain, truth, strict=True):
        assert_within_budget(*tensors, name)


@pytest.mark.parametrize(
    ("pooling", "normalize", "masked"),
    [(*options, True) for options in OPTIONS] + [(pooling, "joint", False) for pooling in api.POOLINGS],
)
def test_every_option(pooling, normalize, masked):
    layout = small_layout()
    mask = some_tokens(layout) if masked else None
    assert_right(layout, hidden_inputs(layout), pooling, normalize, mask)


@pytest.mark.parametrize("pooling", api.POOLINGS)
def test_masks_of_single_rollouts(pooling):
    layout = small_layout()
    hidden = [h.detach() for h in hidden_inputs(layout)]
    own = (torch.arange(layout.anchors.numel() * 4) % 3 > 0).view(*layout.anchors.shape, 2, 2)
    options = {"pooling": pooling, "rollout_mask": own}
    actual = pool_features(hidden, layout, impl="triton", **options)
    plain = pool_features(hidden, layout, impl="reference", **options)
    truth = pool_features([h.double() for h in hidden], layout, impl="reference", **options)
    for tensors in zip(actual, plain, truth, strict=True):
        assert_within_budget(*tensors)


@pytest.mark.parametrize("dtype", short_dtypes())
@pytest.mark.parametrize("pooling", ("last_token", "mean"))
def test_16_bits(pooling, dtype):
    layout = small_layout()
    assert_right(layout, hidden_inputs(layout, channels=6, dtype=dtype), pooling, "joint", some_tokens(layout))


@pytest.mark.parametrize("pooling", ("last_token", "mean"))
def test_features_of_bfloat16(pooling):
    """Only forward: the interpreter reads bfloat16 right, but does not round to it."""
    layout = small_layout(samples=1)
    hidden = [h.detach() for h in hidden_inputs(layout, dtype=torch.bfloat16)]
    actual = pool_features(hidden, layout, pooling=pooling, impl="triton")
    expected = pool_features([h.float() for h in hidden], layout, pooling=pooling, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("layers", "channels", "chunks", "resident"), [(2, 70, 2, 1), (3, 70, 2, 0), (1, 259, 5, 0)])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", "joint"), ("concat", "per_layer"), ("last_token", "none")])
def test_tokens_of_several_tiles_and_tokens_too_long_to_keep(
    pooling, normalize, layers, channels, chunks, resident, monkeypatch
):
    layout = StridedLayout.strided(1, 5, context=2, stride=1, horizon=2, samples=1)
    launches = recorded_launches(monkeypatch)
    mask = torch.tensor([[True, True, False, True, True]])
    assert_right(layout, hidden_inputs(layout, layers=layers, channels=channels), pooling, normalize, mask)
    assert [name for name, _ in launches] == ["pool_fwd_kernel", "pool_bwd_kernel"]
    if op_checks.INTERPRETED:
        assert all((x["CHUNKS"], x["RESIDENT"]) == (chunks, resident) for _, x in launches)


@pytest.mark.parametrize("pooling", ("last_token", "concat"))
def test_anchors_that_are_missing_or_whose_window_leaves_the_row(pooling):
    anchors = torch.tensor([[1, 3, -1], [2, 4, 5]])
    layout = StridedLayout.from_anchors(anchors, 5, horizon=2, samples=1)
    assert layout.valid.tolist() == [[True, True, False], [True, False, False]]
    assert_right(layout, hidden_inputs(layout, layers=1, channels=3), pooling, "joint", None)


def test_empty_batch():
    layout = LAYOUTS["empty_batch"]()
    hidden = hidden_inputs(layout)
    features = pool_features(hidden, layout, impl="triton")
    assert [f.shape for f in features] == [(0, 5, 2, 10), (0, 5, 10)]
    assert torch.autograd.grad(features, hidden, [torch.ones_like(f) for f in features])[0].shape == hidden[0].shape


@pytest.mark.parametrize("pooling", ("last_token", "mean"))
def test_only_the_needed_rows_are_read_and_get_a_gradient(pooling):
    layout = StridedLayout.strided(1, 12, context=2, stride=5, horizon=3, samples=2)
    hidden = hidden_inputs(layout)
    needed = torch.zeros(1, layout.packed_length, dtype=torch.bool)
    used = slice(-1, None) if pooling == "last_token" else slice(None)
    layout.rollouts(needed)[..., used] = True
    needed[0, (layout.anchors.long() + torch.arange(3)[:, None])[used].flatten()] = True
    poisoned = [h.detach().masked_fill(~needed[..., None], torch.nan).requires_grad_() for h in hidden]
    clean, results = (
        results_and_gradients(pool_features(h, layout, pooling=pooling, impl="triton"), h) for h in (hidden, poisoned)
    )
    assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))
    assert all((grad[~needed] == 0).all() and (grad[needed] != 0).any(-1).all() for grad in results[2:])


@pytest.mark.parametrize("normalize", api.NORMALIZATIONS)
def test_what_is_not_finite_stays_in_its_token(normalize):
    layout = small_layout()
    hidden = hidden_inputs(layout)
    broken = [h.detach().clone() for h in hidden]
    layout.rollouts(broken[0])[0, 1, 0, 1, 3] = torch.nan
    options = {"pooling": "token", "normalize": normalize, "impl": "triton"}
    (rollouts, targets), (clean, clean_targets) = (pool_features(h, layout, **options) for h in (broken, hidden))
    same = (rollouts == clean).all(-1)
    assert torch.equal(targets, clean_targets) and not same[0, 1, 0, 1] and int((~same).sum()) == 1
    assert rollouts[0, 1, 0, 1].isnan().sum() == {"joint": 10, "per_layer": 5, "none": 1}[normalize]


@pytest.mark.parametrize("size", (0, 1e-14))
@pytest.mark.parametrize("normalize", ("joint", "per_layer"))
def test_hidden_states_too_short_to_normalize(size, normalize):
    """They are divided by 1e-12, and so is their gradient."""
    layout = StridedLayout.strided(1, 4, context=1, stride=2, horizon=1, samples=1)
    hidden = [(size * h.detach()).requires_grad_() for h in hidden_inputs(layout)]
    features = pool_features(hidden, layout, normalize=normalize, impl="triton")
    expected = pool_features(hidden, layout, normalize=normalize, impl="reference")
    for a, b in zip(features, expected, strict=True):
        assert (a - b).abs().max() <= 4 * torch.finfo(torch.float32).eps * b.abs().max()
    for grad in torch.autograd.grad(features[0], hidden, torch.ones_like(features[0])):
        assert (layout.rollouts(grad) - 1e12).abs().max() <= 1e12 * torch.finfo(torch.float32).eps


def test_strided_inputs_and_upstream_gradients():
    """Channels apart, rows apart, layers with different strides, an offset that no 16-byte access fits."""
    layout = small_layout(samples=1)
    shape = (layout.batch_size, layout.packed_length, 8)
    wide = randn(*shape[:2], 20, seed=3, dtype=torch.float32)
    views = [
        [wide[..., 1:17:2], wide[..., 3:19:2]],
        [wide[..., 1:9], wide[..., 9:17]],
        [wide[..., :8], randn(shape[1], shape[0], 8, seed=4, dtype=torch.float32).transpose(0, 1)],
    ]
    for tensors in views:
        results = []
        for inputs in (tensors, [t.contiguous() for t in tensors]):
            leaves = [t.detach().requires_grad_() for t in inputs]
            features = pool_features(leaves, layout, pooling="mean", impl="triton")
            upstream = [
                randn(*f.shape[::-1], seed=5, dtype=torch.float32).permute(*range(f.ndim)[::-1]) for f in features
            ]
            results.append([*features, *torch.autograd.grad(features, leaves, upstream)])
        assert not any(t.is_contiguous() for t in tensors)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_results_repeat_bitwise_and_do_not_depend_on_the_rest_of_the_batch():
    layout = small_layout()
    hidden = hidden_inputs(layout)
    first, second = (
        results_and_gradients(pool_features(hidden, layout, pooling="mean", impl="triton"), hidden) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = StridedLayout.strided(1, 5, context=2, stride=1, horizon=2, samples=2)
    features = pool_features([h[1:] for h in hidden], alone, pooling="mean", impl="triton")
    assert all(torch.equal(a[0], b[1]) for a, b in zip(features, first, strict=False))


@pytest.mark.parametrize("masked", (False, True))
def test_registration(masked):
    layout = small_layout(samples=1)
    hidden = hidden_inputs(layout)
    rows = api.feature_rows(layout, some_tokens(layout) if masked else None, last_only=True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(api._forward_op, (hidden, *rows, "last_token", "joint", "triton"), test_utils=checks)
    detached = [h.detach() for h in hidden]
    features = api._forward_op(detached, *rows, "last_token", "joint", "triton")
    arguments = (*features, detached, *rows, "last_token", "joint", "triton")
    torch.library.opcheck(api._backward_op, arguments, test_utils=checks)


def test_float64_is_refused():
    layout = small_layout()
    with pytest.raises(
        ValueError, match="impl: pool_features has no implementation 'triton' on .* not in torch.float64"
    ):
        pool_features(hidden_inputs(layout, dtype=torch.float64), layout, impl="triton")
