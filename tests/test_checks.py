"""Argument checks and the choice of implementation: each message names the argument, what was expected, what came."""

from __future__ import annotations

import pytest
import torch

import ebft_kernels
from ebft_kernels import _checks, _dispatch, _triton

OPS = (
    "strided_attention",
    "strided_attention_step",
    "pool_features",
    "mean_embedding_loss",
    "feature_matching",
    "linear_log_probs",
)


def test_check_tensor_binds_letters_and_compares_them():
    sizes = {"B": 2}
    _checks.check_tensor("q", torch.zeros(2, 3, 5), "B H D", sizes)
    assert sizes == {"B": 2, "H": 3, "D": 5}
    _checks.check_tensor("k", torch.zeros(2, 7, 5), "B S D", sizes)
    _checks.check_tensor("hidden", torch.zeros(4, 9, 5), "... D", sizes)
    _checks.check_tensor("x", torch.zeros(2, 7, 1, 1), "B S ...", sizes)
    _checks.check_tensor("x", torch.zeros(2, 7), "B S ...", sizes)
    _checks.check_tensor("x", torch.zeros(2, 4), "B 4", sizes)


@pytest.mark.parametrize(
    ("shape", "letters", "message"),
    [
        ((2, 3), "B H D", r"q: expected shape \[B=2, H, D=5\], got \[2, 3\]"),
        ((2, 3, 4), "B H D", r"q: expected shape \[B=2, H, D=5\], got \[2, 3, 4\]"),
        ((2, 3, 5, 1), "B H D", r"got \[2, 3, 5, 1\]"),
        ((4, 3), "... D", r"q: expected shape \[\.\.\., D=5\], got \[4, 3\]"),
        ((3, 3), "B ...", r"q: expected shape \[B=2, \.\.\.\], got \[3, 3\]"),
        ((2, 3), "B 4", r"q: expected shape \[B=2, 4\], got \[2, 3\]"),
        ((), "... D", r"got \[\]"),
    ],
)
def test_check_tensor_refuses_other_shapes(shape, letters, message):
    with pytest.raises(ValueError, match=message):
        _checks.check_tensor("q", torch.zeros(shape), letters, {"B": 2, "D": 5})


def test_check_tensor_refuses_other_types_and_devices():
    with pytest.raises(TypeError, match=r"q: expected a tensor \[B, D\], got list"):
        _checks.check_tensor("q", [[1.0]], "B D", {})
    with pytest.raises(TypeError, match="q: expected dtype int64 or int32, got float32"):
        _checks.check_tensor("q", torch.zeros(1), "B", {}, dtype=_checks.INTEGER)
    with pytest.raises(TypeError, match="q: expected dtype bool, got float32"):
        _checks.check_tensor("q", torch.zeros(1), "B", {}, dtype=torch.bool)
    with pytest.raises(ValueError, match="q: expected a tensor on cpu, got one on meta"):
        _checks.check_tensor("q", torch.zeros(1, device="meta"), "B", {}, device=torch.device("cpu"))


def test_scalar_checks():
    with pytest.raises(ValueError, match="pooling: expected one of 'mean', 'concat'; got 'max'"):
        _checks.check_option("pooling", "max", ("mean", "concat"))
    with pytest.raises(TypeError, match="step: expected an int, got float"):
        _checks.check_int("step", 1.0, minimum=0)
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        _checks.check_int("step", -1, minimum=0)
    with pytest.raises(TypeError, match="temperature: expected a number, got str"):
        _checks.check_positive("temperature", "1")
    for value in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
            _checks.check_positive("temperature", value)


def test_integers_that_32_bits_do_not_hold_are_refused():
    _checks.check_int("samples", 2**31 - 1, minimum=1)
    _checks.check_int("window", 2**70, minimum=1, bounded=False)
    for value in (2**31, 2**32 + 1, 2**63, 10**400):
        with pytest.raises(ValueError, match=rf"samples: expected less than 2\^31, got {value}"):
            _checks.check_int("samples", value, minimum=1)


def test_numbers_that_float32_does_not_hold_are_refused():
    for value in (1e-38, 1e-40, 5e-324, 1e39, 10**400):
        with pytest.raises(ValueError, match="softcap: expected what float32 can hold, 1.18e-38 to 3.4e"):
            _checks.check_positive("softcap", value)
    for value in (1e39, -1e39, 10**400, 1e-46, -1e-40, 5e-324):
        with pytest.raises(ValueError, match="scale: expected 0 or what float32 can hold, 1.18e-38 to 3.4e"):
            _checks.check_finite("scale", value)
    for value in (1.2e-38, 3.4e38):
        _checks.check_positive("softcap", value)
    for value in (0, -0.0, -1.2e-38, -3.4e38):
        _checks.check_finite("scale", value)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_and_a_fast_implementation(op):
    available = ebft_kernels.available_impls(op, "cpu")
    assert available.index("torch") < available.index("reference")
    assert ebft_kernels.select_impl(op, "cpu", torch.bfloat16) == available[0] != "reference"
    for impl in available:
        assert _dispatch.implementation(op, impl).__name__.endswith(f"._{impl}")


def test_an_explicit_choice_never_falls_back():
    device = torch.device("cpu")
    assert _dispatch.resolve_impl("pool_features", "reference", device, torch.float32) == "reference"
    with pytest.raises(ValueError, match="impl: expected one of 'auto', .* got 'cuda'"):
        _dispatch.resolve_impl("pool_features", "cuda", device, torch.float32)
    message = r"impl: linear_log_probs has no implementation 'triton' on cpu \(.*\); available there: "
    with pytest.raises(ValueError, match=message):
        _dispatch.resolve_impl("linear_log_probs", "triton", device, torch.float64)
    with pytest.raises(ValueError, match="op: expected one of"):
        ebft_kernels.available_impls("attention", "cpu")
    with pytest.raises(TypeError, match="dtype: expected float64, float32, bfloat16 or float16, got torch.int64"):
        ebft_kernels.select_impl("pool_features", "cpu", torch.int64)


def test_an_older_triton_is_declined_for_what_it_cannot_compile(monkeypatch):
    pytest.importorskip("triton")
    device, few, many = torch.device("cpu"), {"n": 8}, {"n": 9}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(_dispatch._native, "why_not", lambda _device_type: "not built")
    _triton._why_not.cache_clear()
    try:
        monkeypatch.setattr(_triton, "_version", lambda: (3, 4))
        assert not _dispatch.why_not("feature_matching", "triton", device, torch.float32, few)
        assert not _dispatch.why_not("mean_embedding_loss", "triton", device, torch.float32, many)
        with pytest.raises(ValueError, match=r"more than 8 rollouts per anchor need Triton 3\.5, there is 3\.4\)"):
            _dispatch.resolve_impl("feature_matching", "triton", device, torch.float32, many)
        assert _dispatch.resolve_impl("feature_matching", "auto", device, torch.float32, many) == "torch"
        monkeypatch.setattr(_triton, "_version", lambda: (3, 5))
        assert not _dispatch.why_not("feature_matching", "triton", device, torch.float32, many)
        monkeypatch.setattr(_triton, "_version", lambda: (3, 2))
        _triton._why_not.cache_clear()
        with pytest.raises(ValueError, match=r"they need Triton 3\.3, there is 3\.2\)"):
            _dispatch.resolve_impl("pool_features", "triton", device, torch.float32)
    finally:
        _triton._why_not.cache_clear()
