"""Backend ``cuda`` without a GPU: what its threads run, compiled for the host, inside the real composition."""

import ctypes

import pytest
import torch
from check import Sizes, assert_promised, worst
from on_host import build
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast.ops import reference

pytest.importorskip("mmfast.kernels.concat_linear_cuda")
from mmfast.kernels import concat_linear_cuda as cuda

ACTIVATIONS = ("none", "relu", "gelu", "silu", "swiglu")
HOST = """
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "binding.h"
#define CUDA CPU  // the key that the binding registers for
#include "concat_linear.cpp"
#undef CUDA

namespace mmfast {
template <class F>
const char* with(Type type, F run) {
  if (type == Type::float32) run(float{});
  if (type == Type::float16) run(c10::Half{});
  if (type == Type::bfloat16) run(c10::BFloat16{});
  return nullptr;
}
const char* launch(const Forward& f, Type type, void*) {
  return with(type, [&](auto t) {
    for (int64_t row = f.rows; row--;)  // threads run in any order
      for (int64_t column = f.width; column--;) forward_element<decltype(t)>(f, row, column);
  });
}
const char* launch(const Backward& b, Type type, void*) {
  return with(type, [&](auto t) {
    for (int64_t part = (b.rows + b.rows_each - 1) / b.rows_each; part--;)
      for (int64_t column = b.width; column--;) backward_column<decltype(t)>(b, part, column);
  });
}
}  // namespace mmfast
extern "C" __attribute__((visibility("default"))) float value(int a, float x) {
  return mmfast::activate(static_cast<mmfast::Activation>(a), x);
}
extern "C" __attribute__((visibility("default"))) float slope(int a, float x) {
  return mmfast::derivative(static_cast<mmfast::Activation>(a), x);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    loaded = build(tmp_path_factory.mktemp("host"), HOST)
    for function in (loaded.value, loaded.slope):
        function.restype, function.argtypes = ctypes.c_float, [ctypes.c_int, ctypes.c_float]
    return loaded


@pytest.fixture
def epilogue(host, monkeypatch):
    """The composition over the binding, whose launches are loops on the host, without cuBLASLt."""
    product = cuda._product

    def on_cpu(x, weight):  # where torch.mm makes no float32 of half precision
        return product(x.float(), weight.float())

    monkeypatch.setattr(cuda, "PRODUCTS", lambda *args: False)
    monkeypatch.setattr(cuda, "_product", on_cpu)


@pytest.mark.parametrize("activation", ACTIVATIONS[:4])
def test_activations_and_their_derivatives_are_those_of_float64(host, activation):
    x = (
        torch.cat([torch.linspace(-12, 12, 481), torch.tensor([-100.0, 100.0, 1e-20])])
        .double()
        .requires_grad_()
    )
    functions = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
    y = functions.get(activation, lambda x: x * 1)(x)
    [slope] = torch.autograd.grad(y.sum(), x)
    number = ACTIVATIONS.index(activation)
    tolerance = 8 * torch.finfo(torch.float32).eps
    for got, want in ((host.value, y.detach()), (host.slope, slope)):
        found = torch.tensor([got(number, value) for value in x.tolist()], dtype=torch.float64)
        assert ((found - want).abs() <= tolerance * want.abs().clamp(min=1)).all()


def test_nan_stays_nan_and_relu_keeps_its_gradient_there(host):
    assert all(host.value(number, float("nan")) != host.value(number, float("nan")) for number in range(4))
    assert host.slope(ACTIVATIONS.index("relu"), float("nan")) == 1.0  # as PyTorch has it


SHAPES = (
    ((3, 5, 6), (3, 1, 7), (5, 4)),
    ((3, 70, 6), (3, 70, 2)),
    ((2, 1, 3), (1, 5, 3)),
    ((7, 6), (7, 2)),
    ((3, 4, 0), (3, 4, 5)),
    ((2, 3, 1, 4, 1, 3), (2, 1, 2, 1, 2, 5)),
)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("norm", (False, True), ids=("plain", "norm"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_the_composition_agrees_with_the_reference_in_float64(epilogue, shapes, norm, activation, dtype):
    generator = torch.Generator().manual_seed(len(activation))
    variants = [(None, False), (1, True), (4, True)]
    for width, seen in variants:
        check(generator, shapes, norm, activation, width, seen, dtype=dtype)


# the pooled sources' own rows: along inner, outer and all dimensions; alike; and nothing else
BROADCASTS = {
    "inner, outer and all": (((3, 19, 17), (3, 1, 18), (1, 19, 5), (7,)), 0),
    "alike": (((3, 1, 18), (3, 19, 17), (3, 1, 9)), 0),
    "pooled only": (((3, 1, 18), (1, 19, 17)), 0),
    "far from 0 and apart": (((3, 19, 17), (3, 1, 18), (1, 19, 5)), 1000),
    "one feature": (((3, 19, 17), (3, 1, 1), (1, 19, 1)), 1000),
    "no features": (((3, 19, 17), (3, 1, 0), (3, 19, 0)), 0),
    "sixteen": (((3, 4, 2), (3, 1, 9), *[(3, 1, 8)] * 15), 0),
    "what is left of 1024 rows": (((8, 1024, 2), (8, 1, 1)), 3),
}


@pytest.mark.parametrize("seen", (False, True), ids=("all present", "some absent"))
@pytest.mark.parametrize(("shapes", "far"), BROADCASTS.values(), ids=BROADCASTS)
def test_pooled_sources_under_a_norm(epilogue, shapes, far, seen):
    for activation in ("gelu", "swiglu"):
        check(torch.Generator().manual_seed(0), shapes, True, activation, 4, seen, far)


@pytest.mark.parametrize("norm", (False, True), ids=("plain", "norm"))
@pytest.mark.parametrize("seen", (False, True), ids=("all present", "some absent"))
def test_no_tensor_is_as_wide_as_the_concatenation(epilogue, monkeypatch, norm, seen):
    """Nothing is wider than one source with all rows, and a pooled source is nowhere at the output's size."""
    inputs = [torch.randn(shape) for shape in (*[(8, 8, 64)] * 6, (8, 1, 512), (1, 8, 512))]
    depth = sum(x.shape[-1] for x in inputs)
    weight, flags = torch.randn(16, depth), torch.rand(8, len(inputs)) < 0.5 if seen else None
    scale, shift = torch.randn(2, depth) if norm else (None, None)
    options = (flags, 1e-5 if norm else None, scale, shift, "gelu")
    monkeypatch.setattr(cuda, "WORKSPACE", 0)
    with Sizes() as made:
        out, preact, *moments = cuda.concat_linear(inputs, weight, None, *options, None, None, True)
        needs = [True] * len(inputs) + [True, False, norm, norm, False]
        cuda.concat_linear_backward(
            out, inputs, weight, *options, None, preact, *(moments or (None, None)), needs
        )
    assert max(made.sizes) <= max(64 * 64 * 4, weight.nbytes)


