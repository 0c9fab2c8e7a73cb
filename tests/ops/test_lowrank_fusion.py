"""The promises of every op for lowrank_fusion, on every backend that is there."""

import itertools

import pytest
import torch
from check import at_thread_counts, backends, cast, check, compiled, dtypes, isas, run, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import backend, lowrank_fusion, native_calls, reference

BACKENDS = backends("lowrank_fusion")
KERNELS = [name for name in BACKENDS if name != "reference"]
ISAS = isas()
OPTIONS = {"plain": {}, "no bias": {"bias": False}, "present": {"present": True}}


def example(depths=(8, 5, 3), rows=6, ranks=3, width=10, *, present=False, bias=True, seed=0, grad=True):
    """Arguments for lowrank_fusion in float64, each factor's product of about size 1."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.requires_grad_(grad)

    arguments = {
        "inputs": [randn(rows, depth) for depth in depths],
        "factors": [randn(ranks, depth + 1, width, scale=(depth + 1) ** -0.5) for depth in depths],
        "rank_weight": randn(ranks),
        "bias": randn(width) if bias else None,
    }
    if present:
        arguments["present"] = torch.rand(rows, len(depths), generator=generator) > 0.4
    return arguments


def on(name):
    def op(**arguments):
        with backend(name):
            return lowrank_fusion(**arguments)

    return op


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_as_exact_as_promised(name, options):
    for dtype in dtypes(name):
        check(on(name), reference.lowrank_fusion, example(**options), dtype, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("rows", [1, 40, 150, 600])
def test_every_instruction_set_is_as_exact(isa, rows):
    """Few rows read the factors in place, more pack them, many are summed in parts; widths that are no multiple of a panel."""
    for width in (37, 64):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            arguments = example((70, 9), rows, 3, width, present=rows == 40)
            check(on("cpu"), reference.lowrank_fusion, arguments, dtype, upstreams=12, runs=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("rows, present", [(150, False), (150, True), (900, False)])
def test_large_products_are_as_exact(isa, rows, present):
    """With AMX those of float32 too run in its tiles. The gradient of a modality is one product over all ranks, or several."""
    for dtype, width in itertools.product((torch.float32, torch.bfloat16), (128, 130)):
        arguments = example((150, 129, 20), rows, 2, width, present=present)
        check(on("cpu"), reference.lowrank_fusion, arguments, dtype, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_directional_derivatives_in_float32(isa):
    """The gradient along a direction is the slope of the kernel's own output along it."""
    arguments = cast(example((20, 9, 5), 30, 3, 33, present=True), torch.float32)
    leaves = [*arguments["inputs"], *arguments["factors"], arguments["rank_weight"], arguments["bias"]]
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
    """Any sizes, presence, and layout of each tensor."""
    depths = draw(st.lists(st.sampled_from([0, 1, 7, 33]), min_size=1, max_size=4))
    arguments = example(
        depths,
        draw(st.sampled_from([0, 1, 5, 40])),
        draw(st.sampled_from([1, 2, 5])),
        draw(st.sampled_from([1, 9, 64])),
        present=draw(st.booleans()),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
    layouts = st.sampled_from(["dense", "sliced", "stepped", "swapped"])
    for key in ("inputs", "factors"):
        arguments[key] = [laid_out(t, draw(layouts)) for t in arguments[key]]
    return arguments


def laid_out(t, how):
    """The same values in another layout. Only "swapped" has no dense last dimension."""
    t = t.detach()
    if how == "sliced":  # columns of something wider
        t = torch.cat([t, t], -1)[..., t.shape[-1] :]
    elif how == "stepped":  # every second row
        t = torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :]
    elif how == "swapped":
        t = t.mT.contiguous().mT
    return t.requires_grad_()


@pytest.mark.parametrize("name", KERNELS)
def test_any_size_presence_and_layout(name):
    @settings(max_examples=60 if name == "cpu" else 6)
    @given(problems())
    def every(arguments):
        check(on(name), reference.lowrank_fusion, arguments, torch.float32, upstreams=4, runs=1)

    every()


def tensor_product(inputs, factors, rank_weight, bias):
    """A linear layer over the outer product of all [x_i, 1]: equations 1 to 4 of Liu et al. 2018."""
    product, weight = inputs[0].new_ones(len(inputs[0]), 1), rank_weight[:, None, None]
    for x, factor in zip(inputs, factors, strict=True):
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        product = torch.einsum("bk,bd->bkd", product, x).flatten(1)  # [B, product of (D_i + 1)]
        weight = torch.einsum("rko,rdo->rkdo", weight, factor).flatten(1, 2)
    return product @ weight.sum(0) + bias


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_the_full_tensor_product_under_a_weight_of_that_rank(name):
    dtype = torch.float64 if torch.float64 in dtypes(name) else torch.float32
    check(on(name), tensor_product, example(rows=20, ranks=4), dtype, upstreams=4)


