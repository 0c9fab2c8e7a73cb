"""The ten promises of docs/architecture.md for concat_linear, on every backend that is there, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from check import backends, cast, check, compiled, dtypes, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import backend, concat_linear, native_calls, reference

BACKENDS = backends("concat_linear")
KERNELS = [name for name in BACKENDS if name != "reference"]
ACTIVATIONS = ["none", "relu", "gelu", "silu", "swiglu"]


def example(
    shapes=((3, 5, 8), (3, 1, 6), (1, 5, 4)),
    width=12,
    *,
    present=False,
    norm=False,
    activation="none",
    residual=False,
    gate=0,
    bias=True,
    seed=0,
    grad=True,
):
    """Arguments for concat_linear in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    lead = torch.broadcast_shapes(*[shape[:-1] for shape in shapes])
    depth, rows = sum(shape[-1] for shape in shapes), width * (2 if activation == "swiglu" else 1)
    arguments = {
        "inputs": [randn(*shape) for shape in shapes],
        "weight": (randn(rows, depth).detach() / max(depth, 1) ** 0.5).requires_grad_(grad),
        "bias": randn(rows) if bias else None,
        "activation": activation,
    }
    if present:
        arguments["present"] = torch.rand(lead[0], len(shapes), generator=generator) > 0.4
    if norm:
        arguments |= {"norm_eps": 1e-5, "norm_weight": randn(depth), "norm_bias": randn(depth)}
    if residual:
        arguments["residual"] = randn(*lead, width)
    if gate:
        arguments["gate"] = randn(gate)
    return arguments


def on(name):
    def op(**arguments):
        with backend(name):
            return concat_linear(**arguments)

    return op


OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "present": {"present": True},
    "norm": {"norm": True},
    "residual": {"residual": True},
    "scalar gate": {"gate": 1},
    "everything": {"present": True, "norm": True, "residual": True, "gate": 12},
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients_are_as_exact_as_promised(name, activation, options):
    for dtype in dtypes(name):
        check(on(name), reference.concat_linear, example(activation=activation, **options), dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("present", [False, True])
def test_one_feature_for_many_rows_is_as_exact_under_a_norm(name, present):
    """Its gradient is what is left where most of the sums over the rows would cancel."""
    arguments = example(shapes=((3, 400, 2), (3, 1, 1)), norm=True, present=present)
    for i, x in enumerate(arguments["inputs"]):
        x.data += 5 * i
    check(on(name), reference.concat_linear, arguments, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_it_is_as_exact(name, activation):
    arguments = example(activation=activation, **OPTIONS["plain" if activation == "none" else "everything"])
    check(compiled(on(name)), reference.concat_linear, arguments, torch.float32)


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    function = compiled(lambda **a: concat_linear(**a).sin(), backend="inductor")
    everything = example(activation="gelu", **OPTIONS["everything"])
    check(function, lambda **a: reference.concat_linear(**a).sin(), everything, torch.float32)


@st.composite
def problems(draw):
    """Any broadcasting, presence, options, and any layout with a dense last dimension; 16 draws of the values.

    A norm of one or two features leaves its inputs a gradient of almost nothing, the rest of a difference: it is not
    asked for.
    """
    lead = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 40]), max_size=3))
    shapes, layouts = [], []
    for _ in range(draw(st.integers(1, 4))):
        keep = draw(st.integers(0, len(lead)))  # missing leading dimensions broadcast
        own = [draw(st.sampled_from([size, size, 1])) for size in lead[len(lead) - keep :]]
        shapes.append((*own, draw(st.sampled_from([0, 1, 7, 16, 33]))))
        layouts.append(
            draw(st.sampled_from(["dense", "sliced", "swapped", "stepped", "expanded", "reversed"]))
        )
    lead = torch.broadcast_shapes(*[shape[:-1] for shape in shapes])
    width, activation, seed = (
        draw(st.sampled_from([1, 9, 32])),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.integers(0, 99)),
    )
    options = {name: draw(st.booleans()) for name in ("norm", "residual", "bias")}
    grad = not options["norm"] or sum(shape[-1] for shape in shapes) > 2
    options["present"] = len(lead) > 0 and draw(st.booleans())
    values = [
        example(shapes, width, activation=activation, seed=1000 * k + seed, **options) for k in range(16)
    ]
    for arguments in values:
        laid = [laid_out(x, how) for x, how in zip(arguments["inputs"], layouts, strict=True)]
        arguments["inputs"] = [x.requires_grad_(grad) for x in laid]
    return values


