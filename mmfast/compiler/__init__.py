"""``torch.compile(model, backend="mmfast")``: finds what the ops do better in a model that nobody rewrote.

A graph as Dynamo captured it is searched before AOTAutograd and Inductor see it. What is found becomes a call
of a public op, so that gradients, autocast and dynamic shapes are the op's own; Inductor compiles the rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import Graph, GraphModule, Node

from mmfast.compiler import (
    _concat_linear,
    _contrastive_loss,
    _cross_attention,
    _multihead_attention,
    _worth,
)
from mmfast.compiler._graph import Body, Make, inner_graphs, storages, where, write
from mmfast.compiler._match import Left, Match

PATTERNS = (_concat_linear, _contrastive_loss, _cross_attention, _multihead_attention)


@dataclass(frozen=True)
class Finding:
    """A place where a pattern was found."""

    op: str
    where: str  # in the user's source
    replaced: bool
    why: str  # what was replaced, or why nothing was


def mmfast(
    module: GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: ``rewrite``, then Inductor with ``torch.compile``'s ``mode`` and ``options``."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    rewrite(module)
    patches = (list_mode_options(mode) if mode else {}) | {
        key.replace("-", "_"): v for key, v in (options or {}).items()
    }
    compiled: Any = compile_fx(module, example_inputs, config_patches=patches)
    return compiled


def rewrite(module: GraphModule, *, only_faster: bool = True) -> list[Finding]:
    """Replaces in a graph of Dynamo what an op computes as exactly, in checkpointed regions too.

    Args:
        module: is changed.
        only_faster: leave what the table of measurements does not call faster.

    Returns:
        What was found.
    """
    return _rewrite(Body(module.graph), only_faster)


def _rewrite(body: Body, only_faster: bool) -> list[Finding]:
    graph, claimed = body.graph, set[Node]()
    found: list[Match | Left] = []
    findings: list[Finding] = []
    for node in graph.nodes:
        if node.target is tag_activation_checkpoint:
            if any(body.edited_after(read, node, None, ()) for read in node.all_input_nodes):
                found.append(Left("checkpoint", node, "what the region reads is edited in place afterwards"))
            else:
                for inner in inner_graphs(node):
                    findings += _rewrite(Body(inner, body, node), only_faster)
        for pattern in PATTERNS:
            result = _find(pattern, body, node, claimed)
            if isinstance(result, Match):
                why = _worth.slower(result) if only_faster else ""
                if why:
                    result = Left(result.op, node, why)
                else:
                    claimed |= result.fused
            if result is not None:
                found.append(result)
    found = _spare(graph, found)
    matches = [match for match in found if isinstance(match, Match)]
    instead: dict[Node, Node] = {}
    given_back = set[str]()
    for match in sorted(matches, key=lambda match: body.order[match.last]):
        call = match.call
        if storages([match.last]) & body.given_back:
            # AOTAutograd makes one call of two alike, and then one tensor of two outputs
            if match.op in given_back and call.function is not torch.clone:
                call = Make(torch.clone, (call,))
            given_back.add(match.op)
        new = write(graph, call, match.last, instead)
        new.meta = match.last.meta.copy()
        match.last.replace_all_uses_with(new)
        instead[match.last] = new
    for node in sorted(
        {n for match in matches for n in match.fused}, key=body.order.__getitem__, reverse=True
    ):
        if not node.users:
            graph.erase_node(node)
    if matches and isinstance(graph.owning_module, GraphModule):
        graph.owning_module.recompile()
    return findings + [
        Finding(
            one.op, where(one.node), isinstance(one, Match), one.what if isinstance(one, Match) else one.why
        )
        for one in found
    ]


def _find(pattern: Any, body: Body, node: Node, claimed: set[Node]) -> Match | Left | None:
    try:
        result: Match | Left | None = pattern.find(body, node, claimed)
    except Exception as error:  # what only makes a model faster must not end its compilation
        return Left(pattern.__name__.rpartition("._")[2], node, f"it cannot be read: {error}")
    return result


def _spare(graph: Graph, found: list[Match | Left]) -> list[Match | Left]:
    """Leaves what is a part of another match, and what would not spare the memory that it is to spare."""
    while True:
        matches = [match for match in found if isinstance(match, Match)]
        inner = {node for match in matches for node in match.fused - {match.last}}
        matches = [match for match in matches if match.last not in inner]
        fused = {node for match in matches for node in match.fused}
        gone = {match.last for match in matches}
        for node in reversed(graph.nodes):
            if node in fused and all(user in gone for user in node.users):
                gone.add(node)
        kept = [
            _left_if_needed(one, gone) if isinstance(one, Match) and one in matches else one for one in found
        ]
        if kept == found:
            break
        found = kept
    return [
        Left(one.op, one.node, "it is a part of what another op replaces")
        if isinstance(one, Match) and one not in matches
        else one
        for one in found
    ]


def _left_if_needed(match: Match, gone: set[Node]) -> Match | Left:
    for node, what in match.spared.items():
        fewer = what == "the concatenation" and match.saved > 0  # that pays even where it is made
        if node not in gone and not fewer:
            return Left(match.op, match.node, f"{what} is used elsewhere")
    return match
