"""Fixtures of the ops' tests."""

import pytest
from check import instruction_set


@pytest.fixture
def isa(request):
    """The CPU kernels in the instruction set that the test is parametrised with."""
    with instruction_set(request.param):
        yield request.param