def test_any_weight_is_reached_at_a_rank_as_large_as_it_needs():
    """One factor that picks each entry of the outer product: the full tensor layer with an arbitrary weight."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(7, depth, generator=generator, dtype=torch.float64) for depth in (3, 2))
    weight = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)  # [D_x + 1, D_y + 1, O]
    picks = torch.eye(4, dtype=torch.float64)[:, :, None].expand(4, 4, 5)  # rank r picks row r
    out = lowrank_fusion([x, y], [picks, weight], torch.ones(4, dtype=torch.float64))
    one = torch.ones(7, 1, dtype=torch.float64)
    meant = torch.einsum("bx,by,xyo->bo", torch.cat([x, one], 1), torch.cat([y, one], 1), weight)
    torch.testing.assert_close(out, meant, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_a_factor_that_is_zero_does_not_divide(name):
    arguments = example(present=True)
    with torch.no_grad():
        arguments["factors"][1].zero_()
        arguments["factors"][0][:, :, ::2] = 0
    check(on(name), reference.lowrank_fusion, arguments, torch.float32, upstreams=4)
    assert all(t.isfinite().all() for t in run(on(name), cast(arguments, torch.float32)).values())


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_it_is_as_exact_and_dynamic(name):
    function = compiled(on(name))
    for rows in (5, 6):
        check(
            function, reference.lowrank_fusion, example(rows=rows, present=True), torch.float32, upstreams=4
        )


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    function = compiled(lambda **a: lowrank_fusion(**a).sin(), backend="inductor")
    check(function, lambda **a: reference.lowrank_fusion(**a).sin(), example(), torch.float32, upstreams=4)


def test_twenty_shapes_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    function = torch.compile(on("cpu" if "cpu" in KERNELS else "reference"), fullgraph=True, backend=counter)
    for rows in range(2, 22):
        run(function, cast(example(rows=rows, present=True), torch.float32))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_absent_reaches_no_bit(name):
    arguments = example((40, 6, 9), 30, present=True)
    present = arguments["present"]
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        new = cast(arguments, torch.float32)
        with torch.no_grad():
            for i, x in enumerate(new["inputs"]):
                x[~present[:, i]] = poison
        results.append(run(on(name), new))
    for other in results[1:]:
        assert same_bits(results[0], other)
    for i in range(3):
        assert results[0][f"gradient of ['inputs'][{i}]"][~present[:, i]].count_nonzero() == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_an_absent_modality_counts_as_one_and_without_any_the_rank_weights_are_left(name):
    arguments = cast(example(rows=3, grad=False), torch.float32)
    present = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    out = on(name)(**arguments, present=present)
    two = {**arguments, "inputs": arguments["inputs"][:2], "factors": arguments["factors"][:2]}
    torch.testing.assert_close(out[0], on(name)(**two)[0])
    torch.testing.assert_close(out[1], arguments["rank_weight"].sum() + arguments["bias"])


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_visible_propagates_nan(name):
    arguments = cast(example(grad=False), torch.float32)
    arguments["inputs"][1][1] = torch.nan
    out = on(name)(**arguments)
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_rows_features_and_outputs(name):
    for sizes in (
        {"rows": 0},
        {"depths": (0, 4)},
        {"width": 0},
        {"ranks": 0},
        {"ranks": 0, "rows": 80, "width": 32},
    ):
        for options in OPTIONS.values():
            check(on(name), reference.lowrank_fusion, example(**sizes, **options), torch.float32, upstreams=4)


@pytest.mark.parametrize("name", [name for name in KERNELS if torch.float64 in dtypes(name)])
def test_gradcheck(name):
    arguments = example((2, 3), 4, 2, 3, present=True)
    inputs, factors = arguments.pop("inputs"), arguments.pop("factors")
    weight, bias, present = arguments.values()

    def function(*flat):
        return on(name)(
            inputs=flat[:2], factors=flat[2:4], rank_weight=flat[4], bias=flat[5], present=present
        )

    assert torch.autograd.gradcheck(function, (*inputs, *factors, weight, bias))


@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name):
    for options in OPTIONS.values():
        a = cast(example(grad=False, **options), torch.float32)
        shared, present = (a["inputs"], a["factors"], a["rank_weight"]), a.get("present")
        forward, backward = (
            getattr(op, name)
            for op in (torch.ops.mmfast.lowrank_fusion, torch.ops.mmfast.lowrank_fusion_backward)
        )
        for save in (False, True):
            torch.library.opcheck(forward, (*shared, a["bias"], present, save))
        out, products = forward(*shared, a["bias"], present, True)
        for needs in ([True] * 8, [False, True, False, True, False, False, True, False]):
            torch.library.opcheck(
                backward, (torch.randn_like(out).mT.contiguous().mT, *shared, present, products, needs)
            )


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
    x = torch.randn(4, 6, requires_grad=True)
    factor, weight = torch.randn(2, 7, 5, requires_grad=True), torch.ones(2)
    meant = reference.lowrank_fusion([x, x], [factor, factor], weight)
    theirs = torch.autograd.grad(meant.sum(), [x, factor])
    for function in (on(name), compiled(on(name))):
        out = function(inputs=[x, x], factors=[factor, factor], rank_weight=weight)
        torch.testing.assert_close(out, meant)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), [x, factor]), theirs)


@pytest.mark.parametrize("name", KERNELS)
def test_the_forced_backend_really_runs(name):
    ops = [f"lowrank_fusion.{name}", f"lowrank_fusion_backward.{name}"]
    before = [native_calls(op) for op in ops]
    run(on(name), cast(example(), torch.float32))
    assert [native_calls(op) for op in ops] == [n + 1 for n in before]


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_every_time_and_with_any_number_of_threads(name):
    small, large = ((40, 20), 130, 4, 70), ((300, 200), 256, 8, 70)  # products side by side, or each on all
    larger = ((300, 200), 150, 2, 130)  # in the tiles of AMX, where they are
    for sizes in (small, large, larger) if name == "cpu" else [((40, 20), 40, 2, 70)]:
        arguments = cast(example(*sizes, present=True), torch.float32)
        first, *others = at_thread_counts(lambda arguments=arguments: run(on(name), arguments))
        assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("name", KERNELS)
def test_double_backward_is_refused(name):
    arguments = cast(example(), torch.float32)
    out = on(name)(**arguments).sum()
    (gradient,) = torch.autograd.grad(out, arguments["rank_weight"], create_graph=True)
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
    assert arguments["rank_weight"].grad.dtype == torch.float32


ERRORS = {
    "inputs is a Tensor, wanted a list or tuple of tensors": (TypeError, {"inputs": torch.zeros(6, 8)}),
    "factors[0] is a float, wanted a tensor": (TypeError, {"factors": [1.0]}),
    "inputs is empty, wanted at least one tensor": (ValueError, {"inputs": []}),
    "factors is 1 tensors, wanted 3, one for each of the inputs": (
        ValueError,
        {"factors": [torch.zeros(3, 9, 10)]},
    ),
    "rank_weight is [3, 1], wanted [R]": (ValueError, {"rank_weight": torch.zeros(3, 1)}),
    "rank_weight's dtype is torch.int64, wanted float32, bfloat16, float16 or float64": (
        ValueError,
        {"rank_weight": torch.zeros(3, dtype=torch.int64)},
    ),
    "inputs[0] is torch.float32 on cpu, wanted rank_weight's torch.float64 on cpu": (
        ValueError,
        {"rank_weight": torch.zeros(3, dtype=torch.float64)},
    ),
    "bias is torch.float64 on cpu, wanted rank_weight's torch.float32 on cpu": (
        ValueError,
        {"bias": torch.zeros(10, dtype=torch.float64)},
    ),
    "bias is [9], wanted [10]": (ValueError, {"bias": torch.zeros(9)}),
    "factors[0] is [4, 9, 10], wanted [3, 9, 10]: ranks, features and 1, outputs": (
        ValueError,
        {"factors": [torch.zeros(4, 9, 10)] * 3},
    ),
    "factors[0] is [9, 10], wanted [R, D + 1, O]": (ValueError, {"factors": [torch.zeros(9, 10)] * 3}),
    "inputs[1] is [5, 5], wanted [6, D]": (
        ValueError,
        {"inputs": [torch.zeros(6, 8), torch.zeros(5, 5), torch.zeros(6, 3)]},
    ),
    "inputs[0] is [6, 2, 8], wanted [B, D]": (ValueError, {"inputs": [torch.zeros(6, 2, 8)] * 3}),
    "present is [3, 6], wanted [6, 3]: samples, inputs": (ValueError, {"present": torch.ones(3, 6).bool()}),
    "present is torch.float32 on cpu, wanted torch.bool on cpu": (ValueError, {"present": torch.ones(6, 3)}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_what_was_got_and_what_was_wanted(message):
    kind, change = ERRORS[message]
    with pytest.raises(kind) as error:
        lowrank_fusion(**(cast(example(grad=False), torch.float32) | change))
    assert str(error.value) == f"lowrank_fusion: {message}"
