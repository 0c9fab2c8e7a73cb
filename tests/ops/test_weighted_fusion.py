"""The promises of every op for weighted_fusion, on every backend that is there."""

import pytest
import torch
from check import backends, cast, check, compiled, dtypes, isas, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import backend, native_calls, reference, weighted_fusion

BACKENDS = backends("weighted_fusion")
KERNELS = [name for name in BACKENDS if name != "reference"]
ISAS = isas()
OPTIONS = {
    "plain": {},
    "present": {"present": True},
    "a weight for each row": {"logits": (3, 5)},
    "both": {"present": True, "logits": (3, 1)},
}


def example(shapes=((3, 5, 10), (3, 1, 10), (1, 5, 10)), *, present=False, logits=(), seed=0, grad=True):
    """Arguments for weighted_fusion in float64; ``logits``: their leading dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    arguments = {"inputs": [randn(*shape) for shape in shapes], "logits": randn(*logits, len(shapes))}
    if present:
        lead = torch.broadcast_shapes(logits, *[shape[:-1] for shape in shapes])
        arguments["present"] = torch.rand(lead[0], len(shapes), generator=generator) > 0.4
    return arguments


def on(name):
    def op(**arguments):
        with backend(name):
            return weighted_fusion(**arguments)

    return op


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_as_exact_as_promised(name, options):
    for dtype in dtypes(name):
        check(on(name), reference.weighted_fusion, example(**options), dtype, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_instruction_set_is_as_exact(isa):
    for width in (37, 64):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            shapes = ((9, 20, width), (9, 20, width), (9, 1, width))
            arguments = example(shapes, present=True, logits=(9, 20))
            check(on("cpu"), reference.weighted_fusion, arguments, dtype, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_directional_derivatives_in_float32(isa):
    """The gradient along a direction is the slope of the kernel's own output along it."""
    arguments = cast(example(((4, 6, 35), (4, 6, 35)), present=True, logits=(4, 6)), torch.float32)
    leaves = [*arguments["inputs"], arguments["logits"]]
    generator = torch.Generator().manual_seed(1)
    ways = [torch.randn(t.shape, generator=generator) for t in leaves]
    out = on("cpu")(**arguments)
    grad = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad(out, leaves, grad)
    slope = sum((g.double() * way).sum() for g, way in zip(gradients, ways, strict=True))
    size = sum((g.double() * way).abs().sum() for g, way in zip(gradients, ways, strict=True))

    def along(step):
        with torch.no_grad():
            for t, way in zip(leaves, ways, strict=True):
                t += step * way
            out = on("cpu")(**arguments).double()
            for t, way in zip(leaves, ways, strict=True):
                t -= step * way
        return (out * grad).sum()

    step = 2.0**-9
    assert abs((along(step) - along(-step)) / (2 * step) - slope) < 2e-3 * size


