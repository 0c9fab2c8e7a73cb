"""Finds attention over concatenated keys and values, or under a key padding mask: ``cross_attention``."""

import math
import operator
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
    off,
    same,
    shape,
    sizes,
    storages,
    transposed,
    value,
    widens,
)
from mmfast.compiler._match import Left, Match, along, is_cat, parts, unsound
from mmfast.ops import cross_attention


@dataclass
class Attention:
    """``softmax(scale * query @ key.mT, where visible) @ value``, as it was written."""

    query: Any
    key: Any
    value: Any
    scale: float | None = None
    mask: Any = None  # True where a query sees a key
    hidden: bool = False  # the mask is True where it does not
    causal: bool = False
    passed: list[Node] = field(default_factory=list)
    watched: list[Node] = field(default_factory=list)  # of them, those that nobody else may read
    why: str = ""  # what keeps it from being the op


@dataclass
class Streams:
    """A tensor as a concatenation of ``pieces`` along its keys; ``groups`` query heads read one head."""

    pieces: list[Any]
    sizes: list[Any]
    passed: list[Node]
    cat: Node | None = None
    groups: int = 1

    def in_words(self, masked: bool) -> str:
        """As ``explain`` says it."""
        return f"{len(self.pieces)} stream{'s' * (len(self.pieces) > 1)}" + ", key padding masks" * masked


def find(body: Body, node: Node, claimed: set[Node]) -> Match | Left | None:
    """The match of an attention that ends at ``node``, or why there is none; None for other nodes."""
    found = _sdpa(node) if name(node) == "scaled_dot_product_attention" else _written_out(node)
    if found is None or any(value(t) is None for t in (found.query, found.key, found.value)):
        return None
    dims = {len(shape(t)) for t in (found.query, found.key, found.value)}
    if dims not in ({3}, {4}):
        return None
    one_head = dims == {3}  # [B, L, D]
    along_keys = 1 if one_head else 2
    key, values = streams(found.key, along_keys), streams(found.value, along_keys)
    ordinary = key.cat is None and values.cat is None and found.mask is None
    why = found.why
    if found.causal and not (ordinary and same(shape(found.query)[-2], shape(found.key)[-2])):
        why = "it is causal over more or fewer keys than queries, or over a concatenation"
    if not why and any(user not in found.passed for seen in found.watched for user in seen.users):
        why = "the attention weights are used elsewhere"
    if key.groups != values.groups or not same(key.sizes, values.sizes):
        key, values = (Streams([t], [shape(t)[-2]], []) for t in (found.key, found.value))
        why = why or ("keys and values are not concatenated alike" if found.mask is None else "")
    masks, hindrance = _masks(found, key)
    why = why or hindrance
    if why:
        return Left("cross_attention", node, why)

    options = {"masks": masks, "scale": found.scale, "causal": found.causal or None}
    query: Any = found.query
    if one_head:
        query, *heads = (Make(torch.unsqueeze, (t, 1)) for t in (query, *key.pieces, *values.pieces))
        pairs = list(zip(heads[: len(key.pieces)], heads[len(key.pieces) :], strict=True))
    else:
        pairs = list(zip(key.pieces, values.pieces, strict=True))
    call = Make(cross_attention, (query, pairs), {k: v for k, v in options.items() if v is not None})
    if one_head:
        call = Make(torch.squeeze, (call, 1))
    elif _lies_by_rows(node):
        call = Make(torch.transpose, (call, 1, 2))
        call = Make(torch.transpose, (Make(torch.Tensor.contiguous, (call,)), 1, 2))
    if name(node) == "matmul" and storages([node]) & body.given_back:
        call = Make(torch.clone, (call,))  # whoever gets it may edit a product, but not what the op keeps
    *lead, depth = map(hint, shape(found.query))
    match = Match(
        op="cross_attention",
        node=node,
        last=node,
        call=call,
        fused=frozenset((*found.passed, *key.passed, *values.passed)),
        spared=spared(key, values, masks),
        dtype=node.meta["example_value"].dtype,
        flops=2.0 * math.prod(lead) * hint(shape(found.key)[-2]) * (depth + hint(shape(found.value)[-1])),
        saved=0.0,
        what=key.in_words(masks is not None),
        ordinary=ordinary,
        written_out=name(node) == "matmul",
        head=depth,
        keeps_output=True,
    )
    why = unsound(body, match)
    return Left("cross_attention", node, why) if why else match


def _sdpa(node: Node) -> Attention:
    names = ("query", "key", "value", "attn_mask")
    query, key, values, mask = (argument(node, i, name) for i, name in enumerate(names))
    scale: Any = node.kwargs.get("scale")
    found = Attention(query, key, values, scale, mask, passed=[node])
    if isinstance(found.scale, Node):
        found.why = "its scale is not a number"
    if number(argument(node, 4, "dropout_p", default=0.0)) != 0.0:
        found.why = "there is dropout"
    found.causal = bool(argument(node, 5, "is_causal", default=False))
    return found


