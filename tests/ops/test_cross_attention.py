"""The ten promises for cross_attention, on every backend that is there, eager and compiled."""

import pytest
import torch
import torch.nn.functional as F
from check import assert_promised, backends, cast, check, compiled, dtypes, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from mmfast.ops import backend, cross_attention, native_calls, reference

BACKENDS = backends("cross_attention")
KERNELS = [name for name in BACKENDS if name != "reference"]


def example(
    batch=2,
    heads=4,
    queries=9,
    sizes=(13, 1, 20),
    depth=16,
    *,
    kv_heads=4,
    value_depth=None,
    lengths=False,
    masks=False,
    present=0,
    causal=False,
    bias=0,
    seed=0,
    grad=True,
):
    """Arguments for cross_attention in float64."""
    generator = torch.Generator().manual_seed(seed)
    n = len(sizes)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    def some(*shape):
        return torch.rand(*shape, generator=generator) > 0.4

    arguments = {
        "query": randn(batch, heads, queries, depth),
        "sources": [
            (randn(batch, kv_heads, size, depth), randn(batch, kv_heads, size, value_depth or depth))
            for size in sizes
        ],
        "causal": causal,
    }
    if lengths:  # beyond both ends: they are clamped
        arguments["lengths"] = [
            None if i == 1 else torch.randint(-2, size + 4, (batch,), generator=generator)
            for i, size in enumerate(sizes)
        ]
    if masks:
        arguments["masks"] = [None if i == 2 else some(batch, size) for i, size in enumerate(sizes)]
    if present:
        arguments["present"] = some(batch, n) if present == 2 else some(batch, queries, n)
    if bias:
        arguments["source_bias"] = randn(*(batch, heads, n)[3 - bias :])
    return arguments


def example_for(name, *args, **options):
    """Triton's interpreter takes its time for every head: for it there are two, one group where others have some."""
    if name == "triton":
        options = {"heads": 2, **options, "kv_heads": 1 if "kv_heads" in options else options.get("heads", 2)}
    return example(*args, **options)


def on(name):
    def op(**arguments):
        with backend(name):
            return cross_attention(**arguments)

    return op


def all_of(function):
    """Output and lse in one tensor, so that both get a gradient; a query that sees nothing keeps an lse of -inf,
    which no difference could be taken of.
    """

    def op(**arguments):
        out, stats = function(**arguments, return_stats=True)
        lse = torch.where(stats.lse == -torch.inf, 0, stats.lse).to(out.dtype)
        return torch.cat([out, lse[..., None], stats.mass.to(out.dtype)], -1)

    return op


