"""Rows, masks and loads inside a kernel, shared by the kernels that walk several sources."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Size, Tensor

from mmfast.kernels._launch import Triple, walk

INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Source(NamedTuple):
    """One source as a kernel sees it, and its block of the weight."""

    data: Tensor  # [..., width], the last dimension dense
    strides: Triple  # of the three collapsed leading dimensions
    number: int = 0  # its column of `present`
    width: int = 0
    weight: Tensor | None = None  # [O, width]
    column: int = 0  # where the block begins
    grad: Tensor | None = None  # [rows, width]


class Pooled(NamedTuple):
    """A source with fewer rows than the output, as the main kernel sees it: multiplied already.

    Under a norm its rows were centred on their own means and scaled by the norm's weight before.
    """

    data: Tensor  # [..., O], float32
    strides: Triple
    number: int
    width: int
    mean: Tensor | None = None  # [..., 1], of its own rows
    rstd: Tensor | None = None  # [..., 1]
    moment_strides: Triple = (0, 0, 0)
    along: Tensor | None = None  # [O], its block of the weight @ the norm's weight


def walk_with(
    lead: Size, tensors: Sequence[Tensor], pooled: Sequence[Pooled]
) -> tuple[Triple, list[tuple[Tensor, Triple]], list[Pooled]]:
    """``walk`` through tensors and pooled sources together."""
    more = [t for source in pooled for t in (source.data, source.mean, source.rstd) if t is not None]
    sizes, walked, strides = walk(lead, [*tensors, *more])
    found = list(zip(walked, strides, strict=True))
    rest, placed = iter(found[len(tensors) :]), []
    for source in pooled:
        data, steps = next(rest)
        source = source._replace(data=data, strides=steps)
        if source.mean is not None:
            (mean, steps), (rstd, _) = next(rest), next(rest)
            source = source._replace(mean=mean, rstd=rstd, moment_strides=steps)
        placed.append(source)
    return sizes, found[: len(tensors)], placed


@triton.jit
def row_offset(row, n1, n2, strides):
    """Where a row begins: rows are counted through dimensions (.., n1, n2)."""
    outer = (row // (n1 * n2)).to(tl.int64) * strides[0]
    return outer + (row // n2 % n1).to(tl.int64) * strides[1] + (row % n2).to(tl.int64) * strides[2]


@triton.jit
def rows_with(number, row, inside, present, num_sources, per_sample):
    """Which of these rows have the source."""
    seen = inside
    if present is not None:
        flag = tl.load(
            present + (row // per_sample).to(tl.int64) * num_sources + number, mask=inside, other=0
        )
        seen = inside & (flag != 0)
    return seen


@triton.jit
def any_of(mask):
    return tl.max(mask.to(tl.int32), 0) > 0


@triton.jit
def load_tile(pointers, row_mask, column_mask):
    return tl.load(pointers, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``. What a tensor core gets in float32 it cuts off to TF32, and every sum is too small by
    some 7e-4: here it is rounded, as PyTorch's products have it. The interpreter multiplies exactly.
    """
    if PRECISION == "tf32" and not INTERPRETED:
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def to_tf32(x):
    if x.dtype == tl.float32:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], tl.float32, True, 1)
    return x


@triton.jit
def load_row(pointer, k, inside, default):
    """``pointer[k]`` in float32 as [1, K]; the default where there is no pointer."""
    if pointer is not None:
        row = tl.load(pointer + k, mask=inside, other=0.0).to(tl.float32)
    else:
        row = tl.full(k.shape, default, tl.float32)
    return row[None, :]
