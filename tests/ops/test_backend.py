"""Which backend runs: chosen from the table, or forced, and never a silent fallback."""

import itertools
import os

import pytest
import torch
from check import compiled, python

import mmfast.ops._backend as _backend
from mmfast.ops import available, backend, concat_linear, native_calls

X, W = [torch.ones(2, 3), torch.ones(2, 1)], torch.ones(4, 4)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend is 'tpu', wanted one of cpu, triton, cuda, reference"):
        with backend("tpu"):
            pass


def test_an_impossible_choice_is_an_error_with_the_reason():
    with (
        backend("cuda"),
        pytest.raises(ValueError, match="'cuda' cannot run concat_linear on cpu tensors: it is for"),
    ):
        concat_linear(X, W)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "0")
    with backend("triton"), pytest.raises(ValueError, match="needs a GPU, or TRITON_INTERPRET=1"):
        concat_linear(X, W)


def test_forcing_ends_with_the_block_even_after_an_error():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert _backend.choose("concat_linear", torch.device("cpu")) != "reference" or not available(
        "concat_linear", "cpu"
    )["cpu"].startswith("ready")


def test_a_compiled_graph_follows_the_forced_backend():
    if available("concat_linear", "cpu")["cpu"] != "ready":
        pytest.skip("the native CPU library is not there")
    function = compiled(lambda x, w: concat_linear(x, w))
    calls = [native_calls("concat_linear.cpu")]
    for name in ("cpu", "reference", "cpu"):
        with backend(name):
            function(X, W)
        calls.append(native_calls("concat_linear.cpu"))
    assert [b - a for a, b in itertools.pairwise(calls)] == [1, 0, 1]


def test_every_backend_says_what_it_is():
    for device in ("cpu", "cuda"):
        states = available("concat_linear", device)
        assert list(states) == ["cpu", "triton", "cuda", "reference"] and all(states.values())
    if not torch.cuda.is_available():
        assert available("concat_linear", "cuda")["triton"].startswith("compiled, not run")


def test_a_device_that_nobody_measured_gets_the_reference(monkeypatch):
    monkeypatch.setattr(_backend, "TABLE", {})
    _backend._from_table.cache_clear()
    assert _backend.choose("concat_linear", torch.device("cpu")) == "reference"
    _backend._from_table.cache_clear()


def test_without_the_native_library_the_op_still_runs():
    code = """
import pathlib, torch
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: not self.name.startswith("libmmfast") and exists(self)
from mmfast.ops import available, concat_linear
print(available("concat_linear", "cpu")["cpu"], concat_linear([torch.ones(2, 3)], torch.ones(4, 3))[0].tolist())
"""
    assert python(code).strip() == "not built [3.0, 3.0, 3.0, 3.0]"
