"""What a pattern says of a node: a call that may take its place, or why there is none."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from mmfast.compiler._graph import Body, Make, argument, name, same, shape, value


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
    flops: float  # as it was written, a multiplication and an addition counted as two
    saved: float  # those of them that the op does not make
    what: str  # in words


def unsound(body: Body, match: Match) -> str:
    """Why ``match`` would not be exact; empty if it is."""
    floats = [node for node in match.fused if (known := value(node)) is None or known.is_floating_point()]
    if not body.one_mode(floats):
        return "autocast or grad mode changes on the way"
    wanted = match.last.meta["example_value"]
    # The op keeps for its backward what a concatenation had copied: then no later edit is harmless either.
    until = None if wanted.requires_grad else match.last
    for node in match.fused:
        for read in node.all_input_nodes:
            since = read if read in match.fused else node
            if body.edited_after(read, since, until, match.fused):
                return f"{read} is edited in place"
    try:
        got = body.evaluate(match.call, match.last)
    except (ValueError, TypeError) as error:  # the op's own checks
        return str(error)
    assert isinstance(got, Tensor)
    if got.dtype != wanted.dtype or not same(got.shape, wanted.shape):
        return f"it gives {wanted.dtype} {list(wanted.shape)}, the op {got.dtype} {list(got.shape)}"
    if not same(got.stride(), wanted.stride()):
        return f"its output has strides {list(wanted.stride())} in memory, the op's {list(got.stride())}"
    return ""


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
