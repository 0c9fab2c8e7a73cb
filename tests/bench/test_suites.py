"""The suites: every variant computes the op, and pytest-benchmark holds the very rounds that were recorded."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmfast import ops
from mmfast.bench import (
    bench_compiler,
    bench_concat_linear,
    bench_contrastive_loss,
    bench_cross_attention,
    bench_cross_attention_scaling,
    bench_group_norm,
    bench_lowrank_fusion,
    bench_training_step,
    bench_weighted_fusion,
    tune,
)
from mmfast.bench import bench_compiler_thresholds as thresholds
from mmfast.bench.measure import measure
from mmfast.bench.report import Record
from mmfast.compiler import rewrite
from mmfast.train import TrainerConfig

ROOT = Path(__file__).parents[2]
PEERS = {
    bench_compiler: ["inductor", "eager"],
    bench_concat_linear: ["eager", "compiled", "split"],
    bench_contrastive_loss: ["eager", "compiled"],
    bench_group_norm: ["eager", "copied", "compiled"],
    bench_lowrank_fusion: ["published", "compiled", "gemm"],
    bench_weighted_fusion: ["stacked", "compiled", "terms"],
    bench_cross_attention: ["sdpa", "cat", "merge", "flex"],
    bench_cross_attention_scaling: ["alone"],
    bench_training_step: [
        "mmfast eager",
        "mmfast float32",
        "stock",
        "stock compiled",
        "stock bfloat16",
        "stock compiled bfloat16",
    ],
}
FEWER = bench_cross_attention  # not every peer does every work
WORKS = [(suite, at) for suite in PEERS for at in range(len(suite.works("cpu")))]

SMALL = {
    name: bench_compiler.Case(
        model, lambda g, shapes=shapes: tuple(torch.randn(s, generator=g) for s in shapes)
    )
    for name, model, shapes in (
        ("late fusion", partial(bench_compiler.LateFusion, 16, 8, 4, 3), ((4, 3, 16), (4, 8), (4, 4))),
        (
            "image-prompt adapter",
            partial(bench_compiler.PromptAdapter, 16, 8, 2),
            ((2, 9, 16), (2, 5, 8), (2, 4, 8)),
        ),
        ("CLIP-type pair", partial(bench_compiler.ImageTextPair, 12, 10, 8), ((5, 12), (5, 10))),
        (
            "multiplicative interactions",
            partial(bench_compiler.MultiplicativeInteractions, 6, 4, 5, 8, 3),
            ((5, 6), (5, 4), (5, 5)),
        ),
        (
            "concatenation and a layer",
            partial(bench_compiler.ConcatFusion, (6, 5, 4), 8, 3),
            ((5, 6), (5, 5), (5, 4)),
        ),
        ("FiLM", partial(bench_compiler.FeatureModulation, 6, 5, 8, 3), ((5, 6), (5, 5))),
        ("tensor fusion", partial(bench_compiler.TensorFusion, (4, 3, 2), 8), ((5, 4), (5, 3), (5, 2))),
        (
            "low-rank tensor fusion",
            partial(bench_compiler.LowRankTensorFusion, (6, 5, 4), 8, 2),
            ((5, 6), (5, 5), (5, 4)),
        ),
        ("non-local gate", partial(bench_compiler.NonLocalGate, 8, 12), ((2, 5, 8), (2, 7, 12))),
        (
            "MulT-type",
            partial(bench_compiler.CrossModalTransformer, 16, 2, classes=3),
            ((2, 5, 16), (2, 7, 16), (2, 4, 16)),
        ),
    )
} | {
    "Flamingo-type block": bench_compiler.Case(
        partial(bench_compiler.GatedBlock, 16, 2),
        lambda g: (
            *(torch.randn(2, s, 16, generator=g) for s in (3, 5, 4)),
            torch.ones(2, 9, dtype=torch.bool),
        ),
    ),
    "DLRM-type": bench_compiler.Case(
        partial(bench_compiler.ClickModel, 3, 10, 8, 5),
        lambda g: (torch.randn(6, 5, generator=g), torch.randint(10, (6, 3), generator=g)),
    ),
    "the article's model": bench_compiler.CASES["the article's model"],
}


def _rewrite(graph, inputs):
    rewrite(graph, only_faster=False)
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_concat_linear, "OUT", 8)
    mixes = {
        name: tuple((4, *(min(t, 3) for t in rows), d // 64) for _, *rows, d in shapes)
        for name, shapes in bench_concat_linear.MIXES.items()
    }
    monkeypatch.setattr(bench_concat_linear, "MIXES", mixes)
    monkeypatch.setattr(bench_contrastive_loss, "PAIRS", 70)
    monkeypatch.setattr(bench_contrastive_loss, "FEATURES", 24)
    monkeypatch.setattr(bench_compiler, "CASES", SMALL)
    monkeypatch.setattr(bench_group_norm, "SHAPES", ((2, 32, 3, 3), (2, 64, 2, 2)))
    ranked = {name: (6, (5, 3, 2), 2, 4) for name in bench_lowrank_fusion.SHAPES}
    monkeypatch.setattr(bench_lowrank_fusion, "SHAPES", ranked)
    monkeypatch.setattr(bench_weighted_fusion, "SHAPES", {"vectors": (6, 5), "sequences": (6, 3, 5)})
    small = {
        name: replace(mix, queries=7, keys=tuple(7 + k % 3 for k in mix.keys), heads=2, depth=16)
        for name, mix in bench_cross_attention.MIXES.items()
    }
    monkeypatch.setattr(bench_cross_attention, "MIXES", small)
    scaled = {
        name: replace(layout, keys=40 if layout.by else 48, batch=2, heads=2, queries=7, depth=16)
        for name, layout in bench_cross_attention_scaling.LAYOUTS.items()
    }
    monkeypatch.setattr(bench_cross_attention_scaling, "LAYOUTS", scaled)
    streams = (("image", 7, 6), ("audio", 9, 5), ("sensor", 3, 4))
    job = bench_training_step.Job(streams, batch=4, dim=32, heads=2, queries=5, layers=2, classes=3)
    monkeypatch.setattr(bench_training_step, "JOB", job)
    monkeypatch.setattr(bench_training_step, "multiplies", lambda dtype, device: True)
    really = torch.compile

    def compile_(call, backend="inductor", **options):  # as it is, or rewritten and not compiled further
        return really(call, backend=_rewrite, **options) if backend is bench_compiler.mmfast else call

    monkeypatch.setattr(torch, "compile", compile_)
    yield
    if dist.is_initialized():  # by the trainer, for this process alone; other tests begin their own
        dist.destroy_process_group()


@pytest.mark.parametrize(("suite", "at"), WORKS)
def test_every_variant_computes_what_it_is_measured_for(tiny, suite, at):
    work = replace(suite.works("cpu")[at], weigh=None)  # a fresh process would weigh the full size
    result = measure(work, seconds=0, rounds=(1, 1))
    peers = list(result.seconds)[1:]
    assert peers == PEERS[suite] or (
        suite is FEWER and peers == [p for p in PEERS[suite] if p in peers] != []
    )
    assert set(work.required) <= set(peers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "graph",
    [
        thresholds._dense_layer(6, 4, 3),
        thresholds._broadcast_source(2, 3, 4),
        thresholds._two_streams(2, 2, 3, 4, 8),
        thresholds._one_stream(2, 8, 2, 3, 5),
        thresholds._written_out(2, 8, 3, 5),
        thresholds._pairs_loss(5, 8),
    ],
    ids=lambda graph: graph.name,
)
def test_every_graph_that_finds_a_threshold_is_replaced(monkeypatch, graph, dtype):
    monkeypatch.setattr(thresholds, "graphs", lambda: [graph])
    monkeypatch.setattr(thresholds, "mmfast", torch._dynamo.lookup_backend("aot_eager"))
    (work,) = [work for work in thresholds.works("cpu") if str(work).endswith(dtype)]
    assert work.name.endswith("left by the table") != bool(work.required)
    measure(replace(work, variants={"mmfast": work.variants["mmfast"]}), seconds=0, rounds=(1, 1))


@pytest.mark.parametrize(
    "suite",
    [
        bench_concat_linear,
        bench_contrastive_loss,
        bench_cross_attention,
        bench_lowrank_fusion,
        bench_weighted_fusion,
    ],
)
def test_every_backend_of_a_gpu_is_a_variant_chosen_or_not(monkeypatch, suite):
    ready = {"cpu": "it is for cpu tensors", "triton": "ready", "cuda": "ready", "reference": "ready"}
    monkeypatch.setattr(ops, "available", lambda op, device: ready)
    for chosen, others in (("reference", ["triton", "cuda"]), ("triton", ["cuda"])):
        monkeypatch.setattr(tune, "choose", lambda op, device, chosen=chosen: chosen)
        for work in suite.works("cuda"):
            first = [name for name in work.variants if name.startswith("mmfast")]
            assert first == [f"mmfast {name}" for name in (chosen, *others)]
            assert first == list(work.variants)[: len(first)], "ours, to which the others are compared"


def test_every_peer_of_cross_attention_does_some_work_and_every_promise_is_measured():
    works = bench_cross_attention.works("cpu")
    assert {peer for work in works for peer in work.variants} >= set(PEERS[bench_cross_attention])
    assert sum(len(work.required) for work in works) == 2 * (2 * 3 + 2 * 2 + 4)


def test_the_training_steps_take_the_weights_to_the_same_place(tiny, monkeypatch):
    """At the rate of 0 that is measured a step could go anywhere: here it is not 0."""
    job = bench_training_step.JOB
    monkeypatch.setattr(bench_training_step, "OPTIONS", TrainerConfig(lr=1e-2, warmup=0, max_steps=10**9))
    steps = [
        bench_training_step.ours(job, "cpu", precision="fp64"),
        bench_training_step.stock(job, "cpu", dtype=torch.float64),
    ]
    for seed in range(4):
        (batch,) = bench_training_step.inputs(job, "cpu", seed)
        batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        losses = [float(step(batch)[0].detach()) for step in steps]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_half_of_the_training_steps_are_absent():
    (batch,) = bench_training_step.inputs(bench_training_step.JOB, "cpu", 0)
    whole = [steps for _, steps, _ in bench_training_step.JOB.streams]
    assert batch["lengths"].sum(0).tolist() == [4 * steps for steps in whole]
    assert batch["lengths"].amax(0).tolist() == whole  # what a batch is padded to
    assert 0 < (~batch["present"]).sum() and batch["present"].sum(1).min() >= 2


TINY = """
import torch
from mmfast.bench.measure import Work

