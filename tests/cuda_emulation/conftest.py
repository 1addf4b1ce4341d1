"""The CUDA kernels, compiled for the CPU, in the place of the compiled module: ``impl="native"`` runs them."""

from __future__ import annotations

import pytest

from ebft_kernels import _native

from .library import COMPILER, Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return Emulated(build(tmp_path_factory.mktemp("cuda_emulation")))


@pytest.fixture
def cuda(emulated, monkeypatch):
    """``impl="native"`` runs the CUDA kernels in the test; threads take turns in ascending order."""
    monkeypatch.setattr(_native, "library", lambda: emulated)
    monkeypatch.setattr(_native, "execution", lambda: (0,))
    monkeypatch.setattr(_native, "why_not", lambda _device_type: "")
    yield emulated
    emulated.library.emulation_set_order(0)
