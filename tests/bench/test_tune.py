"""Tuning finds the best it was shown, keeps what others measured, and looks for ops and kernels by itself."""

import itertools
import json

import pytest
import torch

from mmfast import ops
from mmfast.bench import tune
from mmfast.bench.measure import Result, Work, WrongOutputError, forward_backward

BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


def distance_from(best):
    return lambda blocks: sum(abs(blocks[name] - value) for name, value in best.items())


def test_climbing_reaches_the_best_blocks_and_tries_none_twice():
    best, tried = {**BLOCKS, "BLOCK_M": 256, "num_warps": 8, "num_stages": 5}, []
    cost = distance_from(best)
    assert tune.climb(BLOCKS, lambda blocks: (tried.append(blocks), cost(blocks))[1]) == best
    assert all(tried.count(blocks) == 1 for blocks in tried)


def test_noise_is_not_climbed():
    assert tune.climb(BLOCKS, lambda blocks: 0.0 if blocks == BLOCKS else -0.005) == BLOCKS


def test_neighbours_stay_within_the_limits():
    corner = {name: tune.LEAST[name] for name in BLOCKS}
    assert all(b[n] >= tune.LEAST[n] for b in tune.neighbours(corner) for n in b)
    assert all(b[n] <= tune.LIMITS[n] for b in tune.neighbours(tune.LIMITS) for n in b)


def test_every_kernels_blocks_have_limits():
    pytest.importorskip("triton")
    for op, generation in itertools.product(ops.__all__, (80, 90, 100)):
        for blocks in tune.untuned(op, generation).values():
            assert list(tune.neighbours(blocks))


def test_the_fastest_over_all_works_is_chosen():
    works = [
        Result("a", "float32", "cpu", {"cpu": [1.0], "reference": [4.0]}),
        Result("b", "float32", "cpu", {"cpu": [2.0], "reference": [1.0]}),
    ]
    assert tune.fastest(works, ["cpu", "reference"]) == "cpu"
    assert tune.fastest(works[1:], ["cpu", "reference"]) == "reference"


def test_each_backend_is_really_the_one_that_runs():
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    work = Work("work", {"ours": lambda: ops.concat_linear([x], w)}, lambda _: (), lambda: x @ w.T)
    before = ops.native_calls("concat_linear.cpu")
    (result,) = tune.compare([work], ["reference"], seconds=0)
    assert ops.native_calls("concat_linear.cpu") == before and list(result.seconds) == ["reference"]
    if ops.available("concat_linear", "cpu")["cpu"] == "ready":
        (result,) = tune.compare([work], ["cpu"], seconds=0)
        assert ops.native_calls("concat_linear.cpu") > before


def test_a_wrong_backend_stops_the_tuning():
    work = Work("work", {"ours": lambda x: x + 1}, lambda seed: (torch.ones(2),), lambda x: x)
    with pytest.raises(WrongOutputError):
        list(tune.compare([work], ["reference"], seconds=0))


def test_kernels_are_found_in_the_ops_own_modules():
    pytest.importorskip("triton")
    found = tune.untuned("concat_linear", 90)
    assert {"forward.half", "grad_weight.ieee"} <= found.keys()  # from two modules
    assert all(blocks.keys() - {"DESCRIPTORS"} == BLOCKS.keys() for blocks in found.values())
    found = tune.untuned("cross_attention", 90)
    assert {"forward_64.half", "grad_query_128.tf32", "grad_source_256.ieee"} <= found.keys()
    assert all(blocks.keys() == BLOCKS.keys() - {"BLOCK_K"} for blocks in found.values())


