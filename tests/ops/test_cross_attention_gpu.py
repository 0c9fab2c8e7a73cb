"""The promises of cross_attention's Triton kernels on the device that they are for, with tiles of its size."""

import pytest
import torch
from check import cast, check, compiled, run, same_bits
from test_cross_attention import OPTIONS, all_of, example, on
from test_cross_attention_absence import poisoned
from torch.utils._pytree import tree_map_only

from mmfast.ops import reference

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
triton = on("triton")


def example_there(dtype, shape="many queries", **options):
    arguments = example(**{**SHAPES[shape], **options})
    return cast(tree_map_only(torch.Tensor, lambda t: t.to("cuda"), arguments), dtype)


def check_there(dtype, shape="many queries", **options):
    arguments = example_there(torch.float64, shape, **options)
    check(all_of(triton), all_of(reference.cross_attention), arguments, dtype, upstreams=4)


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_output_and_gradients_are_as_exact_as_promised(options):
    check_there(HALF, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF], ids=str)
@pytest.mark.parametrize("options", ["lengths", "everything"])
def test_every_dtype_and_few_queries_too(shape, dtype, options):
    check_there(dtype, shape, **OPTIONS[options])


@pytest.mark.parametrize("shape", SHAPES)
def test_tf32_where_pytorch_allows_it(tf32, shape):
    check_there(torch.float32, shape, lengths=True)


@pytest.mark.parametrize("depth", [128, 256])
def test_wide_heads(depth):
    check_there(HALF, lengths=True, depth=depth)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_hidden_cannot_reach_a_bit(shape):
    arguments = example_there(HALF, shape, masks=True, lengths=True, seed=3)
    arguments["lengths"][0].fill_(100)
    arguments["masks"][1][0] = False
    before, after = (run(all_of(triton), given) for given in (arguments, poisoned(arguments, torch.nan)))
    assert same_bits(before, after)


@pytest.mark.parametrize("shape", SHAPES)
def test_visible_nan_propagates(shape):
    arguments = example_there(HALF, shape)
    with torch.no_grad():
        arguments["sources"][1][1][0, 0, 0, 2] = torch.nan  # a value
        arguments["sources"][1][0][0, 1] = torch.nan  # the only key of its source
    out, stats = triton(**arguments, return_stats=True)
    assert out[0, 0, :, 2].isnan().all() and not out[0, 0, :, 3].isnan().any()
    assert out[0, 1].isnan().all() and stats.lse[0, 1].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_runs_give_the_same_bits(shape):
    arguments = example_there(HALF, shape, lengths=True)
    first = run(all_of(triton), arguments)
    for _ in range(99):
        again = run(all_of(triton), arguments)
        assert same_bits(first, again)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_graph_gives_the_same_bits(shape):
    arguments = example_there(HALF, shape, lengths=True)
    eager = run(triton, arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    grad = torch.randn_like(eager["out"])
    leaves = [arguments["query"], *(t for pair in arguments["sources"] for t in pair)]
    meant = torch.autograd.grad(triton(**arguments), leaves, grad)
    with torch.cuda.graph(graph):
        out = triton(**arguments)
        grads = torch.autograd.grad(out, leaves, grad)
    graph.replay()
    assert same_bits(out, eager["out"]) and same_bits(grads, meant)


@pytest.mark.inductor
def test_compiled_it_gives_the_same_bits():
    arguments = example_there(HALF, **OPTIONS["everything"])
    eager, graph = (run(function, arguments) for function in (triton, compiled(triton, backend="inductor")))
    assert same_bits(eager, graph)
