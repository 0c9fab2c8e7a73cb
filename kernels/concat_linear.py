"""Triton kernels of ``concat_linear`` and their launcher; the backward is in ``concat_linear_backward.py``.

One launch walks all sources: for a tile of the output the K loop runs through source after source and adds
into the same float32 tile, so the concatenation exists nowhere. Three things keep work away from it:

- A *pooled* source, one with fewer rows than the output, is projected at its own few rows by a launch of its
  own, and the main launch adds the result to its tile. Backwards, its gradient is summed over the rows it was
  broadcast to before it is multiplied by the weight. So it is under a norm too, where a row ``p`` of mean
  ``m`` (an absent one: ``p = m = 0``) gives an output row of statistics ``mean`` and ``rstd``

      rstd * ((p - m) * norm_weight) @ W.T + rstd * (m - mean) * (W @ norm_weight)

  and each row is centred on its own mean before it is multiplied: a large mean costs no digits.
- A tile none of whose rows has a source skips that source's loop. A row without it is masked off when it is
  loaded, so nothing that stands in an absent element enters a register.
- Bias, activation, gate and residual are applied to the tile before it is stored.

Tiles of sources and weight may be read through tensor descriptors, unless a row may be absent or is normed on
its way; see ``mmfast.kernels._launch.use_descriptors`` for how they must lie.

All gradients are sums in a fixed order, without atomics: the same bits every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._activations import activate, tanh
from mmfast.kernels._launch import (
    Triple,
    aligned,
    blocks,
    columns_of,
    configuration,
    contiguous,
    dense,
    described,
    is_pooled,
    lead_of,
    on,
    presence,
    row_step,
    times,
    unit,
    use_descriptors,
    walk,
)
from mmfast.kernels._tiles import (
    Pooled,
    Source,
    any_of,
    load_row,
    load_tile,
    multiply,
    row_offset,
    rows_with,
    walk_with,
)
from mmfast.kernels.concat_linear_backward import concat_linear_backward

__all__ = ["concat_linear", "concat_linear_backward"]

# By the oldest compute capability they are for. Nobody has tuned them on a device yet. "unaligned" is for
# matrices that do not lie in whole vectors (see `aligned`), few rows or many: small enough not to spill.
UNTUNED = {
    80: {
        "forward.half": blocks(128, 128, 32, num_warps=8, num_stages=4),
        "forward.tf32": blocks(128, 64, 32, num_warps=8, num_stages=3),
        "forward.ieee": blocks(64, 64, 16, num_warps=4, num_stages=2),
        "forward_few_rows.half": blocks(32, 64, 64, num_warps=4, num_stages=4),
        "forward_few_rows.tf32": blocks(32, 64, 32, num_warps=4, num_stages=3),
        "forward_few_rows.ieee": blocks(32, 32, 16, num_warps=4, num_stages=2),
        "forward_unaligned.half": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "forward_unaligned.tf32": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "forward_unaligned.ieee": blocks(64, 32, 16, num_warps=4, num_stages=2),
    },
    90: {
        "forward.half": described(blocks(128, 128, 64, num_warps=8, num_stages=4)),
        "forward.tf32": described(blocks(128, 64, 32, num_warps=8, num_stages=3)),
        "forward.ieee": blocks(64, 64, 16, num_warps=4, num_stages=2),
        "forward_few_rows.half": blocks(64, 64, 64, num_warps=4, num_stages=4),
        "forward_few_rows.tf32": blocks(64, 64, 32, num_warps=4, num_stages=3),
        "forward_few_rows.ieee": blocks(32, 32, 16, num_warps=4, num_stages=2),
        "forward_unaligned.half": described(blocks(64, 64, 32, num_warps=8, num_stages=2)),
        "forward_unaligned.tf32": described(blocks(64, 64, 32, num_warps=8, num_stages=2)),
        "forward_unaligned.ieee": blocks(64, 32, 16, num_warps=4, num_stages=2),
    },
}
UNTUNED[100] = {
    **UNTUNED[90],
    "forward.half": described(blocks(128, 64, 64, num_warps=8, num_stages=4)),
    "forward_unaligned.tf32": blocks(64, 32, 32, num_warps=8, num_stages=2),
}  # else they spill


@triton.jit
def statistics_kernel(
    mean, rstd, sources, pooled, present, num_sources, eps, total, rows, n1, n2, per_sample,
    SOURCES: tl.constexpr, POOLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of every row of the concatenation; the variance around the mean."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    k = tl.arange(0, BLOCK_K)
    m = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(SOURCES):
        source = sources[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        for k0 in range(0, tl.where(any_of(seen), source.width, 0), BLOCK_K):
            m += tl.sum(load_tile(x + (k0 + k)[None, :], seen, k0 + k < source.width).to(tl.float32), 1)
    for i in tl.static_range(POOLED):
        source = pooled[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        at = row_offset(row, n1, n2, source.moment_strides)
        m += source.width * tl.load(source.mean + at, mask=seen, other=0.0)
    m = m / total
    square = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(SOURCES):
        source = sources[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        for k0 in range(0, source.width, BLOCK_K):  # an absent source's zeros are m away from the mean
            tile = load_tile(x + (k0 + k)[None, :], seen, k0 + k < source.width).to(tl.float32) - m[:, None]
            square += tl.sum(tl.where((k0 + k < source.width)[None, :], tile * tile, 0.0), 1)
    for i in tl.static_range(POOLED):
        source = pooled[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        at = row_offset(row, n1, n2, source.moment_strides)
        away = tl.load(source.mean + at, mask=seen, other=0.0) - m
        deviation = tl.where(seen, 1 / tl.load(source.rstd + at, mask=seen, other=1.0), 0.0)
        square += source.width * (away * away + deviation * deviation)
    tl.store(mean + row, m, mask=inside)
    tl.store(rstd + row, 1 / tl.sqrt(square / total + eps), mask=inside)


@triton.jit(do_not_specialize=["rows", "per_sample"])
def forward_kernel(
    out, preact, sources, pooled, weight_stride, bias, present, num_sources,
    mean, rstd, norm_weight, norm_bias, residual, residual_strides, gate, gate_stride,
    rows, n1, n2, per_sample, width,
    SOURCES: tl.constexpr, POOLED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of ``residual + tanh(gate) * activation(norm(cat(sources)) @ weight.T + bias)``."""
    SWIGLU: tl.constexpr = ACTIVATION == "swiglu"
    tile = tl.program_id(0)
    tiles = tl.cdiv(width, BLOCK_N)  # neighbours share their rows of the sources
    row0, column0 = tile // tiles * BLOCK_M, tile % tiles * BLOCK_N
    row, column = row0 + tl.arange(0, BLOCK_M), column0 + tl.arange(0, BLOCK_N)
    inside, kept = row < rows, column < width
    k = tl.arange(0, BLOCK_K)
    if mean is not None:
        m = tl.load(mean + row, mask=inside, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=inside, other=0.0)[:, None]

    a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # swiglu's second half
    for i in tl.static_range(POOLED):
        source = pooled[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        part = source.data + row_offset(row, n1, n2, source.strides)[:, None] + column[None, :]
        a += load_tile(part, seen, kept)
        if SWIGLU:
            b += load_tile(part + width, seen, kept)
        if mean is not None:
            own = source.mean + row_offset(row, n1, n2, source.moment_strides)
            away = tl.load(own, mask=seen, other=0.0)[:, None] - m
            a += away * load_row(source.along, column, kept, 0.0)
            if SWIGLU:
                b += away * load_row(source.along, width + column, kept, 0.0)
    if mean is not None and POOLED > 0:
        a, b = a * r, b * r
    for i in tl.static_range(SOURCES):
        source = sources[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        w = source.weight + column.to(tl.int64)[None, :] * weight_stride
        w2 = source.weight + (width + column).to(tl.int64)[None, :] * weight_stride
        end = source.width
        if mean is None:
            end = tl.where(any_of(seen), end, 0)
        if DESCRIPTORS:
            x_tiles = tl.make_tensor_descriptor(
                source.data, [rows, source.width], [source.strides[2], 1], [BLOCK_M, BLOCK_K]
            )
            w_tiles = tl.make_tensor_descriptor(
                source.weight, [2 * width if SWIGLU else width, source.width], [weight_stride, 1],
                [BLOCK_N, BLOCK_K],
            )  # fmt: skip
        for k0 in range(0, end, BLOCK_K):
            left = k0 + k < source.width
            if DESCRIPTORS:
                tile_x = x_tiles.load([row0, k0])
            else:
                tile_x = load_tile(x + (k0 + k)[None, :], seen, left)  # [M, K]
            if mean is not None:
                scale = load_row(norm_weight, source.column + k0 + k, left, 1.0)
                shift = load_row(norm_bias, source.column + k0 + k, left, 0.0)
                tile_x = ((tile_x.to(tl.float32) - m) * r * scale + shift).to(source.data.dtype.element_ty)
            if DESCRIPTORS:
                tile_w = w_tiles.load([column0, k0]).T
            else:
                tile_w = load_tile(w + (k0 + k)[:, None], left, kept)  # [K, N]
            a = multiply(tile_x, tile_w, a, PRECISION)
            if SWIGLU:
                if DESCRIPTORS:
                    tile_w = w_tiles.load([width + column0, k0]).T
                else:
                    tile_w = load_tile(w2 + (k0 + k)[:, None], left, kept)
                b = multiply(tile_x, tile_w, b, PRECISION)

    a += load_row(bias, column, kept, 0.0)
    if SWIGLU:
        b += load_row(bias, width + column, kept, 0.0)
    at = row.to(tl.int64)[:, None] * width + column[None, :]
    both = inside[:, None] & kept[None, :]
    if preact is not None:
        if SWIGLU:
            at2 = at + row.to(tl.int64)[:, None] * width
            tl.store(preact + at2, a, mask=both)
            tl.store(preact + at2 + width, b, mask=both)
        else:
            tl.store(preact + at, a, mask=both)
    if SWIGLU:
        y = activate(a, "silu") * b
    else:
        y = activate(a, ACTIVATION)
    if gate is not None:
        y *= tanh(load_row(gate, column * gate_stride, kept, 0.0))
    if residual is not None:
        start = row_offset(row, n1, n2, residual_strides)
        y += load_tile(residual + start[:, None] + column[None, :], inside, kept).to(tl.float32)
    tl.store(out + at, y, mask=both)


def _run(
    out: Tensor, preact: Tensor | None, sources: Sequence[Source], pooled: Sequence[Pooled], weight: Tensor,
    bias: Tensor | None, flags: tuple[Tensor | None, int, int], norm: tuple[Tensor | None, ...],
    residual: tuple[Tensor | None, Triple | None], gate: Tensor | None, sizes: Triple, activation: str,
) -> None:  # fmt: skip
    """Launches ``forward_kernel`` on rows counted through ``sizes``."""
    rows, width = sizes[0] * sizes[1] * sizes[2], out.shape[-1]
    present, num_sources, per_sample = flags
    name = "forward_few_rows" if rows <= 256 else "forward"
    weights = [(source.weight, (weight.stride(0),)) for source in sources]
    tiles = [(source.data, source.strides) for source in sources]
    tiles += [(source.data, source.strides) for source in pooled]
    if not aligned((out, ()), residual, *weights, *tiles):
        name = "forward_unaligned"
    options = configuration("concat_linear", name, weight, weight.dtype, UNTUNED)
    if activation == "swiglu":
        options["BLOCK_N"] //= 2  # two tiles of the output live at once
    use_descriptors(
        options,
        present is None and norm[0] is None,
        *((source.data, row_step(sizes, source.strides)) for source in sources),
        *((source.weight, weight.stride(0)) for source in sources),
    )
    grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
    gate_step = 0 if gate is None or len(gate) == 1 else 1
    forward_kernel[grid](
        out, preact, tuple(sources), tuple(pooled), weight.stride(0), bias, present, num_sources, *norm,
        *residual, gate, gate_step, rows, sizes[1], sizes[2], per_sample, width,
        SOURCES=len(sources), POOLED=len(pooled), ACTIVATION=activation, **options,
    )  # fmt: skip


def _take_statistics(
    mean: Tensor, rstd: Tensor, sources: Sequence[Source], pooled: Sequence[Pooled],
    flags: tuple[Tensor | None, int, int], eps: float, sizes: Triple,
) -> None:  # fmt: skip
    rows = mean.numel()
    total = sum(source.width for source in sources) + sum(source.width for source in pooled)
    statistics_kernel[(triton.cdiv(rows, 4),)](
        mean, rstd, tuple(sources), tuple(pooled), flags[0], flags[1], eps, max(1, total), rows, *sizes[1:],
        flags[2], SOURCES=len(sources), POOLED=len(pooled), BLOCK_M=4, BLOCK_K=128, num_warps=4,
    )  # fmt: skip


def project(x: Tensor, number: int, weight: Tensor) -> Pooled:
    """A pooled source ``[..., D]`` times its block of the weight ``[O, D]``."""
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
    sizes, (x,), (strides,) = walk(x.shape[:-1], [x])
    source, norm = Source(x, strides, 0, x.shape[-1], weight), (None,) * 4
    _run(out, None, [source], [], weight, None, (None, 1, 1), norm, (None, None), None, sizes, "none")
    return Pooled(out, (0, 0, 0), number, x.shape[-1])


def own_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation [..., 1] of a pooled source's own rows.

    There is next to no eps: a row in half precision that is scaled by the latter is in its range.
    """
    mean, rstd = x.new_empty(2, *x.shape[:-1], 1, dtype=torch.float32)
    sizes, (x,), (strides,) = walk(x.shape[:-1], [x])
    _take_statistics(mean, rstd, [Source(x, strides, 0, x.shape[-1])], [], (None, 1, 1), 1e-30, sizes)
    return mean, rstd


def project_centred(
    x: Tensor, number: int, weight: Tensor, norm_weight: Tensor | None, moments: tuple[Tensor, Tensor]
) -> Pooled:
    """The same under a norm."""
    mean, rstd = moments
    centred, to_one = unit(x, mean, norm_weight)
    pooled = project(centred, number, weight)
    return pooled._replace(data=pooled.data / to_one, mean=mean, rstd=rstd, along=times(weight, norm_weight))


def concat_linear(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, present: Tensor | None,
    norm_eps: float | None, norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str,
    residual: Tensor | None, gate: Tensor | None, save: bool,
) -> list[Tensor]:  # fmt: skip
    """Launches the forward; arguments and results are those of ``torch.ops.mmfast.concat_linear``.

    Copied first: a tensor whose last dimension is not dense, and all of them where their leading dimensions
    cannot be walked as three (neighbours that every tensor steps through alike count as one).
    """
    lead = lead_of("concat_linear", inputs)
    bias, norm_weight, norm_bias, gate = contiguous(bias, norm_weight, norm_bias, gate)
    rows, height = lead.numel(), weight.shape[0]
    width = height // 2 if activation == "swiglu" else height
    out = weight.new_empty(*lead, width)
    preact = weight.new_empty(*lead, height) if save else None
    mean = rstd = None
    if norm_eps is not None:
        mean, rstd = (weight.new_empty(lead, dtype=torch.float32) for _ in range(2))
    made = [t for t in (out, preact, mean, rstd) if t is not None]
    if out.numel() == 0:
        return made

    weight, columns = dense(weight), columns_of(inputs)
    blocks = [weight[:, own] for own in columns]
    flags = presence(present, rows)
    with on(weight.device):
        full, pooled = [], []
        for i, x in enumerate(inputs):
            if not is_pooled(x, lead, norm_eps is not None):
                full.append(i)
            elif norm_eps is None:
                pooled.append(project(x, i, blocks[i]))
            else:
                scale = None if norm_weight is None else norm_weight[columns[i]]
                pooled.append(project_centred(x, i, blocks[i], scale, own_moments(x)))
                if norm_bias is not None:
                    start = times(blocks[i], norm_bias[columns[i]])
                    bias = start if bias is None else bias + start
        added = [] if residual is None else [residual.expand(*residual.shape[:-1], width)]
        sizes, rows_of, pooled = walk_with(lead, [*(inputs[i] for i in full), *added], pooled)
        sources = [
            Source(*rows_of[at], i, inputs[i].shape[-1], blocks[i], columns[i].start)
            for at, i in enumerate(full)
        ]
        norm: tuple[Tensor | None, ...] = (None,) * 4
        if mean is not None and rstd is not None and norm_eps is not None:
            norm = mean, rstd, norm_weight, norm_bias
            _take_statistics(mean, rstd, sources, pooled, flags, norm_eps, sizes)
        _run(
            out, preact, sources, pooled, weight, bias, flags, norm,
            rows_of[-1] if added else (None, None), gate, sizes, activation,
        )  # fmt: skip
    return made
