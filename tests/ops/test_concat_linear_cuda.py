"""Backend ``cuda`` of concat_linear where cuBLASLt makes the output at once, without a GPU: its binding, compiled for the
host over a cuBLASLt for the host; see cublaslt_on_host.h. What the epilogue adds is in test_cuda_epilogue.py.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from check import assert_promised, worst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_host import TORCH, build

from mmfast.kernels import concat_linear_cuda as cuda
from mmfast.ops import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOST = """
#include "cublaslt_on_host.h"
#include "binding.h"
#define CUDA CPU  // the key that the binding registers for
#include "concat_linear_product.cpp"
#undef CUDA

extern "C" {
AOTITorchError torch_get_current_cuda_blas_handle(void**) { return 0; }
__attribute__((visibility("default"))) void set_algorithms(int count) { on_host::algorithms = count; }
__attribute__((visibility("default"))) void set_launches(int count) { on_host::launches = count; }
__attribute__((visibility("default"))) bool used_tf32() {
  return on_host::computed == CUBLAS_COMPUTE_32F_FAST_TF32;
}
}
"""


def headers():
    """The folders of cublasLt.h and of what it includes."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    needed = ("cublasLt.h", "crt/host_defines.h", "nv/target")
    places = [*TORCH.parent.glob("nvidia/*/include"), toolkit, toolkit / "cccl"]
    found = [[place for place in places if (place / header).exists()][:1] for header in needed]
    return [place for [place] in found] if all(found) else None


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    cublaslt = headers()
    if cublaslt is None:
        pytest.skip("no headers of CUDA and cuBLASLt")
    loaded = build(tmp_path_factory.mktemp("host"), HOST, include=cublaslt)
    loaded.used_tf32.restype = ctypes.c_bool
    return loaded


@pytest.fixture(autouse=True)
def at_once(host, monkeypatch):
    """No epilogue stands in, and nothing that is left unwritten looks like a number."""
    launch = cuda.PRODUCTS

    def spoil_and_launch(*args):
        residual, out = args[3], args[-1]
        if residual is None or residual.data_ptr() != out.data_ptr():
            out.fill_(torch.nan)
        return launch(*args)

    monkeypatch.setattr(cuda, "PRODUCTS", spoil_and_launch)
    monkeypatch.setattr(cuda, "EPILOGUE", lambda *args: pytest.fail("the epilogue was launched"))


def forward(inputs, weight, bias=None, activation="none", residual=None):
    [out] = cuda.concat_linear(
        inputs, weight, bias, None, None, None, None, activation, residual, None, False
    )
    return out


def check(inputs, weight, bias=None, activation="none", residual=None):
    def meant(to):
        wide = [None if t is None else t.to(to) for t in (weight, bias, residual)]
        return reference.concat_linear(
            [x.to(to) for x in inputs], *wide[:2], residual=wide[2], activation=activation
        )

    found, exact, same = (
        forward(inputs, weight, bias, activation, residual),
        meant(torch.float64),
        meant(weight.dtype),
    )
    assert found.dtype == weight.dtype and found.is_contiguous()
    assert_promised(found, exact, worst(same.double() - exact), "out")
    return found