def laid_out(x, how):
    """The same values in another layout. Only "reversed" has no dense last dimension."""
    x = x.detach()
    if how == "sliced":  # columns of something wider
        x = torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    elif how == "swapped" and x.dim() > 2:  # [S, B, D] in memory
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif how == "stepped" and x.dim() > 1:  # every second row
        x = torch.stack([x, x], -2).flatten(-3, -2)[..., ::2, :]
    elif how == "expanded" and x.dim() > 1:
        x = x[:1].expand_as(x)
    elif how == "reversed":
        x = x.transpose(-1, 0).contiguous().transpose(-1, 0)
    return x


@pytest.mark.parametrize("name", KERNELS)
def test_any_shape_broadcast_presence_and_layout(name):
    @settings(max_examples=100 if name == "cpu" else 25)
    @given(problems())
    def every(values):
        check(on(name), reference.concat_linear, values, torch.float32, runs=1 if name == "triton" else None)

    every()


@pytest.mark.parametrize("name", KERNELS)
def test_any_shape_compiled(name):
    @settings(max_examples=4)
    @given(problems())
    def every(values):
        check(compiled(on(name)), reference.concat_linear, values, torch.float32, runs=1)

    every()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("steps", [3, 40])
def test_what_is_absent_reaches_no_bit(name, norm, steps):
    shapes = ((5, steps, 8), (5, 1, 6), (1, steps, 4))
    arguments = example(shapes, norm=norm, residual=True, gate=12, activation="gelu")
    present = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        new = cast(arguments, torch.float32) | {"present": present}
        with torch.no_grad():
            for i, x in enumerate(new["inputs"][:2]):
                x[~present[:, i]] = poison
            new["inputs"][2].fill_(poison)  # shared by all samples, absent from all
        results.append(run(on(name), new))
    for other in results[1:]:
        for key, value in results[0].items():
            assert same_bits(value, other[key]), key
    for i in range(3):
        gradient = results[0][f"gradient of ['inputs'][{i}]"]
        absent = ~present[:, i] if gradient.shape[0] == 5 else slice(None)
        assert gradient[absent].count_nonzero() == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_visible_propagates_nan(name):
    arguments = example(grad=False)
    arguments["inputs"][1][1] = float("nan")
    out = on(name)(**cast(arguments, torch.float32))
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "shapes",
    [
        ((0, 5, 8), (0, 1, 6)),
        ((3, 0, 8), (3, 1, 6)),
        ((3, 5, 0), (3, 1, 0)),
        ((3, 5, 0), (3, 1, 4)),
        ((0, 8),),
    ],
)
def test_zero_rows_and_zero_features(name, shapes):
    for options in OPTIONS.values():
        check(on(name), reference.concat_linear, example(shapes, **options), torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_zero_rows_compiled(name):
    check(
        compiled(on(name)), reference.concat_linear, example(((0, 5, 8), (0, 1, 6)), norm=True), torch.float32
    )


@pytest.mark.parametrize("name", KERNELS)
def test_zero_output_features(name):
    for options in ({}, {"norm": True}, {"activation": "swiglu", "residual": True}):
        check(on(name), reference.concat_linear, example(width=0, **options), torch.float32)


@pytest.mark.parametrize("name", [name for name in KERNELS if torch.float64 in dtypes(name)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradcheck(name, norm, activation):
    shapes = ((2, 3, 2), (2, 1, 3), (1, 3, 1))
    arguments = example(shapes, 2, present=True, norm=norm, activation=activation, residual=True, gate=2)
    inputs, tensors = arguments.pop("inputs"), {k: v for k, v in arguments.items() if torch.is_tensor(v)}
    others = {k: v for k, v in arguments.items() if k not in tensors}

    def function(*flat):
        named = dict(zip(tensors, flat[3:], strict=True))
        return on(name)(inputs=flat[:3], **named, **others)

    assert torch.autograd.gradcheck(function, (*inputs, *tensors.values()))


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name):
    """All utilities, on the forward and the backward op; gradients live above the ops, so none are asked of them."""
    for options in ({"bias": False}, {"activation": "swiglu", **OPTIONS["everything"]}):
        a = cast(example(grad=False, **options), torch.float32)
        norm = [a.get(key) for key in ("norm_eps", "norm_weight", "norm_bias")]
        forward = (
            a["inputs"], a["weight"], a["bias"], a.get("present"), *norm, a["activation"], a.get("residual"),
            a.get("gate"), True,
        )  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.mmfast.concat_linear, name), forward)
        out, preact, *moments = getattr(torch.ops.mmfast.concat_linear, name)(*forward)
        for needs in ([True] * 8, [False, True, False, True, False, True, False, False]):
            if "gate" not in a:
                needs = [*needs[:5], False, False, False]
            backward = (
                torch.randn_like(out), a["inputs"], a["weight"], a.get("present"), *norm, a["activation"],
                a.get("gate"), preact, *(moments or (None, None)), needs,
            )  # fmt: skip
            torch.library.opcheck(getattr(torch.ops.mmfast.concat_linear_backward, name), backward)


