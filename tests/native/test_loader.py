"""Loading the compiled module: absent, broken, without OpenMP; and what its functions refuse."""

from __future__ import annotations

import importlib
import importlib.machinery
import platform
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import ebft_kernels
from ebft_kernels import _dispatch, _native
from ebft_kernels.testing import feature_inputs

CPU = torch.device("cpu")


@pytest.fixture
def load_again():
    """The test loads the modules as if for the first time; whatever comes of that is forgotten afterwards."""
    _native._load.cache_clear()
    yield
    _native._load.cache_clear()


@pytest.fixture
def package_folder(monkeypatch, tmp_path, load_again):  # noqa: ARG001
    """An empty folder in which the compiled modules are looked for instead."""
    monkeypatch.setattr(ebft_kernels, "__path__", [str(tmp_path)])
    for name in ("_C", "_cuda"):
        monkeypatch.delitem(sys.modules, f"ebft_kernels.{name}", raising=False)
        monkeypatch.delattr(ebft_kernels, name, raising=False)
    return tmp_path


def assert_does_without(reason: str) -> None:
    x, y = feature_inputs(1, 2, 3, 4)
    assert ebft_kernels.select_impl("feature_matching", "cpu", torch.float32) == "torch"
    assert ebft_kernels.feature_matching(x, y).reward.isfinite().all()
    with pytest.raises(
        ValueError, match=rf"no implementation 'native' on cpu \(.*{reason}.*\); available there: torch"
    ):
        ebft_kernels.feature_matching(x, y, impl="native")
    with pytest.raises(ImportError, match=reason):
        _native.library("cpu")
    assert reason in _native.build_info()


@pytest.mark.usefixtures("package_folder")
def test_without_the_module_others_run_and_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_does_without("was not built")
        assert _native.why_not("cuda") == "the CUDA module was not built; pip builds it where it finds nvcc on PATH"
        assert _native.why_not("cuda") in _native.build_info()


def test_a_broken_module_is_warned_of_once(package_folder):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package_folder / f"_C{suffix}").write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match=f"the C\\+\\+ module cannot be loaded: .*_C{suffix}") as caught:
        assert_does_without("cannot be loaded")
    assert len(caught) == 1


def test_a_broken_cuda_module_is_warned_of_once(package_folder):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package_folder / f"_cuda{suffix}").write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match=f"the CUDA module cannot be loaded: .*_cuda{suffix}") as caught:
        reason = _native.why_not("cuda")
        assert reason.startswith("the CUDA module cannot be loaded: ") and reason in _native.build_info()
        with pytest.raises(ImportError, match="the native kernels cannot run: the CUDA module cannot be loaded"):
            _native.run("layout_mask", torch.device("cuda", 0))
    assert len(caught) == 1


@pytest.mark.usefixtures("load_again")
def test_the_openmp_runtime_of_torch_is_made_visible_where_it_is_not(monkeypatch):
    imported, loaded = [], []

    def import_module(name):
        imported.append(name)
        if len(imported) == 1:
            raise ImportError(f"{name}: undefined symbol: GOMP_parallel")
        return "the module"

    monkeypatch.setattr(_native, "PathFinder", SimpleNamespace(find_spec=lambda *_: object()))
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda path, mode: loaded.append((path, mode)))
    assert _native.library("cpu") == "the module"
    assert all("torch" in path and "omp" in path and mode == _native.ctypes.RTLD_GLOBAL for path, mode in loaded)


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
@pytest.mark.usefixtures("compiled")
def test_there_is_one_openmp_runtime():
    program = """
import torch
from ebft_kernels import feature_matching
torch.set_num_threads(2)
feature_matching(torch.randn(1, 64, 4, 4096), torch.randn(1, 64, 4096), impl="native")
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if "omp" in line.rsplit("/", 1)[-1]})
"""
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert len(result.stdout.split()) <= 1, result.stdout


def test_only_the_cpu_and_cuda_are_served():
    reason = _dispatch.why_not("feature_matching", "native", torch.device("meta"), torch.float32)
    assert reason == "they are compiled for the CPU and for CUDA only"
    with pytest.raises(ValueError, match="they are compiled for the CPU and for CUDA only"):
        _dispatch.resolve_impl("feature_matching", "native", torch.device("meta"), torch.float32)


def test_build_info_names_what_was_compiled(compiled):
    info = _native.build_info()
    assert compiled.isas()[-1] in info and compiled.compiler in info


