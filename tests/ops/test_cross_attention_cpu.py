"""What only the C++ kernels of cross_attention promise: every instruction set, threads and memory."""

import timeit

import pytest
import torch
from check import cast, check, isas, python, run
from test_cross_attention import OPTIONS, all_of, example, on
from test_cross_attention_absence import check_hidden

from mmfast import _native
from mmfast.ops import available, cross_attention, reference

pytestmark = pytest.mark.skipif(
    available("cross_attention", "cpu")["cpu"] != "ready", reason="the native CPU library is not there"
)
ISAS = isas() if _native.cpu else []


@pytest.fixture
def isa(request):
    before = _native.isa()
    yield _native.isa(request.param)
    _native.isa(before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("options", ["plain", "causal in one source", "everything"])
@pytest.mark.parametrize("queries", [5, 70])
def test_every_instruction_set_is_as_exact(isa, options, queries):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        arguments = example(queries=queries, sizes=(130, 1, 67), **OPTIONS[options])
        check(all_of(on("cpu")), all_of(reference.cross_attention), arguments, dtype, upstreams=4)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_the_logits_of_few_keys_have_gradients_as_exact_as_the_references(isa):
    """Along a direction that all keys share the query's gradient is 0: what is left is rounding alone."""
    shapes = {
        "query": (2, 4, 30, 32),
        "key": (2, 4, 1, 32),
        "value": (2, 4, 7, 70),
        "upstream": (2, 4, 30, 70),
    }
    drawn = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for name, shape in shapes.items()
    }

    def error(op, dtype):
        query, key, value, upstream = (t.to(dtype) for t in drawn.values())
        out = op(query=query.requires_grad_(), sources=[(key.expand(-1, -1, 7, -1), value)])
        return torch.autograd.grad(out, query, upstream)[0].double().abs().mean()

    for dtype in (torch.float32, torch.bfloat16):
        assert error(on("cpu"), dtype) <= 1.25 * error(reference.cross_attention, dtype)


UPSTREAMS = {"out": (1, 0), "lse": (0, 1), "out and lse": (1, 1)}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("shares", UPSTREAMS.values(), ids=UPSTREAMS)
def test_directional_derivatives_in_float32(isa, options, shares):
    """The gradient along a direction in any one argument is the slope of the float64 definition along it."""
    arguments = example(queries=33, sizes=(90, 1, 40), **{"bias": 3, **OPTIONS[options]})
    arguments = cast(arguments, torch.float32)
    exact = cast(arguments, torch.float64)

    def leaves(arguments):
        pairs = [t for source in arguments["sources"] for t in source]
        return [arguments["query"], *pairs, arguments["source_bias"]]

    def results(op, arguments):  # a query that sees nothing has an lse of -inf
        out, stats = op(**arguments, return_stats=True)
        return out, torch.where(stats.lse == -torch.inf, 0, stats.lse)

    torch.manual_seed(0)
    made = results(on("cpu"), arguments)
    upstream = [share * torch.randn_like(t) for share, t in zip(shares, made, strict=True)]
    gradients = torch.autograd.grad(made, leaves(arguments), upstream)

    @torch.no_grad()
    def value(point, way, step):
        point += step * way
        moved = results(reference.cross_attention, exact)
        point -= step * way
        return sum((t * g).sum() for t, g in zip(moved, upstream, strict=True))

    for point, gradient in zip(leaves(exact), gradients, strict=True):
        for _ in range(3):
            way = torch.randn_like(point)
            slope = (value(point, way, 1e-5) - value(point, way, -1e-5)) / 2e-5
            terms = gradient * way
            assert (terms.sum() - slope).abs() <= 8 * torch.finfo(torch.float32).eps * terms.abs().sum()