def _written_out(node: Node) -> Attention | None:
    """``softmax(...) @ value``, read from its end."""
    if name(node) != "matmul":
        return None
    weights, values = argument(node, 0, "input"), argument(node, 1, "other", "mat2")
    found, scale = Attention(None, None, values, passed=[node]), 1.0

    def step(passed: Node, *after: Any) -> Any:
        found.passed.append(passed)
        found.watched.append(passed)
        return after[0] if after else argument(passed, 0, "input", "self")

    while name(weights) == "dropout" or widens(weights, values):
        if name(weights) == "dropout" and not off(weights):
            found.why = "there is dropout"
        weights = step(weights)
    if name(weights) != "softmax":
        return None
    if argument(weights, 1, "dim") not in (-1, len(shape(weights)) - 1):
        found.why = "its softmax is not over the keys"
    made, logits = value(weights), step(weights)
    if (known := value(logits)) is None or made is None or made.dtype.itemsize < known.dtype.itemsize:
        return None
    while name(logits) != "matmul":
        kind, after = name(logits), argument(logits, 0, "input", "self") if name(logits) else None
        if kind in ("mul", "div"):
            factor = argument(logits, 1, "other")
            if kind == "mul" and isinstance(factor, Node):
                factor, after = after, factor
            if not isinstance(factor, int | float) or factor <= 0:
                return None
            scale = scale * factor if kind == "mul" else scale / factor
        elif kind in ("masked_fill", "where") and found.mask is None:
            found.hidden = kind == "masked_fill"
            found.mask = argument(logits, int(found.hidden), "mask", "condition")
            fill = argument(logits, 2, "value", "other")
            if kind == "where":
                after = argument(logits, 1, "input", "self")
                if not isinstance(after, Node):
                    found.hidden, after, fill = True, fill, after
            if not isinstance(fill, int | float):
                return None
            if fill != -math.inf:
                found.why = f"{fill:g} is finite: a query that sees nothing would see everything"
        elif kind == "add" and value(argument(logits, 1, "other")) is not None:
            found.mask, found.why = argument(logits, 1, "other"), "its mask is added"
        elif not widens(logits, after):
            return None
        logits = step(logits, after)
    key = transposed(argument(logits, 1, "other", "mat2"))
    if key is None:
        return None
    found.query, found.key, found.scale = step(logits), key, scale
    found.passed.append(argument(logits, 1, "other", "mat2"))
    return found


def streams(node: Node, dim: int) -> Streams:
    """``node``, of which ``dim`` counts the keys, as the pieces that were put together along it.

    Where heads come before the keys, ``dim`` is 2.
    """
    inner, factor = _repeated(node) if dim == 2 else (node, 1)
    found = _pieces(inner, dim)
    passed = [node] if inner is not node else []
    if found is None:
        found = Streams([inner], [shape(inner)[dim]], [])
    elif factor == 1 and all(
        isinstance(p, Node) for p in found.pieces
    ):  # repeated before they were put together
        each = [_repeated(piece) for piece in found.pieces]
        if len({times for _, times in each}) == 1:
            passed += [piece for piece, (_, times) in zip(found.pieces, each, strict=True) if times != 1]
            found.pieces, factor = [piece for piece, _ in each], each[0][1]
    found.groups, found.passed = factor, passed + found.passed
    return found


def _pieces(node: Any, dim: int) -> Streams | None:
    """Looks for a concatenation along ``dim`` through what moves or splits dimensions."""
    if value(node) is None:
        return None
    kind, dims = name(node), len(shape(node))
    if is_cat(node):
        joined, cats = parts(node, dim)
        plain = all(value(part) is not None and len(shape(part)) == dims for part in joined)
        if along(node) != dim or len(joined) < 2 or not plain:
            return None
        return Streams(list(joined), [shape(part)[dim] for part in joined], cats, node)
    source: Any = argument(node, 0, "input", "self") if node.op.startswith("call") and node.args else None
    if value(source) is None:
        return None
    args: tuple[Any, ...] = ()
    function: Any = None
    if kind == "transpose" and len(node.args) == 3:
        one, other = (d % dims for d in node.args[1:])
        function, args = torch.transpose, (one, other)
        dim = {one: other, other: one}.get(dim, dim)
    elif kind == "permute":
        order = tuple(d % dims for d in sizes(node))
        function, args, dim = torch.permute, (order,), order[dim]
    elif kind in ("view", "unflatten") and dims == len(shape(source)) + 1 and dim < dims - 2:
        heads = tuple(shape(node)[-2:])
        if same(shape(node)[:-2], shape(source)[:-1]) and all(isinstance(size, int) for size in heads):
            function, args = torch.unflatten, (-1, heads)
    elif kind == "contiguous":
        return _through(_pieces(source, dim), node, lambda piece: piece)
    if function is None:
        return None
    return _through(_pieces(source, dim), node, lambda piece: Make(function, (piece, *args)))