def test_the_best_instruction_set_is_the_default(compiled):
    assert _native.execution() == (len(compiled.isas()) - 1, torch.get_num_threads())
    with _native.assume_isa("baseline"):
        assert _native.execution()[0] == 0


# Rollouts [2, 3, 4, 5] and targets [2, 3, 5], in float32.
RUN = {"isa": 0, "threads": 1, "dtype": 1, "sizes": (2, 3, 4, 5)}
OPERANDS = {"rollouts": 64, "rollout_strides": (240, 80, 20), "targets": 64, "target_strides": (60, 20)}
MATCHING = {"groups": 1, "whitening": 0, "alignment_coef": 1.0, "diversity_coef": 1.0, "estimator": 0}
RESULTS = dict.fromkeys(("loss", "alignment", "diversity", "reward", "advantage"), 64)
REFUSED = [
    ({"isa": 3}, ValueError, "isa: expected a number from 0 to"),
    ({"isa": -1}, ValueError, "isa: expected a number from 0 to"),
    ({"threads": 0}, ValueError, "threads: expected at least 1"),
    ({"dtype": 4}, ValueError, "dtype: expected a number from 0 to 3, got 4"),
    ({"dtype": -1}, ValueError, "dtype: expected a number from 0 to 3, got -1"),
    ({"sizes": (5,)}, ValueError, "strides: expected one for each axis but the last"),
    ({"sizes": (2, -3, 4, 5)}, ValueError, "sizes: expected no negative one"),
    ({"sizes": (2, 3, 0, 5)}, ValueError, "sizes: expected at least one feature"),
    ({"sizes": (2, 3, 4, 0)}, ValueError, "sizes: expected at least one feature"),
    ({"sizes": (2, 3, 1 << 40, 5)}, ValueError, "sizes: expected at least one feature and 1 to 16384 rollouts"),
    ({"rollout_strides": (80, 20)}, ValueError, "strides: expected one for each axis but the last"),
    ({"target_strides": (60, 20, 4)}, ValueError, "strides: expected one for each axis but the last"),
    ({"rollouts": 0}, ValueError, "address: expected that of a tensor, got 0"),
    ({"targets": 0}, ValueError, "address: expected that of a tensor, got 0"),
    ({"reward": 0}, ValueError, "address: expected that of a tensor, got 0"),
    ({"groups": 0}, ValueError, "groups: expected a divisor of the number of features"),
    ({"groups": 3}, ValueError, "groups: expected a divisor of the number of features"),
    ({"whitening": 3}, ValueError, "whitening: expected a number from 0 to 2, got 3"),
    ({"estimator": -1}, ValueError, "estimator: expected a number from 0 to 2, got -1"),
    ({"rollouts": -1}, TypeError, "incompatible function arguments"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_bad_calls_of_feature_matching_are_refused(change, error, message, compiled):
    arguments = {**RUN, **OPERANDS, **MATCHING, **RESULTS, **change}
    with pytest.raises(error, match=message):
        compiled.feature_matching(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (2, 3, 1, 5)}, "unbiased: expected at least 2 rollouts"),
        ({"difference": 0}, "address: expected that of a tensor, got 0"),
        ({"loss": 0}, "address: expected that of a tensor, got 0"),
    ],
)
def test_bad_calls_of_the_mean_embedding_loss_are_refused(change, message, compiled):
    arguments = {**RUN, **OPERANDS, "unbiased": True, "loss": 64, "difference": 64, **change}
    with pytest.raises(ValueError, match=message):
        compiled.mean_embedding_forward(*arguments.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (2, 3, 1, 5)}, "unbiased: expected at least 2 rollouts"),
        ({"sizes": (5,)}, "strides: expected one for each axis but the last"),
        ({"grad": 0}, "address: expected that of a tensor, got 0"),
        ({"grad_targets": 0}, "address: expected that of a tensor, got 0"),
    ],
)
def test_bad_calls_of_its_backward_pass_are_refused(change, message, compiled):
    rollouts = {name: OPERANDS[name] for name in ("rollouts", "rollout_strides")}
    others = {"grad": 64, "difference": 64, "unbiased": True, "grad_rollouts": 64, "grad_targets": 64}
    with pytest.raises(ValueError, match=message):
        compiled.mean_embedding_backward(*{**RUN, **rollouts, **others, **change}.values())
