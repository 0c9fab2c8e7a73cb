"""Triton kernels of ``contrastive_loss`` and their launchers.

A program owns a block of rows and walks all columns, tile by tile: forward in an online softmax, backward
adding up its rows' gradient. What it does for the rows of ``a`` a second launch, with the sides exchanged,
does for those of ``b``: no column needs to be added up across programs, so nothing of the size of the matrix
exists, there are no atomics, and every run gives the same bits.

Scale, bias and upstream gradient are read on the device: nobody waits for them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._launch import blocks, configuration, dense, on
from mmfast.kernels._tiles import load_tile, multiply

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2: one instruction
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# By the oldest compute capability they are for: large ones that do not spill. No device tuned them yet.
UNTUNED = {
    80: {
        "loss.half": blocks(128, 64, 32, num_warps=8, num_stages=4),
        "loss.tf32": blocks(128, 64, 32, num_warps=8, num_stages=3),
        "loss.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "gradient.half": {**blocks(64, 32, 32, num_warps=8, num_stages=2), "BLOCK_E": 128},
        "gradient.tf32": {**blocks(64, 32, 32, num_warps=8, num_stages=2), "BLOCK_E": 64},
        "gradient.ieee": {**blocks(32, 32, 16, num_warps=8, num_stages=1), "BLOCK_E": 64},
    },
}
UNTUNED[90] = {
    **UNTUNED[80],
    "loss.ieee": blocks(32, 64, 16, num_warps=8, num_stages=2),
    "gradient.half": {**blocks(64, 32, 32, num_warps=8, num_stages=2), "BLOCK_E": 256},
    "gradient.tf32": {**blocks(64, 32, 32, num_warps=8, num_stages=2), "BLOCK_E": 128},
}
UNTUNED[100] = {
    **UNTUNED[90],
    "loss.tf32": blocks(128, 32, 32, num_warps=8, num_stages=3),
    "loss.ieee": blocks(32, 32, 16, num_warps=8, num_stages=2),
    "gradient.ieee": {**blocks(32, 32, 16, num_warps=8, num_stages=1), "BLOCK_E": 32},
}


@triton.jit
def is_there(present, at, n):
    there = at < n
    if present is not None:
        there = tl.load(present + at, mask=there, other=0) != 0
    return there


@triton.jit
def products_of(
    x, x_stride, y, y_stride, row, column, rows, columns, features,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``x @ y.T`` in float32, 0 in rows and columns that are not there."""
    k = tl.arange(0, BLOCK_K)
    left = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    right = y + column.to(tl.int64)[:, None] * y_stride + k[None, :]
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, features, BLOCK_K):
        inside = k0 + k < features
        s = multiply(
            load_tile(left + k0, rows, inside), tl.trans(load_tile(right + k0, columns, inside)), s, PRECISION
        )
    return s


@triton.jit
def softplus(x):
    u = tl.exp(-tl.abs(x))
    whole = 1 + u
    return tl.maximum(x, 0.0) + tl.log(whole) + (u - (whole - 1)) / whole  # the last: what `whole` lost of u