@st.composite
def problems(draw):
    """Any broadcasting, presence, and layout of each source."""
    lead = draw(st.lists(st.sampled_from([0, 1, 2, 3, 20]), max_size=3))
    width = draw(st.sampled_from([0, 1, 7, 33]))

    def part():  # some of the leading dimensions, missing ones in front
        keep = draw(st.integers(0, len(lead)))
        return tuple(draw(st.sampled_from([size, size, 1])) for size in lead[len(lead) - keep :])

    shapes = [(*part(), width) for _ in range(draw(st.integers(1, 4)))]
    logits = part()
    arguments = example(
        shapes,
        logits=logits,
        present=len(torch.broadcast_shapes(logits, *[s[:-1] for s in shapes])) > 0 and draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    layouts = st.sampled_from(["dense", "sliced", "stepped", "reversed"])
    arguments["inputs"] = [laid_out(x, draw(layouts)) for x in arguments["inputs"]]
    return arguments


def laid_out(x, how):
    """The same values in another layout. Only "reversed" has no dense last dimension."""
    x = x.detach()
    if how == "sliced":  # columns of something wider
        x = torch.cat([x, x], -1)[..., x.shape[-1] :]
    elif how == "stepped" and x.dim() > 1:  # every second row
        x = torch.stack([x, x], -2).flatten(-3, -2)[..., ::2, :]
    elif how == "reversed":
        x = x.transpose(-1, 0).contiguous().transpose(-1, 0)
    return x.requires_grad_()


@pytest.mark.parametrize("name", KERNELS)
def test_any_shape_broadcast_presence_and_layout(name):
    @settings(max_examples=80 if name == "cpu" else 25)
    @given(problems())
    def every(arguments):
        check(on(name), reference.weighted_fusion, arguments, torch.float32, upstreams=4, runs=1)

    every()


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_it_is_as_exact_and_dynamic(name):
    function = compiled(on(name))
    for steps in (5, 6):
        shapes = ((3, steps, 10), (3, 1, 10))
        arguments = example(shapes, present=True, logits=(3, 1))
        check(function, reference.weighted_fusion, arguments, torch.float32, upstreams=4)


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    function = compiled(lambda **a: weighted_fusion(**a).sin(), backend="inductor")
    meant, arguments = lambda **a: reference.weighted_fusion(**a).sin(), example(present=True)
    check(function, meant, arguments, torch.float32, upstreams=4)


def test_twenty_shapes_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    function = torch.compile(on("cpu" if "cpu" in KERNELS else "reference"), fullgraph=True, backend=counter)
    for size in range(2, 22):
        shapes = ((size, size + 1, 8), (size, 1, 8))
        run(function, cast(example(shapes, present=True), torch.float32))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_absent_reaches_no_bit(name):
    shapes = ((5, 3, 18), (5, 1, 18), (1, 3, 18))
    arguments = example(shapes, logits=(5, 1))
    present = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        new = cast(arguments, torch.float32) | {"present": present}
        with torch.no_grad():
            for i, x in enumerate(new["inputs"][:2]):
                x[~present[:, i]] = poison
            new["inputs"][2].fill_(poison)  # shared by all samples, absent from all
            new["logits"].squeeze(1)[~present] = poison
        results.append(run(on(name), new))
    for other in results[1:]:
        for key, value in results[0].items():
            assert same_bits(value, other[key]), key
    assert results[0]["out"][3].count_nonzero() == 0
    assert results[0]["gradient of ['logits']"].squeeze(1)[~present].count_nonzero() == 0
    assert results[0]["gradient of ['inputs'][2]"].count_nonzero() == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_visible_propagates_nan(name):
    arguments = cast(example(grad=False), torch.float32)
    arguments["inputs"][1][1] = torch.nan
    out = on(name)(**arguments)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_rows_and_zero_features(name):
    for shapes in (((0, 5, 8), (0, 1, 8)), ((3, 0, 8), (3, 1, 8)), ((3, 5, 0), (3, 1, 0)), ((0, 8),)):
        for present in (False, True):
            arguments = example(shapes, present=present)
            check(on(name), reference.weighted_fusion, arguments, torch.float32, upstreams=4)


@pytest.mark.parametrize("name", [name for name in KERNELS if torch.float64 in dtypes(name)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(name, options):
    arguments = example(((3, 5, 2), (3, 1, 2), (1, 5, 2)), **options)
    inputs, present = arguments["inputs"], arguments.get("present")

    def function(*flat):
        return on(name)(inputs=flat[:3], logits=flat[3], present=present)

    assert torch.autograd.gradcheck(function, (*inputs, arguments["logits"]))


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name):
    for options in OPTIONS.values():
        a = cast(example(grad=False, **options), torch.float32)
        arguments = a["inputs"], a["logits"], a.get("present")
        torch.library.opcheck(getattr(torch.ops.mmfast.weighted_fusion, name), arguments)
        grad = torch.randn(10, 3, 5).permute(1, 2, 0)
        for needs in ([True] * 4, [False, True, False, False]):
            backward = getattr(torch.ops.mmfast.weighted_fusion_backward, name)
            torch.library.opcheck(backward, (grad, *arguments, needs))


@pytest.mark.parametrize("name", KERNELS)
def test_partial_requires_grad(name):
    arguments = example(present=True)
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
def test_one_tensor_may_come_twice(name):
    x, y, logits = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6), torch.randn(3)
    for function in (on(name), compiled(on(name))):
        out = function(inputs=[x, y, x], logits=logits)
        meant = reference.weighted_fusion([x, y, x], logits)
        torch.testing.assert_close(out, meant)
        theirs = torch.autograd.grad(meant.sum(), x)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x), theirs)


