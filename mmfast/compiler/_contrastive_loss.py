"""Finds the cross-entropies, both ways, of a whole matrix of logits: ``contrastive_loss``."""

import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from mmfast.compiler._graph import (
    Body,
    Make,
    argument,
    hint,
    name,
    number,
    same,
    shape,
    transposed,
    value,
    widens,
)
from mmfast.compiler._match import Left, Match, unsound
from mmfast.ops import contrastive_loss

# Going over the matrix, forward and backward, takes as long as so many operations on each logit. On the CPU
# it is 900 to 1400 from 4,096 pairs on and half of that where the matrix stays in the caches, in any dtype.
PASSES = 1100.0

# In these ``arange`` has every target that a matrix of logits can have.
EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)

PLAIN = (
    ("weight", 2, None),
    ("size_average", 3, None),
    ("ignore_index", 4, -100),
    ("reduce", 5, None),
    ("label_smoothing", 7, 0.0),
)


@dataclass
class Logits:
    """``scale * a @ b.T + bias``, as it was written."""

    a: Any = None
    b: Any = None
    scales: list[tuple[str, Any]] = field(default_factory=list)  # "mul" or "div", by a tensor or a number
    bias: Node | None = None
    matrices: list[Node] = field(default_factory=list)  # the nodes that hold all logits
    passed: list[Node] = field(default_factory=list)  # the other ones

    def read_alike(self, other: "Logits") -> bool:
        """Whether both are made of the same tensors."""
        same_sides = (self.a, self.b, self.bias) == (other.a, other.b, other.bias)
        return same_sides and Counter(self.scales) == Counter(other.scales)


def find(body: Body, node: Node, claimed: set[Node]) -> Match | Left | None:
    """The match of a sum of two cross-entropies at ``node``, or why there is none; None for other nodes."""
    if name(node) != "add" or node.kwargs.get("alpha", 1) != 1:
        return None
    (one, factor, passed), (other, other_factor, more) = map(
        _weighed, (argument(node, 0, "input", "self"), argument(node, 1, "other"))
    )
    if name(one) != "cross_entropy" or name(other) != "cross_entropy":
        return None
    rows, columns = _logits(argument(one, 0, "input")), _logits(argument(other, 0, "input"), turned=True)
    if rows is None or columns is None:
        return None
    targets = [_diagonal(argument(loss, 1, "target"), shape(rows.a)[0]) for loss in (one, other)]
    reductions = {argument(loss, 6, "reduction", default="mean") for loss in (one, other)}
    why = ""
    if not rows.read_alike(columns):
        why = "its halves are not of the rows and of the columns of one matrix"
    elif not all(targets):
        why = "its targets are not known to be the diagonal"
    elif any(
        argument(loss, i, key, default=usual) != usual for loss in (one, other) for key, i, usual in PLAIN
    ):
        why = "it has weights, an index to ignore, smoothed labels or arguments of old"
    elif factor != other_factor or reductions not in ({"mean"}, {"sum"}):
        why = "its halves are not weighed alike"
    if why:
        return Left("contrastive_loss", node, why)

    pair = Make(contrastive_loss, (rows.a, rows.b, _product(rows), rows.bias))
    loss = Make(operator.getitem, (pair, 0))
    if reductions == {"mean"}:
        loss = Make(torch.div, (loss, Make(operator.getitem, (pair, 1))))
    loss = Make(torch.mul, (loss, 2.0 * factor))  # the op takes half of each
    if node.meta["example_value"].dtype.itemsize < 4:
        loss = Make(torch.Tensor.to, (loss, node.meta["example_value"].dtype))
    matrices = [*rows.matrices, *columns.matrices]
    pairs, features = map(hint, shape(rows.a))
    match = Match(
        op="contrastive_loss",
        node=node,
        last=node,
        call=loss,
        fused=frozenset(
            (
                node,
                one,
                other,
                *passed,
                *more,
                *matrices,
                *rows.passed,
                *columns.passed,
                *targets[0],
                *targets[1],
            )
        ),
        spared=dict.fromkeys(matrices, "the matrix of logits"),
        dtype=rows.matrices[-1].meta["example_value"].dtype,
        flops=2.0 * pairs * pairs * features,
        saved=pairs * pairs * (PASSES - 2.0 * features),  # since the op makes the product once more
        what="the matrix of logits and its cross-entropies",
    )
    why = unsound(body, match)
    return Left("contrastive_loss", node, why) if why else match


