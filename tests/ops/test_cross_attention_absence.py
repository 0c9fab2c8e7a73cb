"""What is not visible reaches no bit of cross_attention, forward or backward; what is visible does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from check import cast, check, dtypes, python, run, same_bits
from test_cross_attention import BACKENDS, ISAS, KERNELS, all_of, example, example_for, on

from mmfast.ops import reference


def poisoned(arguments, value):
    """The same arguments with `value` in every key and value that no query of its sample sees."""
    query, sources = arguments["query"], arguments["sources"]
    kv_heads, bias = sources[0][0].shape[1], arguments.get("source_bias", torch.zeros(len(sources)))
    used = bias.expand(*query.shape[:2], len(sources)) != -torch.inf
    used = used.unflatten(1, (kv_heads, -1)).any(2)  # [B, Hkv, n]
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
        hidden = ~(seen.any(2) & used[..., i, None])[..., None]  # [B, Hkv, S, 1]
        assert hidden.any()
        spoilt.append(
            tuple(torch.where(hidden, value, t.detach()).requires_grad_(t.requires_grad) for t in (key, val))
        )
    return {**arguments, "sources": spoilt}


def counts(name):
    """Of queries: keys are read in place, or packed."""
    return (9,) if name == "triton" else (9, 40)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "options", [{"masks": True, "lengths": True}, {"present": 2, "lengths": True, "causal": True}]
)
def test_what_is_hidden_cannot_reach_a_bit(name, value, options):
    for queries in counts(name):
        for dtype in dtypes(name):
            check_hidden(on(name), value, dtype, name=name, queries=queries, **options)


def check_hidden(op, value, dtype, *, name="", **options):
    sizes = (40 if name == "triton" else 70, 9, 20)
    arguments = cast(example_for(name, 3, **{"sizes": sizes, "seed": 3, **options}), dtype)
    for i in range(3):  # something to hide in every source
        arguments["lengths"][i] = torch.tensor([4, 0, arguments["sources"][i][0].shape[2]])
    if "source_bias" in arguments:  # and a source from a key head
        with torch.no_grad():
            arguments["source_bias"][..., : arguments["query"].shape[1] // 2, 2] = -torch.inf
    before = run(all_of(op), arguments)
    after = run(all_of(op), poisoned(arguments, value))
    for key in before:
        assert same_bits(before[key], after[key]), key
        assert key == "out" or before[key].isfinite().all(), key


UNREAD = """
import ctypes, itertools, mmap, sys, torch
from mmfast import _native
from mmfast.ops import backend, cross_attention
protect, held = ctypes.CDLL(None).mprotect, []
if NAME == "triton":
    DTYPES, QUERIES, NUMBERS = [torch.float32, torch.float16], [9], [3]
else:
    DTYPES, QUERIES, NUMBERS = [torch.float32, torch.bfloat16, torch.float64], [1, 9, 70], [3, 4]

