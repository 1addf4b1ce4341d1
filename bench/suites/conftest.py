"""Options of the suites, and the machine in every file of results."""

from __future__ import annotations

import pytest
import torch

from bench.measure import machine_line
from bench.shapes import MODELS, Geometry


def pytest_addoption(parser: pytest.Parser) -> None:
    """What is measured at."""
    group = parser.getgroup("bench")
    group.addoption("--model", choices=list(MODELS), default="demo")
    group.addoption("--length", type=int, default=512, help="prompt tokens P")
    group.addoption("--batch-size", type=int, default=1)
    group.addoption("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=2)


@pytest.fixture(scope="session")
def shape(pytestconfig: pytest.Config) -> tuple:
    """Model, geometry, dtype and device."""
    option = pytestconfig.getoption
    torch.set_num_threads(option("--threads"))
    geometry = Geometry(batch=option("--batch-size"), length=option("--length"))
    return MODELS[option("--model")], geometry, getattr(torch, option("--dtype")), torch.device(option("--device"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Processor, threads and versions as all other tables have them."""
    machine_info["line"] = machine_line(torch.device(config.getoption("--device")))
