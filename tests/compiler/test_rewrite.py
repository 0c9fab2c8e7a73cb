"""Every graph of ``graphs.py``: what is made of it, and that outputs and gradients keep the one bound."""

import pytest
import torch
from graphs import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import check, counted, rewritten
from torch.nn import functional as F

from mmfast.ops import concat_linear, contrastive_loss, cross_attention

WIDTHS_MATTER = "heads_split_after_the_cat"  # how wide a head is must be a number
OPS = {
    "concat_linear": concat_linear,
    "contrastive_loss": contrastive_loss,
    "cross_attention": cross_attention,
}


def tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(shape):
        if shape[0] == "bool":
            mask = torch.rand(shape[1:], generator=generator) > 0.4
            mask[..., :1] = True  # a written-out softmax over nothing is nan
            return mask
        if shape[0] == "int":
            return torch.randint(1, 6, shape[1:], generator=generator)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {name: make(shape) for name, shape in shapes.items()}


def same_everywhere(case, **options):
    """Replaced or left as the case says, and as exact as the model that nobody rewrote."""
    call, found, graphs = rewritten(case.function, **options)
    draws = [
        tensors(case.shapes, seed) for seed in range(4)
    ]  # the model's own error may be next to none by luck
    check(call, case.function, draws, torch.float32, runs=1)
    assert tuple(f.op for f in found if f.replaced) == case.takes
    left = [f.why for f in found if not f.replaced]
    assert len(left) == len(case.leaves) and all(
        w in got for w, got in zip(case.leaves, left, strict=True)
    ), left
    assert [counted(graphs, op) for op in OPS.values()] == [case.takes.count(op) for op in OPS]
    assert all(f.where.startswith("graphs_") for f in found)


@pytest.mark.parametrize("name", CASES)
def test_what_is_replaced_and_that_nothing_changes(name):
    same_everywhere(CASES[name])


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.takes and name != WIDTHS_MATTER]
)
def test_with_every_size_dynamic(name):
    same_everywhere(CASES[name], dynamic=True)


@st.composite
def late_fusions(draw):
    """A composition of all that is looked through, with the layer written in any of its ways."""
    sources = draw(st.lists(st.sampled_from(["dense", "expand", "repeat", "vector"]), min_size=2, max_size=4))
    return (
        ["dense", *sources[1:]],
        draw(st.sampled_from(["linear", "matmul", "no bias"])),
        *(draw(st.booleans()) for _ in range(3)),
        draw(st.sampled_from([None, F.relu, F.gelu, F.silu])),
    )


@settings(max_examples=15)
@given(late_fusions())
def test_any_composition_is_replaced_by_one_call_without_a_cat(drawn):
    kinds, layer, norm, gated, residual, activation = drawn
    shapes = {
        f"s{i}": {"dense": (2, 3, i + 2), "vector": (i + 2,)}.get(k, (2, i + 2)) for i, k in enumerate(kinds)
    }
    depth = sum(shape[-1] for shape in shapes.values())
    shapes |= {"weight": (6, depth), "bias": (6,), "scale": (depth,), "gate": (1,), "residual": (2, 3, 6)}

    def function(weight, bias, scale, gate, residual_, **sources):
        broadcast = {
            "dense": lambda x: x,
            "expand": lambda x: x[:, None].expand(-1, 3, -1),
            "repeat": lambda x: x.unsqueeze(1).repeat(1, 3, 1),
            "vector": lambda x: x.expand(2, 3, -1),
        }
        x = torch.cat([broadcast[kind](x) for kind, x in zip(kinds, sources.values(), strict=True)], -1)
        x = F.layer_norm(x, x.shape[-1:], scale) if norm else x
        bias = None if layer == "no bias" else bias
        x = x @ weight.T + bias if layer == "matmul" else F.linear(x, weight, bias)
        x = x if activation is None else activation(x)
        x = gate.tanh() * x if gated else x
        return residual_ + x if residual else x

    arguments = {("residual_" if k == "residual" else k): v for k, v in tensors(shapes).items()}
    wanted = {"weight"} | {k for k in arguments if k[0] == "s" and k != "scale"}
    wanted |= {
        k
        for k, on in (("bias", layer != "no bias"), ("scale", norm), ("gate", gated), ("residual_", residual))
        if on
    }
    arguments = {k: v if k in wanted else v.detach() for k, v in arguments.items()}
    call, found, graphs = rewritten(function)
    dtype = torch.float64 if activation is F.relu else torch.float32  # relu's kink: see the op's page
    check(call, function, arguments, dtype, upstreams=8, runs=2)
    assert [f.replaced for f in found] == [True]
    (graph,) = graphs
    called = [node for node in graph.graph.nodes if node.op.startswith("call")]
    assert called[-1].target is concat_linear and not any(node.target is torch.cat for node in called)