def test_a_pooled_source_in_half_precision_keeps_its_range(epilogue):
    """One feature of 4096 is there, and it is scaled."""
    pooled, weight, scale = torch.zeros(2, 1, 4096), torch.randn(4, 4104) / 64, torch.ones(4104)
    pooled[..., 7], scale[15] = 100, 1100
    half = [t.half() for t in (torch.randn(2, 3, 8), pooled, weight, scale)]

    def meant(dtype):
        x, pooled, weight, scale = (t.to(dtype) for t in half)
        return reference.concat_linear([x, pooled], weight, norm_eps=1e-5, norm_weight=scale)

    out, *_ = cuda.concat_linear(
        half[:2], half[2], None, None, 1e-5, half[3], None, "none", None, None, False
    )
    assert_promised(out, meant(torch.float64), worst(meant(torch.float16).double() - meant(torch.float64)))


def test_more_sources_that_are_broadcast_than_the_epilogue_takes_are_refused():
    inputs = [torch.randn(3, 4, 2), *[torch.randn(3, 1, 1)] * 17]
    with pytest.raises(ValueError, match="inputs: got 17 that are broadcast, wanted at most 16"):
        cuda.concat_linear(inputs, torch.randn(5, 19), None, None, None, None, None, "gelu", None, None, True)


