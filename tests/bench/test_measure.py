"""What the measuring core promises: fair rounds, no figure for a wrong output, honest statistics and memory."""

import time
from dataclasses import replace

import pytest
import torch

from mmfast.bench import measure as core
from mmfast.bench.measure import Result, Spread, Work, WrongOutputError, check, measure


def inputs(seed):
    return (torch.randn(64, generator=torch.Generator().manual_seed(seed)),)


def work(reference=torch.exp, **variants):
    return Work("work", variants, inputs, reference)


def quick(work):
    return measure(work, seconds=0.0, rounds=(5, 5))


def test_each_round_times_every_variant_on_the_same_inputs(monkeypatch):
    calls = []
    watched = work(
        ours=lambda x: (calls.append(("ours", float(x[0]))), x.exp())[1],
        peer=lambda x: (calls.append(("peer", float(x[0]))), x.exp())[1],
    )
    monkeypatch.setattr(core, "SHORTEST", 1e-12)  # one call a sample
    quick(watched)
    rounds = [calls[i : i + 2] for i in range(len(calls) - 10, len(calls), 2)]
    assert all({name for name, _ in pair} == {"ours", "peer"} for pair in rounds)
    assert all(len({x for _, x in pair}) == 1 for pair in rounds)
    assert len({x for pair in rounds for _, x in pair}) == 3  # the sets take turns
    assert len({pair[0][0] for pair in rounds}) == 2  # neither is always first


def test_a_wrong_variant_is_an_error_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(core, "_elapsed", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongOutputError, match="work float32: cheat: output 0 is off by"):
        quick(work(ours=torch.exp, cheat=lambda x: x + 1))


def test_unless_it_is_strict_what_fails_is_left_out_and_named():
    def broken(x):
        raise RuntimeError("no room")

    variants = {"ours": torch.exp, "cheat": lambda x: x + 1, "broken": broken, "peer": torch.exp}
    result = measure(work(**variants), seconds=0.0, rounds=(5, 5), strict=False)
    assert list(result.seconds) == ["ours", "peer"]
    assert result.failed["cheat"].startswith("WrongOutputError: work float32: cheat: output 0 is off by")
    assert result.failed["broken"] == "RuntimeError: no room"
    with pytest.raises(WrongOutputError):  # without ours there is nothing to compare
        measure(work(ours=lambda x: x + 1, peer=torch.exp), seconds=0.0, strict=False)


def test_what_cannot_be_weighed_keeps_its_times():
    def weigh(variant):
        if variant == "peer":
            raise RuntimeError("killed")
        return 64

    weighed = replace(work(ours=torch.exp, peer=torch.exp), weigh=weigh)
    result = measure(weighed, seconds=0.0, rounds=(5, 5), strict=False)
    assert list(result.seconds) == ["ours", "peer"]
    assert (result.peak_bytes, result.failed) == ({"ours": 64}, {"peer": "killed"})
    with pytest.raises(RuntimeError, match="killed"):
        quick(weighed)


def test_our_other_backends_get_no_more_slack_than_we_do():
    def rounded(x):  # to 6e-5
        return x + 1000 - 1000

    def coarse(x):
        return rounded(x) + 1e-4

    variants = {"ours": rounded, "peer": coarse, "mmfast triton": coarse}
    result = measure(work(rounded, **variants), seconds=0.0, rounds=(5, 5), strict=False)
    assert list(result.seconds) == ["ours", "peer"] and list(result.failed) == ["mmfast triton"]


@pytest.mark.parametrize(
    "wrong", [lambda x: x.double(), lambda x: x[:3], lambda x: x * torch.nan, lambda x: x + 1e-4]
)
def test_dtype_shape_nan_and_error_are_all_checked(wrong):
    exact = torch.ones(4, dtype=torch.double)
    plain = exact.float()
    check("right", plain, exact, plain)
    with pytest.raises(WrongOutputError):
        check("wrong", wrong(plain), exact, plain)


def test_a_variant_that_is_wrong_on_one_set_only_is_found():
    seen = []

    def stale(x):
        seen.append(x)
        return seen[0].exp()

    with pytest.raises(WrongOutputError):
        quick(work(ours=stale))


