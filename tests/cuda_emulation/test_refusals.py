"""Bad arguments of the compiled module: refused with the name of the argument, before a kernel starts."""

from __future__ import annotations

import pytest


@pytest.fixture
def cuda_module(emulation):
    return emulation.module


# Rollouts [2, 3, 4, 5] and targets [2, 3, 5], in float32.
RUN = {"stream": 0, "dtype": 1, "sizes": (2, 3, 4, 5)}
OPERANDS = {"rollouts": 64, "rollout_strides": (240, 80, 20), "targets": 64, "target_strides": (60, 20)}
MATCHING = {"groups": 1, "whitening": 0, "alignment_coef": 1.0, "diversity_coef": 1.0, "estimator": 0}
RESULTS = dict.fromkeys(("loss", "alignment", "diversity", "reward", "advantage", "gram"), 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 4}, "dtype: expected a number from 0 to 3, got 4"),
        ({"dtype": -1}, "dtype: expected a number from 0 to 3, got -1"),
        ({"sizes": (5,)}, "strides: expected one for each axis but the last"),
        ({"sizes": (2, 3, 3, 4, 5)}, "strides: expected one for each axis but the last"),
        ({"rollout_strides": (80, 20)}, "strides: expected one for each axis but the last"),
        ({"target_strides": (60, 20, 4)}, "strides: expected one for each axis but the last"),
        (
            {"sizes": (1, 1, 2, 3, 4, 5), "rollout_strides": (0,) * 5, "target_strides": (0,) * 4},
            "sizes: expected at most three leading axes",
        ),
        ({"sizes": (2, -3, 4, 5)}, "anchors: expected no negative size, got -3"),
        ({"sizes": (2, 3, 0, 5)}, "n: expected 1 to 32767 rollouts per anchor, got 0"),
        ({"sizes": (2, 3, 17, 5)}, "n: on CUDA feature matching takes at most 16 rollouts per anchor, got 17"),
        ({"sizes": (2, 3, 4, 0)}, "F: expected at least one feature, got 0"),
        ({"groups": 0}, "groups: expected a divisor of F, got 0"),
        ({"groups": 3}, "groups: expected a divisor of F, got 3"),
        ({"whitening": 3}, "whitening: expected a number from 0 to 2, got 3"),
        ({"estimator": -1}, "estimator: expected a number from 0 to 2, got -1"),
        *(({name: 0}, f"{name}: expected an address, got null") for name in ("rollouts", "targets", *RESULTS)),
    ],
)
def test_feature_matching(cuda_module, change, message):
    arguments = {**RUN, **OPERANDS, **MATCHING, **RESULTS, **change}
    with pytest.raises(ValueError, match=message):
        cuda_module.feature_matching(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 7}, "dtype: expected a number from 0 to 3, got 7"),
        ({"sizes": (2, 3, 1, 5)}, "unbiased: expected at least 2 rollouts per anchor, got 1"),
        ({"sizes": (2, 3, 1 << 15, 5)}, "n: expected 1 to 32767 rollouts per anchor, got 32768"),
        *(({name: 0}, f"{name}: expected an address, got null") for name in ("rollouts", "targets", "loss")),
    ],
)
def test_mean_embedding_loss(cuda_module, change, message):
    arguments = {**RUN, **OPERANDS, "unbiased": True, "loss": 64, "difference": 64, **change}
    with pytest.raises(ValueError, match=message):
        cuda_module.mean_embedding_forward(*arguments.values())


@pytest.mark.parametrize("name", ("grad", "difference", "grad_rollouts", "grad_targets"))
def test_its_backward_pass(cuda_module, name):
    rollouts = {name: OPERANDS[name] for name in ("rollouts", "rollout_strides")}
    others = {"grad": 64, "difference": 64, "unbiased": True, "grad_rollouts": 64, "grad_targets": 64}
    with pytest.raises(ValueError, match=f"{name}: expected an address, got null"):
        cuda_module.mean_embedding_backward(*{**RUN, **rollouts, **others, name: 0}.values())


