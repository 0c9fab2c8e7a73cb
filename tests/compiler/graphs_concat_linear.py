"""Linear layers over concatenations."""

import torch
import torch.nn.functional as F
from cases import case

X, POOLED, SIDE = (3, 5, 8), (3, 6), (3, 5, 4)  # a sequence, a vector for each sample, a second sequence


def linear(depth=18, width=12, *, bias=True):
    return {"weight": (width, depth)} | ({"bias": (width,)} if bias else {})


ALL = {"x": X, "pooled": POOLED, "side": SIDE, **linear()}
TWO = {"x": X, "side": SIDE, **linear(12)}
LATE = {"a": (7, 8), "b": (7, 6), **linear(14)}


def whole(x, pooled, side):
    return torch.cat([x, pooled[:, None].expand(-1, x.shape[1], -1), side], -1)


# how a concatenation and a linear layer are written


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


@case(LATE, leaves=("dropout",))
def dropout_that_is_on_behind_a_norm(a, b, weight, bias):
    normed = F.layer_norm(torch.cat([a, b], -1), (14,))
    return F.linear(F.dropout(normed, 0.0, training=True), weight, bias)


@case(LATE, leaves=("dropout",))
def dropout_that_is_on_before_a_norm(a, b, weight, bias):
    dropped = F.dropout(torch.cat([a, b], -1), 0.0, training=True)
    return F.linear(F.layer_norm(dropped, (14,)), weight, bias)


@case(LATE, leaves=("grad mode changes on the way",))
def sources_detached_by_no_grad(a, b, weight, bias):
    with torch.no_grad():
        both = torch.cat([a, b], -1)
    return F.linear(both, weight, bias) + a.sum() + b.sum()


@case(ALL, "concat_linear")
def something_is_checked_on_the_way(x, pooled, side, weight, bias):
    both = whole(x, pooled, side)
    torch._check(both.shape[-1] == weight.shape[-1])
    return F.linear(both, weight, bias)


@case(ALL, leaves=("a hook",))
def a_hook_on_the_concatenation(x, pooled, side, weight, bias):
    both = whole(x, pooled, side)
    y = torch.relu(F.linear(both, weight, bias))
    both.register_hook(lambda gradient: 2 * gradient)
    return y


@case(ALL, "concat_linear")
def a_hook_on_a_source(x, pooled, side, weight, bias):
    pooled = pooled * 2
    y = F.linear(whole(x, pooled, side), weight, bias)
    pooled.register_hook(lambda gradient: 2 * gradient)
    return y


@case({"x": X, "row": (1, 5, 6), **linear(14)}, "concat_linear")
def repeated_by_a_size_made_elsewhere(x, row, weight, bias):
    return F.linear(torch.cat([x, row.repeat(x.shape[:1] + (1, 1))], -1), weight, bias)
