"""Attention over the keys and values of several streams."""

import math

import torch
import torch.nn.functional as F
from cases import case, together

B, H, L, D = 2, 4, 3, 8
QUERY, FIRST, SECOND = (B, H, L, D), (B, H, 5, D), (B, H, 7, D)
STREAMS = {"q": QUERY, "k1": FIRST, "v1": FIRST, "k2": SECOND, "v2": SECOND}
MASKS = {"m1": ("bool", B, 5), "m2": ("bool", B, 7)}
ONE_HEAD = {name: (shape[0], *shape[2:]) for name, shape in STREAMS.items()}
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


@case(ONE_HEAD | MASKS, "cross_attention")
def one_head(q, k1, v1, k2, v2, m1, m2):
    mask = torch.cat([m1, m2], 1)[:, None]
    return F.scaled_dot_product_attention(q, torch.cat([k1, k2], 1), torch.cat([v1, v2], -2), attn_mask=mask)


@case(ONE_HEAD | MASKS, "cross_attention")
def one_head_written_out(q, k1, v1, k2, v2, m1, m2):
    logits = torch.bmm(q, torch.cat([k1, k2], 1).transpose(1, 2)) / D**0.5
    logits = logits.masked_fill(torch.cat([m1, m2], 1).logical_not().unsqueeze(1), -torch.inf)
    return logits.softmax(2).bmm(torch.cat([v1, v2], 1))


@case({"q": (B, L, D), "k": (B, 7, D), "v": (B, 7, D)}, "cross_attention")
def one_head_over_one_stream(q, k, v):
    return q + (q @ k.mT).softmax(-1) @ v


@case(ONE_HEAD | {"mask": ("bool", B, L, 12)}, leaves=("differs from query to query",))
def one_head_and_a_mask_for_each_query(q, k1, v1, k2, v2, mask):
    return F.scaled_dot_product_attention(q, torch.cat([k1, k2], 1), torch.cat([v1, v2], 1), attn_mask=mask)


@case({"q": (B, L, D), "k": (B, 7, D), "v": (B, 7, D)}, leaves=("softmax is not over the keys",))
def one_head_with_a_softmax_over_the_queries(q, k, v):
    return (q @ k.mT).softmax(1) @ v


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


# nn.MultiheadAttention, which is one node

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


@case({"q": (4, 8), "one": (5, 8), "two": (6, 8)} | MULTIHEAD)
def a_layer_over_one_sample(q, one, two, **weights):
    keys = torch.cat([one, two])
    return by_function(q, keys, keys, *weights.values())


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


@case(STREAMS | MASKS, "cross_attention")
def where_a_key_is_hidden(q, k1, v1, k2, v2, m1, m2):
    hidden = ~torch.cat([m1, m2], 1)[:, None, None]
    logits = torch.where(hidden, -torch.inf, q @ both(k1, k2).mT * D**-0.5)
    return logits.softmax(-1) @ both(v1, v2)


@case(STREAMS, "cross_attention")
def logits_widened_before_the_softmax(q, k1, v1, k2, v2):
    return (q @ both(k1, k2).mT).to(torch.float64).softmax(-1).to(q.dtype) @ both(v1, v2)


@case(STREAMS | MASKS, leaves=("a hook",))
def a_hook_on_the_keys(q, k1, v1, k2, v2, m1, m2):
    keys, seen = both(k1, k2), torch.cat([m1, m2], 1)[:, None, None]
    out = F.scaled_dot_product_attention(q, keys, both(v1, v2), attn_mask=seen)
    keys.register_hook(lambda gradient: 2 * gradient)
    return out