def test_a_variant_is_held_against_the_reference_in_the_dtype_it_computes_in():
    def half(x):
        return x.bfloat16().exp().float()

    def reference(x):
        return x.exp().to(torch.promote_types(x.dtype, torch.float32))

    with pytest.raises(WrongOutputError):
        quick(work(reference, ours=torch.exp, half=half))
    quick(
        Work(
            "work",
            {"ours": half, "float32": torch.exp},
            inputs,
            reference,
            computed_in={"ours": torch.bfloat16},
        )
    )
    with pytest.raises(WrongOutputError, match="float32: ours"):
        coarse = {"ours": lambda x: half(x) * 1.2, "float32": torch.exp}
        quick(Work("work", coarse, inputs, reference, computed_in={"ours": torch.bfloat16}))


def test_ratios_are_paired_within_the_rounds():
    # A machine that slows down fivefold halfway through moves the times, not the ratio.
    speed = [1.0] * 5 + [5.0] * 5
    result = Result(
        "w", "float32", "cpu", {"ours": [2.0 * s for s in speed], "peer": [3.0 * s for s in speed]}
    )
    assert result.ours == "ours"
    assert result.ratio("peer") == Spread(1.5, 1.5, 1.5)
    assert result.time("ours").high == 5 * result.time("ours").low


def test_an_outlier_does_not_move_the_median():
    assert Spread.of([1.0, 1.1, 1.2, 1.3, 900.0]) == (1.1, 1.2, 1.3)
    assert Spread.of([2.0]) == (2.0, 2.0, 2.0)


def test_a_variant_that_sleeps_longer_takes_longer():
    slow = work(ours=lambda x: (time.sleep(1e-3), x.exp())[1], peer=lambda x: (time.sleep(4e-3), x.exp())[1])
    result = quick(slow)
    assert 2 < result.ratio("peer").median < 6
    assert 1e-3 < result.time("ours").median < 3e-3


def test_backward_gives_the_output_and_every_gradient():
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    grad = torch.randn(3)
    out, dx, dw = core.forward_backward(lambda pair, none: pair[0] * pair[1])(grad, [x, w], None)
    torch.testing.assert_close((out, dx, dw), (x * w, grad * w, grad * x))


def holding(mebibytes):
    """For a fresh process: a call that holds that much beside its inputs for a moment, and returns a fourth of it."""
    given = torch.ones(32 * 2**18)  # 32 MiB that are there before
    size = mebibytes * 2**18

    def call():
        between = torch.ones(size).mul_(given[0])
        return between[: size // 4].clone()

    return call


def test_peak_memory_is_what_a_call_adds_in_a_fresh_process():
    assert core.peak_bytes(holding, 64) / 2**20 == pytest.approx(80, abs=3)


def failing():
    raise OSError("no such data")


def test_a_failure_in_the_fresh_process_is_told():
    with pytest.raises(
        RuntimeError, match=r"failing\(\) failed in a fresh process \(exit status 1\):[\s\S]*no such"
    ):
        core.peak_bytes(failing)


def test_mixes_are_seeded_and_as_asked():
    present = core.present_mix(0, 32, 3, absent=0.5)
    assert present.sum(0).tolist() == [16, 16, 16]
    assert torch.equal(present, core.present_mix(0, 32, 3)) and not torch.equal(
        present, core.present_mix(1, 32, 3)
    )
    lengths = core.length_mix(0, 1000, 77)
    assert (lengths.min(), lengths.max()) == (1, 77) and lengths.float().mean() == pytest.approx(39, abs=2)
    assert torch.equal(lengths, core.length_mix(0, 1000, 77))


@pytest.mark.parametrize("bfloat16", [True, False])
def test_ceilings_are_rates_of_this_machine(monkeypatch, bfloat16):
    """A product of bfloat16 takes half a minute where PyTorch has no instructions for it."""
    monkeypatch.setattr(core, "_elapsed", lambda call, turn, device: 0.5 * len(turn))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bfloat16)
    gemm = {"gemm_float32": 4 * 2048**3} | ({"gemm_bfloat16": 4 * 2048**3} if bfloat16 else {})
    assert core.ceilings("cpu") == {**gemm, "copy": 4 * 4 * 2**26}
