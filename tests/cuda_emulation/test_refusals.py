"""Bad arguments of the functions in csrc/cuda/api.h: refused with the name of the argument, before a kernel starts."""

from __future__ import annotations

import pytest
import torch

# Rollouts [2, 3, 4, 5] and targets [2, 3, 5], in float32.
RUN = {"stream": 0, "dtype": 1, "sizes": (2, 3, 4, 5)}
OPERANDS = {"rollouts": 64, "rollout_strides": (240, 80, 20), "targets": 64, "target_strides": (60, 20)}
MATCHING = {"groups": 1, "whitening": 0, "alignment_coef": 1.0, "diversity_coef": 1.0, "estimator": 0}
RESULTS = dict.fromkeys(("loss", "alignment", "diversity", "reward", "advantage"), 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 4}, "dtype: expected a number from 0 to 3, got 4"),
        ({"dtype": -1}, "dtype: expected a number from 0 to 3, got -1"),
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
def test_feature_matching(emulated, change, message):
    arguments = {**RUN, **OPERANDS, **MATCHING, **RESULTS, **change}
    with pytest.raises(ValueError, match=message):
        emulated.feature_matching(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 7}, "dtype: expected a number from 0 to 3, got 7"),
        ({"sizes": (2, 3, 1, 5)}, "unbiased: expected at least 2 rollouts per anchor, got 1"),
        ({"sizes": (2, 3, 1 << 15, 5)}, "n: expected 1 to 32767 rollouts per anchor, got 32768"),
        *(({name: 0}, f"{name}: expected an address, got null") for name in ("rollouts", "targets", "loss")),
    ],
)
def test_mean_embedding_loss(emulated, change, message):
    arguments = {**RUN, **OPERANDS, "unbiased": True, "loss": 64, "difference": 64, **change}
    with pytest.raises(ValueError, match=message):
        emulated.mean_embedding_forward(*arguments.values())


@pytest.mark.parametrize("name", ("grad", "difference", "grad_rollouts", "grad_targets"))
def test_its_backward_pass(emulated, name):
    rollouts = {name: OPERANDS[name] for name in ("rollouts", "rollout_strides")}
    others = {"grad": 64, "difference": 64, "unbiased": True, "grad_rollouts": 64, "grad_targets": 64}
    with pytest.raises(ValueError, match=f"{name}: expected an address, got null"):
        emulated.mean_embedding_backward(*{**RUN, **rollouts, **others, name: 0}.values())


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
        ({"sizes": (1, 4, 4, 1, 1, 9999)}, "K: too many tokens for the mean on CUDA, got 9999"),
        ({"pooling": 0}, "K: expected 1 token for last_token, got 2"),
        ({"pooling": 4}, "pooling: expected a number from 0 to 3, got 4"),
        ({"normalization": -1}, "normalization: expected a number from 0 to 2, got -1"),
        ({"layers": []}, "layers: on CUDA pooling takes 1 to 64 layers, got 0"),
        ({"layers": [LAYER, (0, 64, 16)]}, "layer: expected an address, got null"),
        *(
            ({name: 0}, f"{name}: expected an address, got null")
            for name in ("rollout_rows", "target_rows", "rollouts", "targets")
        ),
    ],
)
def test_pool_features(emulated, change, message):
    with pytest.raises(ValueError, match=message):
        emulated.pool_features(*{**CALL, **INDEX, "rollouts": 64, "targets": 64, **change}.values())


@pytest.mark.parametrize("name", ("grad_rollouts", "grad_targets", "grads"))
def test_pool_features_backward(emulated, name):
    rows = torch.tensor([0, 1])
    index = {**INDEX, "rollout_rows": rows.data_ptr(), "target_rows": rows.data_ptr()}
    arguments = {**CALL, **index, "grad_rollouts": 64, "grad_targets": 64, "grads": [LAYER]}
    arguments[name] = [(0, 64, 16)] if name == "grads" else 0
    with pytest.raises(ValueError, match=f"{name}: expected an address, got null"):
        emulated.pool_features_backward(*arguments.values())
