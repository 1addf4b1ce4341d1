"""The recorded cases, pooled and matched by the compiled kernels."""

from __future__ import annotations

import pytest

from ..golden import test_matching_golden as golden
from ..golden.loader import case_parameters

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.parametrize("name", case_parameters())
def test_rewards(name):
    golden.test_rewards(name, "native")


@pytest.mark.parametrize("name", case_parameters(golden.advantages_are_comparable))
def test_advantages(name):
    golden.test_advantages(name, "native")
