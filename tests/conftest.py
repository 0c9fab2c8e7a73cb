"""Chooses Triton's interpreter where there is no GPU, before anything imports Triton, and leaves out what needs a
compiler where there is none.
"""

import os
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item):
    if item.get_closest_marker("inductor") and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler")
