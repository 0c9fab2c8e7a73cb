"""What only the Triton launchers of cross_attention promise: keys that several programs share."""

from functools import partial
from types import SimpleNamespace

import pytest
import test_cross_attention as suite
import test_cross_attention_absence as absence
import torch
from check import cast, check, run, same_bits

if not torch.cuda.is_available():
    pytest.importorskip("triton")
from mmfast.kernels import _attention, _launch, cross_attention, cross_attention_backward
from mmfast.ops import reference

pytestmark = pytest.mark.skipif("triton" not in suite.KERNELS, reason="needs Triton's interpreter")
DEVICE = torch.device("cpu")
ours = suite.on("triton")


@pytest.fixture
def splits(monkeypatch):
    """Tiles of 16 keys, and a split for each 12 keys; holds how many each launch had."""
    names = {
        name for table in (cross_attention.UNTUNED, cross_attention_backward.UNTUNED) for name in table[80]
    }
    entry = {"triton": dict.fromkeys(names, _attention.tiles(16, 16, num_warps=4, num_stages=1))}
    monkeypatch.setattr(_launch, "measured", lambda op, device: entry)
    monkeypatch.setattr(_attention, "programs_wanted", lambda device, num_warps: 2**30)
    monkeypatch.setattr(_attention, "_LEAST_KEYS", 12)
    found = []

    def splits_of(*args):
        found.append(_attention.splits_of(*args))
        return found[-1]

    for module in (cross_attention, cross_attention_backward):
        monkeypatch.setattr(module, "splits_of", splits_of)
    return found


PROMISES = {
    **{
        name: partial(suite.test_output_and_gradients_are_as_exact_as_promised, "triton", options)
        for name, options in suite.OPTIONS.items()
        if name in ("plain", "lengths", "masks", "present", "causal in one source", "everything")
    },
    "what is hidden": partial(
        absence.test_what_is_hidden_cannot_reach_a_bit, "triton", torch.nan, {"masks": True, "lengths": True}
    ),
    "what a query does not see": partial(absence.test_what_a_query_does_not_see_cannot_reach_it, "triton"),
    "a query that sees nothing": partial(
        absence.test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient, "triton"
    ),
    "an empty source": partial(suite.test_zero_rows, "triton", {"sizes": (0, 40)}),
    "only the bias": partial(suite.test_only_the_gradients_that_are_needed, "triton", "source_bias"),
}


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_the_promises_hold_where_keys_are_split(splits, promise):
    promise()
    assert min(splits) > 1


def test_visible_nan_propagates_out_of_its_split(splits, monkeypatch):
    monkeypatch.setattr(_attention, "_LEAST_KEYS", 4)
    absence.test_visible_nan_propagates("triton")
    assert min(splits) > 1


def test_more_splits_than_are_combined_at_once_add_up_to_the_same_bits(splits):
    arguments = suite.example(1, 1, 3, (250, 9), kv_heads=1, lengths=True, bias=1)
    check(suite.all_of(ours), suite.all_of(reference.cross_attention), arguments, torch.float32)
    assert min(splits) > 16
    one, other = (run(suite.all_of(ours), cast(arguments, torch.float32)) for _ in range(2))
    assert same_bits(one, other)


def test_nobody_sees_anything(splits):
    arguments = cast(suite.example(1, 1, 3, (20, 9), kv_heads=1), torch.float32)
    arguments["lengths"] = [torch.zeros(1, dtype=torch.int64)] * 2
    arguments["sources"] = cast(
        [[torch.full_like(t, torch.nan) for t in pair] for pair in arguments["sources"]], torch.float32
    )
    results = run(suite.all_of(ours), arguments)
    assert min(splits) > 1 and all((result == 0).all() for result in results.values())


def test_splits_share_what_is_seen_and_not_what_is_hidden(splits, monkeypatch):
    """Six tiles of three sources are seen: each of six splits has one, wherever the hidden ones lie."""
    tops = []

    class Combine:
        def __getitem__(self, grid):
            return lambda *args, **_: tops.append(args[5])

    monkeypatch.setattr(cross_attention, "combine_kernel", Combine())
    monkeypatch.setattr(cross_attention, "splits_of", lambda *_: 6)
    arguments = cast(suite.example(1, 1, 3, (90, 16, 200), kv_heads=1, grad=False), torch.float32)
    arguments["lengths"] = [torch.tensor([16]), None, torch.tensor([50])]
    ours(**arguments)
    assert tops[0].shape == (6, 1, 1, 3) and (tops[0] > -torch.inf).all()


def test_sixteen_sources_are_one_launch_each_way(monkeypatch):
    """And a second one backward, for the queries; what comes before both is their ``delta``."""
    launches = []

    def counted(name, kernel):
        class Counted:
            def __getitem__(self, grid):
                return lambda *args, **options: launches.append(name) or kernel[grid](*args, **options)

        return Counted()

    for module in (cross_attention, cross_attention_backward):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    run(suite.all_of(ours), cast(suite.example(1, 1, 3, (5,) * 16, kv_heads=1, bias=1), torch.float32))
    assert launches == ["forward_kernel", "delta_kernel", "grad_query_kernel", "grad_source_kernel"]


@pytest.mark.parametrize(
    ("dtype", "depth", "kind", "message"),
    [
        (torch.float64, 16, TypeError, "got float64, wanted float32, bfloat16 or float16"),
        (torch.float32, 257, ValueError, "got 257 and 257 features a head, wanted at most 256"),
    ],
)
def test_what_it_cannot_do_is_an_error_that_says_so(dtype, depth, kind, message):
    with pytest.raises(kind, match=message):
        ours(**cast(suite.example(1, 1, 3, (5,), depth, kv_heads=1), dtype))


def test_few_queries_are_split_until_the_device_is_full(monkeypatch):
    monkeypatch.setattr(_attention, "programs_wanted", lambda device, num_warps: 132)
    keys = [torch.empty(1, 1, size, 1, device="meta") for size in (50_000, 0, 900)]
    assert _attention.splits_of(16, keys, 8) == 8
    assert [_attention.splits_of(programs, keys, 8) for programs in (66, 67, 132, 10**6)] == [2, 1, 1, 1]
    assert [_attention.splits_of(1, keys[at:], 8) for at in (0, 1)] == [132, 3]
    assert _attention.splits_of(1, keys[1:2], 8) == 1


def test_a_device_is_full_when_its_registers_can_be(monkeypatch):
    device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132)
    )
    assert [_attention.programs_wanted(device, warps) for warps in (4, 8)] == [264, 132]
    assert _attention.programs_wanted(DEVICE, 8) == 1
