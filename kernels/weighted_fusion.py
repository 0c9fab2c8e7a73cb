"""Triton kernels of ``weighted_fusion`` and their launchers.

A program takes a few rows: their logits become weights in registers, and each source is read once. A row
without a source is masked off when it is loaded, so nothing that stands in an absent element enters a
register.
Every row's gradients are its own, so there is nothing to add up: the same bits every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._launch import lead_of, on, presence, walk
from mmfast.kernels._tiles import Source, load_tile, row_offset

__all__ = ["weighted_fusion", "weighted_fusion_backward"]

_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 128}  # not tuned on a device yet


@triton.jit
def softmax(logits, row, inside, n1, n2, present, num_sources, per_sample, count, SOURCES: tl.constexpr):
    """Which sources a row has, and their weights [M, SOURCES]."""
    i = tl.arange(0, SOURCES)[None, :]
    seen = inside[:, None] & (i < count)
    if present is not None:
        at = (row // per_sample).to(tl.int64)[:, None] * num_sources + i
        seen = seen & (tl.load(present + at, mask=seen, other=0) != 0)
    at = row_offset(row, n1, n2, logits.strides)[:, None] + i
    logit = tl.load(logits.data + at, mask=seen, other=float("-inf")).to(tl.float32)
    largest = tl.max(logit, 1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.where(seen, tl.exp(logit - largest[:, None]), 0.0)
    total = tl.where(tl.max(seen.to(tl.int32), 1) > 0, tl.sum(weight, 1), 1.0)
    return seen, weight / total[:, None]


@triton.jit
def column_of(values, number, SOURCES: tl.constexpr):
    """Column ``number`` of [M, SOURCES]."""
    return tl.sum(tl.where(tl.arange(0, SOURCES)[None, :] == number, values, 0), 1)


@triton.jit(do_not_specialize=["rows", "per_sample"])
def mix_kernel(
    out, sources, logits, present, num_sources, rows, n1, n2, per_sample, width,
    COUNT: tl.constexpr, SOURCES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the weighted sum."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, kept = row < rows, column < width
    seen, weight = softmax(logits, row, inside, n1, n2, present, num_sources, per_sample, COUNT, SOURCES)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.static_range(COUNT):
        source = sources[i]
        there = column_of(seen.to(tl.int32), i, SOURCES) > 0
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None] + column[None, :]
        x = load_tile(x, there, kept).to(tl.float32)
        w = column_of(weight, i, SOURCES)[:, None]
        total += tl.where(there[:, None], w * x, 0.0)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + at, total, mask=inside[:, None] & kept[None, :])


@triton.jit(do_not_specialize=["rows", "per_sample"])
def grad_mix_kernel(
    grad_logits, grad, sources, logits, present, num_sources, rows, n1, n2, per_sample, width,
    COUNT: tl.constexpr, SOURCES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx_i = w_i grad;  dlogit_i = w_i (grad . x_i - sum over j of w_j grad . x_j)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    number = tl.arange(0, SOURCES)[None, :]
    seen, weight = softmax(logits, row, inside, n1, n2, present, num_sources, per_sample, COUNT, SOURCES)
    start = row.to(tl.int64)[:, None] * width
    dots = tl.zeros([BLOCK_M, SOURCES], tl.float32)
    for i in tl.static_range(COUNT):
        source = sources[i]
        there = column_of(seen.to(tl.int32), i, SOURCES) > 0
        w = column_of(weight, i, SOURCES)[:, None]
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        dot = tl.zeros([BLOCK_M], tl.float32)
        for first in range(0, width, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            kept = column < width
            g = load_tile(grad + start + column[None, :], inside, kept).to(tl.float32)
            if source.grad is not None:
                dx = tl.where(there[:, None], w * g, 0.0)
                tl.store(source.grad + start + column[None, :], dx, mask=inside[:, None] & kept[None, :])
            if grad_logits is not None:
                x_tile = load_tile(x + column[None, :], there, kept).to(tl.float32)
                dot += tl.sum(tl.where(there[:, None], g * x_tile, 0.0), 1)
        dots = tl.where(number == i, dot[:, None], dots)
    if grad_logits is not None:
        mean = tl.sum(weight * dots, 1)[:, None]
        at = row.to(tl.int64)[:, None] * COUNT + number
        mask = inside[:, None] & (number < COUNT)
        tl.store(grad_logits + at, tl.where(seen, weight * (dots - mean), 0.0), mask=mask)


def weighted_fusion(inputs: Sequence[Tensor], logits: Tensor, present: Tensor | None) -> Tensor:
    """Launches the forward; arguments and results are those of ``torch.ops.mmfast.weighted_fusion``.

    Copied first: a tensor whose last dimension is not dense, and all of them where their leading dimensions
    cannot be walked as three (neighbours that every tensor steps through alike count as one).
    """
    lead = lead_of("weighted_fusion", [*inputs, logits])
    rows, width = lead.numel(), inputs[0].shape[-1]
    out = logits.new_empty(*lead, width)
    if out.numel() == 0:
        return out
    with on(logits.device):
        sources, of_logits, shared = _arguments(inputs, logits, present, lead)
        grid = triton.cdiv(rows, _BLOCKS["BLOCK_M"]), triton.cdiv(width, _BLOCKS["BLOCK_N"])
        mix_kernel[grid](out, sources, of_logits, *shared, width, **_options(inputs))
    return out


def weighted_fusion_backward(
    grad: Tensor, inputs: Sequence[Tensor], logits: Tensor, present: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """Launches the backward; arguments and results: ``torch.ops.mmfast.weighted_fusion_backward``.

    A ``grad`` that is not contiguous is copied first; for the others see ``weighted_fusion``.
    """
    lead = lead_of("weighted_fusion_backward", [*inputs, logits])
    rows, width = lead.numel(), inputs[0].shape[-1]
    grads = [logits.new_empty(*lead, width) if needed else None for needed in needs[:-1]]
    grad_logits = logits.new_empty(*lead, len(inputs), dtype=torch.float32) if needs[-1] else None
    if rows:
        with on(logits.device):
            sources, of_logits, shared = _arguments(inputs, logits, present, lead)
            sources = tuple(s._replace(grad=g) for s, g in zip(sources, grads, strict=True))
            grid = (triton.cdiv(rows, _BLOCKS["BLOCK_M"]),)
            grad_mix_kernel[grid](
                grad_logits, grad.contiguous(), sources, of_logits, *shared, width, **_options(inputs)
            )
    return [t for t in (*grads, grad_logits) if t is not None]


def _arguments(
    inputs: Sequence[Tensor], logits: Tensor, present: Tensor | None, lead: torch.Size
) -> tuple[tuple[Source, ...], Source, tuple[Tensor | int | None, ...]]:
    """Sources, logits, and what tells rows apart."""
    (_, n1, n2), tensors, strides = walk(lead, [*inputs, logits])
    *sources, of_logits = (Source(t, steps) for t, steps in zip(tensors, strides, strict=True))
    flags, num_sources, per_sample = presence(present, lead.numel())
    return tuple(sources), of_logits, (flags, num_sources, lead.numel(), n1, n2, per_sample)


def _options(inputs: Sequence[Tensor]) -> dict[str, int]:
    """How many sources, and columns for them: a power of two."""
    count = len(inputs)
    return {"COUNT": count, "SOURCES": max(2, triton.next_power_of_2(count)), **_BLOCKS}