def _weighed(node: Any) -> tuple[Any, float, list[Node]]:
    """Of ``number * loss`` or ``loss / number``: the loss, its factor, and the nodes passed."""
    factor, passed = 1.0, list[Node]()
    while name(node) in ("mul", "div"):
        inner, by = _operands(node)
        if not isinstance(by, int | float) or by == 0:
            break
        factor = factor * by if name(node) == "mul" else factor / by
        passed.append(node)
        node = inner
    return node, factor, passed


def _logits(node: Any, turned: bool = False) -> Logits | None:
    """What ``node``, or if ``turned`` its transposed, is made of; None where that is no matrix of logits."""
    found = Logits()
    while value(node) is not None and len(shape(node)) == 2:
        found.matrices.append(node)
        kind = name(node)
        inner, by = _operands(node)
        if kind in ("matmul", "linear"):
            found.a, found.b = (
                _unscaled(found, inner),
                _unscaled(found, by if kind == "linear" else _right(found, by)),
            )
            if turned:
                found.a, found.b = found.b, found.a
            bare = kind == "matmul" or argument(node, 2, "bias") is None
            return found if bare and value(found.a) is not None and value(found.b) is not None else None
        if _scales(node, by):
            found.scales.append((kind, by))
        elif kind == "add" and _is_bias(node, by) and not (found.scales or found.bias):
            found.bias = by
        elif transposed(node) is not None:
            inner, turned = transposed(node), not turned
        elif not widens(node, inner):
            return None
        node = inner
    return None


def _right(found: Logits, node: Any) -> Node | None:
    found.passed.append(node)
    return transposed(node)


def _unscaled(found: Logits, side: Any) -> Any:
    """``side`` without a factor of all of it, which goes to the scale."""
    while _scales(side, by := _operands(side)[1]):
        found.scales.append((name(side), by))
        found.passed.append(side)
        side = _operands(side)[0]
    return side


def _operands(node: Any) -> tuple[Any, Any]:
    """The two operands of a call; of a sum or product with one number, the number as the second."""
    if not name(node):
        return None, None
    one, other = argument(node, 0, "input", "self"), argument(node, 1, "other", "mat2", "weight")
    commutes = name(node) in ("add", "mul")
    return (other, one) if commutes and _is_one_number(one) else (one, other)


def _scales(node: Any, by: Any) -> bool:
    return name(node) in ("mul", "div") and _is_one_number(by) and bool(by != 0)


def _is_bias(node: Node, by: Any) -> bool:
    return isinstance(by, Node) and _is_one_number(by) and bool(node.kwargs.get("alpha", 1) == 1)


def _is_one_number(x: Any) -> bool:
    if value(x) is not None:
        return len(shape(x)) == 0 or same(shape(x), (1,))
    return isinstance(x, int | float)


def _product(logits: Logits) -> Make | Node:
    """The scale as a tensor."""
    numbers = [by if kind == "mul" else 1 / by for kind, by in logits.scales if not isinstance(by, Node)]
    a = logits.a.meta["example_value"]
    wide = torch.promote_types(a.dtype, torch.float32)
    scale: Any = None
    for kind, by in logits.scales:
        if isinstance(by, Node):
            if by.meta["example_value"].dtype.itemsize < wide.itemsize:  # one rounding would shift all logits
                by = Make(torch.Tensor.to, (by, wide))
            by = by if kind == "mul" else Make(torch.reciprocal, (by,))
            scale = by if scale is None else Make(torch.mul, (scale, by))
    if scale is None:
        options = {"device": a.device, "dtype": wide}
        return Make(torch.full, ((), math.prod(numbers, start=1.0)), options)
    return Make(torch.mul, (scale, math.prod(numbers))) if numbers else scale


def _diagonal(target: Any, pairs: Any) -> list[Node]:
    """The nodes that make ``target``, if it is 0, 1, 2, ... up to the number of pairs."""
    made = [target]
    while name(target) == "to" and target.meta["example_value"].dtype == torch.int64:
        target = argument(target, 0, "self")
        made.append(target)
    if name(target) != "arange" or target.meta["example_value"].dtype not in EXACT:
        return []
    if len(target.args) == 1 and "end" not in target.kwargs:
        start, end = 0, target.args[0]
    else:
        start, end = argument(target, 0, "start", default=0), argument(target, 1, "end")
    step = argument(target, 2, "step", default=1)
    return made if same((number(start), number(end), number(step)), (0, pairs, 1)) else []