def works():
    return [Work("work", {"ours": torch.exp, "peer": torch.exp}, lambda seed: (torch.ones(3) * seed,), torch.exp)]

def test_tiny(measured, variant, rounds, benchmark):
    rounds(benchmark)
"""


def bench(folder, *options, suite=TINY):
    (folder / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (folder / "bench_tiny.py").write_text(suite)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--benchmark-only",
        "--seconds",
        "0",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_XDIST_WORKER", None)  # under xdist pytest-benchmark measures nothing
    return subprocess.run(
        [*command, *options], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_pytest_benchmark_holds_the_recorded_rounds(tmp_path):
    done = bench(tmp_path, "--results", "kept", "--benchmark-json", "all.json")
    assert done.returncode == 0, done.stdout
    (path,) = (tmp_path / "kept").iterdir()
    (result,) = Record.load(path).results
    held = {b["params"]["variant"]: b for b in json.loads((tmp_path / "all.json").read_text())["benchmarks"]}
    for variant, seconds in result.seconds.items():
        assert held[variant]["stats"]["data"] == pytest.approx(seconds)
        assert held[variant]["extra_info"]["over_ours"]["median"] == result.ratio(variant).median
    low, median, high = result.ratio("peer")
    assert f"{median:.2f}x ({low:.2f}-{high:.2f})" in done.stdout


def test_a_part_of_a_run_is_shown_and_not_recorded(tmp_path):
    done = bench(tmp_path, "-k", "peer")
    assert done.returncode == 0 and "not recorded: a part was left out" in done.stdout


def test_bfloat16_is_skipped_by_name_where_pytorch_only_loops_over_it(tmp_path):
    suite = TINY.replace("torch.exp)]", "torch.exp, dtype=torch.bfloat16)]")
    suite += "\ntorch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False\n"
    done = bench(tmp_path, "-rs", suite=suite)
    assert done.returncode == 0 and "2 skipped" in done.stdout
    assert "no instructions for products of torch.bfloat16 on this cpu" in done.stdout


def weighed(variant):
    (work,) = (w for w in bench_concat_linear.works("cpu") if str(w) == "pooled relu forward float32")
    return work.weigh(variant)


def test_concat_linear_never_holds_the_concatenation():
    if ops.available("concat_linear", "cpu")["cpu"] != "ready":
        pytest.skip("no native code here: plain PyTorch concatenates")
    output, concatenation = (32 * 196 * width * 4 for width in (768, 768 + 512 + 128))
    assert weighed("mmfast cpu") < output + concatenation / 10
    assert weighed("eager") > output + 0.9 * concatenation
