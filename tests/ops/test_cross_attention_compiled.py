"""cross_attention under torch.compile, and what its operators promise the compiler."""

from functools import partial

import pytest
import test_cross_attention as suite
import test_cross_attention_absence as absence
import torch
from check import cast, check, compiled, dtypes, run
from hypothesis import given, settings
from test_cross_attention import (
    ANY,
    KERNELS,
    OPTIONS,
    all_of,
    example,
    example_for,
    needs_cpu,
    on,
    schema_arguments,
)
from test_cross_attention_absence import check_hidden
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import cross_attention, reference


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_compiled_it_is_as_exact(name, options):
    function = compiled(all_of(on(name)))
    for dtype in dtypes(name) if name == "cpu" else (torch.float32,):
        check(function, all_of(reference.cross_attention), example_for(name, **OPTIONS[options]), dtype)


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    function = compiled(lambda **a: cross_attention(**a).sin(), backend="inductor")
    arguments = example(**OPTIONS["everything"])
    check(function, lambda **a: reference.cross_attention(**a).sin(), arguments, torch.float32)


@needs_cpu
@given(arguments=ANY)
@settings(max_examples=5)
def test_any_shape_visibility_and_layout_compiled(arguments):
    check(
        compiled(all_of(on("cpu"))), all_of(reference.cross_attention), arguments, torch.float32, upstreams=4
    )


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_what_is_hidden_cannot_reach_a_bit(name):
    op = compiled(on(name))
    check_hidden(op, torch.nan, torch.float32, name=name, present=2, masks=True, lengths=True)


PROMISES = {
    "of few queries": partial(suite.test_few_queries, queries=5),
    "of a query that sees nothing": (absence.test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient),
    "of visible nan": absence.test_visible_nan_propagates,
    "of the gradients of visible nan": partial(
        absence.test_visible_nan_propagates_to_the_gradients, part="value"
    ),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_the_promises_hold_compiled(monkeypatch, name, promise):
    op = compiled(on(name))
    for module in (suite, absence):
        monkeypatch.setattr(module, "on", lambda name: op)
    promise(name)


@pytest.mark.parametrize("name", KERNELS)
def test_zero_rows_compiled(name):
    function = compiled(all_of(on(name)))
    for shape in ({"batch": 0}, {"queries": 0}, {"sizes": (0, 5)}):
        check(function, all_of(reference.cross_attention), example_for(name, **shape), torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_opcheck(name, options):
    arguments = cast(
        example_for(name, queries=5, sizes=(13, 1, 4), **OPTIONS[options]),
        torch.float16 if options == "everything" else torch.float32,
    )
    forward = getattr(torch.ops.mmfast.cross_attention, name)
    backward = getattr(torch.ops.mmfast.cross_attention_backward, name)
    given = schema_arguments(arguments)
    if given[7] is not None:  # as the public function gives it
        given = (*given[:7], given[7].float().expand(*given[0].shape[:2], 3), *given[8:])
    torch.library.opcheck(forward, given)
    torch.library.opcheck(forward, (*given[:-1], False))
    out, lse, normalizers, _ = forward(*given)
    bias = given[7] is not None
    for grad_lse, needs in (
        (None, [True] * 7 + [bias]),
        (torch.ones_like(lse), [False, True] * 3 + [True, bias]),
    ):
        arguments = torch.ones_like(out), grad_lse, *given[:9], out, lse, normalizers, needs
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_double_backward_is_refused(name, how):
    function, message = (
        (on(name), "differentiable once") if how == "eager" else (compiled(on(name)), "create_graph=False")
    )
    arguments = cast(example_for(name), torch.float32)
    out = function(**arguments)
    with pytest.raises(RuntimeError, match=message):
        (grad,) = torch.autograd.grad(out.sum(), arguments["query"], create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", ["lengths", "everything"])
def test_mixes_of_lengths_compile_at_most_twice(name, options):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(on(name), fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for mix in range(20):
        most = 9 if name == "triton" else 40
        batch, queries, *sizes = torch.randint(2, most, (5,), generator=generator).tolist()
        arguments = example_for(name, batch, queries=queries, sizes=sizes, seed=mix, **OPTIONS[options])
        arguments = cast(arguments, torch.float32)
        if name == "triton":
            function(**arguments)
            continue
        graph, eager = run(function, arguments), run(on(name), arguments)
        assert all(torch.equal(graph[key], eager[key]) for key in eager)
    assert counter.frame_count <= 2
