"""The promises of cross_attention's Triton and CUDA kernels on the device that they are for, with tiles of its size."""

import pytest
import torch
from check import cast, check, compiled, run, same_bits
from test_cross_attention import OPTIONS, all_of, example, laid_out, on
from test_cross_attention_absence import poisoned
from torch.utils._pytree import tree_map_only

from mmfast.ops import available, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALF = torch.bfloat16
# many queries, and few of them over many keys, which are split
SHAPES = {
    "many queries": {
        "batch": 3,
        "heads": 8,
        "kv_heads": 8,
        "queries": 300,
        "sizes": (577, 1, 1500),
        "depth": 64,
    },
    "few queries": {
        "batch": 1,
        "heads": 2,
        "kv_heads": 2,
        "queries": 17,
        "sizes": (5000, 1, 9000),
        "depth": 64,
    },
}


@pytest.fixture(params=["triton", "cuda"])
def op(request):
    """The op on a backend; that of CUDA has Triton's backward."""
    state = available("cross_attention", "cuda")[request.param]
    if state != "ready":
        pytest.skip(state)
    return on(request.param)


def example_there(dtype, shape="many queries", **options):
    arguments = example(**{**SHAPES[shape], **options})
    return cast(tree_map_only(torch.Tensor, lambda t: t.to("cuda"), arguments), dtype)


def check_there(op, dtype, shape="many queries", **options):
    arguments = example_there(torch.float64, shape, **options)
    check(all_of(op), all_of(reference.cross_attention), arguments, dtype, upstreams=4)


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_as_exact_as_promised(op, options):
    check_there(op, HALF, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF], ids=str)
@pytest.mark.parametrize("options", ["lengths", "everything"])
def test_every_dtype_and_few_queries_too(op, shape, dtype, options):
    check_there(op, dtype, shape, **OPTIONS[options])


@pytest.mark.parametrize("shape", SHAPES)
def test_tf32_where_pytorch_allows_it(op, tf32, shape):
    check_there(op, torch.float32, shape, lengths=True)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("depth", [5, 72, 128, 200, 256])
def test_any_head_dim(op, depth, dtype):
    if depth == 256 and torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 163 << 10:
        pytest.skip("shared memory of this GPU holds no such head")
    check_there(op, dtype, lengths=True, depth=depth)


@pytest.mark.parametrize("how", ["swapped", "sliced", "reversed"])
def test_any_layout(op, how):
    """ "sliced" begins anywhere, not at a multiple of 16 bytes."""
    arguments = example_there(torch.float64, depth=24, lengths=True)
    arguments["query"] = laid_out(arguments["query"], how)
    arguments["sources"] = [(laid_out(k, how), laid_out(v, how)) for k, v in arguments["sources"]]
    check(all_of(op), all_of(reference.cross_attention), arguments, HALF, upstreams=4)


@pytest.mark.parametrize("queries", [1, 64, 65])
def test_any_number_of_queries(op, queries):
    check_there(op, HALF, "few queries", queries=queries, **OPTIONS["grouped heads"] | {"kv_heads": 1})


def test_another_stream(op):
    arguments = example_there(HALF, lengths=True)
    meant = run(op, arguments)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = run(op, arguments)
    torch.cuda.synchronize()
    assert same_bits(meant, found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one(op):
    arguments = example_there(HALF, lengths=True)
    meant = run(op, arguments)
    there = tree_map_only(
        torch.Tensor, lambda t: t.detach().to("cuda:1").requires_grad_(t.requires_grad), arguments
    )
    found = run(op, there)
    assert same_bits(meant, {name: t.to("cuda:0") for name, t in found.items()})


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_hidden_cannot_reach_a_bit(op, shape):
    arguments = example_there(HALF, shape, masks=True, lengths=True, seed=3)
    arguments["lengths"][0].fill_(100)
    arguments["masks"][1][0] = False
    before, after = (run(all_of(op), given) for given in (arguments, poisoned(arguments, torch.nan)))
    assert same_bits(before, after)


@pytest.mark.parametrize("shape", SHAPES)
def test_visible_nan_propagates(op, shape):
    arguments = example_there(HALF, shape)
    with torch.no_grad():
        arguments["sources"][1][1][0, 0, 0, 2] = torch.nan  # a value
        arguments["sources"][1][0][0, 1] = torch.nan  # the only key of its source
    out, stats = op(**arguments, return_stats=True)
    assert out[0, 0, :, 2].isnan().all() and not out[0, 0, :, 3].isnan().any()
    assert out[0, 1].isnan().all() and stats.lse[0, 1].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_runs_give_the_same_bits(op, shape):
    arguments = example_there(HALF, shape, lengths=True)
    first = run(all_of(op), arguments)
    for _ in range(99):
        again = run(all_of(op), arguments)
        assert same_bits(first, again)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_graph_gives_the_same_bits(op, shape):
    arguments = example_there(HALF, shape, lengths=True)
    eager = run(op, arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    grad = torch.randn_like(eager["out"])
    leaves = [arguments["query"], *(t for pair in arguments["sources"] for t in pair)]
    meant = torch.autograd.grad(op(**arguments), leaves, grad)
    with torch.cuda.graph(graph):
        out = op(**arguments)
        grads = torch.autograd.grad(out, leaves, grad)
    graph.replay()
    assert same_bits(out, eager["out"]) and same_bits(grads, meant)


@pytest.mark.inductor
def test_compiled_it_gives_the_same_bits(op):
    arguments = example_there(HALF, **OPTIONS["everything"])
    eager, graph = (run(function, arguments) for function in (op, compiled(op, backend="inductor")))
    assert same_bits(eager, graph)
