"""``torch.compile(model, backend="mmfast")``: finds what the ops do better in a model that nobody rewrote.

A graph as Dynamo captured it is searched before AOTAutograd and Inductor see it. What is found becomes a call
of a public op, so that gradients, autocast and dynamic shapes are the op's own; Inductor compiles the rest.
"""

import logging
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

log = logging.getLogger(__name__)
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
    """The backend: ``rewrite_or_leave``, then Inductor with ``torch.compile``'s ``mode`` and ``options``."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    rewrite_or_leave(module)
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
    plans = _plan(Body(module.graph), only_faster, set())
    # An error ends this before anything is changed: all calls are written before the first one is used.
    written: list[dict[Node, Node]] = []
    try:
        for plan in plans:
            written.append({})
            _write(plan, written[-1])
        findings = [
            Finding(
                one.op,
                where(one.node),
                isinstance(one, Match),
                one.what if isinstance(one, Match) else one.why,
            )
            for plan in plans
            for one in plan.found
        ]
    except Exception:
        for plan in plans:
            for node in reversed(plan.body.graph.nodes):
                if node not in plan.body.order:
                    plan.body.graph.erase_node(node)
        raise
    for plan, instead in zip(plans, written, strict=True):
        _replace(plan, instead)
    return findings


def rewrite_or_leave(module: GraphModule) -> list[Finding]:
    """``rewrite``, or nothing and a warning: what only makes a model faster must not end its compilation."""
    try:
        return rewrite(module)
    except Exception as error:
        name = type(error).__name__
        log.warning(
            "a graph is compiled without mmfast, whose search ended with %s: %s", name, error, exc_info=True
        )
        return []


@dataclass(frozen=True)
class Plan:
    """What was found in a graph."""

    body: Body
    found: list[Match | Left]

    @property
    def matches(self) -> list[Match]:
        """What is to be replaced, in the order of the graph."""
        matches = [match for match in self.found if isinstance(match, Match)]
        return sorted(matches, key=lambda match: self.body.order[match.last])


def _plan(body: Body, only_faster: bool, seen: set[Graph]) -> list[Plan]:
    """Plans for the graphs inside ``body``, then for itself; none for those that were ``seen``."""
    plans, claimed = list[Plan](), set[Node]()
    found: list[Match | Left] = []
    for node in body.graph.nodes:
        if node.target is tag_activation_checkpoint:
            if any(body.edited_after(read, node, None, ()) for read in node.all_input_nodes):
                found.append(Left("checkpoint", node, "what the region reads is edited in place afterwards"))
            else:
                for inner in inner_graphs(node):
                    if inner not in seen:
                        seen.add(inner)
                        plans += _plan(Body(inner, body, node), only_faster, seen)
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
    return [*plans, Plan(body, _spare(body.graph, found))]


def _write(plan: Plan, instead: dict[Node, Node]) -> None:
    """Writes a call for each match, and into ``instead`` what it stands for."""
    given_back = set[str]()
    for match in plan.matches:
        call = match.call
        if storages([match.last]) & plan.body.given_back:
            # AOTAutograd makes one call of two alike, and then one tensor of two outputs
            if match.op in given_back and call.function is not torch.clone:
                call = Make(torch.clone, (call,))
            given_back.add(match.op)
        new = write(plan.body.graph, call, match.last, instead)
        new.meta = match.last.meta.copy()
        instead[match.last] = new


def _replace(plan: Plan, instead: dict[Node, Node]) -> None:
    graph, order = plan.body.graph, plan.body.order
    for node, new in instead.items():
        node.replace_all_uses_with(new)
    for node in sorted(
        {n for match in plan.matches for n in match.fused}, key=order.__getitem__, reverse=True
    ):
        if not node.users:
            graph.erase_node(node)
    if instead and isinstance(graph.owning_module, GraphModule):
        graph.owning_module.recompile()


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