def _through(found: Streams | None, node: Node, change: Any) -> Streams | None:
    if found is not None:
        found.pieces = [change(piece) for piece in found.pieces]
        found.passed.append(node)
    return found


def _repeated(node: Node) -> tuple[Node, int]:
    """Heads ``[B, Hkv, S, D]`` that ``node`` repeats, each a number of times in a row, and that number."""
    if name(node) == "repeat_interleave":
        inner: Any = argument(node, 0, "input")
        times = argument(node, 1, "repeats")
        if isinstance(times, int) and argument(node, 2, "dim") in (1, -3) and value(inner) is not None:
            return inner, times
    if name(node) != "view":
        return node, 1
    wide: Any = argument(node, 0, "input")  # [B, Hkv, times, S, D]
    narrow: Any = argument(wide, 0, "input") if name(wide) == "expand" else None  # [B, Hkv, 1, S, D]
    if value(narrow) is None or value(wide) is None or len(shape(wide)) != 5 or len(shape(narrow)) != 5:
        return node, 1
    inner = argument(narrow, 0, "input") if name(narrow) in ("getitem", "unsqueeze") else None
    if value(inner) is None or len(shape(inner)) != 4:
        return node, 1
    batch, heads, times, keys, depth = shape(wide)
    added = same(shape(narrow), (*shape(inner)[:2], 1, *shape(inner)[2:])) and _adds_dimension_2(narrow)
    folded = same(shape(node), (batch, heads * times, keys, depth))
    expanded = same((batch, heads, keys, depth), shape(inner))
    return (inner, times) if added and folded and expanded and isinstance(times, int) else (node, 1)


def _adds_dimension_2(node: Node) -> bool:
    if name(node) == "unsqueeze":
        return argument(node, 1, "dim") in (2, -3)
    index = argument(node, 1)
    return isinstance(index, tuple) and index[:3] == (slice(None), slice(None), None) and (
        all(i == slice(None) for i in index[3:])
    )  # fmt: skip


def _masks(found: Attention, key: Streams) -> tuple[list[Any] | None, str]:
    """For each stream bool ``[B, S_i]``, and what stands against it."""
    mask = found.mask
    if mask is None:
        return None, ""
    if value(mask) is None:
        return None, "the mask is not a tensor"
    if mask.meta["example_value"].dtype != torch.bool:
        return None, f"the mask is {mask.meta['example_value'].dtype}, not of bools"
    hidden = found.hidden
    while name(mask) in ("expand", "invert"):
        hidden ^= name(mask) == "invert"
        found.passed.append(mask)
        mask = argument(mask, 0, "input", "self")
    batch, keys = shape(found.query)[0], shape(found.key)[-2]
    between = len(shape(found.query)) - 2  # dimensions of heads and queries
    if len(shape(mask)) != between + 2 or not all(same(size, 1) for size in shape(mask)[1:-1]):
        return None, "the mask differs from query to query, or from head to head"
    if not same((shape(mask)[0], shape(mask)[-1]), (batch, keys)):
        return None, "the mask is not one of each sample and key"
    seen = Make(operator.getitem, (mask, (slice(None), *[0] * between)))  # [B, S]
    if hidden:
        seen = Make(torch.logical_not, (seen,))
    return split_mask(seen, key.pieces, between), ""


def spared(key: Streams, values: Streams, masks: list[Any] | None) -> dict[Node, str]:
    """What must go for the op to pay: nothing where it also spares the work of hidden keys."""
    if masks:
        return {}
    return {cat: "the concatenation" for cat in (key.cat, values.cat) if cat is not None}


def split_mask(seen: Make, pieces: list[Any], dim: int) -> list[Make]:
    """A mask ``[B, S]`` as one ``[B, S_i]`` for each of ``pieces``, whose ``dim`` counts the keys."""
    if len(pieces) == 1:
        return [seen]
    lengths = [Make(torch.Tensor.size, (piece, dim)) for piece in pieces]
    each = Make(torch.split, (seen, lengths, 1))
    return [Make(operator.getitem, (each, i)) for i in range(len(lengths))]


def _lies_by_rows(node: Node) -> bool:
    """Whether ``[B, H, L, D]`` lies in memory as ``[B, L, H, D]``, as some attentions leave it."""
    out = node.meta["example_value"]
    plain = out.transpose(1, 2)
    return bool(not same(out.stride(), _dense(out.shape)) and same(plain.stride(), _dense(plain.shape)))


def _dense(sizes: Any) -> tuple[Any, ...]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
