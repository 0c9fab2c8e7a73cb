"""The ten promises for cross_attention, on every backend that is there, eager and compiled."""

import math

import pytest
import torch
import torch.nn.functional as F
from check import (
    assert_promised,
    backends,
    cast,
    check,
    compiled,
    dtypes,
    instruction_set,
    isas,
    run,
    same_bits,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from mmfast.ops import backend, cross_attention, native_calls, reference

BACKENDS = backends("cross_attention")
KERNELS = [name for name in BACKENDS if name != "reference"]
ISAS = isas() or [None]


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
    """Of one sample: there the keys are split among threads."""
    sizes = (300, 70, 900)
    arguments = example_for(name, 1, heads=2, kv_heads=2, queries=queries, sizes=sizes, lengths=True, bias=2)
    for dtype in dtypes(name):
        check(all_of(on(name)), all_of(reference.cross_attention), arguments, dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("n", [1, 2, 16])
def test_any_number_of_sources(name, n):
    arguments = example_for(
        name, queries=20, sizes=(5, 1, 0, 3) * 4, lengths=True, masks=True, present=3, bias=3
    )
    for own in ("sources", "lengths", "masks"):
        arguments[own] = arguments[own][:n]
    for own in ("present", "source_bias"):
        arguments[own] = arguments[own].detach()[..., :n].requires_grad_(own == "source_bias")
    check(all_of(on(name)), all_of(reference.cross_attention), arguments, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("depth", [1, 3, 96, 128, 256])
def test_any_head_dim(name, depth):
    few, many, narrow = (7, torch.float32), (40, torch.float32), (40, torch.bfloat16)
    for queries, dtype in (few, many, narrow) if name == "cpu" else (few,):
        for value_depth in (depth, 5):
            arguments = example(
                1, 2, queries, (9, 70), depth, value_depth=value_depth, kv_heads=1, lengths=True
            )
            check_problem(name, arguments, dtype)


@pytest.mark.parametrize("name", KERNELS)
def test_an_expanded_tensor_is_read_where_it_lies(name):
    """One head's keys for all heads, one sample's values for all samples."""
    key, value = (
        torch.randn(2, 1, 20, 16).expand(-1, 2, -1, -1),
        torch.randn(1, 2, 20, 16).expand(2, -1, -1, -1),
    )
    query = torch.randn(1, 1, 1, 16).expand(2, 2, 9, -1)
    bias = torch.randn(1).expand(2, 2, 1)
    given = {"query": query, "sources": [(key, value)], "source_bias": bias}
    given["masks"] = [torch.randn(1, 20).gt(0).expand(2, -1)]
    given["lengths"] = [torch.tensor([17]).expand(2)]
    given["present"] = torch.tensor([[[True]]]).expand(2, 9, 1)
    dense = pytree.tree_map(lambda t: t.contiguous() if isinstance(t, torch.Tensor) else t, given)
    assert torch.equal(on(name)(**given), on(name)(**dense))


@pytest.mark.parametrize("name", KERNELS)
def test_what_hides_keys_may_have_any_layout_and_lengths_either_integer(name):
    arguments = cast(example_for(name, 3, sizes=(40, 1, 20), **OPTIONS["everything"]), torch.float32)
    arguments["lengths"][0] = torch.tensor([30, 7, 0])
    apart = dict(arguments)
    stepped(apart)
    one, other = run(all_of(on(name)), arguments), run(all_of(on(name)), apart)
    assert apart["lengths"][0].dtype == torch.int32 and apart["lengths"][2].dtype == torch.int64
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_arrive_in_any_layout(name):
    arguments = cast(example_for(name, bias=2), torch.float32)
    out, stats = on(name)(**arguments, return_stats=True)
    leaves = [
        arguments["query"],
        *(t for pair in arguments["sources"] for t in pair),
        arguments["source_bias"],
    ]

    def gradients(*upstream):
        return torch.autograd.grad([out, stats.lse], leaves, upstream, retain_graph=True)

    for scalar in (1.0, torch.randn(2, 1, 1, 1)):
        expanded = [torch.as_tensor(scalar).expand_as(out), torch.ones(1).expand_as(stats.lse)]
        assert all(map(torch.equal, gradients(*expanded), gradients(*(t.contiguous() for t in expanded))))
    upstream = torch.randn_like(out), torch.randn_like(stats.lse)
    turned = [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in upstream]
    assert all(map(torch.equal, gradients(*upstream), gradients(*turned)))


@pytest.mark.parametrize("name", KERNELS)
def test_the_lse_alone_may_be_asked_for_its_gradient(name):
    """And the mass for none."""
    arguments = example_for(name, 2, lengths=True, bias=2)

    def lse(op):
        def run(**arguments):
            stats = op(**arguments, return_stats=True)[1]
            assert not stats.mass.requires_grad
            values = sum(value.sum() for _, value in arguments["sources"])  # they have no part in it
            return torch.where(stats.lse == -torch.inf, 0, stats.lse) + 0 * values

        return run

    check(lse(on(name)), lse(reference.cross_attention), arguments, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_any_scale(name, scale, options):
    arguments = {**example_for(name, **OPTIONS[options]), "scale": scale}
    check(all_of(on(name)), all_of(reference.cross_attention), arguments, torch.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_the_weights_of_a_row_are_made_again_without_the_rounding_of_its_lse(name):
    """Large logits, exact in float32: the gradients of values are the weights alone."""
    sizes = 70, 1, 3
    steps = torch.linspace(-2, 0, sum(sizes), dtype=torch.float64).mul(64).round() / 64
    query = (8 + torch.arange(16, dtype=torch.float64) / 16)[:, None, None, None]
    keys = (9 + steps)[None, None, :, None].expand(16, 1, -1, 1).split(sizes, 2)

    def weights(op, dtype):
        values = [torch.zeros(*key.shape, dtype=dtype, requires_grad=True) for key in keys]
        sources = [(key.to(dtype), value) for key, value in zip(keys, values, strict=True)]
        out, stats = op(query=query.to(dtype), sources=sources, scale=math.log(2), return_stats=True)
        return stats.lse, torch.cat(torch.autograd.grad(out.sum(), values), 2)

    (lse, meant), (_, made) = (
        weights(reference.cross_attention, torch.float64),
        weights(on(name), torch.float32),
    )
    assert lse.min() > 50 and lse.max() < 60
    assert ((made - meant).abs() <= 8 * torch.finfo(torch.float32).eps * meant).all()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_one_tensor_may_be_query_key_and_value_of_several_sources(name, how):
    def attend(op):
        return lambda x: op(query=x, sources=[(x, x), (x, x)], causal=[True, False])

    function = compiled(attend(on(name))) if how == "compiled" else attend(on(name))
    x = {"x": torch.randn(2, 1, 20, 16, dtype=torch.float64).requires_grad_()}
    check(function, attend(reference.cross_attention), x, torch.float32)


@st.composite
def problems(draw, batches, kv_heads, queries, sizes, most_sources=4):
    """Any sizes, visibility of every kind and mix, and any layout with a dense last dimension. Dozens of
    queries: of a few, the reference's own error, which bounds ours, is a matter of luck.
    """
    few = st.lists(st.sampled_from(sizes), min_size=1, max_size=4)
    many = st.lists(st.sampled_from([9, 1, 0]), min_size=5, max_size=most_sources)
    sizes = draw(st.one_of(few, few, many) if most_sources > 4 else few)
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
    if draw(st.booleans()):
        stepped(arguments)
    arguments["scale"] = draw(st.sampled_from([None, None, 0.3]))
    return arguments


def stepped(arguments):
    """Lengths, masks, presence and bias as every second element of something larger, lengths of two kinds."""

    def step(t):
        return None if t is None else t.detach().repeat_interleave(2, -1)[..., ::2]

    for name in {"lengths", "masks"} & arguments.keys():
        arguments[name] = [step(t) for t in arguments[name]]
    if "lengths" in arguments and arguments["lengths"][0] is not None:
        arguments["lengths"][0] = step(arguments["lengths"][0].int())
    if "present" in arguments:
        arguments["present"] = step(arguments["present"])
    if "source_bias" in arguments:
        arguments["source_bias"] = step(arguments["source_bias"]).requires_grad_()


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


def check_problem(name, arguments, dtype=torch.float32, **options):
    check(all_of(on(name)), all_of(reference.cross_attention), arguments, dtype, upstreams=4, **options)


ANY = problems([3, 2, 3, 1, 0], [1, 2, 4], [17, 30, 70, 17, 70, 0], [40, 70, 150, 7, 2, 1, 0], 16)
needs_cpu = pytest.mark.skipif("cpu" not in KERNELS, reason="the CPU kernels were not built here")


@needs_cpu
@given(
    arguments=ANY,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16]),
    isa=st.sampled_from(ISAS),
)
@settings(max_examples=100)
def test_any_shape_visibility_and_layout(arguments, dtype, isa):
    # of few numbers a gradient's error in bfloat16, like the reference's, is a matter of luck
    many = all(key.shape[2] == 0 or key.shape[2] >= 40 for key, _ in arguments["sources"])
    narrow = arguments if many else pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    # what the reference loses in float64 is told from float32, whose luck under one of few gradients hides it
    upstreams = 16 if dtype == torch.float64 else 4
    with instruction_set(isa):
        check(all_of(on("cpu")), all_of(reference.cross_attention), arguments, dtype, upstreams, runs=4)
        check(on("cpu"), reference.cross_attention, narrow, torch.bfloat16, upstreams=4)


@pytest.mark.skipif("triton" not in KERNELS, reason="there is no Triton here")
@given(arguments=problems([2, 2, 2, 0], [1, 2], [17, 40, 40, 0], [0, 1, 7, 20, 50]))
@settings(max_examples=40)
def test_any_shape_visibility_and_layout_on_triton(arguments):
    check_problem("triton", arguments, runs=1)


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
        arguments.get("scale"),
        mass,
    )


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "triton"])
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_gradcheck(name, options):
    arguments = example(1, 2, 4, (5, 1, 3), 3, **{**OPTIONS[options], "kv_heads": 1, "value_depth": 2})
    leaves, layout = pytree.tree_flatten(arguments)

    def function(*leaves):
        return all_of(on(name))(**pytree.tree_unflatten(leaves, layout))[..., :3]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("name", KERNELS)
