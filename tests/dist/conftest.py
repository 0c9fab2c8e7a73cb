import sys
from pathlib import Path

import pytest
import torch

for room in ("ops", "train"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))


@pytest.fixture(autouse=True)
def one_thread():
    """The toy model is too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
