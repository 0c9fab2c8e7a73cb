"""The compiler's patterns in small graphs of several sizes, each replaced, against Inductor alone.

What ``"compiler"`` in ``mmfast/ops/table.json`` says is read off this table: it names the least size from
which a graph gains. Where the committed table has a graph replaced, a ratio of 1 is wanted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.fx import GraphModule

from mmfast.bench.measure import Call, Result, Work, forward_backward
from mmfast.compiler import _worth, mmfast, rewrite


@dataclass(frozen=True)
class Graph:
    """A function of tensors of ``shapes`` that one match replaces, and what the table decides by."""

    name: str
    op: str
    function: Call
    shapes: Sequence[tuple[int, ...]]
    flops: float
    saved: float = 0.0
    head: int = 0  # of an attention for which PyTorch has a kernel


def dense_layer(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """[N, D], [N, E], [O, D + E] -> [N, O]."""
    return F.linear(torch.cat([x, y], -1), weight)


def broadcast_layer(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """[B, T, D], [B, E], [O, D + E] -> [B, T, O]."""
    return F.linear(torch.cat([x, y[:, None].expand(-1, x.shape[1], -1)], -1), weight)


def two_streams(query: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor) -> Tensor:
    """[B, H, L, D], twice [B, H, S, D] each -> [B, H, L, D]."""
    return F.scaled_dot_product_attention(query, torch.cat([k1, k2], 2), torch.cat([v1, v2], 2))


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, L, D], [B, S, D] twice -> [B, L, D]."""
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


def pairs_loss(a: Tensor, b: Tensor) -> Tensor:
    """[N, E] twice -> []."""
    logits, target = 20 * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).t(), torch.arange(len(a))
    target = target.to(a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def graphs() -> list[Graph]:
    """Every pattern at several sizes."""
    layers = [
        *(_dense_layer(rows) for rows in (128, 512, 2048, 8192)),
        *(_broadcast_source(batch) for batch in (1, 4, 16, 64)),
    ]
    attentions = [
        *(_two_streams(batch) for batch in (1, 4, 16)),
        *(_one_stream(batch, 64) for batch in (1, 4, 16, 64)),
        *(_one_stream(batch, 128, heads=4) for batch in (1, 4, 16)),
        *(_written_out(8 * batch, 64) for batch in (1, 4, 16, 64)),
        *(_written_out(batch, 128) for batch in (4, 16, 64)),
        *(_written_out(batch, 256) for batch in (1, 4, 16)),
    ]
    losses = [(2048, 128), (4096, 128), (4096, 256), (4096, 512), (8192, 512)]
    return [*layers, *attentions, *(_pairs_loss(*size) for size in losses)]


def _dense_layer(rows: int, width: int = 256, out: int = 512) -> Graph:
    shapes = (rows, width), (rows, width), (out, 2 * width)
    return Graph("dense layer", "concat_linear", dense_layer, shapes, 4.0 * rows * width * out)


def _broadcast_source(batch: int, steps: int = 64, width: int = 128) -> Graph:
    shapes = (batch, steps, width), (batch, width), (width, 2 * width)
    once = 2.0 * batch * width * width  # a row of each sample, times a block of the weight
    saved = (steps - 1) * once
    return Graph("broadcast source", "concat_linear", broadcast_layer, shapes, 2 * steps * once, saved)


def _two_streams(batch: int, heads: int = 8, queries: int = 64, keys: int = 128, depth: int = 64) -> Graph:
    shapes = (batch, heads, queries, depth), *[(batch, heads, keys, depth)] * 4
    flops = 8.0 * batch * heads * queries * keys * depth
    return Graph("two streams", "cross_attention", two_streams, shapes, flops)


def _one_stream(batch: int, depth: int, heads: int = 8, queries: int = 196, keys: int = 400) -> Graph:
    shapes = (batch, heads, queries, depth), *[(batch, heads, keys, depth)] * 2
    flops = 4.0 * batch * heads * queries * keys * depth
    attention = F.scaled_dot_product_attention
    return Graph(f"one stream, {depth} features", "cross_attention", attention, shapes, flops, head=depth)


def _written_out(batch: int, depth: int, queries: int = 196, keys: int = 400) -> Graph:
    shapes = (batch, queries, depth), *[(batch, keys, depth)] * 2
    flops, name = 4.0 * batch * queries * keys * depth, f"the same written out, {depth} features"
    return Graph(name, "cross_attention", written_out, shapes, flops, head=depth)


def _pairs_loss(rows: int, features: int) -> Graph:
    shapes = (rows, features), (rows, features)
    flops, saved = (float(rows) * rows * each for each in (2 * features, 1100 - 2 * features))
    return Graph(f"CLIP's loss, {features} features", "contrastive_loss", pairs_loss, shapes, flops, saved)


def works(device: str | None = None) -> list[Work]:
    """Every graph with its backward pass, in float32 and bfloat16, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        for graph in graphs():
            size = (graph.op, torch.device(device), dtype, graph.flops, graph.saved, graph.head)
            left = _worth.why_not(*size, written=graph.function is written_out)
            small = f"{graph.saved:.2g} saved" if graph.saved else f"{graph.flops:.2g} operations"
            made.append(
                Work(
                    name=f"{graph.name}, {small}{', left by the table' if left else ''}",
                    variants={
                        "mmfast": _compiled(graph.function, _replaced),
                        "inductor": _compiled(graph.function, "inductor"),
                    },
                    inputs=functools.partial(_inputs, graph, dtype, device),
                    reference=forward_backward(graph.function),
                    dtype=dtype,
                    device=device,
                    flops=3 * graph.flops,
                    required={} if left else {"inductor": 1.0},
                    sets=1,
                )
            )
    return made


def test_compiler_thresholds(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds."""
    rounds(benchmark)


def _replaced(module: GraphModule, example_inputs: Sequence[Tensor]) -> Any:
    (finding,) = rewrite(module, only_faster=False)
    assert finding.replaced, finding
    return mmfast(module, example_inputs)


def _compiled(function: Call, backend: Any) -> Call:
    """Compiled when it is first called, its backward included."""
    call = functools.cache(lambda: forward_backward(torch.compile(function, backend=backend, dynamic=False)))
    return lambda *args: call()(*args)


def _inputs(graph: Graph, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    """The output's gradient, and what the graph takes, of deviation 1 over a weight's or a head's width."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in graph.shapes]
    if graph.op == "concat_linear":
        made[-1] /= math.sqrt(made[-1].shape[-1])
    grad = torch.randn(graph.function(*made).shape, generator=generator)
    return grad.to(device, dtype), *(t.to(device, dtype).requires_grad_() for t in made)