def test_a_forced_backend_is_entered(name):
    before = [native_calls(f"{op}.{name}") for op in ("cross_attention", "cross_attention_backward")]
    run(on(name), cast(example_for(name), torch.float32))
    after = [native_calls(f"{op}.{name}") for op in ("cross_attention", "cross_attention_backward")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


@pytest.mark.parametrize("name", KERNELS)
def test_a_hundred_runs_give_the_same_bits(name):
    small = {"heads": 1, "queries": 5, "sizes": (9, 3)}
    options = small if name == "triton" else {"queries": 70, "sizes": (90, 33)}
    arguments = cast(example_for(name, 1, **options, lengths=True), torch.float32)
    first = run(all_of(on(name)), arguments)
    assert all(same_bits(first, run(all_of(on(name)), arguments)) for _ in range(99))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_one_source_is_scaled_dot_product_attention(name, causal):
    def peer(query, sources, causal):
        return F.scaled_dot_product_attention(query, *sources[0], is_causal=causal)

    check(on(name), peer, example(queries=20, sizes=(20,), causal=causal), torch.float32)


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
def test_autocast_casts_all_but_the_bias(name):
    dtype = torch.float16 if name == "triton" else torch.bfloat16
    arguments = cast(example_for(name, bias=1), torch.float32)
    with torch.autocast("cpu", dtype):
        out, stats = on(name)(**arguments, return_stats=True)
        if name in KERNELS:
            assert torch.equal(out, compiled(on(name))(**arguments))
    plain = on(name)(**{**cast(arguments, dtype), "source_bias": arguments["source_bias"]})
    assert out.dtype == dtype and stats.lse.dtype == torch.float32 and torch.equal(out, plain)
    out.float().sum().backward()
    assert arguments["query"].grad.dtype == arguments["source_bias"].grad.dtype == torch.float32
    if torch.float64 in dtypes(name):
        with torch.autocast("cpu", dtype):
            assert on(name)(**example()).dtype == torch.float64


@pytest.mark.parametrize("name", KERNELS)
def test_a_bias_of_float32_is_not_rounded_to_the_querys_dtype(name):
    arguments = cast(example_for(name, grad=False), torch.float16)
    fine = torch.tensor([100.0, 0.0, 100.0]) + torch.tensor(
        [0.01, 0.0, 0.0]
    )  # float16 sees no hundredth of it
    mass = on(name)(**arguments, source_bias=fine, return_stats=True)[1].mass
    meant = reference.cross_attention(
        **cast(arguments, torch.float64), source_bias=fine.double(), return_stats=True
    )[1].mass
    torch.testing.assert_close(mass.double(), meant, rtol=2e-3, atol=1e-6)


Q, KV = torch.randn(2, 4, 3, 8), (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6))
WRONG = {
    "query is a list, wanted a tensor": (TypeError, {"query": [Q]}),
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
    r"causal is \[1\], wanted a bool or 1 of them": (ValueError, {"causal": [1]}),
    "causal is a NoneType, wanted a bool or a list": (TypeError, {"causal": None}),
    "present is a list, wanted a tensor": (TypeError, {"present": [[True]]}),
    "source_bias is a float, wanted a tensor": (TypeError, {"source_bias": 0.5}),
    "scale is a Tensor, wanted a number": (TypeError, {"scale": torch.tensor(1.0)}),
    "return_stats is a int, wanted a bool": (TypeError, {"return_stats": 1}),
    r"lengths\[0\] is a int, wanted a tensor": (TypeError, {"lengths": [3]}),
    "masks is a Tensor, wanted a list": (TypeError, {"masks": torch.ones(2, 5, dtype=torch.bool)}),
    "the number of masks is 2, wanted 1": (ValueError, {"masks": [None, None]}),
    r"masks\[0\] is a list, wanted a tensor": (TypeError, {"masks": [[True] * 5]}),
    r"key of sources\[0\] is torch.float32 on meta, wanted query's torch.float32 on cpu": (
        ValueError,
        {"sources": [tuple(t.to("meta") for t in KV)]},
    ),
    r"lengths\[0\] is torch.int64 on meta": (
        ValueError,
        {"lengths": [torch.ones(2, dtype=torch.int64, device="meta")]},
    ),
    r"value of sources\[0\] is torch.float64": (ValueError, {"sources": [(KV[0], KV[1].double())]}),
    r"value of sources\[1\] is \[2, 2, 5, 5\], wanted \[2, 2, 5, 6\]": (
        ValueError,
        {"sources": [KV, (KV[0], KV[1][..., 1:])]},
    ),
    r"key of sources\[0\] is \[2, 5, 8\], wanted \[B, Hkv, S, features\]": (
        ValueError,
        {"sources": [(KV[0][:, 0], KV[1])]},
    ),
    r"query is \[2, 4, 3, 0\]": (ValueError, {"query": Q[..., :0]}),
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
