"""Runs what ``mmfast.compiler`` makes of a graph, without Inductor behind it."""

import sys
from pathlib import Path

import torch
from torch._dynamo.backends.registry import lookup_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from check import assert_promised, check

from mmfast.compiler import rewrite

__all__ = ["assert_promised", "check", "counted", "rewritten"]


def rewritten(function, *, only_faster=False, **options):
    """``function`` as one rewritten graph that AOTAutograd runs, what was found in it, and the graphs.

    Dynamo may trace again after the backend was called: the last time counts.
    """
    found, graphs = [], []

    def keep(module, inputs):
        found[:] = rewrite(module, only_faster=only_faster)
        graphs[:] = [module]
        return lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=keep, **options), found, graphs


def counted(graphs, op):
    """How often ``op`` is called in ``graphs`` and the graphs inside them."""
    modules = [m for graph in graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    return sum(node.target is op for m in modules for node in m.graph.nodes)