@st.composite
def problems(draw):
    """Sources of which at least one has all rows, the others those of some outer dimensions; in half precision one."""
    dtype = draw(st.sampled_from(DTYPES))
    size, features = st.sampled_from([1, 2, 3, 7]), st.sampled_from([0, 1, 5, 16])
    lead = draw(st.lists(size, max_size=3))
    shapes = [(*lead, draw(st.sampled_from([1, 5, 16])))]
    outer = draw(st.integers(0, len(lead)))
    for _ in range(draw(st.integers(0, 3)) if dtype == torch.float32 else 0):
        kept = draw(st.sampled_from(["all", "outer", "none"]))
        mine = (
            lead if kept == "all" else [*lead[:outer], *[1] * (len(lead) - outer)] if kept == "outer" else []
        )
        shapes.append((*mine, draw(features)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    width = draw(st.sampled_from([1, 4, 9]))
    make = lambda *shape: torch.randn(shape, generator=generator).to(dtype)  # noqa: E731
    depth = sum(shape[-1] for shape in shapes)
    problem = {
        "inputs": [make(*shape) for shape in draw(st.permutations(shapes))],
        "weight": make(width, depth) / depth**0.5,
    }
    problem["bias"] = make(width) if draw(st.booleans()) else None
    problem["residual"] = make(*lead, width) if draw(st.booleans()) else None
    problem["activation"] = "relu" if problem["residual"] is None and draw(st.booleans()) else "none"
    return problem


@given(problems())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_mix_of_dense_and_pooled_sources(problem):
    check(**problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_of_what_is_read(dtype):
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    inputs = [
        draw(4, 3, 5).transpose(0, 1),  # rows that are not in turn
        draw(3, 1, 6).expand(3, 4, 6),  # one row over and over
        draw(3, 4, 9)[..., 1:8],  # with gaps, and not aligned
        draw(20).unfold(0, 7, 1).expand(3, 14, 7)[:, ::4],  # rows that overlap
        draw(3, 3, 4).transpose(1, 2),  # features that are not dense
    ]
    residual, bias = draw(4, 3, 8).transpose(0, 1), draw(16)[::2]
    for x in inputs:
        check([x], draw(x.shape[-1], 8).t(), bias, residual=residual)
        check([x[:, :1]], draw(8, x.shape[-1]), draw(9)[1:])
    if dtype == torch.float32:
        check([*inputs, draw(3, 1, 2)], draw(30, 8).t(), bias, residual=residual)


def test_what_is_nan_stays_nan_through_relu():
    x = torch.randn(2, 3, 5)
    x[1, 2, 0] = torch.nan
    out = forward([x, torch.randn(2, 1, 4)], torch.randn(6, 9), torch.randn(6), "relu")
    assert out[1, 2].isnan().all() and out.isnan().sum() == 6


def test_float32_follows_the_precision_that_pytorch_is_set_to(host):
    matmul, x, weight = torch.backends.cuda.matmul, torch.randn(4, 8), torch.randn(3, 8)
    before = matmul.fp32_precision
    try:
        for precision, dtype in (("tf32", torch.float32), ("tf32", torch.float16), ("ieee", torch.float32)):
            matmul.fp32_precision = precision
            forward([x.to(dtype)], weight.to(dtype))
            assert host.used_tf32() == (precision == "tf32" and dtype == torch.float32)
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((3, 4, 5), (1, 4, 2)), {}),  # broadcast along an outer dimension
        (((3, 1, 5), (1, 4, 2)), {}),  # no source has all rows
        (((3, 4, 0),), {}),  # nothing to multiply
        (((3, 4, 5), (3, 4, 5)), {"dtype": torch.bfloat16}),  # the sum may cancel
        (((3, 4, 5), (3, 1, 5)), {"dtype": torch.float16}),
        (((3, 4, 5),), {"activation": "gelu"}),
        (((3, 4, 5),), {"activation": "relu", "residual": (3, 4, 6)}),
        (((3, 4, 5),), {"residual": (4, 6)}),  # a broadcast residual
        (((3, 4, 5),), {"gate": (1,)}),
        (((3, 4, 5),), {"present": (3, 1)}),
        (((3, 4, 5),), {"save": True}),
    ],
    ids=str,
)
def test_the_rest_is_left_to_the_epilogue(monkeypatch, shapes, options):
    launched, made = [], []
    monkeypatch.setattr(cuda, "EPILOGUE", lambda *args: launched.append(args))
    monkeypatch.setattr(cuda, "PRODUCTS", lambda *args: bool(made.append(args[-1])))
    make = {"residual": torch.randn, "gate": torch.randn, "present": torch.ones}
    given = {name: make[name](*v) if name in make else v for name, v in options.items()}
    if "present" in given:
        given["present"] = given["present"].bool()
    dtype = given.get("dtype", torch.float32)
    # on the CPU torch.mm makes no float32 of half precision
    monkeypatch.setattr(cuda, "_product", lambda x, weight: x.float() @ weight.float().t())
    cuda.concat_linear(
        [torch.randn(*shape, dtype=dtype) for shape in shapes],
        torch.randn(6, sum(s[-1] for s in shapes), dtype=dtype), torch.randn(6, dtype=dtype),
        given.get("present"), None, None, None, given.get("activation", "none"), given.get("residual"),
        given.get("gate"), given.get("save", False),
    )  # fmt: skip
    [(*_, out, _)] = launched
    assert not any(product.data_ptr() == out.data_ptr() for product in made)


@pytest.mark.parametrize("what", ["algorithms", "launches"])
@pytest.mark.parametrize("known", [0, 1])
def test_so_is_what_cublaslt_has_no_algorithm_for_or_refuses(host, monkeypatch, known, what):
    launched, put = [], getattr(host, f"set_{what}")
    monkeypatch.setattr(cuda, "EPILOGUE", lambda *args: launched.append(args))
    put(known)
    try:
        forward([torch.randn(4, 8), torch.randn(4, 5)], torch.randn(3, 13))
    finally:
        put(1 << 30)
    assert len(launched) == 1


@pytest.mark.parametrize("norm", [False, True], ids=("plain", "norm"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sources_with_all_rows_become_one_float32_sum(monkeypatch, dtype, norm):
    launched = []
    monkeypatch.setattr(cuda, "EPILOGUE", lambda *args: launched.append(args))
    monkeypatch.setattr(cuda, "_product", lambda x, weight: x.float() @ weight.float().t())
    torch.manual_seed(0)
    inputs = [torch.randn(3, 4, d).to(dtype) for d in (5, 0, 8, 2)]
    inputs[1:1] = [torch.randn(3, 1, 9).to(dtype)]
    weight, present = torch.randn(7, 24).to(dtype), torch.rand(3, 5) < 0.5
    inputs[0][~present[:, 0]] = torch.nan
    cuda.concat_linear(
        inputs, weight, None, present, 1e-5 if norm else None, None, None, "gelu", None, None, True
    )
    [(products, sources, means, along, mean, rstd, *_)] = launched
    assert sources == [1, -1] and len(means) == len(along) == (1 if norm else 0)
    blocks, total = weight.double().split([5, 9, 0, 8, 2], 1), 0
    for i in (0, 3, 4):
        x = torch.where(present[:, i].view(3, 1, 1), inputs[i].double(), 0)
        if norm:
            x = (x - mean.double().unsqueeze(-1)) * rstd.double().unsqueeze(-1)
        total = total + x @ blocks[i].t()
    # each x^ is rounded to the dtype, and the product of as many as there are columns adds their errors up
    bound = (torch.finfo(dtype).eps if norm else 2**-23) * 8 * total.abs().max()
    assert products[1].dtype == torch.float32 and (products[1] - total).abs().max() <= bound
