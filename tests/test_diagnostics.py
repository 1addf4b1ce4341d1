"""The self-test passes here, and fails where an implementation is wrong."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import ebft_kernels
from ebft_kernels import _self_test, _triton, diagnostics
from ebft_kernels._dispatch import OPS
from ebft_kernels.attention import _torch as torch_attention


@pytest.fixture
def without_triton(monkeypatch):
    """As on a machine without a GPU, where the interpreter is not switched on."""
    why_not = diagnostics.why_not

    def no_triton(op, impl, *rest):
        return "there is no GPU" if impl == "triton" else why_not(op, impl, *rest)

    monkeypatch.setattr(diagnostics, "why_not", no_triton)
    monkeypatch.setattr(_triton, "why_not", lambda _device_type: "there is no GPU")


def wrong_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "WRONG" in line]


@pytest.mark.usefixtures("without_triton")
def test_build_info_names_the_chosen_implementation_of_every_op_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(_triton, "why_not", lambda _device_type: "there is no GPU")
    info = ebft_kernels.build_info()
    assert info["torch"] == torch.__version__
    assert info["triton"] and info["native"]
    assert info["target"] == "no Triton kernels: there is no GPU"
    for op, (_, impls) in OPS.items():
        present, _, missing = info[op].partition("; not there: ")
        assert present.startswith(f"{ebft_kernels.select_impl(op, 'cpu', torch.float32)} on cpu; also there: ")
        assert all((impl in missing) if impl == "triton" else (impl in info[op]) for impl in impls)


@pytest.mark.heavy
def test_self_test_covers_every_op_and_passes(capsys):
    assert ebft_kernels.self_test(device="cpu")
    table = capsys.readouterr().out
    for op, (_, impls) in OPS.items():
        for impl in impls:
            assert f"\n{op:<24}{impl:<11}float32 " in table
    assert table.count("\nlayout                  triton     integers  ") == 2
    assert "WRONG" not in table and "none wrong" in table


@pytest.mark.usefixtures("without_triton")
def test_what_could_not_run_is_named_with_the_reason(capsys):
    assert ebft_kernels.self_test(device="cpu")
    table = capsys.readouterr().out
    for op, (_, impls) in OPS.items():
        assert (f"\n{op:<24}triton     not run: there is no GPU\n" in table) == ("triton" in impls)


@pytest.mark.usefixtures("without_triton")
def test_the_16_bit_cases_that_a_gpu_gets_hold_for_the_implementations_that_run_here(monkeypatch, capsys):
    monkeypatch.setattr(diagnostics, "_dtypes", lambda *_: (torch.bfloat16, torch.float16))
    assert ebft_kernels.self_test(device="cpu"), wrong_lines(capsys)


@pytest.mark.heavy
@pytest.mark.usefixtures("without_triton")
def test_the_long_rows_of_wide_heads_that_a_gpu_gets_hold_for_the_implementations_that_run_here(monkeypatch, capsys):
    names = ("long prompt, D = 128", "the same in a window")
    long = [case for case in _self_test.cases(large=True) if case.name in names]
    assert len(long) == 4 and {x.shape[-1] for case in long for x in case.inputs().values()} == {128}
    assert all(case.inputs()["k"].shape[2] > 1024 for case in long)
    monkeypatch.setattr(diagnostics, "cases", lambda *, large: long)  # noqa: ARG005
    monkeypatch.setattr(diagnostics, "_dtypes", lambda *_: (torch.bfloat16,))
    assert ebft_kernels.self_test(device="cpu"), wrong_lines(capsys)


@pytest.mark.usefixtures("without_triton")
class TestFaults:
    """One implementation of one op is broken; exactly its lines say so."""

    def broken(self, monkeypatch, capsys, fault) -> list[str]:
        step = torch_attention.step

        def faulty(*arguments):
            out, lse = step(*arguments)
            return fault(out), lse

        monkeypatch.setattr(torch_attention, "step", faulty)
        assert not ebft_kernels.self_test(device="cpu")
        lines = wrong_lines(capsys)
        assert len(lines) == 2
        assert all(line.startswith(f"{'strided_attention_step':<24}torch ") for line in lines)
        return lines

    def test_slightly_wrong_numbers(self, monkeypatch, capsys):
        self.broken(monkeypatch, capsys, lambda out: out * 1.0001)

    def test_nan_in_one_place(self, monkeypatch, capsys):
        def fault(out):
            out[0, 0, 0, 0] = float("nan")
            return out

        self.broken(monkeypatch, capsys, fault)

    def test_an_exception(self, monkeypatch, capsys):
        def fault(_out):
            raise RuntimeError("out of registers")

        assert all("RuntimeError: out of registers" in line for line in self.broken(monkeypatch, capsys, fault))

    def test_other_bits_in_a_second_run(self, monkeypatch, capsys):
        runs = iter(range(100))

        def fault(out):
            out[0, 0, 0, 0].add_(1e-7 * (next(runs) % 2))
            return out

        assert all("in a second run: other numbers" in line for line in self.broken(monkeypatch, capsys, fault))


@pytest.mark.heavy
def test_faults_in_the_layouts_kernels_are_found(monkeypatch, capsys):
    from ebft_kernels import _layout_triton

    def fault(*_arguments):
        raise RuntimeError("no such kernel")

    geometry = _layout_triton.geometry
    monkeypatch.setattr(diagnostics, "cases", lambda *, large: ())  # noqa: ARG005
    assert ebft_kernels.self_test(device="cpu")
    monkeypatch.setattr(_layout_triton, "geometry", lambda *x: (geometry(*x)[0] + 1, geometry(*x)[1]))
    assert not ebft_kernels.self_test(device="cpu")
    monkeypatch.setattr(_layout_triton, "geometry", fault)
    assert not ebft_kernels.self_test(device="cpu")
    lines = wrong_lines(capsys)
    assert len(lines) == 4 and all("no such kernel" in line for line in lines[2:])


def test_the_kernels_import_and_run_without_any_optional_package():
    program = """
        import sys
        for name in ("triton", "transformers", "accelerate", "tokenizers", "tqdm", "numpy", "safetensors"):
            sys.modules[name] = None
        import torch, ebft_kernels
        layout = ebft_kernels.StridedLayout.strided(1, 12, context=2, stride=2, horizon=2, samples=2)
        q = torch.randn(1, 2, layout.packed_length, 16, requires_grad=True)
        ebft_kernels.strided_attention(q, q, q, layout).sum().backward()
        assert q.grad is not None
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], check=True)
