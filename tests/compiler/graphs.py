"""Models that nobody rewrote, as functions: what ``mmfast.compiler`` makes of each is written beside it.

``takes``: the ops that replace something, in order. ``leaves``: what ``explain`` says of the rest, in part.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

X, POOLED, SIDE = (3, 5, 8), (3, 6), (3, 5, 4)  # a sequence, a vector for each sample, a second sequence


@dataclass
class Case:
    function: Callable
    shapes: dict
    takes: tuple = ()
    leaves: tuple = ()


CASES: dict[str, Case] = {}


def case(shapes, *takes, leaves=()):
    """Registers a graph; a shape that holds "bool" or "int" makes such a tensor."""

    def register(function):
        CASES[function.__name__] = Case(function, shapes, takes, leaves)
        return function

    return register


def linear(depth=18, width=12, *, bias=True):
    return {"weight": (width, depth)} | ({"bias": (width,)} if bias else {})


ALL = {"x": X, "pooled": POOLED, "side": SIDE, **linear()}
TWO = {"x": X, "side": SIDE, **linear(12)}
LATE = {"a": (7, 8), "b": (7, 6), **linear(14)}


def whole(x, pooled, side):
    return torch.cat([x, pooled[:, None].expand(-1, x.shape[1], -1), side], -1)


def together(*tensors):
    return torch.stack([t.sum() for t in tensors])


# concat_linear: how a concatenation and a linear layer are written


@case(ALL, "concat_linear")
def expanded(x, pooled, side, weight, bias):
    return F.linear(whole(x, pooled, side), weight, bias)


@case(ALL, "concat_linear")
def repeated(x, pooled, side, weight, bias):
    return F.linear(torch.cat([x, pooled.unsqueeze(1).repeat(1, 5, 1), side], dim=2), weight, bias)


@case(ALL, "concat_linear")
def repeat_interleaved(x, pooled, side, weight, bias):
    pooled = pooled.unsqueeze(1).repeat_interleave(5, dim=1)
    return F.linear(torch.concat((x, pooled, side), dim=-1), weight, bias)


@case(ALL, "concat_linear")
def expanded_as(x, pooled, side, weight, bias):
    pooled = pooled[:, None, :].expand_as(x[..., :6])
    return F.linear(torch.concatenate([x, pooled, side], axis=-1), weight, bias)


@case({"x": X, "vector": (6,), "side": SIDE, **linear()}, "concat_linear")
def one_vector_for_all(x, vector, side, weight, bias):
    return F.linear(torch.cat([x, vector.broadcast_to(3, 5, 6), side], -1), weight, bias)


@case(ALL, "concat_linear")
def every_source_pooled(x, pooled, side, weight, bias):
    x, side = x.mean(1, keepdim=True).expand(-1, 5, -1), side.mean(1, keepdim=True).expand(-1, 5, -1)
    return F.linear(whole(x, pooled, side), weight, bias)


@case(ALL, "concat_linear")
def nested(x, pooled, side, weight, bias):
    inner = torch.cat([x, pooled[:, None].expand(-1, 5, -1)], -1)
    return F.linear(torch.cat([inner, side], -1), weight, bias)


@case(LATE, "concat_linear")
def hstack(a, b, weight, bias):
    return F.linear(torch.hstack([a, b]), weight, bias)


@case(LATE, "concat_linear")
def matmul_and_add(a, b, weight, bias):
    return torch.cat([a, b], 1) @ weight.T + bias


@case(LATE, "concat_linear")
def matmul_by_method(a, b, weight, bias):
    return bias + torch.cat([a, b], -1).matmul(weight.transpose(0, 1))


@case({"a": (7, 8), "b": (7, 6), "weight": (14, 12)}, "concat_linear")
def weight_the_other_way_round(a, b, weight):
    return torch.mm(torch.cat([a, b], 1), weight)


@case(LATE, "concat_linear")
def addmm(a, b, weight, bias):
    return torch.addmm(bias, torch.cat([a, b], -1), weight.t())


@case(LATE, "concat_linear")
def cat_with_a_constant(a, b, weight, bias):
    return F.linear(torch.cat([a, torch.ones(7, 1), b[:, 1:]], -1), weight, bias)


@case({"a": (7, 8), **linear(16)}, "concat_linear")
def the_same_source_twice(a, weight, bias):
    return F.linear(torch.cat([a, a], -1), weight, bias)


@case(LATE, "concat_linear", "concat_linear")
def tied_weights(a, b, weight, bias):
    first = F.linear(torch.cat([a, b], -1), weight, bias)
    return first + F.linear(torch.cat([a.flip(0), b], -1), weight).sin()


@case(LATE | {"more": (12, 14)}, "concat_linear", "concat_linear")
def two_layers_on_one_cat(a, b, weight, bias, more):
    both = torch.cat([a, b], -1)
    return F.linear(both, weight, bias).sigmoid() * torch.tanh(F.linear(both, more))


@case(ALL, "concat_linear")
def reused_cat_with_a_pooled_source(x, pooled, side, weight, bias):
    both = whole(x, pooled, side)
    return F.linear(both, weight, bias).sum(-1) + both.sum(-1)


# what comes before and after


@case(ALL | {"scale": (18,), "shift": (18,)}, "concat_linear")
def norm_between(x, pooled, side, weight, bias, scale, shift):
    return F.linear(F.layer_norm(whole(x, pooled, side), (18,), scale, shift, 1e-6), weight, bias)


@case(ALL, "concat_linear")
def norm_without_parameters_then_gelu(x, pooled, side, weight, bias):
    return F.gelu(F.linear(F.layer_norm(whole(x, pooled, side), (18,)), weight, bias))


@case(LATE, "concat_linear")
def silu(a, b, weight, bias):
    return F.silu(F.linear(torch.cat([a, b], -1), weight, bias))


@case(LATE, "concat_linear")
def swiglu(a, b, weight, bias):
    gate, up = F.linear(torch.cat([a, b], -1), weight, bias).chunk(2, dim=-1)
    return F.silu(gate) * up


@case(LATE, "concat_linear")
def swiglu_by_sizes(a, b, weight, bias):
    gate, up = F.linear(torch.cat([a, b], -1), weight, bias).split([6, 6], -1)
    return F.silu(gate) * up


@case(LATE, "concat_linear")
def a_mean_and_a_deviation(a, b, weight, bias):
    mean, deviation = F.linear(torch.cat([a, b], -1), weight, bias).split([4, 8], dim=-1)
    return torch.cat([mean, deviation.exp()], -1)


@case(LATE, "concat_linear")
def one_half_is_enough(a, b, weight, bias):
    return F.linear(torch.cat([a, b], -1), weight, bias).chunk(2, -1)[0].sigmoid()


@case({"a": (8,), "b": (6,), "weight": (14,)})
def nothing_but_vectors(a, b, weight):
    return F.linear(torch.cat([a, b]), weight)


@case(TWO | {"gate": (1,), "residual": (3, 5, 12)}, "concat_linear")
def gate_and_residual(x, side, weight, bias, gate, residual):
    return residual + gate.tanh() * F.gelu(F.linear(torch.cat([x, side], -1), weight, bias))


@case(TWO | {"gate": (12,), "residual": (12,)}, "concat_linear")
def channel_gate_and_a_residual_that_is_broadcast(x, side, weight, bias, gate, residual):
    return F.linear(torch.cat([x, side], -1), weight, bias) * torch.tanh(gate) + residual


@case(LATE, "concat_linear")
def dropout_that_is_off(a, b, weight, bias):
    return F.linear(F.dropout(torch.cat([a, b], -1), 0.3, training=False), weight, bias).sin()


@case(LATE, "concat_linear")
def the_linear_has_a_second_consumer(a, b, weight, bias):
    y = F.linear(torch.cat([a, b], -1), weight, bias)
    return F.silu(y) + y


@case(LATE, "concat_linear")
def gelu_by_tanh_stays_outside(a, b, weight, bias):
    return F.gelu(F.linear(torch.cat([a, b], -1), weight, bias), approximate="tanh")


@case({"x": (3, 1, 8), "side": (3, 1, 4), "residual": X[:2] + (12,), **linear(12)}, "concat_linear")
def a_residual_that_is_longer_stays_outside(x, side, weight, bias, residual):
    return residual + F.linear(torch.cat([x, side], -1), weight, bias)


@case(LATE, "concat_linear")
def in_place_activation(a, b, weight, bias):
    return F.silu(F.linear(torch.cat([a, b], -1), weight, bias), inplace=True)


@case(LATE, "concat_linear")
def in_place_edit_before_it_is_read(a, b, weight, bias):
    bias, y = bias.clone(), torch.cat([a, b], -1) @ weight.T
    bias += 1
    return y + bias


# what is left alone


@case(LATE, leaves=("1 source",))
def cat_of_one(a, b, weight, bias):
    return F.linear(torch.cat([F.pad(a, (0, 6))], -1), weight, bias) + b.sum()


@case({"x": X, "more": (3, 2, 8), **linear(8)}, leaves=("along dimension 1",))
def wrong_dimension(x, more, weight, bias):
    return F.linear(torch.cat([x, more], 1), weight, bias)


@case(TWO, leaves=("concatenation is used elsewhere",))
def reused_cat(x, side, weight, bias):
    both = torch.cat([x, side], -1)
    return F.linear(both, weight, bias).sum(-1) + both.sum(-1)


@case(LATE, leaves=("edited in place",))
def in_place_edit_of_a_source(a, b, weight, bias):
    a = a.clone()
    both = torch.cat([a, b], -1)
    a.mul_(2)
    return F.linear(both, weight, bias) + a.sum()


@case(LATE, leaves=("edited in place",))
def in_place_edit_before_the_backward(a, b, weight, bias):
    a = a.clone()
    y = F.linear(torch.cat([a, b], -1), weight, bias)
    a.mul_(2)
    return y + a.sum()


@case(ALL, leaves=("edited in place",))
def in_place_edit_through_a_view(x, pooled, side, weight, bias):
    pooled = pooled.clone()
    both = whole(x, pooled, side)
    pooled.view(-1)[0] = 7.0
    return F.linear(both, weight, bias)


@case(ALL, leaves=("edited in place",))
def in_place_edit_of_the_cat(x, pooled, side, weight, bias):
    both = whole(x, pooled, side)
    both[:, 0] = 0.0
    return F.linear(both, weight, bias)


@case(LATE | {"scale": (14,)}, leaves=("the norm's output is used elsewhere",))
def norm_with_a_second_consumer(a, b, weight, bias, scale):
    normed = F.layer_norm(torch.cat([a, b], -1), (14,), scale)
    return F.linear(normed, weight, bias).sum(-1) + normed.sum(-1)


@case(LATE, leaves=("dropout",))
def dropout_that_is_on(a, b, weight, bias):
    return F.linear(F.dropout(torch.cat([a, b], -1), 0.0, training=True), weight, bias)


@case(LATE, leaves=("grad mode changes on the way",))
def sources_detached_by_no_grad(a, b, weight, bias):
    with torch.no_grad():
        both = torch.cat([a, b], -1)
    return F.linear(both, weight, bias) + a.sum() + b.sum()


# cross_attention: keys and values of several streams

B, H, L, D = 2, 4, 3, 8
QUERY, FIRST, SECOND = (B, H, L, D), (B, H, 5, D), (B, H, 7, D)
STREAMS = {"q": QUERY, "k1": FIRST, "v1": FIRST, "k2": SECOND, "v2": SECOND}
MASKS = {"m1": ("bool", B, 5), "m2": ("bool", B, 7)}
GROUPED = {"q": QUERY, **{name: (B, 2, s, D) for name, s in (("k1", 5), ("v1", 5), ("k2", 7), ("v2", 7))}}


def both(one, other):
    return torch.cat([one, other], 2)


@case(STREAMS, "cross_attention")
def sdpa(q, k1, v1, k2, v2):
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2))


@case(STREAMS | MASKS, "cross_attention")
def sdpa_with_masks(q, k1, v1, k2, v2, m1, m2):
    mask = torch.cat([m1, m2], 1)[:, None, None, :]
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), attn_mask=mask, scale=0.3)


@case(STREAMS | MASKS, "cross_attention")
def sdpa_with_an_expanded_mask(q, k1, v1, k2, v2, m1, m2):
    mask = torch.cat([m1, m2], -1).unsqueeze(1).unsqueeze(2).expand(B, H, L, 12)
    return F.scaled_dot_product_attention(q, torch.cat([k1, k2], -2), torch.cat([v1, v2], -2), mask)


@case(STREAMS | {"n1": ("int", B), "n2": ("int", B)}, "cross_attention")
def masks_built_from_lengths(q, k1, v1, k2, v2, n1, n2):
    m1, m2 = torch.arange(5) < n1[:, None], torch.arange(7)[None] < n2.unsqueeze(1)
    mask = torch.cat([m1, m2], 1).view(B, 1, 1, 12)
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), attn_mask=mask)


@case(STREAMS | {"n": ("int", B)}, "cross_attention")
def a_mask_over_the_whole_built_from_lengths(q, k1, v1, k2, v2, n):
    mask = (torch.arange(12) < n[:, None])[:, None, None]
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), attn_mask=mask)


@case(STREAMS | MASKS, "cross_attention")
def written_out(q, k1, v1, k2, v2, m1, m2):
    logits = q @ both(k1, k2).transpose(-2, -1) / math.sqrt(D)
    logits = logits.masked_fill(~torch.cat([m1, m2], 1)[:, None, None], float("-inf"))
    return torch.softmax(logits, dim=-1) @ both(v1, v2)


@case(STREAMS | MASKS, "cross_attention")
def written_out_with_a_scaled_query(q, k1, v1, k2, v2, m1, m2):
    logits = 0.5 * torch.matmul(q * D**-0.5, both(k1, k2).mT)
    logits = torch.where(torch.cat([m1, m2], 1)[:, None, None], logits, -torch.inf)
    return logits.softmax(-1, dtype=torch.float32).to(q.dtype).matmul(both(v1, v2))


@case({n: (s[0], s[2], s[1], s[3]) if s != QUERY else s for n, s in STREAMS.items()}, "cross_attention")
def heads_behind_the_sequence(q, k1, v1, k2, v2):
    key, value = torch.cat([k1, k2], 1).transpose(1, 2), torch.cat([v1, v2], 1).permute(0, 2, 1, 3)
    return F.scaled_dot_product_attention(q, key, value).transpose(1, 2).reshape(B, L, H * D)


@case(
    {"q": (B, L, 32), "k1": (B, 5, 32), "v1": (B, 5, 32), "k2": (B, 7, 32), "v2": (B, 7, 32)},
    "cross_attention",
)
def heads_split_after_the_cat(q, k1, v1, k2, v2):
    def heads(x):
        return x.view(B, -1, H, D).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        heads(q), heads(torch.cat([k1, k2], 1)), heads(torch.cat([v1, v2], 1))
    )
    return out.transpose(1, 2).contiguous().view(B, L, 32)


@case(GROUPED, "cross_attention")
def grouped_heads(q, k1, v1, k2, v2):
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), enable_gqa=True)


@case(GROUPED, "cross_attention")
def keys_repeated_for_grouped_heads(q, k1, v1, k2, v2):
    key, value = both(k1, k2).repeat_interleave(2, dim=1), torch.repeat_interleave(both(v1, v2), 2, 1)
    return F.scaled_dot_product_attention(q, key, value)


@case(GROUPED, "cross_attention")
def keys_expanded_for_grouped_heads(q, k1, v1, k2, v2):
    def repeat(x):
        return x[:, :, None, :, :].expand(B, 2, 2, x.shape[2], D).reshape(B, H, x.shape[2], D)

    return F.scaled_dot_product_attention(q, both(repeat(k1), repeat(k2)), both(repeat(v1), repeat(v2)))


@case({"q": QUERY, "k": SECOND, "v": SECOND, "mask": ("bool", B, 7)}, "cross_attention")
def one_stream_under_a_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])


@case(STREAMS, leaves=("causal",))
def causal_over_the_whole(q, k1, v1, k2, v2):
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), is_causal=True)


@case(STREAMS, leaves=("dropout",))
def attention_dropout(q, k1, v1, k2, v2):
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), dropout_p=1e-30)


@case(STREAMS | {"bias": (B, 1, L, 12)}, leaves=("mask is torch.float",))
def an_additive_mask(q, k1, v1, k2, v2, bias):
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), attn_mask=bias)


@case(STREAMS | {"mask": ("bool", B, 1, L, 12)}, leaves=("differs from query to query",))
def a_mask_for_each_query(q, k1, v1, k2, v2, mask):
    return F.scaled_dot_product_attention(q, both(k1, k2), both(v1, v2), attn_mask=mask)


@case(STREAMS | MASKS, leaves=("-1e+09 is finite",))
def a_finite_fill(q, k1, v1, k2, v2, m1, m2):
    logits = q @ both(k1, k2).mT * D**-0.5
    logits = logits.masked_fill(~torch.cat([m1, m2], 1)[:, None, None], -1e9)
    return logits.softmax(-1) @ both(v1, v2)


@case(STREAMS, leaves=("attention weights are used elsewhere",))
def weights_that_are_looked_at(q, k1, v1, k2, v2):
    weights = (q @ both(k1, k2).mT).softmax(-1)
    return weights @ both(v1, v2) + weights.amax(-1, keepdim=True)


@case(STREAMS, leaves=("used elsewhere",))
def keys_that_are_used_again(q, k1, v1, k2, v2):
    key = both(k1, k2)
    return F.scaled_dot_product_attention(q, key, both(v1, v2)) + key.sum()


@case(STREAMS, leaves=("edited in place",))
def a_stream_edited_in_place(q, k1, v1, k2, v2):
    k2 = k2.clone()
    key = both(k1, k2)
    k2.zero_()
    return F.scaled_dot_product_attention(q, key, both(v1, v2))


@case(STREAMS | MASKS, leaves=("edited in place",))
def a_mask_edited_after_it_was_inverted(q, k1, v1, k2, v2, m1, m2):
    seen = torch.cat([m1, m2], 1)[:, None, None].clone()
    hidden = ~seen
    seen.fill_(False)
    return (q @ both(k1, k2).mT).masked_fill(hidden, -math.inf).softmax(-1) @ both(v1, v2)


@case(STREAMS, leaves=("not over the keys",))
def softmax_over_the_queries(q, k1, v1, k2, v2):
    return (q @ both(k1, k2).mT).softmax(-2) @ both(v1, v2)


@case({"q": QUERY, "k": FIRST, "v": FIRST}, "cross_attention")
def one_stream_without_a_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@case({"q": FIRST, "k": FIRST, "v": FIRST}, "cross_attention")
def one_causal_stream(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case({"q": QUERY, "k": FIRST, "v": FIRST}, leaves=("causal over more or fewer keys",))
def one_causal_stream_of_another_length(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@case(STREAMS | MASKS, leaves=("its mask is added",))
def bools_that_are_added(q, k1, v1, k2, v2, m1, m2):
    recent = torch.cat([m1, m2], 1)[:, None, None]
    return (q @ both(k1, k2).mT + recent).softmax(-1) @ both(v1, v2)


@case(STREAMS | MASKS, leaves=("edited in place",))
def a_mask_narrowed_in_place(q, k1, v1, k2, v2, m1, m2):
    seen = torch.cat([m1, m2], 1)[:, None, None].clone()
    hidden = ~seen
    seen &= torch.arange(seen.shape[-1]) < 4
    return (q @ both(k1, k2).mT).masked_fill(hidden, -math.inf).softmax(-1) @ both(v1, v2)


@case(STREAMS | MASKS, "cross_attention", "cross_attention")
def the_second_layer_sees_less(q, k1, v1, k2, v2, m1, m2):
    seen, keys, values = torch.cat([m1, m2], 1)[:, None, None], both(k1, k2), both(v1, v2)
    q = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    less = seen & (torch.arange(seen.shape[-1]) < 4)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=less)


@case(STREAMS, leaves=("its output, which its backward needs, is edited",))
def an_output_that_is_added_to(q, k1, v1, k2, v2):
    out = (q @ both(k1, k2).mT).softmax(-1) @ both(v1, v2)
    out += 1
    return out


# cross_attention: nn.MultiheadAttention, which is one node

WORDS = {"q": (3, 4, 8), "one": (3, 5, 8), "two": (3, 6, 8)}
LAYER = {"in_proj_weight": (24, 8), "in_proj_bias": (24,), "out_proj.weight": (8, 8), "out_proj.bias": (8,)}
MULTIHEAD = {name.replace(".", "_"): shape for name, shape in LAYER.items()}
PADDING = {"p1": ("bool", 3, 5), "p2": ("bool", 3, 6)}


MODULE = torch.nn.MultiheadAttention(8, 2, batch_first=True, device="meta")


def multihead(q, k, v, *weights, need_weights=False, **options):
    named = dict(zip(LAYER, weights, strict=True))
    out = torch.func.functional_call(MODULE, named, (q, k, v), options | {"need_weights": need_weights})
    return out if need_weights else out[0]


def by_function(q, k, v, *weights, dropout=0.0, zero=False, **options):
    """Sequence first, as the function takes it."""
    packed, bias, *out = weights
    return F.multi_head_attention_forward(
        q, k, v, 8, 2, packed, bias, None, None, zero, dropout, *out, need_weights=False, **options
    )[0]  # fmt: skip


@case(WORDS | MULTIHEAD, "cross_attention")
def a_multihead_layer(q, one, two, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias):
    keys = torch.cat([one, two], 1)
    return multihead(q, keys, keys, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)


@case(WORDS | PADDING | MULTIHEAD, "cross_attention")
def a_padded_multihead_layer(q, one, two, p1, p2, **weights):
    keys, padding = torch.cat([one, two], 1), torch.cat([p1, p2], 1)
    return multihead(q, keys, keys, *weights.values(), key_padding_mask=~padding)


@case(WORDS | PADDING | MULTIHEAD, "cross_attention")
def a_padded_layer_over_one_stream(q, one, two, p1, p2, **weights):
    return multihead(q, one, one, *weights.values(), key_padding_mask=~p1) + two.mean() + p2.sum()


@case({"q": (4, 3, 8), "one": (5, 3, 8), "two": (6, 3, 8)} | PADDING | MULTIHEAD, "cross_attention")
def a_padded_layer_by_function(q, one, two, p1, p2, **weights):
    keys, padding = torch.cat([one, two]), torch.cat([p1, p2], 1)
    return by_function(q, keys, torch.cat([one, two.sin()]), *weights.values(), key_padding_mask=~padding)


@case({"q": (4, 3, 8), "one": (5, 3, 8), "two": (6, 3, 8)} | MULTIHEAD, "cross_attention")
def a_layer_without_biases(q, one, two, **weights):
    keys = torch.cat([one, two])
    packed, _, out, bias = weights.values()
    return by_function(q, keys, keys, packed, None, out, None) + bias + weights["in_proj_bias"].sum()


@case(WORDS | MULTIHEAD, leaves=("attention weights are used",))
def a_layer_whose_weights_are_wanted(q, one, two, **weights):
    keys = torch.cat([one, two], 1)
    return together(*multihead(q, keys, keys, *weights.values(), need_weights=True))


@case(WORDS | MULTIHEAD, leaves=("differs from query to query",))
def a_layer_with_a_mask_of_its_own(q, one, two, **weights):
    keys = torch.cat([one, two], 1)
    seen = torch.ones(4, 11, dtype=torch.bool).tril(7)
    return multihead(q, keys, keys, *weights.values(), attn_mask=~seen)


@case({"q": (4, 3, 8), "one": (5, 3, 8), "two": (6, 3, 8)} | MULTIHEAD, leaves=("keys of its own",))
def a_layer_with_a_zero_key(q, one, two, **weights):
    keys = torch.cat([one, two])
    return by_function(q, keys, keys, *weights.values(), zero=True)


@case({"q": (4, 3, 8), "one": (5, 3, 8), "two": (6, 3, 8)} | MULTIHEAD, leaves=("there is dropout",))
def a_layer_with_dropout(q, one, two, **weights):
    keys = torch.cat([one, two])
    return by_function(q, keys, keys, *weights.values(), dropout=1e-30)


@case({"q": (4, 3, 8), "one": (5, 3, 8)} | MULTIHEAD, "cross_attention")
def a_layer_over_one_stream(q, one, **weights):
    return by_function(q, one, one, *weights.values())


@case({"q": (4, 3, 8), "one": (5, 3, 8), "two": (6, 3, 8)} | PADDING | MULTIHEAD, leaves=("padding mask",))
def a_padding_that_is_read_again(q, one, two, p1, p2, **weights):
    keys, hidden = torch.cat([one, two]), ~torch.cat([p1, p2], 1)
    zeros = torch.zeros_like(hidden, dtype=q.dtype)
    padding = zeros.masked_fill_(hidden, -math.inf)
    return by_function(q, keys, keys, *weights.values(), key_padding_mask=padding) + zeros.exp().sum()


# contrastive_loss: the whole matrix, then cross-entropy both ways

PAIRS = {"image": (6, 8), "text": (6, 8), "scale": (1,)}


def both_ways(logits, more=None, **options):
    target = torch.arange(logits.shape[0], device=logits.device)
    rows = F.cross_entropy(logits, target, **options)
    return rows + F.cross_entropy(logits.t() if more is None else more, target, **options)


@case(PAIRS, "contrastive_loss")
def clip(image, text, scale):
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return both_ways(scale.exp() * image @ text.t()) / 2


@case(PAIRS, "contrastive_loss")
def two_matrices(image, text, scale):
    return both_ways(scale * image @ text.T, scale * text @ image.T) / 2


@case(PAIRS | {"bias": (1,)}, "contrastive_loss")
def scaled_behind_with_a_bias(image, text, scale, bias):
    logits = torch.matmul(text, image.mT) * scale.exp() + bias
    return both_ways(logits)


@case(PAIRS, "contrastive_loss")
def over_a_temperature_and_weighed(image, text, scale):
    logits = F.linear(image, text).float() / 0.07 / scale
    target = torch.arange(0, len(logits)).long()
    return 0.5 * F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target) / 2


@case({"image": (6, 8), "text": (6, 8)}, "contrastive_loss")
def without_a_scale_summed(image, text):
    return both_ways(image @ text.T, reduction="sum")


@case({"image": (6, 8), "scale": (1,)}, "contrastive_loss")
def of_one_tensor_with_itself(image, scale):
    return both_ways(scale * image @ image.T)


@case(PAIRS, "contrastive_loss")
def by_modules(image, text, scale):
    loss, target = torch.nn.CrossEntropyLoss(), torch.arange(6)
    logits = scale * (image @ text.T)
    return (loss(logits, target) + loss(logits.T, target)).div(2)


@case(PAIRS, leaves=("the matrix of logits is used elsewhere",))
def the_logits_are_returned_too(image, text, scale):
    logits = scale * image @ text.T
    return together(both_ways(logits), logits)


@case(PAIRS, leaves=("the matrix of logits is used elsewhere",))
def an_accuracy_is_taken_of_it(image, text, scale):
    logits = scale * image @ text.T
    return together(both_ways(logits), (logits.argmax(1) == torch.arange(6)).float())


@case(PAIRS)
def one_way_only(image, text, scale):
    return F.cross_entropy(scale * image @ text.T, torch.arange(6))


@case(PAIRS, leaves=("not of the rows and of the columns",))
def the_rows_twice(image, text, scale):
    logits = scale * image @ text.T
    return both_ways(logits, logits)


@case(PAIRS | {"other": (6, 8)}, leaves=("not of the rows and of the columns",))
def two_texts(image, text, other, scale):
    return both_ways(scale * image @ text.T, scale * other @ image.T)


@case(PAIRS, leaves=("not of the rows and of the columns",))
def two_temperatures(image, text, scale):
    return both_ways(scale * image @ text.T, 2 * scale * text @ image.T)


@case(PAIRS, leaves=("not known to be the diagonal",))
def other_targets(image, text, scale):
    logits, target = scale * image @ text.T, torch.arange(6).flip(0)
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


@case(PAIRS, leaves=("not known to be the diagonal",))
def every_second_target(image, text, scale):
    logits, target = scale * image @ text.T, torch.arange(0, 6, 1) // 2
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


@case(PAIRS, leaves=("smoothed labels",))
def smoothed(image, text, scale):
    return both_ways(scale * image @ text.T, label_smoothing=0.1)


@case(PAIRS | {"weight": (6,)}, leaves=("weights",))
def weighed_classes(image, text, scale, weight):
    return both_ways(scale * image @ text.T, weight=weight.detach().abs()) + weight.sum()


@case(PAIRS, leaves=("not weighed alike",))
def one_way_counts_more(image, text, scale):
    logits, target = scale * image @ text.T, torch.arange(6)
    return 0.7 * F.cross_entropy(logits, target) + 0.3 * F.cross_entropy(logits.T, target)


@case(PAIRS, leaves=("edited in place",))
def the_diagonal_is_moved_in_place(image, text, scale):
    logits = scale * image @ text.T
    logits.diagonal().add_(1.0)
    return both_ways(logits)


@case(PAIRS | {"bias": (1,)})
def a_bias_that_counts_twice(image, text, scale, bias):
    return both_ways(torch.add(scale * image @ text.T, bias, alpha=2))


@case(PAIRS)
def a_margin_on_the_diagonal(image, text, scale):
    return both_ways(scale * image @ text.T - torch.eye(6))


@case(PAIRS)
def a_scale_for_each_row(image, text, scale):
    return both_ways(scale * image.sum(1, keepdim=True) * (image @ text.T))


@case(PAIRS, leaves=("not weighed alike",))
def not_reduced(image, text, scale):
    return both_ways(scale * image @ text.T, reduction="none")


@case(
    {"a": (6, 3), "b": (6, 5), "text": (6, 8)},
    "contrastive_loss",
    leaves=("a part of what another op replaces",),
)
def one_side_is_a_concatenation(a, b, text):
    return both_ways(torch.cat([a, b], -1) @ text.T)