@pytest.mark.parametrize("name", KERNELS)
def test_the_forced_backend_really_runs(name):
    ops = [f"weighted_fusion.{name}", f"weighted_fusion_backward.{name}"]
    before = [native_calls(op) for op in ops]
    run(on(name), cast(example(), torch.float32))
    assert [native_calls(op) for op in ops] == [n + 1 for n in before]


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_every_time_and_with_any_number_of_threads(name):
    steps = 30 if name == "cpu" else 3
    shapes = ((20, steps, 70), (20, steps, 70), (20, 1, 70))
    arguments = cast(example(shapes, present=True), torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        results.append(run(on(name), arguments))
    torch.set_num_threads(before)
    assert same_bits(results[2], results[3])
    for other in results:  # the sums over rows that were broadcast are PyTorch's, and follow its threads
        assert same_bits(results[0]["out"], other["out"])


@pytest.mark.parametrize("name", KERNELS)
def test_double_backward_is_refused(name):
    arguments = cast(example(), torch.float32)
    out = on(name)(**arguments).sum()
    (gradient,) = torch.autograd.grad(out, arguments["logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_what_is_not_float64(name):
    dtype = torch.float16 if name == "triton" else torch.bfloat16
    arguments = cast(example(present=True), torch.float32)
    with torch.autocast("cpu", dtype):
        out = on(name)(**arguments)
        if torch.float64 in dtypes(name):
            assert on(name)(**example()).dtype == torch.float64
    plain = on(name)(**cast(arguments, dtype))
    assert out.dtype == dtype and torch.equal(out, plain)
    out.sum().backward()
    assert arguments["logits"].grad.dtype == torch.float32


ERRORS = {
    "inputs is a Tensor, wanted a list or tuple of tensors": (TypeError, {"inputs": torch.zeros(3, 10)}),
    "inputs[0] is a float, wanted a tensor": (TypeError, {"inputs": [1.0]}),
    "inputs is empty, wanted at least one tensor": (ValueError, {"inputs": []}),
    "inputs[0] is a scalar, wanted at least one dimension": (ValueError, {"inputs": [torch.tensor(1.0)] * 3}),
    "inputs[1] is [3, 1, 9], wanted [..., 10], as wide as inputs[0]": (
        ValueError,
        {"inputs": [torch.zeros(3, 5, 10), torch.zeros(3, 1, 9), torch.zeros(10)]},
    ),
    "inputs[1] is [2, 1, 10], wanted leading dimensions that broadcast with those of [3], [3, 5, 10]": (
        ValueError,
        {"inputs": [torch.zeros(3, 5, 10), torch.zeros(2, 1, 10), torch.zeros(10)]},
    ),
    "logits is [2], wanted [..., 3], one for each of the inputs": (ValueError, {"logits": torch.zeros(2)}),
    "logits' dtype is torch.int64, wanted float32, bfloat16, float16 or float64": (
        ValueError,
        {"logits": torch.zeros(3, dtype=torch.int64)},
    ),
    "inputs[0] is torch.float32 on cpu, wanted logits' torch.float64 on cpu": (
        ValueError,
        {"logits": torch.zeros(3, dtype=torch.float64)},
    ),
    "present is [3, 2], wanted [3, 3]: samples, inputs": (ValueError, {"present": torch.ones(3, 2).bool()}),
    "present is torch.float32 on cpu, wanted torch.bool on cpu": (ValueError, {"present": torch.ones(3, 3)}),
    "present is [1, 3], wanted None, since the inputs have no leading dimension": (
        ValueError,
        {"inputs": [torch.zeros(10)] * 3, "present": torch.ones(1, 3).bool()},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_what_was_got_and_what_was_wanted(message):
    kind, change = ERRORS[message]
    with pytest.raises(kind) as error:
        weighted_fusion(**(cast(example(grad=False), torch.float32) | change))
    assert str(error.value) == f"weighted_fusion: {message}"