SPLIT = {
    "heads": 2,
    "kv_heads": 1,
    "queries": 70,
    "sizes": (1000, 1, 700),
}  # its keys are split among threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hundred_runs_of_two_threads_give_the_same_bits(dtype):
    arguments = example(1, **SPLIT, lengths=True, masks=True, causal=True, bias=2)
    arguments = cast(arguments, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    first = run(all_of(on("cpu")), arguments)
    for _ in range(99):
        again = run(all_of(on("cpu")), arguments)
        assert all(torch.equal(first[key], again[key]) for key in first)
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("queries", [9, 40])
def test_what_is_hidden_cannot_reach_a_bit_in_any_instruction_set(isa, queries):
    """Split keys too, and masks that leave a block of keys gathered from here and there."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for value in (torch.nan, torch.inf):
            options = {"queries": queries, "sizes": (1000, 1, 700), "masks": True, "lengths": True, "bias": 3}
            check_hidden(on("cpu"), value, dtype, **options)


def test_any_number_of_threads_is_as_exact():
    arguments = example(1, **SPLIT, lengths=True, masks=True, causal=True, bias=2)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check(all_of(on("cpu")), all_of(reference.cross_attention), arguments, torch.float32)
    torch.set_num_threads(before)


class _Attended(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, n):
        return run(all_of(on("cpu")), cast(example(1, **SPLIT, lengths=True, bias=2, seed=n), torch.float32))


def test_it_runs_forward_and_backward_in_the_forked_workers_of_a_data_loader():
    """The parent's threads exist already when its workers are forked; they do not come along."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: how keys are split follows the number of threads
    wanted = [_Attended()[n] for n in range(2)]
    torch.set_num_threads(2)
    _Attended()[0]
    workers = torch.utils.data.DataLoader(
        _Attended(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    for found, meant in zip(workers, wanted, strict=True):
        assert all(torch.equal(found[key], meant[key]) for key in meant)
    torch.set_num_threads(before)


THREADS = """
import os, torch
from mmfast.ops import backend, cross_attention
def threads(count):
    torch.set_num_threads(count)
    x = torch.randn(2, 8, 300, 64, requires_grad=True)
    with backend("cpu"):
        cross_attention(x, [(x, x)] * 2).sum().backward()
    return len(os.listdir("/proc/self/task"))
before = len(os.listdir("/proc/self/task"))
print(*(threads(count) - before for count in (1, 3)))
"""


def test_it_takes_as_many_threads_as_torch_is_set_to():
    alone, three = map(int, python(THREADS).split())
    assert alone == 0 and three == 2


@pytest.mark.memory
def test_the_way_to_the_kernel_takes_the_host_little_time():
    """15 microseconds, beside what the dispatcher and the kernel take."""
    query, *kv = (torch.randn(1, 1, 1, 16) for _ in range(7))
    keys, values = kv[:3], kv[3:]
    sources = list(zip(keys, values, strict=True))
    kernel, none = torch.ops.mmfast.cross_attention.cpu, [None] * 3
    calls = {
        "all": lambda: cross_attention(query, sources),
        "kernel": lambda: kernel(query, keys, values, none, none, None, [False] * 3, None, None, False),
    }
    fastest = {name: min(timeit.repeat(call, number=100, repeat=30)) / 100 for name, call in calls.items()}
    assert fastest["all"] - fastest["kernel"] <= 15e-6, fastest


PEAK = """
import torch
from mmfast.ops import backend, cross_attention
torch.set_num_threads(2)

def mib(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what)) / 1024

def step(queries, keys):  # peak, and the size of what the caller holds: inputs, outputs and gradients
    before = mib("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    def random(heads, rows):  # as a projection leaves them: [B, S, H, D] in memory
        x = torch.randn(2, rows, heads, 64, dtype=torch.DTYPE)
        return x.transpose(1, 2).requires_grad_()
    query, sources = random(QUERY_HEADS, queries), [(random(KEY_HEADS, keys), random(KEY_HEADS, keys)) for _ in range(4)]
    inputs = [query, *(t for source in sources for t in source)]
    with backend("BACKEND"):
        out, stats = cross_attention(query, sources, VISIBLE return_stats=True)
    grads = [torch.randn_like(out), torch.randn_like(stats.lse)]
    gradients = torch.autograd.grad([out, stats.lse], inputs, grads)
    held = [*inputs, out, *stats, *grads, *gradients]
    return mib("VmHWM") - before, sum(t.numel() * t.element_size() for t in held) / 2**20

step(9, 70)
print(*step(QUERIES, KEYS))
"""


def peak(**what):
    code = PEAK
    for name, value in what.items():
        code = code.replace(name, str(value))
    return map(float, python(code).split())


CASES = {
    "float32": {"DTYPE": "float32", "QUERY_HEADS": 8, "KEY_HEADS": 8, "VISIBLE": ""},
    "bfloat16, grouped, masked": {
        "DTYPE": "bfloat16",
        "QUERY_HEADS": 16,
        "KEY_HEADS": 8,
        "VISIBLE": "masks=[torch.rand(2, keys) > 0.3] * 4, causal=[True] * 4, ",
    },
}


@pytest.mark.memory
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_hold_little_beside_inputs_outputs_and_gradients(case):
    """In float32 the keys of one source are 16 MiB: not even they are copied whole."""
    used, held = peak(BACKEND="cpu", QUERIES=2048, KEYS=4096, **case)
    assert used < held + 14, (used, held)


@pytest.mark.memory
def test_few_key_heads_are_not_split_into_parts_that_fill_the_memory():
    """A part has dQ of all query heads, here 16 MiB."""
    case = {"DTYPE": "float32", "QUERY_HEADS": 32, "KEY_HEADS": 1, "VISIBLE": ""}
    used, held = peak(BACKEND="cpu", QUERIES=2048, KEYS=4096, **case)
    assert used < held + 64, (used, held)


@pytest.mark.memory
def test_a_definition_that_concatenates_is_seen_to():
    used, held = peak(BACKEND="reference", QUERIES=512, KEYS=512, **CASES["float32"])
    assert used > held + 64, (used, held)
