"""Finds ``linear(cat([...], -1))`` with what stands between and behind, and makes ``concat_linear`` of it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    off,
    same,
    shape,
    sizes,
    transposed,
    value,
)
from mmfast.compiler._match import Left, Match, along, is_cat, parts, unsound
from mmfast.ops import concat_linear

ACTIVATIONS = ("relu", "gelu", "silu")


@dataclass(frozen=True)
class Stage:
    """A layer and so much of what follows it, up to ``last``."""

    last: Node
    fused: tuple[Node, ...]
    bias: Node | None
    activation: str = "none"
    gate: Node | None = None
    residual: Node | None = None

    def then(self, *nodes: Node, **changes: Any) -> "Stage":
        """With ``nodes`` too, whose last one gives the output."""
        return replace(self, last=nodes[-1], fused=(*self.fused, *nodes), **changes)


def find(body: Body, node: Node, claimed: set[Node]) -> Match | Left | None:
    """The longest match of the layer at ``node``, or why there is none; None where the pattern is not."""
    layer = _layer(node)
    if layer is None:
        return None
    x, weight, bias, passed = layer

    norm, drops = None, False
    while name(x) == "dropout" or (norm is None and _norm(x)):
        norm = x if _norm(x) else norm
        drops |= name(x) == "dropout" and not off(x)
        passed = [*passed, x]
        x = argument(x, 0, "input")
    if not is_cat(x):
        return None
    if drops:
        return Left("concat_linear", node, "there is dropout in between")
    dim, wide = along(x), shape(x)
    if dim != len(wide) - 1:
        return Left(
            "concat_linear", node, f"the concatenation is along dimension {dim}, not along the features"
        )
    joined, cats = parts(x, dim)
    if len(joined) == 1:
        return Left("concat_linear", node, "a concatenation of 1 source")
    dtype = x.meta["example_value"].dtype
    for source in joined:
        known = value(source)
        if known is None or known.dtype != dtype or known.dim() != len(wide):
            return Left("concat_linear", node, "the sources differ in dtype or in their number of dimensions")
    if norm is not None and dtype != node.meta["example_value"].dtype:
        return Left("concat_linear", node, "autocast would round the sources before the norm")

    sources, paths = _cover([_peel(source) for source in joined], wide[:-1])
    passed = [*passed, *cats, *paths]
    normed = {} if norm is None else {
        "norm_eps": float(argument(norm, 4, "eps", default=1e-5)),
        "norm_weight": argument(norm, 2, "weight"),
        "norm_bias": argument(norm, 3, "bias"),
    }  # fmt: skip
    rows, features = math.prod(map(hint, wide[:-1])), hint(node.meta["example_value"].shape[-1])
    elements = sum(math.prod(map(hint, shape(source))) for source in sources)
    why = ""
    for stage in reversed(list(_stages(Stage(node, (node,), bias), claimed))):
        options = normed | {"activation": stage.activation, "residual": stage.residual, "gate": stage.gate}
        pooled = sum(not same(shape(source)[:-1], wide[:-1]) for source in sources)
        match = Match(
            op="concat_linear",
            node=node,
            last=stage.last,
            call=Make(
                concat_linear,
                (sources, weight, stage.bias),
                {k: v for k, v in options.items() if v not in (None, "none")},
            ),
            fused=frozenset((*passed, *stage.fused)),
            spared=({norm: "the norm's output"} if norm else {}) | {x: "the concatenation"},
            dtype=stage.last.meta["example_value"].dtype,
            flops=2.0 * features * rows * hint(wide[-1]),
            saved=2.0 * features * (rows * hint(wide[-1]) - elements),
            what=_in_words(stage, len(sources), pooled, norm is not None),
        )
        why = unsound(body, match)
        if not why:
            return match
    return Left("concat_linear", node, why)


def _layer(node: Node) -> tuple[Node, Any, Node | None, list[Node]] | None:
    """Of ``x @ weight.T + bias`` in one node: x, weight, bias and the nodes that are passed on the way."""
    kind = name(node)
    bias = None
    if value(node) is None:
        return None
    if kind == "linear":
        x, weight, bias = (argument(node, i, key) for i, key in enumerate(("input", "weight", "bias")))
        plain = value(x) is not None and value(weight) is not None and len(shape(weight)) == 2
        return (x, weight, bias, []) if plain else None
    if kind == "matmul":
        x, other = argument(node, 0, "input"), argument(node, 1, "other", "mat2")
    elif kind == "addmm" and node.kwargs.get("alpha", 1) == 1 and node.kwargs.get("beta", 1) == 1:
        bias, x, other = (argument(node, i, key) for i, key in enumerate(("input", "mat1", "mat2")))
    else:
        return None
    if not isinstance(x, Node) or value(other) is None or len(shape(other)) != 2:
        return None
    weight = transposed(other)
    return (x, Make(torch.t, (other,)), bias, []) if weight is None else (x, weight, bias, [other])


def _norm(node: Any) -> bool:
    """Whether ``node`` is a LayerNorm over the last dimension."""
    if name(node) != "layer_norm" or len(argument(node, 1, "normalized_shape")) != 1:
        return False
    return isinstance(argument(node, 4, "eps", default=1e-5), int | float)


def _peel(node: Node) -> tuple[Node, list[Node]]:
    """What ``node`` is broadcast from, its features untouched, and the nodes that broadcast it."""
    inner: Any = argument(node, 0, "input", "self") if isinstance(node, Node) else None
    kind, known = name(node), value(inner)
    if known is None or known.dim() == 0 or not same(known.shape[-1], shape(node)[-1]):
        return node, []
    if kind in ("expand", "expand_as"):
        simple = True  # by what it means
    elif kind == "repeat":
        times = sizes(node)[-known.dim() :]
        simple = all(
            same(n, 1) or same(size, 1) for n, size in zip(map(number, times), known.shape, strict=True)
        )
    elif kind == "repeat_interleave":
        dim = argument(node, 2, "dim")
        simple = dim is not None and same(known.shape[dim], 1)
    else:
        simple = False
    if not simple:
        return node, []
    source, path = _peel(inner)
    return source, [node, *path]


def _cover(peeled: list[tuple[Node, list[Node]]], lead: Sequence[Any]) -> tuple[list[Node], list[Node]]:
    """Sources that together broadcast to ``lead``, as small as that allows, and the nodes passed."""

    def missing() -> bool:
        return any(
            all(len(shape(s)) - 1 < d or not same(shape(s)[-1 - d], lead[-d]) for s, _ in peeled)
            for d in range(1, len(lead) + 1)
        )

    whole: list[tuple[Node, list[Node]]] = [
        (path[0], []) if path else (source, []) for source, path in peeled
    ]
    for i in sorted(range(len(peeled)), key=lambda i: hint(shape(peeled[i][0])[-1])):
        if not missing():
            break
        peeled[i] = whole[i]  # the narrowest first: it costs least to multiply at its full size
    return [source for source, _ in peeled], [node for _, path in peeled for node in path]


def _stages(stage: Stage, claimed: set[Node]) -> Iterator[Stage]:
    """The layer alone, then with one more step of its epilogue each."""
    yield stage
    users = list(stage.last.users)
    if len(users) != 1 or users[0] in claimed:
        return
    user, y = users[0], stage.last
    kind = name(user)
    following: Stage | None = None
    fresh = stage.activation == "none" and stage.gate is None
    if kind in ACTIVATIONS and fresh and user.kwargs.get("approximate", "none") == "none":
        following = stage.then(user, activation=kind)
    elif kind in ("chunk", "split") and fresh:
        following = _swiglu(stage, user)
    elif kind == "mul" and stage.gate is None:
        other = _other(user, y)
        if name(other) == "tanh":
            following = stage.then(other, user, gate=argument(other, 0, "input"))
    elif kind == "add" and user.kwargs.get("alpha", 1) == 1:
        other = _other(user, y)
        if value(other) is not None:
            vector = same(shape(other), shape(y)[-1:])
            is_bias = vector and fresh and stage.bias is None
            yield from (
                _stages(stage.then(user, bias=other), claimed)
                if is_bias
                else [stage.then(user, residual=other)]
            )
    elif off(user):
        following = stage.then(user)
    if following is not None:
        yield from _stages(following, claimed)


def _other(node: Node, y: Node) -> Any:
    """The operand of a sum or product that is not ``y``."""
    operands = [argument(node, 0, "input", "self"), argument(node, 1, "other")]
    return next((operand for operand in operands if operand is not y), None)


def _swiglu(stage: Stage, halves: Node) -> Stage | None:
    """``silu(first half) * second half`` of the features."""
    dim, features = argument(halves, 2, "dim", default=0), shape(stage.last)[-1]
    picked = {argument(user, 1): user for user in halves.users if name(user) == "getitem"}
    if dim % len(shape(stage.last)) != len(shape(stage.last)) - 1 or len(halves.users) != 2:
        return None
    if set(picked) != {0, 1} or not all(same(2 * shape(half)[-1], features) for half in picked.values()):
        return None
    if any(len(half.users) != 1 for half in picked.values()):
        return None
    (silu,), (product,) = picked[0].users, picked[1].users
    if name(silu) != "silu" or list(silu.users) != [product] or name(product) != "mul":
        return None
    return stage.then(halves, *picked.values(), silu, product, activation="swiglu")


def _in_words(stage: Stage, sources: int, pooled: int, norm: bool) -> str:
    words = [f"{sources} sources" + (f", {pooled} of them broadcast" if pooled else "")]
    words += ["norm"] * norm + ([stage.activation] if stage.activation != "none" else [])
    words += ["gate"] * (stage.gate is not None) + ["residual"] * (stage.residual is not None)
    return ", ".join(words)
