"""The promises of the ops on the device that their Triton and CUDA kernels are for, with tiles of its size. Those of
cross_attention are in test_cross_attention_gpu.py.
"""

from functools import partial

import pytest
import test_concat_linear
import test_contrastive_loss
import test_lowrank_fusion
import test_weighted_fusion
import torch
from check import cast, check, compiled, run, same_bits
from torch.utils._pytree import tree_map_only

from mmfast.ops import available, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POOLED = ((6, 150, 136), (6, 1, 40), (1, 150, 24))
DENSE = ((3, 200, 256), (3, 200, 128))

concat = partial(test_concat_linear.example, width=72)
contrastive = partial(test_contrastive_loss.example, 300, 72)
lowrank = partial(test_lowrank_fusion.example, (136, 40, 24), 200, 4, 72)
weighted = partial(test_weighted_fusion.example, ((6, 150, 72), (6, 1, 72), (1, 150, 72)))
EVERYTHING = {"present": True, "norm": True, "residual": True, "gate": 72}
# op -> how its suite forces a backend, the reference, and makers of arguments
OPS = {
    "concat_linear": (
        test_concat_linear.on,
        reference.concat_linear,
        {
            "pooled": partial(concat, POOLED),
            "pooled, relu": partial(concat, POOLED, activation="relu"),
            "dense": partial(concat, DENSE, width=256),
            "dense, residual": partial(concat, DENSE, width=256, residual=True),
            "present": partial(concat, POOLED, activation="silu", present=True),
            "everything": partial(concat, POOLED, activation="gelu", **EVERYTHING),
            "swiglu": partial(concat, POOLED, activation="swiglu", **EVERYTHING),
        },
    ),
    "contrastive_loss": (
        test_contrastive_loss.ours,
        test_contrastive_loss.MEANT,
        {
            f"{kind}{', present' if present else ''}": partial(contrastive, kind=kind, present=present)
            for kind in test_contrastive_loss.KINDS
            for present in (False, True)
        },
    ),
    "lowrank_fusion": (
        test_lowrank_fusion.on,
        reference.lowrank_fusion,
        {"all there": lowrank, "present": partial(lowrank, present=True)},
    ),
    "weighted_fusion": (
        test_weighted_fusion.on,
        reference.weighted_fusion,
        {"all there": weighted, "present": partial(weighted, present=True, logits=(6, 150))},
    ),
}
EXAMPLES = [
    (op, backend, name) for op, (_, _, made) in OPS.items() for name in made for backend in ("triton", "cuda")
]
PRESENT = [(op, backend, name) for op, backend, name in EXAMPLES if name in ("present", "softmax, present")]


def ready(op, backend):
    """The op on a backend, and its reference."""
    state = available(op, "cuda")[backend]
    if state != "ready":
        pytest.skip(state)
    on, meant, _ = OPS[op]
    return on(backend), meant


def example(op, name, dtype, **options):
    arguments = OPS[op][2][name](**options)
    return cast(tree_map_only(torch.Tensor, lambda t: t.to("cuda"), arguments), dtype)


@pytest.fixture
def tf32():
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def sums_in_float16():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    yield
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "backend", "name"), EXAMPLES)
def test_output_and_gradients_are_as_exact_as_promised(op, backend, name, dtype):
    check(*ready(op, backend), example(op, name, torch.float64), dtype, upstreams=4)


@pytest.mark.parametrize(("op", "backend", "name"), EXAMPLES)
def test_tf32_where_pytorch_allows_it(tf32, op, backend, name):
    check(*ready(op, backend), example(op, name, torch.float64), torch.float32, upstreams=4)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("activation", ["none", "relu", "swiglu"])
def test_float16_where_pytorch_adds_in_float16(sums_in_float16, backend, activation):
    function, meant = ready("concat_linear", backend)
    arguments = concat(POOLED, activation=activation, grad=False)
    arguments = cast(tree_map_only(torch.Tensor, lambda t: t.to("cuda"), arguments), torch.float64)
    check(function, meant, arguments, torch.float16)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("shapes", "width"),
    [
        (((0, 5, 8), (0, 1, 6)), 12),  # no rows
        (((7, 1),), 1),
        (((5, 3, 0), (5, 3, 4)), 9),  # a source of no features
        (((70_000, 3, 4), (70_000, 1, 5)), 8),  # more batches than a grid has in its second dimension
    ],
    ids=str,
)  # fmt: skip
def test_odd_sizes(backend, shapes, width):
    function, meant = ready("concat_linear", backend)
    arguments = tree_map_only(torch.Tensor, lambda t: t.to("cuda"), test_concat_linear.example(shapes, width))
    check(function, meant, cast(arguments, torch.float64), torch.float32, upstreams=4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("op", "backend", "name"), PRESENT)
def test_what_is_absent_cannot_reach_a_bit(op, backend, name, value):
    function, _ = ready(op, backend)
    before = run(function, example(op, name, torch.bfloat16))
    arguments = example(op, name, torch.bfloat16)
    present = arguments["present"]
    with torch.no_grad():
        if op == "contrastive_loss":
            arguments["a"][~present] = arguments["b"][~present] = value
        else:
            for i, x in enumerate(arguments["inputs"]):
                if len(x) == len(present):
                    x[~present[:, i]] = value
    assert same_bits(before, run(function, arguments))


@pytest.mark.parametrize(("op", "backend", "name"), EXAMPLES)
def test_twenty_runs_give_the_same_bits_on_any_stream(op, backend, name):
    function, _ = ready(op, backend)
    arguments = example(op, name, torch.bfloat16)
    first = run(function, arguments)
    assert all(same_bits(first, run(function, arguments)) for _ in range(19))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        elsewhere = run(function, arguments)
    torch.cuda.synchronize()
    assert same_bits(first, elsewhere)


@pytest.mark.parametrize(("op", "backend", "name"), EXAMPLES)
def test_a_captured_graph_gives_the_same_bits(op, backend, name):
    function, _ = ready(op, backend)
    arguments = example(op, name, torch.bfloat16)
    leaves = [t for t in torch.utils._pytree.tree_leaves(arguments) if torch.is_tensor(t) and t.requires_grad]
    out = function(**arguments)  # compiles
    grad = torch.randn_like(out)
    meant = out, torch.autograd.grad(out, leaves, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**arguments)
        grads = torch.autograd.grad(out, leaves, grad)
    graph.replay()
    assert same_bits((out, grads), meant)


@pytest.mark.inductor
@pytest.mark.parametrize(("op", "backend", "name"), PRESENT)
def test_compiled_it_gives_the_same_bits(op, backend, name):
    function, _ = ready(op, backend)
    arguments = example(op, name, torch.bfloat16)
    assert same_bits(*(run(f, arguments) for f in (function, compiled(function, backend="inductor"))))
