"""``torch.compile(model, backend="mmfast")``: finds what the ops do better in a model that nobody rewrote.

A graph as Dynamo captured it is searched before AOTAutograd and Inductor see it. What is found becomes a call
of a public op, so that gradients, autocast and dynamic shapes are the op's own; Inductor compiles the rest.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import GraphModule, Node

from mmfast.compiler import _concat_linear, _cross_attention
from mmfast.compiler._graph import Body, where, write
from mmfast.compiler._match import Left, Match
from mmfast.compiler._worth import slower, spared_enough

PATTERNS = (_concat_linear, _cross_attention)


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
    """The backend: ``rewrite``, then Inductor with ``mode`` and ``options`` as ``torch.compile`` takes them."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    rewrite(module)
    return compile_fx(module, example_inputs, config_patches=list_mode_options(mode) | (options or {}))


def rewrite(module: GraphModule, *, only_faster: bool = True) -> list[Finding]:
    """Replaces in a graph of Dynamo what an op computes as exactly, in checkpointed regions too.

    Args:
        module: is changed.
        only_faster: leave what the table of measurements does not call faster.

    Returns:
        What was found, in the order in which it is computed.
    """
    return [finding for inner in _bodies(module) for finding in _rewrite(inner, only_faster)]


def _bodies(module: GraphModule) -> Iterator[GraphModule]:
    """The graph and those of the regions in it that are checkpointed."""
    yield module
    for node in module.graph.nodes:
        if node.target is tag_activation_checkpoint:
            yield from _bodies(getattr(module, node.args[0].target))


def _rewrite(module: GraphModule, only_faster: bool) -> list[Finding]:
    body, claimed = Body(module.graph), set[Node]()
    found: list[Match | Left] = []
    for node in module.graph.nodes:
        for pattern in PATTERNS:
            result = pattern.find(body, node, claimed)
            if isinstance(result, Match):
                why = slower(result) if only_faster else ""
                if why:
                    result = Left(result.op, node, why)
                else:
                    claimed |= result.fused
            if result is not None:
                found.append(result)
    found = _spare(module, found)
    matches = [match for match in found if isinstance(match, Match)]
    instead: dict[Node, Node] = {}
    for match in sorted(matches, key=lambda match: body.order[match.last]):
        new = write(module.graph, match.call, match.last, instead)
        new.meta = match.last.meta.copy()
        match.last.replace_all_uses_with(new)
        instead[match.last] = new
    for node in sorted({n for match in matches for n in match.fused}, key=body.order.__getitem__, reverse=True):
        if not node.users:
            module.graph.erase_node(node)
    if matches:
        module.recompile()
    return [
        Finding(one.op, where(one.node), isinstance(one, Match), one.what if isinstance(one, Match) else one.why)
        for one in found
    ]


def _spare(module: GraphModule, found: list[Match | Left]) -> list[Match | Left]:
    """Leaves what would not spare the memory that it is to spare, since somebody else reads it."""
    while True:
        matches = [match for match in found if isinstance(match, Match)]
        fused = {node for match in matches for node in match.fused}
        gone = {match.last for match in matches}
        for node in reversed(module.graph.nodes):
            if node in fused and all(user in gone for user in node.users):
                gone.add(node)
        kept = [_left_if_needed(one, gone) if isinstance(one, Match) else one for one in found]
        if kept == found:
            return found
        found = kept


def _left_if_needed(match: Match, gone: set[Node]) -> Match | Left:
    for node, what in match.spared.items():
        if node not in gone and not spared_enough(match, what):
            return Left(match.op, match.node, f"{what} is used elsewhere")
    return match
