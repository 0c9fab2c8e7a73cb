"""A task: which head it reads, what it loses, and how it is scored. Everything is a sum and a count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One term w L of the loss, L = Σ wᵢ Lᵢ.

    Sums and counts add up exactly over micro-batches, ranks and steps, where means do not: a rank with 3
    valid samples and one with 8 each contribute what they have. The count must follow from the batch alone,
    because the step adds it up over all ranks before the first backward.

    Args:
        head: the entry of the model's output that the task reads
        loss: (output [B, ...], batch) -> scalar, the *sum* of the losses of the rows that count
        count: batch -> scalar, the number of rows that count
        weight: w
        scores: per metric a function (output, batch) -> scalar, a sum; evaluation divides it by the count
    """

    head: str
    loss: Callable[[Tensor, Batch], Tensor]
    count: Callable[[Batch], Tensor]
    weight: float = 1.0
    scores: Mapping[str, Callable[[Tensor, Batch], Tensor]] = field(default_factory=dict)


def category(head: str = "label", weight: float = 1.0) -> Task:
    """Classification: cross-entropy and accuracy against ``batch[head]``, an int64 [B] with -1 for none."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:  # [B, C] -> []
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, batch[head], ignore_index=-1, reduction="sum")

    def count(batch: Batch) -> Tensor:
        return (batch[head] >= 0).sum()

    def accuracy(logits: Tensor, batch: Batch) -> Tensor:
        # a label is never -1 where argmax can equal it, so filler rows count for nothing
        return (logits.argmax(-1) == batch[head]).sum()

    return Task(head, loss, count, weight, {"accuracy": accuracy})
