"""The CUDA module: whether it can run on a GPU, how its kernels are called, and what it does where there is no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
from types import SimpleNamespace

import pytest
import torch

from ebft_kernels import _native, _triton, available_impls, select_impl
from ebft_kernels.testing import LAYOUTS

ALL = (800, 860, 890, 900, 1000, 1200)


@pytest.fixture
def gpu(monkeypatch):
    """Sets up a GPU, its driver and a module that was compiled for some targets, none of which exist."""

    def install(capability=(9, 0), *, targets=ALL, runtime=13000, driver=13000, hip=None):
        module = SimpleNamespace(targets=list(targets), runtime=runtime, driver=lambda: driver)
        monkeypatch.setattr(_native, "_load", lambda _name: (module, ""))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        _native._why_not_this_gpu.cache_clear()
        return module

    yield install
    _native._why_not_this_gpu.cache_clear()


@pytest.mark.parametrize(
    ("capability", "targets"),
    [
        *(((target // 100, target // 10 % 10), ALL) for target in ALL),
        ((8, 7), ALL),  # machine code for sm_86
        ((10, 3), ALL),  # machine code for sm_100
        ((12, 1), ALL),
        ((13, 0), ALL),  # PTX
        ((12, 0), (800, 900)),  # PTX of an older nvcc
    ],
)
def test_gpus_that_there_is_code_for(gpu, capability, targets):
    gpu(capability, targets=targets)
    assert _native.why_not("cuda") == ""


@pytest.mark.parametrize(
    ("setup", "reason"),
    [
        ({"capability": (7, 5)}, "they are compiled for sm_80, .*, sm_120 and PTX, the GPU is sm_75"),
        ({"capability": (11, 0)}, "they are compiled for sm_80, .*, sm_120 and PTX, the GPU is sm_110"),
        ({"capability": (8, 0), "targets": (860, 900)}, "they are compiled for sm_86, sm_90 and PTX, the GPU is sm_80"),
        ({"driver": 12060}, r"they are compiled by CUDA 13\.0, the driver is for 12\.6"),
        ({"capability": None}, "there is no GPU"),
        ({"hip": "6.2"}, "they are compiled for NVIDIA only"),
    ],
)
def test_what_cannot_run_is_declined_and_build_info_says_why(gpu, setup, reason):
    gpu(**setup)
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        raise RuntimeError(_native.why_not("cuda"))
    gpu(**setup).isas, _native._load("_C")[0].openmp, _native._load("_C")[0].compiler = (lambda: ["avx2"]), True, "gcc"
    assert _native.build_info().endswith(f", not used here: {_native.why_not('cuda')}")


def test_a_driver_of_the_same_major_version_will_do(gpu):
    gpu(runtime=12090, driver=12020)
    assert _native.why_not("cuda") == ""


def test_on_cuda_triton_is_preferred_and_native_does_what_it_does_not(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(_triton, "why_not", lambda _device_type: "")
    assert available_impls("feature_matching", "cuda") == ("triton", "native", "torch", "reference")
    assert select_impl("pool_features", "cuda", torch.bfloat16) == "triton"
    assert select_impl("pool_features", "cuda", torch.float64) == "native"
    assert select_impl("strided_attention", "cuda", torch.float64) == "torch"
    monkeypatch.setattr(_triton, "why_not", lambda _device_type: "triton is not installed")
    assert select_impl("feature_matching", "cuda", torch.float32) == "native"
    assert select_impl("feature_matching", "cuda", torch.float32, sizes={"n": 16}) == "native"
    assert select_impl("feature_matching", "cuda", torch.float32, sizes={"n": 17}) == "torch"


def test_kernels_get_the_current_stream_of_the_device_of_their_tensors(gpu, monkeypatch):
    said = []

    @contextlib.contextmanager
    def current_device(device):
        said.append(f"enter {device}")
        yield
        said.append(f"leave {device}")

    monkeypatch.setattr(torch.cuda, "device", current_device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=device.index + 70))
    gpu().some_kernel = lambda *arguments: said.append(arguments)
    _native.run("some_kernel", torch.device("cuda", 1), 2, "three")
    assert said == ["enter cuda:1", (71, 2, "three"), "leave cuda:1"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
def test_the_module_is_there_where_nvcc_is():
    assert _native._load("_cuda")[1] == ""


@pytest.fixture
def module():
    """Skips where nothing was compiled, for which the test before has to find a reason."""
    module, reason = _native._load("_cuda")
    if reason:
        pytest.skip(reason)
    return module


def test_build_info_names_the_targets(module):
    assert list(module.targets) == sorted(module.targets)
    info = _native.build_info()
    assert f"CUDA: {', '.join(f'sm_{target // 10}' for target in module.targets)} and PTX, compiled by CUDA " in info
    assert torch.cuda.is_available() or info.endswith(", not used here: there is no GPU")


def test_it_has_a_cuda_runtime_of_its_own_and_hides_it(module):
    """Another one, that of torch, may be loaded before it, and of another version."""
    library = ctypes.CDLL(module.__file__, mode=ctypes.RTLD_LOCAL)
    with open("/proc/self/maps") as maps:
        before = {line.split()[-1] for line in maps if "libcuda" in line}
    assert torch.cuda.is_available() or not before
    assert hasattr(library, "PyInit__cuda")
    assert not any(
        hasattr(library, name) for name in ("cudaLaunchKernelExC", "cudaGetLastError", "ebft_cuda_layout_mask")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the addresses of this test are not its own")
def test_without_a_gpu_a_call_says_which_kernel_failed_and_why(module):
    """The real launch code and the real runtime of CUDA."""
    layout = LAYOUTS["strided"]()
    sizes = (layout.batch_size, layout.length, layout.num_anchors, layout.samples, layout.horizon)
    mask = torch.empty(layout.batch_size * layout.packed_length**2, dtype=torch.uint8)
    message = (
        rf"^mask_kernel \({-(-len(mask) // 8192)} blocks of 128 threads, 0 bytes of shared memory\): cudaError\w+: "
    )
    with pytest.raises(RuntimeError, match=message):
        module.layout_mask(0, sizes, *map(_native.layout_tensor, layout.key_ranges), False, mask.data_ptr())
