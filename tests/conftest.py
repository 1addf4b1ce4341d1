"""Settings for every test: where it runs, deterministic algorithms, and NaN in every uninitialised tensor."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from . import op_checks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Already here for the conftests of folders below, which may import Triton; pytest_configure has the last word.
if "--device cuda" not in " ".join(sys.argv).replace("=", " "):
    os.environ["TRITON_INTERPRET"] = "1"
# Until the options are known: the conftest of a folder that the command line names may import kernels before that.
os.environ.setdefault("TRITON_INTERPRET", "1")

#: In the names of tests of what PyTorch does with the tensors of a device, which emulated ones are not.
UNEMULATED = ("opcheck", "registration", "compile", "copies_of_a_layout", "immutable_and_moves")

GOLDEN_DIR = Path(__file__).resolve().parents[2] / "shared" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow: minutes each")
    parser.addoption(
        "--fuzz-examples", type=int, default=50, metavar="N", help="cases that each test of random cases draws (50)"
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "emulated"),
        default="cpu",
        help="cpu (default): every test, Triton's kernels in its interpreter, whether there is a GPU or not; "
        "cuda: the tests of the ops, on the tensors of a GPU and with compiled kernels; emulated: these tests and the "
        "host code of CUDA without a GPU, on tensors that say they are on one",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before the first import of a kernel and the first look for a GPU."""
    where = config.getoption("--device")
    op_checks.DEVICE, op_checks.INTERPRETED = ("cpu" if where == "cpu" else "cuda"), where != "cuda"
    if op_checks.INTERPRETED:
        os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
        return
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or torch refuses matrix products as nondeterministic
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: expected a GPU that torch can use, there is none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked slow, unless it is asked for, and on CUDA what is about the CPU.

    pytest says how many were deselected.
    """
    kept = [item for item in items if config.getoption("--slow") or not item.get_closest_marker("slow")]
    if op_checks.DEVICE == "cuda":
        kept = [item for item in kept if "device" in item.fixturenames and not item.get_closest_marker("speed")]
        if op_checks.INTERPRETED:
            kept = [item for item in kept if not any(word in item.name for word in UNEMULATED)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where the tests of the ops run, ``--device``. What a test makes without saying where is made there."""
    if op_checks.DEVICE == "cpu":
        yield torch.device("cpu")
        return
    from .emulated_cuda import emulated_cuda  # which may import Triton

    with emulated_cuda() if op_checks.INTERPRETED else contextlib.nullcontext(), torch.device("cuda") as device:
        yield device


@pytest.fixture(autouse=True)
def deterministic_and_poisoned():
    """In this mode torch refuses nondeterministic kernels and fills what ``torch.empty`` returns with NaN.

    One thread: the tests' tensors are tiny, and threads that wait for each other on a busy machine cost minutes. Tests
    of speed choose their own number.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fuzz_examples(request: pytest.FixtureRequest) -> int:
    """``--fuzz-examples``."""
    return request.config.getoption("--fuzz-examples")