@triton.jit(do_not_specialize=["n"])
def loss_kernel(
    losses, lse, x, x_stride, y, y_stride, scale, bias, present, n, features,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What each row loses; for softmax, half of its cross-entropy, and its log-sum-exp as two numbers: the
    product whose logit is the largest, negative where the scale is, and log2 of the sum beside that.

    A logit far from 0 has lost to rounding what a difference of products times the scale keeps.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = is_there(present, row, n)
    factor = tl.load(scale)
    size = tl.abs(factor) * LOG2E
    shift = 0.0
    if not SOFTMAX and bias is not None:
        shift = tl.load(bias)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    own = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        columns = is_there(present, column, n)
        s = products_of(
            x, x_stride, y, y_stride, row, column, rows, columns, features, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        mine = row[:, None] == column[None, :]
        if SOFTMAX:
            s = tl.where(factor < 0, -s, s)
            own += tl.sum(tl.where(mine, s, 0.0), 1)
            higher = tl.maximum(top, tl.max(tl.where(columns[None, :], s, float("-inf")), 1))
            higher_or_0 = tl.where(higher == float("-inf"), 0.0, higher)  # nothing may have been there yet
            terms = tl.where(columns[None, :], tl.exp2((s - higher_or_0[:, None]) * size), 0.0)
            before = tl.where(top == float("-inf"), 0.0, tl.exp2((top - higher_or_0) * size))
            total = total * before + tl.sum(terms, 1)
            top = higher
        else:
            z = s * factor + shift
            total += tl.sum(tl.where(columns[None, :], softplus(tl.where(mine, -z, z)), 0.0), 1)
    if SOFTMAX:
        rest = tl.log2(total)
        tl.store(lse + row, tl.where(rows, top, 0.0), mask=row < n)
        tl.store(lse + n + row, tl.where(rows, rest, 0.0), mask=row < n)
        total = ((top - own) * size + rest) * (LN2 / 2)
    tl.store(losses + row, tl.where(rows, total, 0.0), mask=row < n)


@triton.jit(do_not_specialize=["n"])
def gradient_kernel(
    out, sums, x, x_stride, y, y_stride, x_lse, y_lse, grad, scale, bias, present, n, features,
    SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``BLOCK_E`` columns of the gradient of some rows of x, and the sums [2, n] over each row of the slopes
    in its logits times the products, and of the slopes.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = is_there(present, row, n)
    factor = tl.load(scale)
    upstream = tl.load(grad)
    size = tl.abs(factor) * LOG2E
    shift = 0.0
    if SOFTMAX:
        row_top = tl.load(x_lse + row, mask=rows, other=0.0)[:, None]
        row_rest = tl.load(x_lse + n + row, mask=rows, other=0.0)[:, None]
    elif bias is not None:
        shift = tl.load(bias)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    all = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, n, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        columns = is_there(present, column, n)
        s = products_of(
            x, x_stride, y, y_stride, row, column, rows, columns, features, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        mine = row[:, None] == column[None, :]
        if SOFTMAX:
            top = tl.load(y_lse + column, mask=columns, other=0.0)[None, :]
            rest = tl.load(y_lse + n + column, mask=columns, other=0.0)[None, :]
            signed = tl.where(factor < 0, -s, s)
            slope = tl.exp2((signed - row_top) * size - row_rest) + tl.exp2((signed - top) * size - rest)
            slope *= 0.5
            slope = tl.where(mine, slope - 1, slope)
        else:
            z = s * factor + shift
            slope = 1 / (1 + tl.exp(tl.where(mine, z, -z)))
            slope = tl.where(mine, -slope, slope)
        slope = tl.where(rows[:, None] & columns[None, :], slope, 0.0)
        if sums is not None:
            weighted += tl.sum(slope * s, 1)
            all += tl.sum(slope, 1)
        if out is not None:
            features_of = load_tile(
                y + column.to(tl.int64)[:, None] * y_stride + e[None, :], columns, e < features
            )  # [N, E]
            acc = multiply(slope.to(features_of.dtype), features_of, acc, PRECISION)
    if out is not None:
        at = out + row.to(tl.int64)[:, None] * features + e[None, :]
        tl.store(at, acc * (upstream * factor), mask=(row < n)[:, None] & (e < features)[None, :])
    if sums is not None:
        first_part = (row < n) & (tl.program_id(1) == 0)  # all parts of the features come to the same
        tl.store(sums + row, weighted * upstream, mask=first_part)
        tl.store(sums + n + row, all * upstream, mask=first_part)


def _sides(a: Tensor, b: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if a.dtype == torch.float64:
        raise TypeError(
            "contrastive_loss: got float64, wanted float32, bfloat16 or float16: Triton adds in float32"
        )
    return dense(a), dense(b), None if present is None else present.contiguous()


def contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, kind: str, present: Tensor | None
) -> list[Tensor]:
    """Launches the forward; arguments and results are those of ``torch.ops.mmfast.contrastive_loss``.

    Copied first: an ``a`` or ``b`` whose last dimension is not dense, and a ``present`` that is not.
    """
    a, b, present = _sides(a, b, present)
    n, features = a.shape
    softmax = kind == "softmax"
    losses = logit_scale.new_zeros(2 if softmax else 1, n)
    lse = logit_scale.new_empty(2, 2, n) if softmax else None
    options = configuration("contrastive_loss", "loss", a, a.dtype, UNTUNED)
    with on(a.device):
        for side, (x, y) in enumerate([(a, b), (b, a)][: len(losses)] if n else []):
            loss_kernel[(triton.cdiv(n, options["BLOCK_M"]),)](
                losses[side], None if lse is None else lse[side], x, x.stride(0), y, y.stride(0), logit_scale,
                logit_bias, present, n, features, SOFTMAX=softmax, **options,
            )  # fmt: skip
    loss = losses.sum(dtype=torch.float64).to(losses.dtype)
    return [loss] if lse is None else [loss, lse]


def contrastive_loss_backward(
    grad: Tensor, a: Tensor, b: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, kind: str,
    present: Tensor | None, lse: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Launches the backward; arguments and results are those of ``mmfast::contrastive_loss_backward``.

    Copied first: as in the forward.
    """
    a, b, present = _sides(a, b, present)
    n, features = a.shape
    need_a, need_b, *need_scalars = needs
    d_a, d_b = (a.new_empty(n, features) if needed else None for needed in (need_a, need_b))
    sums = logit_scale.new_zeros(2, n) if any(need_scalars) else None
    options: dict[str, Any] = configuration("contrastive_loss", "gradient", a, a.dtype, UNTUNED)
    lses = (None, None) if lse is None else lse.contiguous().unbind(0)
    sides = (d_a, sums, a, b, lses), (d_b, None, b, a, lses[::-1])
    with on(a.device):
        for out, of_slopes, x, y, (x_lse, y_lse) in sides:
            if n == 0 or (out is None and of_slopes is None):
                continue
            parts = 1 if out is None else max(1, triton.cdiv(features, options["BLOCK_E"]))
            gradient_kernel[(triton.cdiv(n, options["BLOCK_M"]), parts)](
                out, of_slopes, x, x.stride(0), y, y.stride(0), x_lse, y_lse, grad, logit_scale, logit_bias,
                present, n, features, SOFTMAX=kind == "softmax", **options,
            )  # fmt: skip
    made = [t for t in (d_a, d_b) if t is not None]
    if present is not None:
        # What is absent gets 0 whatever upstream is, even if infinite; the kernel would spill over it.
        for rows in (*made, *([] if sums is None else [sums.t()])):
            rows.masked_fill_(~present[:, None], 0)
    if sums is not None:
        scalars = sums.sum(1, dtype=torch.float64).to(sums.dtype)
        if kind == "softmax":
            scalars[1] = 0  # its weights add up to 1 whatever the bias
        made += [t.clone() for t, needed in zip(scalars, need_scalars, strict=True) if needed]
    return made
