"""Finds ``nn.MultiheadAttention``, which a graph has as one node, over concatenated keys or under padding."""

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from mmfast.compiler._cross_attention import spared, split_mask, streams
from mmfast.compiler._graph import Body, Make, argument, hint, name, number, same, shape, value
from mmfast.compiler._match import Left, Match, unsound
from mmfast.ops import cross_attention

SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def find(body: Body, node: Node, claimed: set[Node]) -> Match | Left | None:
    """The match of the output of an ``nn.MultiheadAttention``, or why there is none; None for other nodes."""
    layer = argument(node, 0)
    if name(node) != "getitem" or name(layer) != "multi_head_attention_forward" or argument(node, 1) != 0:
        return None
    given: dict[str, Any] = SIGNATURE.bind(*layer.args, **layer.kwargs).arguments
    query, padding = given["query"], given.get("key_padding_mask")
    sequences = query, given["key"], given["value"]  # [L, B, E], where there is a batch
    if any(value(x) is None or len(shape(x)) != 3 for x in sequences):
        return None
    key, values = streams(given["key"], 0), streams(given["value"], 0)
    hidden, passed = (None, list[Node]()) if padding is None else _hidden(padding)
    why = _unlike(given, layer, node)
    if not why and not same(key.sizes, values.sizes):
        why = "keys and values are not concatenated alike"
    if not why and padding is not None and hidden is None:
        why = "its padding mask is not known to be made of bools"
    if why:
        return Left("cross_attention", node, why)

    heads, bias = given["num_heads"], given["in_proj_bias"]
    if given.get("use_separate_proj_weight"):
        weights: list[Any] = [given[f"{one}_proj_weight"] for one in "qkv"]
    else:
        weights = _thirds(given["in_proj_weight"])
    biases = [None] * 3 if bias is None else _thirds(bias)

    def projected(x: Any, i: int) -> Make:  # [S, B, E] -> [B, H, S, D]
        wide = Make(F.linear, (x, weights[i], biases[i]))
        return Make(torch.permute, (Make(torch.unflatten, (wide, -1, (heads, -1))), (1, 2, 0, 3)))

    pairs = [(projected(k, 1), projected(v, 2)) for k, v in zip(key.pieces, values.pieces, strict=True)]
    masks = None if hidden is None else split_mask(Make(torch.logical_not, (hidden,)), key.pieces, 0)
    attended = Make(cross_attention, (projected(query, 0), pairs), {"masks": masks} if masks else {})
    by_rows = Make(torch.flatten, (Make(torch.permute, (attended, (2, 0, 1, 3))), 2))  # [L, B, E]
    queries, batch, features = map(hint, shape(query))
    match = Match(
        op="cross_attention",
        node=node,
        last=node,
        call=Make(F.linear, (by_rows, given["out_proj_weight"], given["out_proj_bias"])),
        fused=frozenset((node, layer, *passed, *key.passed, *values.passed)),
        spared=spared(key, values, masks),
        dtype=node.meta["example_value"].dtype,
        flops=4.0 * batch * queries * hint(shape(given["key"])[0]) * features,
        saved=0.0,
        ordinary=key.cat is None and values.cat is None and padding is None,
        head=features // heads,
        what=f"nn.MultiheadAttention over {key.in_words(masks is not None)}",
    )
    why = unsound(body, match)
    return Left("cross_attention", node, why) if why else match


def _unlike(given: dict[str, Any], layer: Node, output: Node) -> str:
    """What of the layer the op does not have; empty if it is nothing."""
    if number(given["dropout_p"]) != 0.0 and given.get("training", True):
        return "there is dropout"
    if given.get("attn_mask") is not None or given.get("is_causal"):
        return "the mask differs from query to query, or from head to head"
    own = ("bias_k", "bias_v", "static_k", "static_v")
    if given["add_zero_attn"] or any(given.get(key) is not None for key in own):
        return "it adds keys of its own"
    if any(user is not output and (name(user) != "getitem" or user.users) for user in layer.users):
        return "the attention weights are used elsewhere"
    return ""


def _thirds(packed: Node) -> list[Make]:
    each = Make(torch.chunk, (packed, 3))
    return [Make(operator.getitem, (each, i)) for i in range(3)]


def _hidden(padding: Any) -> tuple[Node | None, list[Node]]:
    """Bools, True where a key is padded, and the nodes that made of them what is added to the logits."""
    if value(padding) is None:
        return None, []
    if padding.meta["example_value"].dtype == torch.bool:
        return padding, []
    zeros, bools, fill = (argument(padding, i, key) for i, key in enumerate(("self", "mask", "value")))
    if padding.target != "masked_fill_" or name(zeros) != "zeros_like" or fill != -math.inf:
        return None, []
    if list(zeros.users) != [padding]:
        return None, []
    is_bool = value(bools) is not None and bools.meta["example_value"].dtype == torch.bool
    return (bools if is_bool and same(shape(bools), shape(padding)) else None), [padding, zeros]