def test_attention_kernels_are_tuned_by_the_works_that_launch_them(monkeypatch):
    pytest.importorskip("triton")
    if ops.available("cross_attention", "cpu")["triton"] != "ready":
        pytest.skip("needs Triton's interpreter")
    from mmfast.kernels import _launch, cross_attention, cross_attention_backward

    x = torch.randn(1, 1, 4, 16)
    attend = {"ours": lambda query, kv: ops.cross_attention(query, [(kv, kv)])}
    forward = Work("forward", attend, lambda seed: (x, x), None)
    both = Work(
        "both",
        {"ours": forward_backward(attend["ours"])},
        lambda seed: (x, *(x.clone().requires_grad_() for _ in range(2))),
        None,
    )
    found = tune.Found({})
    monkeypatch.setitem(tune.TABLE["cross_attention"], "cpu", {"triton": found})
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "climb", lambda start, cost: {**start, "num_stages": 6})
    tune.tune_triton("cross_attention", [forward], found)
    assert found.keys() == {"forward_64.tf32", "forward_64.ieee"}  # no half, no wider heads, no backward
    tune.tune_triton("cross_attention", [both], found)
    kernels = {
        "forward_64": cross_attention.UNTUNED,
        "grad_query_64": cross_attention_backward.UNTUNED,
        "grad_source_64": cross_attention_backward.UNTUNED,
    }
    assert found.keys() == {f"{kernel}.{precision}" for kernel in kernels for precision in ("tf32", "ieee")}
    for kernel, table in kernels.items():
        options = _launch.configuration("cross_attention", kernel, x, x.dtype, table)
        assert options == {"PRECISION": "ieee", **table[90][f"{kernel}.ieee"], "num_stages": 6}


@pytest.mark.parametrize("tuned", [{}, {f"forward_64.{kind}": BLOCKS for kind in ("tf32", "ieee")}])
def test_an_interrupt_leaves_blocks_and_precision_as_they_were(monkeypatch, tuned):
    pytest.importorskip("triton")
    if ops.available("cross_attention", "cpu")["triton"] != "ready":
        pytest.skip("needs Triton's interpreter")

    def interrupted(works, backends, seconds):
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(works)
        return [Result("forward", "float32", "cpu", {"triton": [1.0]})]

    tried = []
    x = torch.randn(1, 1, 4, 16)
    forward = Work("forward", {"ours": lambda x: ops.cross_attention(x, [(x, x)])}, lambda seed: (x,), None)
    found = tune.Found(tuned)
    monkeypatch.setitem(tune.TABLE["cross_attention"], "cpu", {"triton": found})
    monkeypatch.setattr(tune.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(tune, "compare", interrupted)
    precision = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(KeyboardInterrupt):
        tune.tune_triton("cross_attention", [forward], found)
    assert found == tuned
    assert torch.backends.cuda.matmul.fp32_precision == precision  # it tries TF32 first


def test_tuning_writes_this_device_and_keeps_the_others(monkeypatch, tmp_path):
    table = {"concat_linear": {"NVIDIA Elsewhere": {"backend": "triton"}, "cpu": {"backend": "reference"}}}
    monkeypatch.setattr(tune, "TABLE", table)
    monkeypatch.setattr(tune, "TABLE_FILE", tmp_path / "table.json")
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "ceilings", lambda device: {})
    timed = Result("w", "float32", "cpu", {"cpu": [1.0], "reference": [2.0]})
    monkeypatch.setattr(tune, "compare", lambda works, backends, seconds: [timed])
    monkeypatch.setattr(
        ops, "available", lambda op, device: {"cpu": "ready", "triton": "no", "reference": "ready"}
    )
    tune.main(["concat_linear"])
    written = json.loads((tmp_path / "table.json").read_text())
    assert written == {
        "concat_linear": {"NVIDIA Elsewhere": {"backend": "triton"}, "cpu": {"backend": "cpu"}}
    }


def test_an_interrupt_keeps_what_was_found_before(monkeypatch, tmp_path):
    def found(op, seconds):
        tune.TABLE[op] = {"cpu": {"backend": "cpu"}}
        if op == "lowrank_fusion":
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "TABLE", {})
    monkeypatch.setattr(tune, "TABLE_FILE", tmp_path / "table.json")
    monkeypatch.setattr(tune, "tune", found)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["concat_linear", "lowrank_fusion"])
    written = json.loads((tmp_path / "table.json").read_text())
    assert written == {op: {"cpu": {"backend": "cpu"}} for op in ("concat_linear", "lowrank_fusion")}


def test_an_op_without_a_suite_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tune, "tune", lambda op, seconds: pytest.fail("before all names are looked at"))
    with pytest.raises(SystemExit):
        tune.main(["concat_linear", "concat_circular"])
    assert "concat_circular has no suite, wanted one of concat_linear" in capsys.readouterr().err


def test_tuning_that_finds_nothing_new_changes_nothing(tmp_path):
    table = tmp_path / "table.json"
    tune.write(table)
    assert table.read_text() == tune.TABLE_FILE.read_text()