# B, S, C, A, n, K
LAYER = (64, 64, 16)
CALL = {"stream": 0, "dtype": 1, "sizes": (1, 4, 4, 1, 1, 2), "layers": [LAYER]}
INDEX = {"rollout_rows": 64, "target_rows": 64, "counted": 0, "pooling": 1, "normalization": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 4}, "dtype: expected a number from 0 to 3, got 4"),
        ({"sizes": (1, 4, -4, 1, 1, 2)}, "sizes: expected no negative one, got -4"),
        ({"sizes": (1, 0, 4, 1, 1, 2)}, "S: expected at least one packed row, got 0"),
        ({"sizes": (1, 4, 4, 1, 0, 2)}, "n: expected at least one rollout, got 0"),
        ({"sizes": (1, 4, 4, 1, 1, 0)}, "K: expected at least one token, got 0"),
        ({"sizes": (1, 4, 4, 1, 1, 9999)}, "L\\*K: on CUDA a mean is taken over at most 2560 hidden states, got 9999"),
        ({"pooling": 0}, "K: expected 1 token for last_token, got 2"),
        ({"pooling": 4}, "pooling: expected a number from 0 to 3, got 4"),
        ({"normalization": -1}, "normalization: expected a number from 0 to 2, got -1"),
        ({"sizes": (1, 4, 4, 1, 1)}, "sizes: expected 6"),
        ({"layers": []}, "layers: on CUDA pooling takes 1 to 64 layers"),
        ({"layers": [LAYER] * 65}, "layers: on CUDA pooling takes 1 to 64 layers"),
        ({"layers": [LAYER, (0, 64, 16)]}, "layer: expected an address, got null"),
        *(
            ({name: 0}, f"{name}: expected an address, got null")
            for name in ("rollout_rows", "target_rows", "rollouts", "targets")
        ),
    ],
)
def test_pool_features(cuda_module, change, message):
    with pytest.raises(ValueError, match=message):
        cuda_module.pool_features(*{**CALL, **INDEX, "rollouts": 64, "targets": 64, **change}.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grads": []}, "grads: expected one for each layer"),
        ({"grads": [(64, 65, 16)]}, "grads: expected contiguous ones"),
        ({"grads": [(0, 64, 16)]}, "grads: expected an address, got null"),
        *(
            ({name: 0}, f"{name}: expected an address, got null")
            for name in ("grad_rollouts", "grad_targets", "begin", "uses")
        ),
    ],
)
def test_pool_features_backward(cuda_module, change, message):
    arguments = {"grad_rollouts": 64, "grad_targets": 64, "grads": [LAYER], "begin": 64, "uses": 64, **change}
    with pytest.raises(ValueError, match=message):
        cuda_module.pool_features_backward(*{**CALL, **INDEX, **arguments}.values())


# B, P, A, n, G
SIZES = (1, 4, 1, 1, 2)
BAD_LAYOUTS = [
    ({"sizes": (1, 4, 1, 1)}, "sizes: expected 5"),
    ({"sizes": (1, -4, 1, 1, 2)}, "sizes: expected no negative one, got -4"),
    ({"sizes": (1, 4, 1, 0, 2)}, "n: expected at least one rollout, got 0"),
    ({"sizes": (1, 1 << 31, 1, 1, 2)}, r"sizes: expected at most 2\^30, got 2147483648"),
    ({"sizes": (1, 4, 1 << 20, 1 << 20, 2)}, r"S: expected at most 2\^30 tokens in a packed row"),
]
RANGES = ("prefix_start", "prefix_end", "own_start")


def layout_call(names: tuple[str, ...], change: dict) -> dict:
    """Arguments for sizes that may be wrong, with tensors that would fit them, and the change."""
    sizes = change.get("sizes", SIZES)
    batch, prompt, anchors, samples, horizon = (*sizes, 2)[:5]
    columns = {"anchors": anchors, "prompt_start": prompt}
    columns |= dict.fromkeys(RANGES, prompt + anchors * samples * horizon)
    tensors = {name: (64, "torch.int32", (batch, columns[name]), (columns[name], 1)) for name in columns}
    good = {"stream": 0, "sizes": sizes} | {name: tensors.get(name, 64) for name in names}
    return good | change


def wrong_tensors(*names: str) -> list[tuple[dict, str]]:
    """A null address, and tensors of another type, size and order."""
    columns = {"anchors": 1, "prompt_start": 4} | dict.fromkeys(RANGES, 6)
    return [
        case
        for name in names
        for size in (columns[name],)
        for case in (
            ({name: (0, "torch.int32", (1, size), (size, 1))}, "address: expected that of a tensor, got 0"),
            ({name: (64, "torch.int64", (1, size), (size, 1))}, f"{name}: expected a contiguous torch.int32 tensor"),
            ({name: (64, "torch.int32", (1, size - 1), (size, 1))}, rf"{name}: .* tensor \[1, {size}\], got"),
            ({name: (64, "torch.int32", (2, size), (size, 1))}, rf"{name}: .* tensor \[1, {size}\], got"),
        )
    ]


def null(name: str) -> tuple[dict[str, int], str]:
    return {name: 0}, f"{name}: expected an address, got null"


@pytest.mark.parametrize(("change", "message"), [*BAD_LAYOUTS, *wrong_tensors(*RANGES), null("mask")])
def test_layout_mask(cuda_module, change, message):
    with pytest.raises(ValueError, match=message):
        cuda_module.layout_mask(*layout_call((*RANGES, "full", "mask"), {"full": False, **change}).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [*BAD_LAYOUTS, *wrong_tensors("anchors", "prompt_start", *RANGES), null("positions")],
)
def test_layout_geometry(cuda_module, change, message):
    with pytest.raises(ValueError, match=message):
        cuda_module.layout_geometry(*layout_call(("anchors", "prompt_start", "positions", *RANGES), change).values())