def check(generator, shapes, norm, activation, gate_width, seen, far=0, dtype=torch.float32):
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    lead = torch.broadcast_shapes(*(s[:-1] for s in shapes))
    depth, width = sum(s[-1] for s in shapes), 4
    height = 2 * width if activation == "swiglu" else width
    leaves = {f"input {i}": draw(*s) + far * (i + 1) for i, s in enumerate(shapes)}
    leaves |= {"weight": draw(height, depth) / depth**0.5, "bias": draw(height)}
    leaves |= {"norm_weight": draw(depth), "norm_bias": draw(depth)} if norm else {}
    leaves |= {"gate": draw(gate_width)} if gate_width else {}
    present = torch.rand(lead[0], len(shapes), generator=generator) < 0.6 if seen else None
    residual = draw(width) if gate_width else None
    grad = draw(*lead, width) + 1  # a sum that cancels, as of a single gate, would measure luck

    def expected(dtype):
        cast = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
        inputs = [cast[f"input {i}"] for i in range(len(shapes))]
        others = {name: t for name, t in cast.items() if not name.startswith("input") and name != "weight"}
        more = {"residual": residual.to(dtype)} if residual is not None else {}
        out = reference.concat_linear(
            inputs, cast["weight"], present=present, norm_eps=1e-5 if norm else None, activation=activation,
            **others, **more,
        )  # fmt: skip
        return [out, *torch.autograd.grad(out, cast.values(), grad.to(dtype))]

    inputs = [leaves[f"input {i}"].clone() for i in range(len(shapes))]
    for i, x in enumerate(inputs):
        if present is not None and x.ndim == len(lead) + 1 and len(x) == lead[0]:
            x[~present[:, i]] = float("nan")
    eps, scale, shift, gate = (
        1e-5 if norm else None,
        *(leaves.get(n) for n in ("norm_weight", "norm_bias", "gate")),
    )
    out, preact, *moments = cuda.concat_linear(
        inputs, leaves["weight"], leaves["bias"], present, eps, scale, shift, activation, residual, gate, True
    )
    needs = [True] * len(inputs) + [True, True, norm, norm, gate is not None]
    grads = cuda.concat_linear_backward(
        grad, inputs, leaves["weight"], present, eps, scale, shift, activation, gate,
        preact, *(moments or (None, None)), needs,
    )  # fmt: skip
    for name, exact, same, found in zip(
        ("out", *leaves), expected(torch.float64), expected(dtype), [out, *grads], strict=True
    ):
        assert_promised(found, exact, worst(same.double() - exact), name)


def test_zero_rows_and_only_the_gradients_that_are_needed(epilogue):
    weight = torch.randn(4, 5)
    inputs = [torch.randn(0, 3, 2), torch.randn(0, 1, 3)]
    out, preact = cuda.concat_linear(inputs, weight, None, None, None, None, None, "gelu", None, None, True)
    assert out.shape == (0, 3, 4)
    needs = [True, False, True, False, False, False, False]
    d_input, d_weight = cuda.concat_linear_backward(
        out, inputs, weight, None, None, None, None, "gelu", None, preact, None, None, needs
    )
    assert d_input.shape == (0, 3, 2) and d_weight.shape == (4, 5) and not d_weight.any()


class Products(TorchDispatchMode):
    """Counts the matrix products made meanwhile."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.mv.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", (False, True), ids=("plain", "norm"))
@pytest.mark.parametrize("seen", (False, True), ids=("all present", "some absent"))
def test_what_needs_no_gradient_costs_no_product(epilogue, norm, seen):
    """Each gradient by itself is, bit for bit, what it is beside all others."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((3, 5, 8), (3, 1, 9), (3, 5, 4))]
    weight, gate = torch.randn(6, 21, generator=generator), torch.randn(6, generator=generator)
    present = torch.rand(3, 3, generator=generator) < 0.6 if seen else None
    scale, shift = torch.randn(2, 21, generator=generator) if norm else (None, None)
    options = (present, 1e-5 if norm else None, scale, shift, "gelu")
    out, preact, *moments = cuda.concat_linear(inputs, weight, None, *options, None, gate, True)

    def backward(needs):
        with Products() as products:
            made = cuda.concat_linear_backward(
                out, inputs, weight, *options, gate, preact, *(moments or (None, None)), needs
            )
        return made, products.count

    names = ["input 0", "input 1", "input 2", "weight", "bias", "norm_weight", "norm_bias", "gate"]
    everything = [norm or not name.startswith("norm") for name in names]
    all_made, all_products = backward(everything)
    wanted = dict(
        zip([n for n, needed in zip(names, everything, strict=True) if needed], all_made, strict=True)
    )
    for name in wanted:
        [alone], products = backward([name == other for other in names])
        assert torch.equal(alone, wanted[name]), name
        assert products < all_products, name
        assert products == 0 or name not in ("bias", "gate"), name
