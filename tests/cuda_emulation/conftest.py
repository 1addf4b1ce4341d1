"""The CUDA kernels, compiled for the CPU, in the place of those for the CPU: ``impl="native"`` runs them."""

from __future__ import annotations

import contextlib

import pytest

from ebft_kernels import _native

from .library import COMPILER, build


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def cuda(emulation, monkeypatch):
    """Tensors of the CPU are taken to be on a GPU, whose threads take turns in ascending order."""
    monkeypatch.setattr(_native, "on_cuda", lambda _device: True)
    monkeypatch.setattr(_native, "current_stream", lambda _device: contextlib.nullcontext(0))
    monkeypatch.setattr(_native, "_load", lambda _name: (emulation.module, ""))
    yield emulation
    emulation.set_order(0)
