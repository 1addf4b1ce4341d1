"""The kernels compile for every supported architecture as docs/compiled-kernels.md says, and within what it demands."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import _binaries, _cuda_kernels, compiled_kernels
from bench._documents import drift, write
from bench._targets import GPUS, programs_in_flight

ROOT = Path(__file__).resolve().parents[1]


def kernel_names() -> set[str]:
    """Every ``@triton.jit`` function of the package that is launched: their names end in "_kernel"."""
    found = set()
    for path in (ROOT / "ebft_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found |= {node.name for decorator in node.decorator_list if "triton.jit" in ast.unparse(decorator)}
    return found


@pytest.fixture(scope="module")
def checked() -> tuple[subprocess.CompletedProcess, str]:
    """What the tool says of the document, and every case, which stays in bench-output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    details = ROOT / "bench-output" / "compiled-kernels.md"
    command = [sys.executable, "-m", "bench.compiled_kernels", "--check", "--details", str(details)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return result, details.read_text(encoding="utf-8")


@pytest.mark.speed
@pytest.mark.timeout(1800)  # some minutes on two cores, if nobody else works on them
def test_the_document_is_what_the_kernels_compile_to_and_nothing_is_wrong_with_them(checked):
    result, _ = checked
    assert result.returncode == 0, f"{result.stderr[-6000:]}\nIf this is wanted: {compiled_kernels.COMMAND}"


def test_drift_is_shown_with_the_command_that_mends_it(tmp_path):
    path = tmp_path / "document.md"
    assert drift(path, "one\n", "python -m tool")[0].endswith("If the change is wanted: python -m tool, and commit it.")
    write(path, "one\ntwo\n")
    assert drift(path, "one\ntwo\n", "python -m tool") == []
    assert drift(path, "one\nthree\n", "python -m tool")[-2:] == ["-two", "+three"]


def test_a_kernel_that_does_not_compile_is_named_and_hides_no_other(monkeypatch):
    def call():
        raise RuntimeError("first line\nlast line")

    monkeypatch.setattr(compiled_kernels, "_calls", lambda: {"broken": call})
    (row,) = compiled_kernels._compile_case(("sm_90", "broken"))
    assert row.case == "broken" and row.problems == ("does not compile: RuntimeError: last line",)


def summary() -> dict[str, str]:
    """The parts of the document by their titles."""
    parts = re.split(r"^# ", compiled_kernels.DOCUMENT.read_text(encoding="utf-8"), flags=re.M)[1:]
    return dict(part.split("\n", 1) for part in parts)


def test_the_document_has_every_kernel_on_every_architecture():
    triton, cuda = summary()["Triton kernels"], summary()["CUDA kernels"]
    assert f"| kernel | {' | '.join(GPUS)} |" in triton and f"| kernel | {' | '.join(_cuda_kernels.ARCHS)} |" in cuda
    assert set(re.findall(r"^\| `(\w+)`", triton, flags=re.M)) == kernel_names()
    assert set(re.findall(r"^\| `(\w+)`", cuda, flags=re.M)) == {name for name, _ in cuda_kernels()}
    assert "-" not in re.findall(r"\| (\S+) (?=\|)", triton + cuda)


def cuda_kernels() -> set[tuple[str, str]]:
    """The kernels of csrc/cuda with all arguments that they are compiled for, as the document names them."""
    dtypes = ("float64", "float32", "bfloat16", "float16")
    moving = ("mean_embedding_fwd", "mean_embedding_bwd", "pool_fwd", "pool_bwd")
    found = {(f"{name}_kernel", dtype) for name, dtype in itertools.product(moving, dtypes)}
    tiles = ("2, 0", "3, 0", "5, 0", "9, 0", "5, 1")
    found |= {("gram_kernel", f"{dtype}, {tile}") for dtype, tile in itertools.product(dtypes, tiles)}
    return found | {
        ("match_kernel", "float32"),
        ("match_kernel", "float64"),
        ("geometry_kernel", ""),
        ("mask_kernel", ""),
    }


def test_every_cuda_kernel_is_known_with_all_types_and_sizes():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    assert {name for name, _ in cuda_kernels()} == set(re.findall(r"(?<!launch\(\")\b([a-z_]+_kernel)\(", sources))
    assert {name for name, _ in _cuda_kernels.NARROW} <= {name for name, _ in cuda_kernels()}
    compiled = _cuda_kernels.read_all()
    for arch in _cuda_kernels.ARCHS if compiled else ():
        here = [(kernel.name, kernel.arguments) for kernel in compiled if kernel.arch == arch]
        assert set(here) == cuda_kernels() and len(here) == len(cuda_kernels())


@pytest.mark.speed
@pytest.mark.timeout(1800)
def test_the_details_have_every_kernel_on_every_architecture(checked):
    parts = dict(part.split("\n", 1) for part in re.split(r"^## ", checked[1], flags=re.M)[1:])
    for arch in GPUS:
        assert set(re.findall(r"^\| `(\w+)`", parts[arch], flags=re.M)) == kernel_names()
    for arch in _cuda_kernels.ARCHS if _cuda_kernels.compiler() else ():
        rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\|", parts[f"CUDA on {arch}"], flags=re.M)
        assert set(rows) == cuda_kernels() and len(rows) == len(cuda_kernels())


def test_what_is_demanded_of_a_cuda_kernel():
    good = _cuda_kernels.Kernel("sm_80", "pool_fwd_kernel", "float32", 60, 0, 32, {"LDG.128": 8, "STG.128": 1})
    assert not list(_cuda_kernels.problems(good))
    assert list(_cuda_kernels.problems(good._replace(spilled=8))) == ["spills 8 bytes per thread"]
    narrow = good._replace(instructions={"LDG.64": 8, "STG.64": 1})
    assert list(_cuda_kernels.problems(narrow)) == ["has no 16-byte loads", "has no 16-byte stores"]
    assert list(_cuda_kernels.problems(narrow._replace(name="gram_kernel"))) == ["has no 16-byte loads"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on PATH")
def test_spills_of_a_cuda_kernel_would_be_seen(tmp_path):
    """A kernel with more numbers than registers, and one without spills that loads 4 bytes at a time."""
    source, cubin = tmp_path / "wasteful.cu", tmp_path / "wasteful.cubin"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spilling_kernel(double* x) {\n"
        "  double y[64];\n"
        "  for (int i = 0; i < 64; ++i) y[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) for (int k = 0; k < 64; ++k) x[i * 64 + k] = y[i] * y[k];\n"
        "}\n"
        "__global__ void narrow_kernel(float* x) { x[threadIdx.x] += 1; }\n"
    )
    subprocess.run(["nvcc", "-cubin", "-arch=sm_80", str(source), "-o", str(cubin)], check=True)
    narrow, spilling = _cuda_kernels.read("sm_80", cubin)
    assert (narrow.name, narrow.spilled, narrow.instructions) == (
        "narrow_kernel",
        0,
        {"LDG.32 or less": 1, "STG.32 or less": 1},
    )
    assert spilling.name == "spilling_kernel" and spilling.spilled > 0


def test_cuda_kernels_that_were_not_built_or_by_another_cuda_are_not_compared(monkeypatch, capsys):
    _, heading, committed = compiled_kernels.DOCUMENT.read_text(encoding="utf-8").partition("# CUDA kernels")
    kernels = [_cuda_kernels.Kernel(arch, "geometry_kernel", "", 60, 0, 0, {}) for arch in _cuda_kernels.ARCHS]
    for compiler, read, said in (("", [], "there are none: CPU: "), ("CUDA 1.0", kernels, "CUDA kernels: CUDA 1.0")):
        monkeypatch.setattr(_cuda_kernels, "compiler", lambda compiler=compiler: compiler)
        assert compiled_kernels._document([], read, check=True).endswith(heading + committed)
        assert said in capsys.readouterr().err
    written = compiled_kernels._document([], kernels, check=False)
    assert "compiled by CUDA 1.0." in written and "| `geometry_kernel` | 60 / 0 / 8 |" in written


def test_a_spilling_cuda_kernel_is_named():
    spilling = _cuda_kernels.Kernel("sm_80", "geometry_kernel", "", 60, 8, 0, {})
    assert list(_cuda_kernels.problems(spilling)) == ["spills 8 bytes per thread"]


def test_the_document_is_of_the_version_that_is_tested():
    (pinned,) = re.findall(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    assert f"with Triton {pinned};" in compiled_kernels.DOCUMENT.read_text(encoding="utf-8")


GOOD = _binaries.Binary(
    registers=100,
    spilled=0,
    shared=1000,
    tensor_columns=0,
    multiplies_16_bit=True,
    instructions={"HMMA": 4, "LDG.128": 2, "STG.128": 1, "STG.32 or less": 9},
)


def test_what_is_demanded_of_a_kernel():
    def problems(arch="sm_86", kernel="some_kernel", **changes):
        return list(compiled_kernels._problems(GPUS[arch], kernel, GOOD._replace(**changes)))

    assert not problems()
    assert problems(spilled=8) == ["spills 8 bytes per thread"]
    assert problems("gfx942", spilled=8) == ["spills 8 registers"]
    assert not problems(shared=99 << 10)
    assert problems(shared=(99 << 10) + 1) == ["needs 101377 bytes of shared memory, there are 101376"]
    wide = {"LDG.128": 2, "STG.128": 1}
    assert problems(instructions=wide) == ["multiplies 16-bit matrices without tensor cores"]
    assert not problems(instructions=wide, multiplies_16_bit=False)
    assert not problems(instructions={"HGMMA": 1, "LDGSTS.128": 1, "STG.128": 1})
    narrow = {"HMMA": 1, "LDG.64": 3, "STG.64": 3}
    assert problems(instructions=narrow) == ["has no 16-byte loads", "has no 16-byte stores"]


def test_exceptions_name_kernels_that_there_are():
    assert {kernel for kernel, _ in compiled_kernels.NARROW} <= kernel_names()
    assert {access for _, access in compiled_kernels.NARROW} <= {"loads", "stores"}


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "expected"),
    [
        ("sm_80", 32, 4, 0, 16),  # 64 warps
        ("sm_86", 32, 4, 0, 12),  # 48 warps
        ("sm_86", 32, 1, 0, 16),  # 16 programs
        ("sm_80", 128, 4, 0, 4),  # 65536 registers
        ("sm_80", 129, 4, 0, 3),  # 136 registers per thread are given, 3 warps per scheduler
        ("sm_80", 255, 8, 0, 1),
        ("sm_80", 32, 4, 40 << 10, 4),  # 164 KiB / 41 KiB
        ("sm_90", 32, 4, 227 << 10, 1),
        ("sm_120", 32, 4, 99 << 10, 1),
        ("gfx942", 64, 4, 0, 8),
        ("gfx942", 65, 4, 0, 7),
        ("gfx942", 256, 4, 0, 2),
        ("gfx942", 64, 8, 0, 4),
        ("gfx942", 64, 4, 30 << 10, 2),
    ],
)
def test_programs_in_flight(arch, registers, warps, shared, expected):
    assert programs_in_flight(GPUS[arch], registers=registers, warps=warps, shared=shared) == expected


def test_tensor_memory_limits_programs_in_flight():
    options = {"registers": 32, "warps": 4, "shared": 0}
    assert [programs_in_flight(GPUS["sm_100"], **options, tensor_columns=x) for x in (0, 128, 256, 512)] == [
        16,
        4,
        2,
        1,
    ]


def test_reading_of_nvidia_code():
    usage = "Function f:\n  REG:78 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:400 TEXTURE:0\n"
    assert _binaries.nvidia_resources(usage) == {"registers": 78, "spilled": 24}
    code = """
        /*0010*/  @P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/      LDG.E.LTC128B R4, desc[UR4][R2.64] ;
        /*0030*/      LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0040*/      STG.E.64 desc[UR4][R2.64], R4 ;
        /*0050*/      HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/      HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/      LDS.128 R4, [R2] ;
    """
    expected = {"LDG.128": 1, "LDG.32 or less": 1, "LDGSTS.128": 1, "STG.64": 1, "HMMA": 1, "HGMMA": 1}
    assert _binaries.nvidia_instructions(code) == expected


def test_reading_of_amd_code():
    metadata = """
  - .agpr_count:     4
    .args:
      - .offset:         0
        .size:           8
    .sgpr_count:     22
    .sgpr_spill_count: 1
    .vgpr_count:     50
    .vgpr_spill_count: 2
"""
    assert _binaries.amd_resources(metadata) == {"registers": 50, "spilled": 3}
    code = """
	global_load_dwordx4 v[2:5], v[0:1], off
	buffer_load_dwordx2 v[2:3], v0, s[0:3], 0 offen
	global_store_dwordx4 v[0:1], v[2:5], off
	global_store_short v[0:1], v2, off
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], 0
"""
    expected = {"LDG.128": 1, "LDG.64": 1, "STG.128": 1, "STG.32 or less": 1, "MFMA": 1}
    assert _binaries.amd_instructions(code) == expected


def test_products_of_16_bit_matrices_are_found():
    line = "%r = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<64x16x{0}> * tensor<16x64x{0}> -> tensor<64x64xf32>"
    assert _binaries.multiplies_16_bit(line.format("bf16"))
    assert _binaries.multiplies_16_bit(line.format("f16"))
    assert not _binaries.multiplies_16_bit(line.format("f32"))


def test_the_users_page_names_every_kernel_and_no_other():
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+_kernel)`", page)) == kernel_names()
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S):
        exec(block, {})