OPTIONS = {
    "plain": {},
    "lengths": {"lengths": True},
    "masks": {"masks": True},
    "present": {"present": 2},
    "present for each query": {"present": 3},
    "causal": {"causal": True},
    "causal in one source": {"causal": [False, True, True], "lengths": True},
    "source bias": {"bias": 1},
    "bias for each head": {"bias": 2},
    "grouped heads": {"kv_heads": 2, "bias": 3},
    "another value depth": {"value_depth": 24, "kv_heads": 1},
    "everything": {
        "lengths": True, "masks": True, "present": 3, "causal": [True, False, True], "bias": 3, "kv_heads": 2,
        "value_depth": 40,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_as_exact_as_promised(name, options):
    arguments = example_for(name, **options)
    for dtype in dtypes(name):
        if name != "triton" or dtype != torch.float32 or not options:
            check(on(name), reference.cross_attention, arguments, dtype)
        if name != "triton" or dtype == torch.float32 or not options:
            check(all_of(on(name)), all_of(reference.cross_attention), arguments, dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("queries", [1, 5, 6, 7])
def test_few_queries(name, queries):
    arguments = example_for(name, 2, queries=queries, sizes=(300, 70, 600), lengths=True, bias=2)
    for dtype in dtypes(name):
        check(all_of(on(name)), all_of(reference.cross_attention), arguments, dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("depth", [1, 3, 96, 128, 256])
def test_any_head_dim(name, depth):
    for value_depth in (depth, 5):
        arguments = example(1, 2, 7, (9, 70), depth, value_depth=value_depth, kv_heads=1, lengths=True)
        check(all_of(on(name)), all_of(reference.cross_attention), arguments, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_compiled_it_is_as_exact(name, options):
    function = compiled(all_of(on(name)))
    check(function, all_of(reference.cross_attention), example_for(name, **OPTIONS[options]), torch.float32)


@pytest.mark.inductor
def test_inductor_compiles_it_too():
    function = compiled(lambda **a: cross_attention(**a).sin(), backend="inductor")
    arguments = example(**OPTIONS["everything"])
    check(function, lambda **a: reference.cross_attention(**a).sin(), arguments, torch.float32)


@st.composite
def problems(draw, batches, kv_heads, queries, sizes):
    """Any sizes, visibility of every kind and mix, and any layout with a dense last dimension. Dozens of
    queries: of a few, the reference's own error, which bounds ours, is a matter of luck.
    """
    sizes = draw(st.lists(st.sampled_from(sizes), min_size=1, max_size=4))
    n = len(sizes)
    kv_heads = draw(st.sampled_from(kv_heads))
    arguments = example(
        draw(st.sampled_from(batches)),
        kv_heads * draw(st.sampled_from([1, 3])),
        draw(st.sampled_from(queries)),
        sizes,
        draw(st.sampled_from([8, 16, 40, 64, 72])),
        kv_heads=kv_heads,
        value_depth=draw(st.sampled_from([None, None, 8, 70])),
        lengths=draw(st.booleans()),
        masks=draw(st.booleans()),
        present=draw(st.sampled_from([0, 2, 3])),
        causal=draw(st.one_of(st.booleans(), st.lists(st.booleans(), min_size=n, max_size=n))),
        bias=draw(st.sampled_from([0, 1, 2, 3])),
        seed=draw(st.integers(0, 99)),
    )
    layout = st.sampled_from(["dense", "dense", "swapped", "sliced", "reversed"])
    arguments["query"] = laid_out(arguments["query"], draw(layout))
    arguments["sources"] = [
        (laid_out(k, draw(layout)), laid_out(v, draw(layout))) for k, v in arguments["sources"]
    ]
    if "source_bias" in arguments and draw(st.booleans()):
        absent = arguments["source_bias"].detach().clone()
        absent[..., 0] = -torch.inf
        arguments["source_bias"] = absent.requires_grad_()
    return arguments


def laid_out(x, how):
    """The same values in another layout. Only "reversed" has no dense last dimension."""
    x = x.detach()
    if how == "swapped":  # [B, S, H, D] in memory, as a projection leaves them
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif how == "sliced":  # part of a packed key and value
        x = torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    elif how == "reversed":
        x = x.transpose(-1, 0).contiguous().transpose(-1, 0)
    return x.requires_grad_()


def check_problem(name, arguments, **options):
    check(
        all_of(on(name)), all_of(reference.cross_attention), arguments, torch.float32, upstreams=4, **options
    )


@pytest.mark.skipif("cpu" not in KERNELS, reason="the CPU kernels were not built here")
@given(arguments=problems([0, 3], [1, 2, 4], [0, 17, 30, 70], [0, 1, 2, 7, 40, 70, 150]))
@settings(deadline=None, max_examples=40)
def test_any_shape_visibility_and_layout(arguments):
    check_problem("cpu", arguments)
    # of few numbers a gradient's error in bfloat16, like the reference's, is a matter of luck
    fixed = torch.utils._pytree.tree_map(
        lambda t: t.detach() if isinstance(t, torch.Tensor) else t, arguments
    )
    check(on("cpu"), reference.cross_attention, fixed, torch.bfloat16)


@pytest.mark.skipif("triton" not in KERNELS, reason="there is no Triton here")
@given(arguments=problems([2, 2, 2, 0], [1, 2], [17, 40, 40, 0], [0, 1, 7, 20, 50]))
@settings(deadline=None, max_examples=40)
def test_any_shape_visibility_and_layout_on_triton(arguments):
    check_problem("triton", arguments, runs=1)


def poisoned(arguments, value):
    """The same arguments with `value` in every key and value that no query of its sample sees."""
    query, sources = arguments["query"], arguments["sources"]
    spoilt = []
    for i, (key, val) in enumerate(sources):
        seen = reference._visible(
            query,
            key.shape[2],
            (arguments.get("lengths") or [None] * len(sources))[i],
            (arguments.get("masks") or [None] * len(sources))[i],
            arguments["present"][..., i] if "present" in arguments else None,
            False,
        )
        hidden = ~seen.any(2)[..., None]  # [B, 1, S, 1]
        assert hidden.any()
        spoilt.append(
            tuple(torch.where(hidden, value, t.detach()).requires_grad_(t.requires_grad) for t in (key, val))
        )
    return {**arguments, "sources": spoilt}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options", [{"masks": True, "lengths": True}, {"present": 2, "lengths": True, "causal": True}]
)
def test_what_is_hidden_cannot_reach_a_bit(name, value, options):
    for dtype in dtypes(name):
        sizes = (40 if name == "triton" else 70, 9, 20)
        arguments = cast(example_for(name, 3, sizes=sizes, seed=3, **options), dtype)
        for i in range(3):  # something to hide in every source
            arguments["lengths"][i] = torch.tensor([4, 0, arguments["sources"][i][0].shape[2]])
        before = run(all_of(on(name)), arguments)
        after = run(all_of(on(name)), poisoned(arguments, value))
        for key in before:
            assert torch.equal(before[key], after[key]), key


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_query_does_not_see_cannot_reach_it(name):
    """The last key is for the last query, one source for half of them: nan there stays out of the others."""
    for dtype in dtypes(name):
        arguments = cast(
            example_for(name, 1, queries=13, sizes=(13, 40), causal=[True, False], seed=1), dtype
        )
        arguments["present"] = torch.ones(1, 13, 2, dtype=torch.bool)
        arguments["present"][:, 2::3, 1] = False
        spoilt = cast(arguments, dtype)
        with torch.no_grad():
            for t in (*spoilt["sources"][0],):
                t[:, :, -1] = torch.nan
        before, after = run(on(name), arguments), run(on(name), spoilt)
        for key in ("out", "gradient of ['query']"):
            assert torch.equal(before[key][:, :, :-1], after[key][:, :, :-1]), key
        assert after["out"][:, :, -1].isnan().all()
        with torch.no_grad():
            spoilt = cast(arguments, dtype)
            for t in (*spoilt["sources"][1],):
                t.fill_(torch.nan)
        after = run(on(name), spoilt)
        for key in ("out", "gradient of ['query']"):
            assert torch.equal(before[key][:, :, 2::3], after[key][:, :, 2::3]), key
            assert after[key][:, :, 0::3].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient(name):
    for dtype in dtypes(name):
        arguments = cast(example_for(name, 2, present=3), dtype)
        arguments["present"][0, 3] = False
        out, stats = on(name)(**arguments, return_stats=True)
        assert (out[0, :, 3] == 0).all() and (stats.mass[0, :, 3] == 0).all()
        assert (stats.lse[0, :, 3] == -torch.inf).all()

        leaves = [arguments["query"], *(t for pair in arguments["sources"] for t in pair)]
        grads = [torch.ones_like(out), torch.ones_like(stats.lse)]
        before = torch.autograd.grad([out, stats.lse], leaves, grads)
        with torch.no_grad():
            arguments["query"][0, :, 3] = torch.nan
        for grad in grads:
            grad[0, :, 3] = torch.nan
        out, stats = on(name)(**arguments, return_stats=True)
        after = torch.autograd.grad([out, stats.lse], leaves, grads)
        assert (after[0][0, :, 3] == 0).all()
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("hidden_by", ["nothing", "lengths", "masks", "present", "causal", "bias"])
def test_a_query_that_sees_one_key_gets_no_gradient_from_its_weight(name, hidden_by):
    """The weight is 1 whatever the logit is: not a rounding error may be left of it."""
    arguments = cast(example_for(name, 1, queries=20, sizes=(1, 20)), torch.float32)
    (query, sources), row = (arguments["query"], arguments["sources"]), slice(None)
    if hidden_by == "nothing":
        sources.pop()
    elif hidden_by == "lengths":
        arguments["lengths"] = [torch.tensor([0]), torch.tensor([1])]
    elif hidden_by == "masks":
        arguments["masks"] = [torch.tensor([[False]]), torch.arange(20)[None] == 17]
    elif hidden_by == "present":
        arguments["present"] = (torch.arange(20)[:, None] >= torch.tensor([0, 15]))[None]
        row = slice(15)
    elif hidden_by == "causal":
        del sources[0]
        arguments["causal"], row = True, slice(1)
    else:
        arguments["source_bias"] = torch.tensor([0.5, -torch.inf])
    out = on(name)(**arguments)
    upstream = torch.zeros_like(out)
    upstream[:, :, row] = torch.randn(upstream[:, :, row].shape, generator=torch.Generator().manual_seed(0))
    keys = [key for key, _ in sources]
    for grad in torch.autograd.grad(out, [query, *keys], upstream):
        assert (grad == 0).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_visible_nan_propagates(name):
    arguments = cast(example(1, sizes=(5, 9), grad=False), torch.float32)
    arguments["sources"][1][1][0, 0, 3, 2] = torch.nan
    out = on(name)(**arguments)
    assert out[:, 0, :, 2].isnan().all() and not out[:, 0, :, 3].isnan().any() and not out[:, 1].isnan().any()
    arguments["sources"][1][0][0, 1, 3, 2] = torch.nan
    assert on(name)(**arguments)[:, 1].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "shape", [{"batch": 0}, {"queries": 0}, {"sizes": (0, 0)}, {"sizes": (0, 5)}], ids=str
)
def test_zero_rows(name, shape):
    check(all_of(on(name)), all_of(reference.cross_attention), example_for(name, **shape), torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("wanted", ["query", "key", "value", "source_bias"])
def test_only_the_gradients_that_are_needed(name, wanted):
    arguments = cast(example_for(name, bias=2, grad=False), torch.float32)
    leaf = {
        "query": arguments["query"],
        "key": arguments["sources"][1][0],
        "value": arguments["sources"][2][1],
        "source_bias": arguments["source_bias"],
    }[wanted]
    leaf.requires_grad_()
    check(on(name), reference.cross_attention, arguments, torch.float32)


def schema_arguments(arguments, mass=True):
    """The forward op's own arguments."""
    n = len(arguments["sources"])
    causal = arguments["causal"]
    return (
        arguments["query"].detach(),
        [key.detach() for key, _ in arguments["sources"]],
        [value.detach() for _, value in arguments["sources"]],
        arguments.get("lengths", [None] * n),
        arguments.get("masks", [None] * n),
        arguments.get("present"),
        [causal] * n if isinstance(causal, bool) else causal,
        arguments["source_bias"].detach() if "source_bias" in arguments else None,
        None,
        mass,
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_opcheck(name, options):
    arguments = cast(example_for(name, queries=5, sizes=(13, 1, 4), **OPTIONS[options]), torch.float32)
    forward = getattr(torch.ops.mmfast.cross_attention, name)
    backward = getattr(torch.ops.mmfast.cross_attention_backward, name)
    given = schema_arguments(arguments)
    torch.library.opcheck(forward, given)
    out, lse, _ = forward(*given)
    for grad_lse in (None, torch.ones_like(lse)):
        needs = [True] * 7 + [given[7] is not None]
        torch.library.opcheck(backward, (torch.ones_like(out), grad_lse, *given[:9], out, lse, needs))


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "triton"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_gradcheck(name, options):
    arguments = example(1, 2, 4, (5, 1, 3), 3, **{**OPTIONS[options], "kv_heads": 1, "value_depth": 2})
    leaves, layout = torch.utils._pytree.tree_flatten(arguments)

    def function(*leaves):
        return all_of(on(name))(**torch.utils._pytree.tree_unflatten(leaves, layout))[..., :3]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", KERNELS)
def test_double_backward_is_refused(name):
    arguments = cast(example_for(name), torch.float32)
    out = on(name)(**arguments)
    (grad,) = torch.autograd.grad(out.square().sum(), arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", KERNELS)
def test_mixes_of_lengths_compile_at_most_twice(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(on(name), fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for mix in range(20):
        most = 9 if name == "triton" else 40
        batch, queries, *sizes = torch.randint(2, most, (5,), generator=generator).tolist()
        arguments = example_for(name, batch, queries=queries, sizes=sizes, lengths=True, seed=mix)
        function(**cast(arguments, torch.float32))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", KERNELS)
def test_a_forced_backend_is_entered(name):
    before = [native_calls(f"{op}.{name}") for op in ("cross_attention", "cross_attention_backward")]
    run(on(name), cast(example_for(name), torch.float32))
    after = [native_calls(f"{op}.{name}") for op in ("cross_attention", "cross_attention_backward")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


@pytest.mark.parametrize("name", KERNELS)
def test_a_hundred_runs_give_the_same_bits(name):
    arguments = cast(example_for(name, 2, queries=70, sizes=(90, 33), lengths=True), torch.float32)
    runs = 100 if name == "cpu" else 3
    first = run(all_of(on(name)), arguments)
    for _ in range(runs - 1):
        again = run(all_of(on(name)), arguments)
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_one_source_is_scaled_dot_product_attention(name, causal):
    def peer(query, sources, causal):
        return F.scaled_dot_product_attention(query, *sources[0], is_causal=causal)

    check(on(name), peer, example(queries=20, sizes=(20,), causal=causal), torch.float32)


@pytest.mark.parametrize("name", BACKENDS)
def test_queries_are_not_cut_with_the_key_mask_when_lengths_differ(name):
    """A stack that unpads queries with the keys' mask drops queries silently where L is not S."""
    arguments = cast(example(2, queries=11, sizes=(5,), grad=False), torch.float32)
    arguments["masks"] = [torch.tensor([[True] * 3 + [False] * 2, [True] * 5])]
    key, value = arguments["sources"][0]
    out = on(name)(**arguments)
    meant = F.scaled_dot_product_attention(arguments["query"][:1], key[:1, :, :3], value[:1, :, :3])
    assert_promised(out[:1], meant.double(), 1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_sources_merge_by_their_log_sum_exp(name):
    arguments = cast(example_for(name, grad=False), torch.float32)
    out, stats = on(name)(**arguments, return_stats=True)
    each = [
        on(name)(**{**arguments, "sources": [source]}, return_stats=True) for source in arguments["sources"]
    ]
    lse = torch.stack([own.lse for _, own in each], -1)
    assert_promised(stats.lse, lse.double().logsumexp(-1), 1e-6)
    assert_promised(stats.mass, lse.double().softmax(-1), 1e-6)
    merged = sum(
        o.double() * w[..., None] for (o, _), w in zip(each, lse.double().softmax(-1).unbind(-1), strict=True)
    )
    assert_promised(out, merged, 1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_bias_of_minus_infinity_is_absence(name):
    arguments = cast(example_for(name, present=0, bias=1), torch.float32)
    with torch.no_grad():
        arguments["source_bias"][1] = -torch.inf
    without = {**arguments, "present": torch.tensor([[True, False, True]] * 2)}
    without["source_bias"] = torch.where(
        arguments["source_bias"].detach() == -torch.inf, 0, arguments["source_bias"].detach()
    ).requires_grad_()
    one, other = run(on(name), arguments), run(on(name), without)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_autocast_casts_all_but_the_bias():
    arguments = cast(example(bias=1), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, stats = cross_attention(**arguments, return_stats=True)
    assert out.dtype == torch.bfloat16 and stats.lse.dtype == torch.float32
    out.float().sum().backward()
    assert arguments["query"].grad.dtype == torch.float32


Q, KV = torch.randn(2, 4, 3, 8), (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6))
WRONG = {
    "sources is a Tensor": (TypeError, {"sources": KV[0]}),
    r"sources\[0\] is a Tensor": (TypeError, {"sources": [KV[0]]}),
    "the number of sources is 0": (ValueError, {"sources": []}),
    "the number of sources is 17": (ValueError, {"sources": [KV] * 17}),
    "query's dtype is torch.int64": (ValueError, {"query": Q.long()}),
    r"query is \[4, 3, 8\]": (ValueError, {"query": Q[0]}),
    r"key of sources\[0\] is torch.float64": (ValueError, {"sources": [(KV[0].double(), KV[1])]}),
    r"key of sources\[0\] is \[2, 2, 5, 7\]": (ValueError, {"sources": [(KV[0][..., 1:], KV[1])]}),
    r"key of sources\[0\] is \[1, 2, 5, 8\]": (ValueError, {"sources": [(KV[0][:1], KV[1][:1])]}),
    r"heads that divide query's 4": (
        ValueError,
        {"sources": [(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 6))]},
    ),
    r"key of sources\[1\] is \[2, 1, 5, 8\]": (ValueError, {"sources": [KV, (KV[0][:, :1], KV[1][:, :1])]}),
    r"value of sources\[0\] is \[2, 2, 4, 6\]": (ValueError, {"sources": [(KV[0], KV[1][:, :, 1:])]}),
    "lengths is a Tensor": (TypeError, {"lengths": torch.tensor([1, 2])}),
    "the number of lengths is 2, wanted 1": (ValueError, {"lengths": [None, None]}),
    r"lengths\[0\] is torch.float32": (ValueError, {"lengths": [torch.ones(2)]}),
    r"lengths\[0\] is \[3\], wanted \[2\]": (ValueError, {"lengths": [torch.ones(3, dtype=torch.int64)]}),
    r"masks\[0\] is torch.int64": (ValueError, {"masks": [torch.ones(2, 5, dtype=torch.int64)]}),
    r"masks\[0\] is \[2, 4\], wanted \[2, 5\]": (ValueError, {"masks": [torch.ones(2, 4, dtype=torch.bool)]}),
    "present is torch.int64": (ValueError, {"present": torch.ones(2, 1, dtype=torch.int64)}),
    r"present is \[2, 2\], wanted \[2, 1\] or \[2, 3, 1\]": (
        ValueError,
        {"present": torch.ones(2, 2, dtype=torch.bool)},
    ),
    r"causal is \[True, False\]": (ValueError, {"causal": [True, False]}),
    "source_bias is torch.float64": (ValueError, {"source_bias": torch.ones(1, dtype=torch.float64)}),
    r"source_bias is \[2\], wanted \[1\], \[4, 1\] or \[2, 4, 1\]": (
        ValueError,
        {"source_bias": torch.ones(2)},
    ),
}


@pytest.mark.parametrize(("message", "kind", "wrong"), [(m, *w) for m, w in WRONG.items()], ids=WRONG)
def test_errors_name_what_was_got_and_what_was_wanted(message, kind, wrong):
    with pytest.raises(kind, match=message):
        cross_attention(**{"query": Q, "sources": [KV], **wrong})
