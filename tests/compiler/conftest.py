"""Every test begins with nothing compiled."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _from_nothing():
    torch._dynamo.reset()
