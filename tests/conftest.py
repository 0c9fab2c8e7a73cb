"""Chooses Triton's interpreter where there is no GPU, before anything imports Triton, and leaves out what needs a
compiler where there is none.
"""

import os
import shutil
import signal
from importlib.util import find_spec
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

# The same examples every time: a promise about rounding is one about luck too. `--hypothesis-profile=new` draws
# new ones.
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile("same")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a shell runs in the background ignores Ctrl-C, and so would what the tests start to send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def patch_the_language_once_a_launch():
    """The interpreter puts its own functions into Triton's language, and does so again at each call of a device
    function, which takes half of its time. Once, for all that a kernel may call, is enough.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, both = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda fn: patch(both)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def multiply_alike_everywhere():
    """The interpreter leaves products to the BLAS kernel that suits the machine, and a promise about rounding would be
    kept here and not there. So they are made in float64 and rounded once; what our kernels add up stays float32.
    """
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    patch_the_language_once_a_launch()
    multiply_alike_everywhere()


@pytest.fixture
def one_rank():
    """A mesh of this process alone. The trainer keeps the process group that it began: then it is that one."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    if ours:
        dist.destroy_process_group()


def pytest_runtest_setup(item):
    if item.get_closest_marker("inductor") and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler")
