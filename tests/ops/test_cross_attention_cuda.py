"""Backend ``cuda`` of cross_attention without a GPU: the kernels' own source, each of their threads, and the binding,
compiled for the host; see warp_on_host.h.
"""

import ctypes
from contextlib import nullcontext

import pytest
import torch
from check import assert_promised, cast, check, same_bits, worst
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from on_host import build
from test_cross_attention import OPTIONS, all_of, example, laid_out, problems, schema_arguments
from test_cross_attention_absence import poisoned
from torch.utils import _pytree as pytree

from mmfast import _native
from mmfast.kernels import cross_attention_cuda as cuda
from mmfast.ops import available, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOST = """
#include "warp_on_host.h"
#include "cross_attention_kernel.h"
#include "binding.h"
#include <algorithm>

#define CUDA CPU  // the key that the binding registers for
#include "cross_attention.cpp"
#undef CUDA

extern "C" {
__attribute__((visibility("default"))) void set_reversed(bool value) { mmfast::reversed = value; }
__attribute__((visibility("default"))) void set_early(bool value) { mmfast::early = value; }
__attribute__((visibility("default"))) int64_t bank_conflicts() { return mmfast::bank_conflicts; }
__attribute__((visibility("default"))) int64_t bytes_copied() { return mmfast::bytes_copied; }
}

namespace mmfast {

const char* launch(const Attention& a, Type type, void*) {
  const char* error = nullptr;
  const auto in_turn = [&](int64_t count, auto run) {
    for (int64_t i = 0; i < count && !error; ++i) error = run(reversed ? count - 1 - i : i);
  };
  with_kernel(a, type, [&](auto kernel) {
    using T = typename decltype(kernel)::Element;
    using Memory = typename decltype(kernel)::Memory;
    const int64_t blocks = a.batch * a.kv_heads * blocks_of(a);
    alignas(128) static char memory[sizeof(Memory)];
    in_turn(blocks * a.splits, [&](int64_t i) {
      std::memset(memory, 0xff, sizeof memory);
      auto& shared = *reinterpret_cast<Memory*>(memory);
      return run_block(kThreads, [&] { attend(a, i % blocks, static_cast<int>(i / blocks), shared); });
    });
    in_turn(a.batch * a.kv_heads * rows_of(a), [&](int64_t row) {
      float weights[kSlots];
      return run_block(32, [&] { merge<T>(a, row, weights); });
    });
  });
  return error;
}

}  // namespace mmfast
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    loaded = build(tmp_path_factory.mktemp("host"), HOST, options=["-march=native"])
    loaded.bank_conflicts.restype = loaded.bytes_copied.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def split(host, monkeypatch):
    """Makes the launcher run on the host, with as many splits as it can be made to take. Nothing that is left unwritten
    looks like a number."""

    def use(splits):
        monkeypatch.setattr(cuda, "processors", lambda device: 10**6 if splits == "many" else 1)
        monkeypatch.setattr(cuda, "shared_memory", lambda device: 163 << 10)
        monkeypatch.setattr(cuda, "FEWEST_TILES", 1 if splits == "many" else 10**6)

    launch = cuda.SPLIT

    def spoil_and_launch(*args):
        for made in args[11:]:
            if made is not None:
                made.fill_(torch.nan)
        launch(*args)

    monkeypatch.setattr(cuda, "SPLIT", spoil_and_launch)
    use("many")
    return use


def forward(arguments):
    """Output, lse and mass by the launcher, as the public function calls it."""
    args = list(schema_arguments(arguments))
    if args[7] is not None:
        args[7] = args[7].float().expand(*args[0].shape[:2], len(args[1]))
    out, lse, _, mass = cuda.cross_attention(*args)
    return {"out": out, "lse": lse, "mass": mass}


def meant(arguments):
    with torch.no_grad():
        out, stats = reference.cross_attention(**arguments, return_stats=True)
    return {"out": out, "lse": stats.lse, "mass": stats.mass}


def check_forward(arguments, dtype):
    arguments = cast(arguments, dtype)
    found, same, exact = forward(arguments), meant(arguments), meant(cast(arguments, torch.float64))
    for name, t in found.items():
        assert t.dtype == (dtype if name == "out" else torch.float32)
        nothing = exact[name] == -torch.inf
        assert torch.equal(t == -torch.inf, nothing)
        t, own, best = (torch.where(nothing, 0, x) for x in (t, same[name], exact[name]))
        assert_promised(t, best, worst(own.double() - best), name)
    return found


@pytest.mark.parametrize("splits", ["many", "one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_visibility_is_as_exact_as_promised(split, options, dtype, splits):
    split(splits)
    check_forward(example(sizes=(70, 1, 40), grad=False, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [1, 3, 40, 64, 72, 128, 200, 256])
def test_any_head_dim(split, depth, dtype):
    for value_depth in (depth, 5):
        check_forward(
            example(1, 2, 7, (9, 70), depth, value_depth=value_depth, kv_heads=1, lengths=True, grad=False),
            dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 16, 17, 33, 70])
def test_any_number_of_queries(split, queries, dtype):
    arguments = example(
        2, 4, queries, (150, 33), kv_heads=2, lengths=True, causal=[False, True], bias=2, grad=False
    )
    check_forward(arguments, dtype)


def test_more_splits_than_there_is_to_see(split):
    arguments = cast(example(3, 2, 5, (700, 90), kv_heads=1, lengths=True, grad=False), torch.float16)
    arguments["lengths"] = [torch.tensor([700, 0, 3]), torch.tensor([90, 0, 5 - 2**40])]
    found = check_forward(arguments, torch.float16)
    assert (
        (found["out"][1] == 0).all()
        and (found["lse"][1] == -torch.inf).all()
        and (found["mass"][1] == 0).all()
    )


@pytest.mark.parametrize("how", ["swapped", "sliced", "reversed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_layout(split, how, dtype):
    arguments = example(depth=32, sizes=(70, 20), lengths=True, masks=True, present=3, bias=3, grad=False)
    arguments["query"] = laid_out(arguments["query"], how)
    arguments["sources"] = [(laid_out(key, how), laid_out(value, how)) for key, value in arguments["sources"]]
    arguments["lengths"] = [arguments["lengths"][0].int().repeat(2)[::2], None]
    arguments["masks"] = [mask.repeat_interleave(3, 1)[:, ::3] for mask in arguments["masks"]]
    arguments["present"] = arguments["present"].movedim(2, 0).contiguous().movedim(0, 2)
    check_forward(
        pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, arguments), dtype
    )


@given(
    problems([0, 3], [1, 2], [17, 40, 70], [0, 1, 7, 40, 150], 16),
    st.sampled_from(DTYPES),
    st.sampled_from(["many", "one"]),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_visibility_and_layout(split, arguments, dtype, splits):
    split(splits)
    check_forward(arguments, dtype)


def test_what_no_query_sees_is_not_read(split, host):
    split("one")
    arguments = cast(example(2, 2, 5, (150, 40), 64, kv_heads=1, masks=True, grad=False), torch.float16)
    arguments["lengths"] = [torch.tensor([70, 150]), torch.tensor([0, 33])]
    seen = [mask & (torch.arange(mask.shape[1]) < length[:, None]) for mask, length in
            zip(arguments["masks"], arguments["lengths"], strict=True)]  # fmt: skip
    before = host.bytes_copied()
    forward(arguments)
    keys_and_values = sum(int(t.sum()) for t in seen) * 64 * 2
    assert host.bytes_copied() - before == 2 * (keys_and_values + arguments["query"].numel())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"masks": True}, {"present": 2, "causal": True}], ids=str)
def test_what_is_hidden_cannot_reach_a_bit(split, options, dtype, value):
    arguments = cast(example(3, sizes=(70, 9, 20), seed=3, lengths=True, grad=False, **options), dtype)
    for i in range(3):  # something to hide in every source
        arguments["lengths"][i] = torch.tensor([4, 0, arguments["sources"][i][0].shape[2]])
    before, after = forward(arguments), forward(poisoned(arguments, value))
    assert same_bits(before, after)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_one_query_sees_cannot_reach_the_next(split, dtype, value):
    """The last key is for the last query, one source for half of the queries, in one column only."""
    arguments = cast(
        example(1, queries=13, sizes=(13, 90), kv_heads=2, causal=[True, False], grad=False), dtype
    )
    arguments["present"] = torch.ones(1, 13, 2, dtype=torch.bool)
    arguments["present"][:, 2::3, 1] = False
    before, spoilt = forward(arguments), cast(arguments, dtype)
    spoilt["sources"][0][1][:, :, -1, 5] = value
    spoilt["sources"][1][1][:, :, 80, 3] = value
    after = forward(spoilt)
    clean = torch.ones_like(before["out"], dtype=torch.bool)
    clean[:, :, -1, 5] = False
    clean[:, :, :, 3] = ~arguments["present"][0, :, 1]
    assert same_bits(after["out"][clean], before["out"][clean]) and after["out"][~clean].isnan().all()
    assert same_bits(after["lse"], before["lse"]) and same_bits(after["mass"], before["mass"])
    spoilt = cast(arguments, dtype)
    spoilt["sources"][1][0][:, :, 80] = torch.nan
    after, hidden = forward(spoilt), ~arguments["present"][0, :, 1]
    assert all(same_bits(after[name][:, :, hidden], before[name][:, :, hidden]) for name in before)
    assert all(after[name][:, :, ~hidden].isnan().any(-1).all() for name in before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_visible_nan_propagates(split, dtype):
    arguments = cast(example(1, sizes=(5, 90), kv_heads=2, grad=False), dtype)
    arguments["sources"][1][1][0, 0, 3, 2] = torch.nan
    out = forward(arguments)["out"]
    assert (
        out[:, :2, :, 2].isnan().all() and not out[:, :2, :, 3].isnan().any() and not out[:, 2:].isnan().any()
    )
    arguments["sources"][1][0][0, 1, 3, 2] = torch.nan
    assert forward(arguments)["out"][:, 2:].isnan().all()
    arguments["query"][0, 0, 4, 1] = torch.nan
    assert forward(arguments)["out"][0, 0, 4].isnan().all()


def test_a_query_that_sees_nothing_may_hold_anything(split):
    arguments = cast(example(present=3, grad=False), torch.float16)
    arguments["present"][0, 3] = False
    arguments["query"][0, :, 3] = torch.nan
    found = forward(arguments)
    assert (found["out"][0, :, 3] == 0).all() and (found["mass"][0, :, 3] == 0).all()
    assert (found["lse"][0, :, 3] == -torch.inf).all() and not found["out"].isnan().any()


@pytest.mark.parametrize(
    "shape", [{"batch": 0}, {"queries": 0}, {"heads": 0}, {"sizes": (0, 0)}, {"sizes": (0, 5)}], ids=str
)
def test_zero_rows(split, shape):
    check_forward(example(grad=False, **shape), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_order_of_blocks_and_threads_changes_no_bit(split, host, dtype):
    arguments = cast(example(sizes=(130, 1, 40), queries=20, grad=False, **OPTIONS["everything"]), dtype)
    for key, value in arguments["sources"]:
        key[:, :, -1:] = value[:, :, -1:] = torch.nan
    before = forward(arguments)
    try:
        host.set_reversed(True)
        after = forward(arguments)
    finally:
        host.set_reversed(False)
    for name in before:
        assert same_bits(before[name].nan_to_num(7), after[name].nan_to_num(7)), name
    assert before["out"].isnan().any() and not before["out"].isnan().all()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [64, 128, 256])
def test_a_copy_reaches_what_it_is_for_and_nothing_else(split, host, depth, dtype, order, early):
    """Many tiles to a block: of the stages that they go through each is full, read and filled again."""
    split("one")
    arguments = example(1, 2, 9, (300, 1, 130), depth, kv_heads=1, lengths=True, grad=False)
    try:
        host.set_reversed(order == "backward")
        host.set_early(early)
        check_forward(arguments, dtype)
    finally:
        host.set_reversed(False)
        host.set_early(False)


@pytest.mark.parametrize("depth", [16, 64, 128, 256])
def test_matrices_are_loaded_without_bank_conflicts(split, host, depth):
    before = host.bank_conflicts()
    forward(cast(example(1, 1, 3, (70,), depth, kv_heads=1, grad=False), torch.float16))
    assert host.bank_conflicts() == before


@given(st.integers(0, 9), st.integers(1, 64), st.integers(1, 10**5), st.lists(st.integers(0, 10**5), max_size=16),
       st.integers(1, 256), st.sampled_from([2, 4]), st.integers(1, 200))  # fmt: skip
def test_a_plan_fits_the_kernels(batch, kv_heads, rows, sizes, depth, itemsize, processors):
    block, splits, slots = cuda.plan(batch, kv_heads, rows, sizes, depth, itemsize, processors)
    assert block in (32, 64) and splits >= 1 and slots == splits * 64 // block <= cuda.MOST_SLOTS
    assert not (itemsize == 4 and depth > 128 and block > 32)
    blocks = batch * kv_heads * -(-rows // block)
    assert splits == 1 or blocks * splits <= 2 * processors
    assert splits == 1 or splits * cuda.FEWEST_TILES <= sum(-(-size // (128 // itemsize)) for size in sizes)


def test_few_queries_fill_the_device():
    block, splits, _ = cuda.plan(1, 8, 1, [100_000], 64, 2, 132)
    assert block == 32 and 8 * splits == 2 * 132 // 8 * 8


def test_what_it_cannot_do_is_an_error_that_says_so(split, monkeypatch):
    for changes, kind, message in (
        ({"dtype": torch.float64}, TypeError, "query is float64, wanted float32, bfloat16 or float16"),
        ({"depth": 257}, ValueError, "257 and 257 features a head, wanted 1 to 256"),
        ({"value_depth": 300}, ValueError, "16 and 300 features a head, wanted 1 to 256"),
    ):
        dtype = changes.pop("dtype", torch.float32)
        with pytest.raises(kind, match=message):
            forward(cast(example(1, 1, 1, (3,), kv_heads=1, grad=False, **{"depth": 16, **changes}), dtype))
    monkeypatch.setattr(cuda, "shared_memory", lambda device: 99 << 10)  # of compute capability 8.6 and 8.9
    for depth in (128, 129):
        arguments = cast(example(1, 1, 1, (3,), depth, kv_heads=1, grad=False), torch.float32)
        with nullcontext() if depth == 128 else pytest.raises(ValueError, match="wanted 1 to 128"):
            forward(arguments)


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_opcheck(split, monkeypatch, options):
    launches, launch = [], cuda.SPLIT

    def noted(*args):
        launches.append(args)
        launch(*args)

    monkeypatch.setattr(cuda, "SPLIT", noted)
    forward(cast(example(queries=5, sizes=(13, 1, 4), grad=False, **OPTIONS[options]), torch.float16))
    torch.library.opcheck(torch.ops.mmfast.cross_attention_split.cuda, launches[0])


def test_its_results_go_into_the_backward_of_triton(split):
    pytest.importorskip("triton")
    arguments = cast(example(1, 2, 5, (20, 3), kv_heads=1, bias=3, lengths=True), torch.float32)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *leaves):
            given = schema_arguments(arguments)
            out, lse, normalizers, mass = cuda.cross_attention(*given)
            ctx.given = *given[:9], out, lse, normalizers
            return out, lse, mass

        @staticmethod
        def backward(ctx, grad, grad_lse, _):
            needs = [True] * (1 + 2 * len(arguments["sources"])) + [True]
            return tuple(cuda.cross_attention_backward(grad, grad_lse, *ctx.given, needs))

    def op(**given):
        keys, values = zip(*given["sources"], strict=True)
        nonlocal arguments
        arguments = given
        out, lse, _ = Op.apply(given["query"], *keys, *values, given["source_bias"])
        return torch.cat([out, lse[..., None]], -1)

    check(op, lambda **a: all_of(reference.cross_attention)(**a)[..., :-2], arguments, torch.float32)


def test_its_backward_multiplies_as_exactly_as_it_does(split, monkeypatch):
    """Weights made again from logits in TF32 would not add up to 1 under sums of exact ones."""
    triton = pytest.importorskip("mmfast.kernels.cross_attention_backward")
    configuration, precisions = triton.configuration, []

    def noted(*args):
        options = configuration(*args)
        precisions.append(options["PRECISION"])
        return options

    monkeypatch.setattr(triton, "configuration", noted)
    given = schema_arguments(cast(example(1, 2, 5, (20,), kv_heads=1), torch.float32))
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        out, lse, normalizers, _ = cuda.cross_attention(*given)
        cuda.cross_attention_backward(
            torch.ones_like(out), None, *given[:9], out, lse, normalizers, [True] * 3 + [False]
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert precisions == ["ieee", "ieee"]


def test_the_doctor_tells_whether_it_can_run():
    there = "ready" if torch.cuda.is_available() else "compiled, not run: no GPU here"
    assert available("cross_attention", "cuda")["cuda"] == _native.missing.get("mmfast_cuda", there)
