"""The whole matrix of logits, then cross-entropy both ways."""

import torch
import torch.nn.functional as F
from cases import case, together

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
    target = torch.arange(0, end=len(logits)).long()
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


@case(PAIRS, "contrastive_loss")
def targets_counted_in_float32(image, text, scale):
    logits, target = scale * image @ text.T, torch.arange(6.0).long()
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


@case(PAIRS, leaves=("not known to be the diagonal",))
def targets_counted_in_bfloat16(image, text, scale):  # which has no 257
    logits, target = scale * image @ text.T, torch.arange(6, dtype=torch.bfloat16).long()
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


@case(PAIRS, leaves=("edited in place",))
def a_target_moved_in_place(image, text, scale):
    logits, target = scale * image @ text.T, torch.arange(6)
    target[0] = 1
    return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


@case(PAIRS, leaves=("a hook",))
def a_hook_on_the_scaled_side(image, text, scale):
    side = scale * image
    loss = both_ways(side @ text.T)
    side.register_hook(lambda gradient: 2 * gradient)
    return loss


@case({"a": (6, 3), "b": (6, 5), "text": (6, 8)}, "concat_linear", leaves=("used elsewhere",))
def logits_of_a_concatenation_are_returned_too(a, b, text):
    logits = torch.cat([a, b], -1) @ text.T
    return together(both_ways(logits), logits)
