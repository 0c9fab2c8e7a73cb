"""The promises of every op for group_norm, in both memory formats, on every backend that is there."""

import math

import pytest
import torch
import torch.nn.functional as F
from check import (
    assert_promised,
    at_thread_counts,
    backends,
    cast,
    check,
    compiled,
    dtypes,
    isas,
    run,
    same_bits,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import backend, group_norm, native_calls, reference

BACKENDS = backends("group_norm")
KERNELS = [name for name in BACKENDS if name != "reference"]
ISAS = isas()
LAYOUTS = ["contiguous", "channels_last"]
OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "everything": {"activation": "relu", "residual": True},
}


def laid_out(x, layout):
    """The same values as [B, C, ...] or [B, ..., C] in memory, or neither: every second sample and pixel."""
    if layout == "strided":
        return x.repeat_interleave(2, 0).repeat_interleave(2, -1)[::2, ..., ::2]
    return x.contiguous() if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)


def example(
    shape=(3, 12, 5, 7),
    groups=4,
    layout="channels_last",
    *,
    affine=True,
    residual=False,
    seed=0,
    grad=True,
    **rest,
):
    """Arguments for group_norm in float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    arguments = {"input": laid_out(randn(*shape), layout), "num_groups": groups}
    if affine:
        arguments |= {"weight": randn(shape[1]), "bias": randn(shape[1])}
    if residual:
        arguments["residual"] = laid_out(randn(*shape), layout if residual is True else residual)
    for t in arguments.values():
        if torch.is_tensor(t):
            t.requires_grad_(grad)
    return arguments | rest


def on(name):
    def op(**arguments):
        with backend(name):
            return group_norm(**arguments)

    return op


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_as_exact_as_promised(name, layout, options):
    for dtype in dtypes(name):
        for affine in (True, False):
            arguments = example(layout=layout, affine=affine, **options)
            check(on(name), reference.group_norm, arguments, dtype, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set_is_as_exact(isa, layout):
    for shape, groups in (((2, 38, 11, 13), 2), ((2, 64, 9, 9), 8)):  # channels that fill no vector, and four
        for options in ({}, {"residual": True}):
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                check(on("cpu"), reference.group_norm, example(shape, groups, layout, **options), dtype)
        for dtype in (torch.float32, torch.float64):  # rounding carries narrower ones across the corner
            everything = example(shape, groups, layout, **OPTIONS["everything"])
            check(on("cpu"), reference.group_norm, everything, dtype)


@st.composite
def problems(draw):
    """Any rank, layout of each argument, and options."""
    groups = draw(st.sampled_from([1, 2, 3]))
    pixels = draw(st.lists(st.sampled_from([1, 2, 3, 9, 40]), max_size=3))
    shape = (draw(st.sampled_from([0, 1, 2, 5])), groups * draw(st.sampled_from([1, 2, 8, 17])), *pixels)
    # The gradient through a group of one value is 0, through one of two almost: all rounding, nothing to compare.
    assume(math.prod(shape[1:]) > 2 * groups)
    layouts = st.sampled_from(LAYOUTS if len(shape) < 3 else [*LAYOUTS, "strided"])
    return example(
        shape,
        groups,
        draw(layouts),
        affine=draw(st.booleans()),
        residual=draw(st.one_of(st.just(False), layouts)),
        activation=draw(st.sampled_from(["none", "relu"])),
        eps=draw(st.sampled_from([1e-5, 0.1])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("name", KERNELS)
def test_any_shape_layout_and_option(name):
    @settings(max_examples=120)
    @given(problems())
    def every(arguments):
        check(on(name), reference.group_norm, arguments, torch.float32)

    every()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
def test_compiled_it_is_as_exact_and_dynamic(name, layout):
    function = compiled(on(name))
    for pixels in (5, 6):
        everything = example((3, 12, pixels, 7), layout=layout, **OPTIONS["everything"])
        check(function, reference.group_norm, everything, torch.float32)
    assert (
        function(**cast(everything, torch.float32)).stride()
        == on(name)(**cast(everything, torch.float32)).stride()
    )


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    everything = example(**OPTIONS["everything"])
    function = compiled(lambda **a: group_norm(**a).sin(), backend="inductor")
    check(function, lambda **a: reference.group_norm(**a).sin(), everything, torch.float32)


def test_twenty_shapes_compile_at_most_twice():
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    function = torch.compile(on("cpu" if "cpu" in KERNELS else "reference"), fullgraph=True, backend=counter)
    for size in range(2, 22):
        run(function, cast(example((size, 8, size + 1, size + 2), **OPTIONS["everything"]), torch.float32))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_and_gradient_keep_the_memory_format(name, layout, dtype):
    arguments = cast(example(layout=layout, residual="strided", activation="relu"), dtype)
    out = on(name)(**arguments)
    assert out.stride() == arguments["input"].stride()
    out.sum().backward()
    assert arguments["input"].grad.stride() == arguments["input"].stride()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_from_zero_costs_no_digits_that_the_reference_keeps(isa, layout):
    for shift in (1e3, 1e5):
        arguments = example((2, 32, 25, 25), layout=layout, **OPTIONS["everything"])
        arguments["input"] = (arguments["input"].detach() + shift).requires_grad_()
        del arguments["activation"]
        check(on("cpu"), reference.group_norm, arguments, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_long_sum_and_an_outlier_keep_float32s_digits(layout):
    """Statistics that one first pixel, far from all others, would spoil if they were taken about it."""
    x = torch.randn(1, 4, 250, 250, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[..., 0, 0] = 1e4
    arguments = cast({"input": laid_out(x, layout), "num_groups": 2}, torch.float32)
    meant = reference.group_norm(**cast(arguments, torch.float64))
    assert_promised(group_norm(**arguments), meant, 0.0)


@pytest.mark.parametrize("name", BACKENDS)
def test_zero_samples(name):
    for options in OPTIONS.values():
        check(on(name), reference.group_norm, example((0, 12, 5, 7), **options), torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_reaches_its_own_group_and_no_other(name, layout, poison):
    arguments = example(layout=layout, activation="relu", residual=True, grad=False)
    arguments["input"][1, 4, 2, 3] = poison  # second group
    arguments["residual"][2, 0, 0, 0] = torch.nan
    bad = on(name)(**cast(arguments, torch.float32)).isnan()
    assert bad[1, 3:6].all() and bad[2, 0, 0, 0] and bad.sum() == 3 * 5 * 7 + 1


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(name, layout, options):
    arguments = example((2, 4, 3, 2), 2, layout, **options)
    tensors = {key: t for key, t in arguments.items() if torch.is_tensor(t)}
    others = {key: v for key, v in arguments.items() if key not in tensors}
    assert torch.autograd.gradcheck(
        lambda *flat: on(name)(**dict(zip(tensors, flat, strict=True)), **others), tuple(tensors.values())
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, layout):
    for options in OPTIONS.values():
        a = cast(example(layout=layout, grad=False, **options), torch.float32)
        activation = a.get("activation", "none")
        arguments = (a["input"], 4, a["weight"], a["bias"], 1e-5, activation, a.get("residual"))
        torch.library.opcheck(getattr(torch.ops.mmfast.group_norm, name), arguments)
        out, *saved = getattr(torch.ops.mmfast.group_norm, name)(*arguments)
        for needs in ([True] * 4, [False, True, False, False], [True, False, False, True]):
            grad = laid_out(torch.randn_like(out), "strided")
            arguments = (grad, a["input"], 4, a["weight"], activation, out, *saved, needs)
            torch.library.opcheck(getattr(torch.ops.mmfast.group_norm_backward, name), arguments)


@pytest.mark.parametrize("name", KERNELS)
def test_partial_requires_grad(name):
    for options in OPTIONS.values():
        arguments = example(grad=False, **options)
        keys = [key for key, t in arguments.items() if torch.is_tensor(t)]
        full = cast(arguments, torch.float32)
        for key in keys:
            full[key].requires_grad_()
        full = run(on(name), full)
        for key in keys:
            partial = cast(arguments, torch.float32)
            partial[key].requires_grad_()
            got = run(on(name), partial)
            assert list(got) == ["out", f"gradient of ['{key}']"]
            assert all(torch.equal(value, full[name_]) for name_, value in got.items()), key


@pytest.mark.parametrize("name", KERNELS)
def test_the_input_may_be_the_residual(name):
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    for function in (on(name), compiled(on(name))):
        out = function(input=x, num_groups=2, residual=x, activation="relu")
        meant = reference.group_norm(x.double(), 2, residual=x.double(), activation="relu")
        torch.testing.assert_close(out.double(), meant, rtol=1e-5, atol=1e-5)
        (ours,) = torch.autograd.grad(out.square().sum(), x)
        (theirs,) = torch.autograd.grad(meant.square().sum(), x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_the_forced_backend_really_runs(name):
    ops = [f"group_norm.{name}", f"group_norm_backward.{name}"]
    before = [native_calls(op) for op in ops]
    run(on(name), cast(example(), torch.float32))
    assert [native_calls(op) for op in ops] == [n + 1 for n in before]


@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_every_time_and_with_any_number_of_threads(name):
    arguments = cast(example((6, 32, 20, 20), **OPTIONS["everything"]), torch.float32)
    first, *others = at_thread_counts(lambda: run(on(name), arguments))
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("name", KERNELS)
def test_double_backward_is_refused(name):
    arguments = cast(example(), torch.float32)
    out = on(name)(**arguments).sum()
    (gradient,) = torch.autograd.grad(out, arguments["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_arrive_in_any_layout(name, layout):
    arguments = cast(example(layout=layout, activation="relu", affine=False), torch.float32)
    meant = cast(arguments, torch.float64)
    for reduce in (
        lambda y: y.sum(),
        lambda y: y.contiguous().flip(-1).transpose(1, 2).cumsum(-1).square().sum(),
    ):
        (ours,) = torch.autograd.grad(reduce(on(name)(**arguments)), arguments["input"])
        (theirs,) = torch.autograd.grad(reduce(reference.group_norm(**meant)), meant["input"])
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_casts_what_is_not_float64(name):
    arguments = cast(example(**OPTIONS["everything"]), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = on(name)(**arguments)
        assert on(name)(**example()).dtype == torch.float64
    plain = on(name)(**cast(arguments, torch.bfloat16))
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    out.sum().backward()
    assert arguments["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_what_people_write_today(layout):
    arguments = example(layout=layout, **OPTIONS["everything"])
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    meant = F.relu(F.group_norm(x, 4, weight, bias) + arguments["residual"])
    torch.testing.assert_close(reference.group_norm(**arguments), meant, rtol=1e-12, atol=1e-12)


ERRORS = {
    "activation is 'gelu', wanted one of none, relu": {"activation": "gelu"},
    "input is [3], wanted [B, C, ...], of which B alone may be 0": {"input": torch.zeros(3)},
    "input is [3, 12, 0], wanted [B, C, ...], of which B alone may be 0": {"input": torch.zeros(3, 12, 0)},
    "input's dtype is torch.int64, wanted float32, bfloat16, float16 or float64": {
        "input": torch.zeros(3, 12, dtype=torch.int64)
    },
    "num_groups is 5, wanted a divisor of input's 12 channels": {"num_groups": 5},
    "num_groups is 0, wanted a divisor of input's 12 channels": {"num_groups": 0},
    "weight is [11], wanted [12]": {"weight": torch.zeros(11)},
    "bias is torch.float64 on cpu, wanted input's torch.float32 on cpu": {
        "bias": torch.zeros(12, dtype=torch.float64)
    },
    "residual is [1, 12, 5, 7], wanted [3, 12, 5, 7]": {"residual": torch.zeros(1, 12, 5, 7)},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument_what_was_got_and_what_was_wanted(message):
    with pytest.raises(ValueError) as error:
        group_norm(**(cast(example(grad=False), torch.float32) | ERRORS[message]))
    assert str(error.value) == f"group_norm: {message}"