@pytest.mark.parametrize("name", KERNELS)
def test_partial_requires_grad(name):
    arguments = example(activation="silu", **OPTIONS["everything"])
    full = run(on(name), cast(arguments, torch.float32))
    keys = [key.removeprefix("gradient of ") for key in full if key != "out"]
    for wanted in keys:
        partial = cast(arguments, torch.float32)
        for key in keys:
            eval(f"a{key}", {"a": partial}).requires_grad_(key == wanted)
        got = run(on(name), partial)
        assert list(got) == ["out", f"gradient of {wanted}"]
        assert all(torch.equal(value, full[key]) for key, value in got.items()), wanted


@pytest.mark.parametrize("name", KERNELS)
def test_the_forced_backend_really_runs(name):
    before = [native_calls(f"{op}.{name}") for op in ("concat_linear", "concat_linear_backward")]
    run(on(name), cast(example(), torch.float32))
    assert native_calls(f"concat_linear.{name}") == before[0] + 1
    assert native_calls(f"concat_linear_backward.{name}") == before[1] + 1


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_every_time(name):
    arguments = example(((6, 40, 48), (6, 1, 16)), 40, activation="gelu", present=True, norm=True, gate=1)
    first, second = (run(on(name), cast(arguments, torch.float32)) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("name", KERNELS)
def test_double_backward_is_refused(name):
    arguments = cast(example(), torch.float32)
    (gradient,) = torch.autograd.grad(on(name)(**arguments).sum(), arguments["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_arrive_through_expanded_and_strided_grads(name):
    arguments = cast(example(activation="relu"), torch.float32)
    meant = cast(arguments, torch.float64)
    for reduce in (lambda y: y.sum(), lambda y: (y.transpose(0, 1) * 2).flip(-1).cumsum(-1).sum()):
        for arguments_, op in ((arguments, on(name)), (meant, reference.concat_linear)):
            reduce(op(**arguments_)).backward()
        assert torch.allclose(arguments["weight"].grad.double(), meant["weight"].grad, rtol=1e-4, atol=1e-4)


LAYOUTS = {"strided": lambda v: v.repeat_interleave(2)[::2], "expanded": lambda v: v[:1].expand_as(v)}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("activation", ["none", "gelu", "swiglu"])
def test_vectors_may_have_any_stride(name, layout, activation):
    vectors = {"bias", "norm_weight", "norm_bias", "gate"}

    def laid(op):
        return lambda **a: op(**a | {key: layout(a[key]) for key in vectors & a.keys()})

    arguments = example(norm=True, activation=activation, gate=12)
    check(laid(on(name)), laid(reference.concat_linear), arguments, torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_what_is_not_float64(name):
    dtype = torch.float16 if name == "triton" else torch.bfloat16
    arguments = cast(example(activation="gelu", norm=True, residual=True), torch.float32)
    with torch.autocast("cpu", dtype):
        out = on(name)(**arguments)
        assert torch.equal(out, compiled(on(name))(**arguments))
    plain = on(name)(**cast(arguments, dtype))
    assert out.dtype == dtype and torch.equal(out, plain)
    out.sum().backward()
    assert arguments["weight"].grad.dtype == torch.float32
    if torch.float64 in dtypes(name):
        with torch.autocast("cpu", dtype):
            assert on(name)(**example()).dtype == torch.float64


def test_twenty_shapes_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    layer = torch.compile(on("cpu" if "cpu" in KERNELS else KERNELS[0]), fullgraph=True, backend=counter)
    for batch in range(2, 22):
        arguments = example(((batch, batch + 3, 8), (batch, 1, 6)), present=True, activation="gelu")
        run(layer, cast(arguments, torch.float32))
    assert counter.frame_count <= 2


def test_the_reference_is_what_people_write_today():
    arguments = example(activation="gelu", norm=True, residual=True, gate=1)
    x, weight, bias = arguments["inputs"], arguments["weight"], arguments["bias"]
    whole = torch.cat([t.expand(3, 5, -1) for t in x], -1)
    whole = F.layer_norm(whole, whole.shape[-1:], arguments["norm_weight"], arguments["norm_bias"])
    meant = arguments["residual"] + arguments["gate"].tanh() * F.gelu(F.linear(whole, weight, bias))
    assert torch.equal(reference.concat_linear(**arguments), meant)


ERRORS = {
    "inputs is a Tensor, wanted a list or tuple of tensors": (TypeError, {"inputs": torch.zeros(3, 8)}),
    "inputs[0] is a float, wanted a tensor": (TypeError, {"inputs": [1.0]}),
    "inputs is empty, wanted at least one tensor": (ValueError, {"inputs": []}),
    "activation is 'tanh', wanted one of none, relu, gelu, silu, swiglu": (
        ValueError,
        {"activation": "tanh"},
    ),
    "weight is [12, 17], wanted 18 columns, the inputs' features being 8 + 6 + 4": (
        ValueError,
        {"weight": torch.zeros(12, 17)},
    ),
    "weight is [18], wanted [O, sum of the inputs' last dimensions]": (
        ValueError,
        {"weight": torch.zeros(18)},
    ),
    "weight is [3, 18], wanted an even number of rows for swiglu: two halves": (
        ValueError,
        {"weight": torch.zeros(3, 18), "activation": "swiglu", "bias": None},
    ),
    "weight's dtype is torch.int64, wanted float32, bfloat16, float16 or float64": (
        ValueError,
        {"weight": torch.zeros(12, 18, dtype=torch.int64)},
    ),
    "bias is [11], wanted [12]": (ValueError, {"bias": torch.zeros(11)}),
    "bias is torch.float64 on cpu, wanted weight's torch.float32 on cpu": (
        ValueError,
        {"bias": torch.zeros(12, dtype=torch.float64)},
    ),
    "inputs[1] is torch.bfloat16 on cpu, wanted weight's torch.float32 on cpu": (
        ValueError,
        {"inputs": [torch.zeros(3, 5, 8), torch.zeros(3, 1, 10, dtype=torch.bfloat16)]},
    ),
    "inputs[1] is [2, 1, 10], wanted leading dimensions that broadcast with those of [3, 5, 8]": (
        ValueError,
        {"inputs": [torch.zeros(3, 5, 8), torch.zeros(2, 1, 10)]},
    ),
    "inputs[0] is a scalar, wanted at least one dimension": (ValueError, {"inputs": [torch.tensor(1.0)]}),
    "norm_eps is None, wanted a number, since norm_weight or norm_bias is given": (
        ValueError,
        {"norm_weight": torch.ones(18)},
    ),
    "norm_weight is [17], wanted [18]": (ValueError, {"norm_eps": 1e-5, "norm_weight": torch.ones(17)}),
    "norm_bias is [1, 18], wanted [18]": (ValueError, {"norm_eps": 1e-5, "norm_bias": torch.ones(1, 18)}),
    "gate is [3], wanted [1] or [12]": (ValueError, {"gate": torch.ones(3)}),
    "present is [3, 2], wanted [3, 3]: samples, inputs": (ValueError, {"present": torch.ones(3, 2).bool()}),
    "present is torch.float32 on cpu, wanted torch.bool on cpu": (ValueError, {"present": torch.ones(3, 3)}),
    "residual is [4, 5, 12], wanted [..., 12] that broadcasts to [3, 5, 12]": (
        ValueError,
        {"residual": torch.zeros(4, 5, 12)},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_what_was_got_and_what_was_wanted(message):
    kind, change = ERRORS[message]
    with pytest.raises(kind) as error:
        concat_linear(**(cast(example(grad=False), torch.float32) | change))
    assert str(error.value) == f"concat_linear: {message}"
