"""What a pattern says of a node: a call that may take its place, or why there is none."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from mmfast.compiler._graph import Body, Make, argument, name, nodes_of, same, shape, storages, value


@dataclass(frozen=True, eq=False)
class Left:
    """The pattern is there and stays as it is."""

    op: str
    node: Node
    why: str


@dataclass(frozen=True, eq=False)
class Match:
    """``call`` gives what ``last`` gave, and stands for all nodes of ``fused``."""

    op: str
    node: Node  # where the pattern was seen
    last: Node
    call: Make
    fused: frozenset[Node]
    spared: dict[Node, str]  # those of them whose memory is to be spared, with their names
    dtype: torch.dtype  # that the products are made in
    flops: float  # as it was written, a multiplication and an addition counted as two
    saved: float  # that the op does not make, or what takes as long as so many
    what: str  # in words
    keeps_output: bool = False  # for the backward
    ordinary: bool = False  # PyTorch has a kernel for it too, which is harder to beat
    written_out: bool = False  # as two products and a softmax
    head: int = 0  # features of a head, of an attention


def unsound(body: Body, match: Match) -> str:
    """Why ``match`` would not be exact; empty if it is."""
    floats = [node for node in match.fused if (known := value(node)) is None or known.is_floating_point()]
    if not body.one_mode(floats):
        return "autocast or grad mode changes on the way"
    if body.differentiates:
        return "gradients are taken inside the graph, and the op has no second derivative"
    if any(map(_hooks, (user for node in match.fused - {match.last} for user in node.users))):
        return "a hook waits for the gradient of a part of it"
    if body.recast & storages([*match.fused, *nodes_of(match.call)]):
        return "its shape, or whether it has a gradient, is changed in place"
    wanted = match.last.meta["example_value"]
    given = [node for node in nodes_of(match.call) if isinstance(node.meta.get("example_value"), Tensor)]
    if special := [node for node in given if value(node) is None]:
        return f"{special[0]} is a {type(special[0].meta['example_value']).__name__}, not a plain tensor"
    if unknown := [node for node in given if free_symbols(node.meta["example_value"]) - body.sizes]:
        return f"how large {unknown[0]} is only the data tell"
    if match.keeps_output and wanted.requires_grad and body.edited_after(match.last, match.last, None, ()):
        return "its output, which its backward needs, is edited in place"
    # The op keeps for its backward what a concatenation had copied: then no later edit is harmless either.
    until = None if wanted.requires_grad else match.last
    for node in match.fused:
        for read in node.all_input_nodes:
            since = read if read in match.fused else node
            if body.edited_after(read, since, until, match.fused):
                return f"{read} is edited in place"
    try:
        got = body.evaluate(match.call, match.last)
    except Exception as error:  # the op's own checks, and whatever else it has against these tensors
        return str(error)
    assert isinstance(got, Tensor)
    if got.device != wanted.device:
        return f"it moves from {got.device} to {wanted.device} on the way"
    if got.dtype != wanted.dtype or not same(got.shape, wanted.shape):
        return f"it gives {wanted.dtype} {list(wanted.shape)}, the op {got.dtype} {list(got.shape)}"
    if not same(got.stride(), wanted.stride()):
        return f"its output has strides {list(wanted.stride())} in memory, the op's {list(got.stride())}"
    return ""


def _hooks(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "register_hook"


def along(cat: Node) -> int:
    """The dimension of a concatenation, counted from the front."""
    dims = len(shape(cat))
    if name(cat) == "hstack":
        return min(dims - 1, 1)
    return int(argument(cat, 1, "dim", "axis", default=0)) % dims


def parts(cat: Node, dim: int) -> tuple[list[Node], list[Node]]:
    """The tensors that ``cat`` puts together along ``dim``, and the concatenations that do it."""
    found: list[Node] = []
    cats = [cat]
    for part in argument(cat, 0, "tensors"):
        if (
            is_cat(part)
            and along(part) == dim
            and len(part.users) == 1
            and len(shape(part)) == len(shape(cat))
        ):
            more, inner = parts(part, dim)
            found, cats = found + more, cats + inner
        else:
            found.append(part)
    return found, cats


def is_cat(node: Any) -> bool:
    """Whether ``node`` is a concatenation of a list that is written out."""
    return (
        name(node) in ("cat", "hstack")
        and value(node) is not None
        and isinstance(argument(node, 0, "tensors"), tuple | list)
    )
