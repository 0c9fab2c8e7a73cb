"""Triton kernels of ``lowrank_fusion`` and their launchers.

Forwards, a program makes a tile of the output: for rank after rank each modality's factor is a product of
its own, multiplied into the rank's tile, and the ranks are added up in registers. A tile none of whose rows
has a modality skips its product. Backwards, one pass over the kept factors gives the gradient of each, by
multiplying the others out; from there on the products are those of ``concat_linear``.

All gradients are sums in a fixed order, without atomics: the same bits every time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._launch import blocks, configuration, contiguous, dense, lead_of, on, presence
from mmfast.kernels._tiles import any_of, load_row, load_tile, multiply, rows_with
from mmfast.kernels.concat_linear_backward import _grad_input, _grad_weight

__all__ = ["lowrank_fusion", "lowrank_fusion_backward"]

# By the oldest compute capability they are for. Nobody has tuned them on a device yet.
UNTUNED = {
    80: {
        "forward.half": blocks(64, 64, 32, num_warps=8, num_stages=3),
        "forward.tf32": blocks(64, 32, 32, num_warps=8, num_stages=3),
        "forward.ieee": blocks(32, 32, 16, num_warps=4, num_stages=2),
    },
}


class Modality(NamedTuple):
    """One modality as the forward kernel sees it."""

    data: Tensor  # [B, width], the last dimension dense
    row_stride: int
    width: int
    factor: Tensor  # [R, width + 1, O], the last dimension dense
    rank_stride: int
    feature_stride: int


@triton.jit
def place_of(i, row, r, column, rows, ranks, width):
    """Where a tile [M, N] of modality i and rank r lies in [n, rows, ranks, width]."""
    return ((tl.cast(rows, tl.int64) * i + row) * ranks + r)[:, None] * width + column[None, :]


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    out, products, modalities, rank_weight, bias, present, num_sources, rows, ranks, width,
    COUNT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``sum over r of rank_weight[r] * product over i of ([x_i, 1] @ factors_i[r]) + bias``."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(width, BLOCK_N)
    row = tile // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, kept = row < rows, column < width
    both = inside[:, None] & kept[None, :]
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for r in range(ranks):
        product = tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32)
        for i in tl.static_range(COUNT):
            m = modalities[i]
            seen = rows_with(i, row, inside, present, num_sources, 1)
            x = m.data + row.to(tl.int64)[:, None] * m.row_stride
            w = m.factor + tl.cast(r, tl.int64) * m.rank_stride
            factor = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k0 in range(0, tl.where(any_of(seen), m.width, 0), BLOCK_K):
                left = k0 + k < m.width
                tile_x = load_tile(x + (k0 + k)[None, :], seen, left)
                feature = (k0 + k).to(tl.int64)[:, None] * m.feature_stride
                tile_w = load_tile(w + feature + column[None, :], left, kept)
                factor = multiply(tile_x, tile_w, factor, PRECISION)
            factor += load_row(w + tl.cast(m.width, tl.int64) * m.feature_stride, column, kept, 0.0)
            factor = tl.where(seen[:, None], factor, 1.0)
            if products is not None:
                tl.store(products + place_of(i, row, r, column, rows, ranks, width), factor, mask=both)
            product *= factor
        total += tl.load(rank_weight + r).to(tl.float32) * product
    total += load_row(bias, column, kept, 0.0)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], total, mask=both)


@triton.jit(do_not_specialize=["rows"])
def grad_factors_kernel(
    grad_factors, rank_sums, grad, products, rank_weight, present, num_sources, rows, ranks, width,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of each factor's gradient, grad * rank_weight * the other factors, for one rank.

    And of ``grad`` times the product of all the sum, for the rank's weight.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, kept = row < rows, column < width
    both = inside[:, None] & kept[None, :]
    g = load_tile(grad + row.to(tl.int64)[:, None] * width + column[None, :], inside, kept).to(tl.float32)
    scaled = g * tl.load(rank_weight + r).to(tl.float32)
    for i in tl.static_range(COUNT):
        d = scaled
        for j in tl.static_range(COUNT):
            at = place_of(j, row, r, column, rows, ranks, width)
            factor = tl.load(products + at, mask=both, other=0.0).to(tl.float32)
            if j != i:
                d *= factor
            if i == 0:
                g *= factor
        seen = rows_with(i, row, inside, present, num_sources, 1)
        at = place_of(i, row, r, column, rows, ranks, width)
        tl.store(grad_factors + at, tl.where(seen[:, None], d, 0.0), mask=both)
    part = tl.program_id(0) * tl.num_programs(2) + tl.program_id(2)
    tl.store(rank_sums + part * ranks + r, tl.sum(tl.sum(tl.where(both, g, 0.0), 1), 0))


def lowrank_fusion(
    inputs: Sequence[Tensor], factors: Sequence[Tensor], rank_weight: Tensor, bias: Tensor | None,
    present: Tensor | None, save: bool,
) -> list[Tensor]:  # fmt: skip
    """Launches the forward; arguments and results are those of ``torch.ops.mmfast.lowrank_fusion``."""
    rows, (ranks, _, width) = lead_of("lowrank_fusion", inputs).numel(), factors[0].shape
    out = inputs[0].new_empty(rows, width)
    made = [out]
    if save:
        made.append(inputs[0].new_empty(len(inputs), rows, ranks, width))
    if out.numel() == 0:
        return made
    modalities = []
    with on(out.device):
        for x, factor in zip(map(dense, inputs), map(dense, factors), strict=True):
            modalities.append(Modality(x, x.stride(0), x.shape[1], factor, *factor.stride()[:2]))
        flags, num_sources, _ = presence(present, rows)
        options = configuration("lowrank_fusion", "forward", out, out.dtype, UNTUNED)
        grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
        product_kernel[grid](
            out, made[1] if save else None, tuple(modalities), *contiguous(rank_weight, bias), flags,
            num_sources, rows, ranks, width, COUNT=len(modalities), **options,
        )  # fmt: skip
    return made


def lowrank_fusion_backward(
    grad: Tensor, inputs: Sequence[Tensor], factors: Sequence[Tensor], rank_weight: Tensor,
    present: Tensor | None, products: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Launches the backward; arguments and results are those of ``torch.ops.mmfast.lowrank_fusion_backward``.

    The factors are copied, transposed, for the gradients of the inputs, and their own gradients at the end.
    """
    lead = lead_of("lowrank_fusion_backward", inputs)
    n, rows, (ranks, _, width) = len(inputs), lead.numel(), factors[0].shape
    if rows == 0 or width == 0:
        shapes = [*(t.shape for t in (*inputs, *factors)), (ranks,), (width,)]
        return [grad.new_zeros(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]
    grads: list[Tensor | None] = [None] * (2 * n)
    with on(grad.device):
        grad = grad.contiguous()
        d = torch.empty_like(products)  # [n, B, R, O]
        grid = triton.cdiv(rows, 32), ranks, triton.cdiv(width, 64)
        rank_sums = grad.new_empty(grid[0] * grid[2], ranks, dtype=torch.float32)
        flags, num_sources, _ = presence(present, rows)
        grad_factors_kernel[grid](
            d, rank_sums, grad, products.contiguous(), rank_weight.contiguous(), flags, num_sources, rows,
            ranks, width, COUNT=n, BLOCK_M=32, BLOCK_N=64,
        )  # fmt: skip
        for i, (x, factor) in enumerate(zip(inputs, factors, strict=True)):
            g, depth = d[i].flatten(1), x.shape[1]  # [B, R O]
            weight = factor[:, :-1].transpose(1, 2).reshape(ranks * width, depth).contiguous()  # [R O, D]
            if needs[i]:
                grads[i] = _grad_input(g, weight, present, i, x.dtype) if depth else torch.zeros_like(x)
            if needs[n + i]:
                product = weight.new_empty(weight.shape)
                _grad_weight(product, g, lead, x, weight, present, i, None)
                ones = d[i].sum(0, dtype=torch.float32)[:, None].to(grad.dtype)  # [R, 1, O]
                grads[n + i] = torch.cat([product.view(ranks, width, depth).transpose(1, 2), ones], 1)
    grads += [rank_sums.sum(0), grad.sum(0, dtype=torch.float32)]
    return [t.to(grad.dtype) for t, needed in zip(grads, needs, strict=True) if needed and t is not None]