def tensor(dtype, *pages):  # of four pages, some of which must not be touched
    held.append(mmap.mmap(-1, 4 * mmap.PAGESIZE))
    made = torch.frombuffer(held[-1], dtype=dtype).view(1, 1, -1, 64).normal_()
    for page in pages:
        at = ctypes.c_void_p(made.data_ptr() + mmap.PAGESIZE * page)
        assert protect(at, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return made.requires_grad_()

hidden = (3,), (2,), (0, 1, 2, 3), (0, 1, 2, 3)  # by a length, a mask, presence and a bias
present = torch.tensor([[True, True, False, True]])
for isa, dtype, queries, n in itertools.product(ISAS, DTYPES, QUERIES, NUMBERS):
    print("of", isa, dtype, queries, n, file=sys.stderr)
    isa and _native.isa(isa)
    query = torch.randn(1, 1, queries, 64, dtype=dtype, requires_grad=True)
    sources = [[tensor(dtype, *pages) for _ in range(2)] for pages in hidden[:n]]
    sources[1][1].data[:, :, -2] = torch.nan  # is seen
    page = sources[0][0].shape[2] // 4  # in keys
    lengths = [torch.tensor([PAGES * page]), torch.tensor([4 * page - 1]), None, None]
    mask = (torch.arange(4 * page) // page != 2)[None]
    with backend(NAME):
        cross_attention(
            query, sources, lengths=lengths[:n], masks=[None, mask, None, None][:n], present=present[:, :n],
            source_bias=torch.tensor([0.0, 1.0, 2.0, -torch.inf], requires_grad=True) if n == 4 else None,
        ).sum().backward()
"""


@pytest.mark.parametrize("name", KERNELS)
def test_what_no_query_sees_is_not_read(name):
    """It lies in pages that end the process where they are touched. What a bias alone hides Triton's backward reads:
    it has a block of keys before it has the heads."""
    python(f"NAME, ISAS, PAGES = {name!r}, {ISAS if name == 'cpu' else [None]}, 3{UNREAD}")
    with pytest.raises(AssertionError):
        python(f"NAME, ISAS, PAGES = {name!r}, [None], 4{UNREAD}")


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_bias_or_each_querys_presence_hides_cannot_reach_a_bit(name):
    for dtype in (torch.float32,) if name == "triton" else dtypes(name):
        check_hidden(on(name), torch.nan, dtype, name=name, present=3, lengths=True, bias=3)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_query_does_not_see_cannot_reach_it(name):
    """The last key is for the last query, one source for half of them: nan there stays out of the others."""
    for dtype, n in itertools.product(dtypes(name), counts(name)):
        arguments = cast(example_for(name, 1, queries=n, sizes=(n, 40), causal=[True, False], seed=1), dtype)
        arguments["present"] = torch.ones(1, n, 2, dtype=torch.bool)
        arguments["present"][:, 2::3, 1] = False
        spoilt = cast(arguments, dtype)
        with torch.no_grad():
            for t in (*spoilt["sources"][0],):
                t[:, :, -1] = torch.nan
        before, after = run(on(name), arguments), run(on(name), spoilt)
        for key in ("out", "gradient of ['query']"):
            assert same_bits(before[key][:, :, :-1], after[key][:, :, :-1]), key
        assert after["out"][:, :, -1].isnan().all()
        with torch.no_grad():
            spoilt = cast(arguments, dtype)
            for t in (*spoilt["sources"][1],):
                t.fill_(torch.nan)
        after = run(on(name), spoilt)
        for key in ("out", "gradient of ['query']"):
            assert same_bits(before[key][:, :, 2::3], after[key][:, :, 2::3]), key
            assert after[key][:, :, 0::3].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("queries", [9, 40])
def test_what_a_head_does_not_see_cannot_reach_it(name, queries):
    """A source that a bias hides from one of two heads that share its keys."""
    arguments = cast(example(1, 2, queries, (20, 30), kv_heads=1, bias=2), torch.float32)
    with torch.no_grad():
        arguments["source_bias"][0, 1] = -torch.inf
    spoilt = cast(arguments, torch.float32)
    with torch.no_grad():
        for t in spoilt["sources"][1]:
            t[:, :, ::3] = torch.nan
    before, after = run(on(name), arguments), run(on(name), spoilt)
    for key in ("out", "gradient of ['query']"):
        assert same_bits(before[key][:, 0], after[key][:, 0]), key
        assert after[key][:, 1].isnan().all(), key


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
    for queries in counts(name):
        arguments = cast(example(1, queries=queries, sizes=(5, 9), grad=False), torch.float32)
        arguments["sources"][1][1][0, 0, 3, 2] = torch.nan
        out = on(name)(**arguments)
        assert out[:, 0, :, 2].isnan().all() and not out[:, 0, :, 3].isnan().any()
        assert not out[:, 1].isnan().any()
        arguments["sources"][1][0][0, 1, 3, 2] = torch.nan
        assert on(name)(**arguments)[:, 1].isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("part", ["key", "value"])
def test_visible_nan_propagates_to_the_gradients(name, part):
    """Of one key of one head: to its queries and other keys, and not to what another head reads."""
    for queries in counts(name):
        arguments = cast(example_for(name, 1, queries=queries, sizes=(5, 9)), torch.float32)
        with torch.no_grad():
            arguments["sources"][1][part == "value"][0, 0, 3, 2] = torch.nan
        results = run(on(name), arguments)
        for key in ("['query']", "['sources'][0][0]"):
            assert results[f"gradient of {key}"][:, 0].isnan().all(), key
        assert all(t[:, 1:].isfinite().all() for t in results.values())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("hidden_by", ["lengths", "masks"])
@pytest.mark.parametrize(("queries", "keys"), [(11, 5), (5, 11)])
def test_queries_are_not_cut_with_the_key_mask_when_lengths_differ(name, hidden_by, queries, keys):
    """A stack that unpads queries with the keys' mask drops queries silently where L is not S."""
    arguments, ends = example_for(name, 2, queries=queries, sizes=(keys,)), torch.tensor([3, keys])
    arguments[hidden_by] = [ends if hidden_by == "lengths" else torch.arange(keys) < ends[:, None]]

    def trimmed(query, sources, **_):
        [(key, value)] = sources
        return torch.cat([
            F.scaled_dot_product_attention(query[[b]], key[[b], :, :end], value[[b], :, :end])
            for b, end in enumerate(ends)
        ])  # fmt: skip

    check(on(name), trimmed, arguments, torch.float32, upstreams=4, runs=1 if name == "triton" else None)


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
