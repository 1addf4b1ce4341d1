"""What nvcc makes of the CUDA kernels for the oldest target and the newest; ``cuda_binaries.py`` prints all."""

from __future__ import annotations

import ctypes
import itertools
import subprocess

import pytest
import torch

from ebft_kernels.testing import LAYOUTS

from ..cuda_emulation.library import Status, layout_struct
from . import cuda_binaries

needs_nvcc = pytest.mark.skipif(cuda_binaries.NVCC is None, reason="there is no nvcc on PATH")

TARGETS = (cuda_binaries.TARGETS[0], cuda_binaries.TARGETS[-1])
# Kernels that move numbers of the layout, or work on small matrices in shared memory, have nothing to load at once.
NARROW = ("geometry_kernel", "mask_kernel", "match_kernel")


@pytest.fixture(scope="module")
def kernels():
    return cuda_binaries.compile_kernels(TARGETS)


@needs_nvcc
def test_all_kernels_are_there(kernels):
    dtypes = ("float64", "float32", "bfloat16", "float16")
    moving = ("mean_embedding_fwd", "mean_embedding_bwd", "pool_fwd", "pool_bwd")
    expected = {f"{name}_kernel<{dtype}>" for name, dtype in itertools.product(moving, dtypes)}
    tiles = ("2, 0", "3, 0", "5, 0", "9, 0", "5, 1")
    expected |= {f"gram_kernel<{dtype}, {tile}>" for dtype, tile in itertools.product(dtypes, tiles)}
    expected |= {"match_kernel<float32>", "match_kernel<float64>", "geometry_kernel", "mask_kernel"}
    for target in TARGETS:
        assert {k.name for k in kernels if k.target == target} == expected


@needs_nvcc
def test_everything_stays_in_registers(kernels):
    assert [k[:6] for k in kernels if k.stack or k.spilled] == []


@needs_nvcc
def test_shared_memory_leaves_room_for_the_blocks_that_registers_leave_room_for(kernels):
    """100 KB per multiprocessor on the smallest GPUs; match_kernel asks for up to 48 KB when it is started."""
    for k in kernels:
        assert k.shared <= 2048 and k.registers <= 255


@needs_nvcc
@pytest.mark.skipif(cuda_binaries.disassembler() is None, reason="there is no nvdisasm, on PATH or in triton")
def test_rows_are_read_and_written_16_bytes_at_a_time(kernels):
    assert all(k.instructions for k in kernels)
    for k in kernels:
        if not k.name.startswith(NARROW):
            assert k.count("LDG.128") > 0, k[:6]
        if not k.name.startswith((*NARROW, "gram_kernel")) or k.name == "mask_kernel":
            assert k.count("STG.128") > 0, k[:6]


@needs_nvcc
def test_spills_would_be_seen(tmp_path):
    """A kernel with more numbers than registers, and one without spills that loads 4 bytes at a time."""
    source = tmp_path / "wasteful.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spilling_kernel(double* x) {\n"
        "  double y[64];\n"
        "  for (int i = 0; i < 64; ++i) y[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) for (int k = 0; k < 64; ++k) x[i * 64 + k] = y[i] * y[k];\n"
        "}\n"
        "__global__ void narrow_kernel(float* x) { x[threadIdx.x] += 1; }\n"
    )
    by_name = {k.name: k for k in cuda_binaries.compile_kernels([80], [source])}
    assert by_name["spilling_kernel"].spilled > 0
    narrow = by_name["narrow_kernel"]
    assert narrow.spilled == narrow.stack == narrow.count("LDG.128") == 0
    assert cuda_binaries.disassembler() is None or narrow.count("LDG") == 1


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the addresses of this test are not its own")
def test_without_a_gpu_a_call_returns_what_failed(tmp_path):
    """The real launch code and the real runtime, in a library that needs no CUDA library to be loaded."""
    library = tmp_path / "layout.so"
    command = [cuda_binaries.NVCC, *cuda_binaries.FLAGS, "-arch=sm_90", "-shared", "-cudart", "static"]
    source = str(cuda_binaries.KERNELS / "layout.cu")
    subprocess.run([*command, "-Xcompiler", "-fPIC,-Wall,-Wextra", source, "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).ebft_cuda_layout_mask
    function.restype = Status
    layout = LAYOUTS["strided"]()
    addresses = [ctypes.c_void_p(r.data_ptr()) for r in layout.key_ranges]
    mask = torch.empty(layout.batch_size * layout.packed_length**2, dtype=torch.uint8)
    status = function(ctypes.byref(layout_struct(layout)), *addresses, 0, ctypes.c_void_p(mask.data_ptr()), None)
    assert status.error > 0
    blocks = -(-len(mask) // 8192)
    expected = f"mask_kernel ({blocks} blocks of 128 threads, 0 bytes of shared memory): cudaError"
    assert status.message.decode().startswith(expected)
