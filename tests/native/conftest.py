"""The tests of the compiled module run once for each instruction set that it has code for."""

from __future__ import annotations

import pytest

from ebft_kernels import _native

ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture
def compiled():
    """Skips where nothing was compiled; ``test_build.py`` fails if that is not for want of a compiler."""
    if reason := _native.why_not("cpu"):
        pytest.skip(reason)
    return _native.library("cpu")


@pytest.fixture(params=ISAS)
def isa(request, compiled):
    """Runs the test with the code for each instruction set."""
    if request.param not in compiled.isas():
        pytest.skip(f"this processor has no {request.param}")
    with _native.assume_isa(request.param):
        yield request.param
