"""Triton kernels of the backward of ``concat_linear``, and their launcher."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._activations import activate, derivative, tanh
from mmfast.kernels._launch import (
    aligned,
    blocks,
    configuration,
    contiguous,
    dense,
    described,
    lead_of,
    on,
    presence,
    row_step,
    row_sum,
    use_descriptors,
    walk,
)
from mmfast.kernels._tiles import (
    Source,
    any_of,
    columns_of,
    load_row,
    load_tile,
    multiply,
    row_offset,
    rows_with,
)

# By the oldest compute capability they are for. Nobody has tuned them on a device yet.
UNTUNED = {
    80: {
        "grad_input.half": blocks(128, 128, 32, num_warps=8, num_stages=4),
        "grad_input.tf32": blocks(128, 64, 32, num_warps=8, num_stages=3),
        "grad_input.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "grad_input_few_rows.half": blocks(32, 64, 64, num_warps=4, num_stages=4),
        "grad_input_few_rows.tf32": blocks(32, 64, 32, num_warps=4, num_stages=3),
        "grad_input_few_rows.ieee": blocks(32, 32, 16, num_warps=4, num_stages=2),
        "grad_input_unaligned.half": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "grad_input_unaligned.tf32": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "grad_input_unaligned.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "grad_weight.half": blocks(128, 128, 32, num_warps=8, num_stages=4),
        "grad_weight.tf32": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "grad_weight.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "grad_weight_unaligned.half": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "grad_weight_unaligned.tf32": blocks(64, 32, 32, num_warps=8, num_stages=2),
        "grad_weight_unaligned.ieee": blocks(64, 32, 16, num_warps=8, num_stages=2),
    },
    90: {
        "grad_input.half": described(blocks(128, 128, 64, num_warps=8, num_stages=4)),
        "grad_input.tf32": described(blocks(128, 64, 32, num_warps=8, num_stages=3)),
        "grad_input.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "grad_input_few_rows.half": blocks(64, 64, 64, num_warps=4, num_stages=4),
        "grad_input_few_rows.tf32": blocks(64, 64, 32, num_warps=4, num_stages=3),
        "grad_input_few_rows.ieee": blocks(32, 32, 16, num_warps=4, num_stages=2),
        "grad_input_unaligned.half": described(blocks(64, 64, 32, num_warps=8, num_stages=2)),
        "grad_input_unaligned.tf32": described(blocks(64, 64, 32, num_warps=8, num_stages=2)),
        "grad_input_unaligned.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "grad_weight.half": described(blocks(128, 128, 64, num_warps=8, num_stages=3)),
        "grad_weight.tf32": blocks(64, 64, 32, num_warps=4, num_stages=3),
        "grad_weight.ieee": blocks(64, 64, 16, num_warps=8, num_stages=2),
        "grad_weight_unaligned.half": described(blocks(64, 64, 32, num_warps=8, num_stages=2)),
        "grad_weight_unaligned.tf32": blocks(64, 64, 32, num_warps=8, num_stages=2),
        "grad_weight_unaligned.ieee": blocks(64, 32, 16, num_warps=8, num_stages=2),
    },
}
UNTUNED[100] = {
    **UNTUNED[90],
    "grad_input.tf32": blocks(128, 64, 32, num_warps=8, num_stages=3),
    "grad_input_few_rows.tf32": blocks(64, 64, 32, num_warps=8, num_stages=3),
    "grad_weight_unaligned.tf32": blocks(64, 32, 32, num_warps=8, num_stages=2),
}  # else they spill

_CHUNK = 256  # rows whose presence is looked up together
_PROGRAMS = (
    256  # a sum over rows is split until about so many programs run, whatever the device: the same bits
)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def grad_preact_kernel(
    grad_preact, bias_sum, gate_sum, grad, preact, gate, gate_stride, rows, rows_each, width,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, and its sums over ``rows_each`` rows for bias and gate."""
    SWIGLU: tl.constexpr = ACTIVATION == "swiglu"
    part = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = column < width
    db = tl.zeros([BLOCK_N], tl.float32)
    db2 = tl.zeros([BLOCK_N], tl.float32)
    dgate = tl.zeros([BLOCK_N], tl.float32)
    if gate is not None:
        scale = tanh(load_row(gate, column * gate_stride, kept, 0.0))
    for row0 in range(part * rows_each, tl.minimum((part + 1) * rows_each, rows), BLOCK_M):
        row = row0 + tl.arange(0, BLOCK_M)
        inside = (row < rows) & (row < (part + 1) * rows_each)
        both = inside[:, None] & kept[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        at2 = at + row.to(tl.int64)[:, None] * width  # in rows of two halves
        g = tl.load(grad + at, mask=both, other=0.0).to(tl.float32)
        if SWIGLU:
            a = tl.load(preact + at2, mask=both, other=0.0).to(tl.float32)
            b = tl.load(preact + at2 + width, mask=both, other=0.0).to(tl.float32)
            if gate is not None:
                dgate += tl.sum(g * activate(a, "silu") * b, 0)
                g *= scale
            da = g * b * derivative(a, "silu")
            g = g * activate(a, "silu")
            tl.store(grad_preact + at2, da, mask=both)
            tl.store(grad_preact + at2 + width, g, mask=both)
            db2 += tl.sum(g, 0)
            g = da
        elif grad_preact is not None:
            a = tl.load(preact + at, mask=both, other=0.0).to(tl.float32)
            if gate is not None:
                dgate += tl.sum(g * activate(a, ACTIVATION), 0)
                g *= scale
            g *= derivative(a, ACTIVATION)
            tl.store(grad_preact + at, g, mask=both)
        db += tl.sum(g, 0)
    if SWIGLU:
        tl.store(bias_sum + part * 2 * width + column, db, mask=kept)
        tl.store(bias_sum + (part * 2 + 1) * width + column, db2, mask=kept)
    else:
        tl.store(bias_sum + part * width + column, db, mask=kept)
    if gate is not None:
        tl.store(gate_sum + part * width + column, dgate, mask=kept)


@triton.jit(do_not_specialize=["number", "rows", "per_sample"])
def grad_input_kernel(
    out, grad, weight, weight_stride, present, num_sources, number, rows, per_sample, width, depth,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of ``grad`` [rows, depth] @ ``weight`` [depth, width]; zeros where the source is absent."""
    tile = tl.program_id(0)
    tiles = tl.cdiv(width, BLOCK_N)
    row0, column0 = tile // tiles * BLOCK_M, tile % tiles * BLOCK_N
    row, column = row0 + tl.arange(0, BLOCK_M), column0 + tl.arange(0, BLOCK_N)
    inside, kept = row < rows, column < width
    k = tl.arange(0, BLOCK_K)
    seen = rows_with(number, row, inside, present, num_sources, per_sample)
    if DESCRIPTORS:
        g_tiles = tl.make_tensor_descriptor(grad, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
        w_tiles = tl.make_tensor_descriptor(weight, [depth, width], [weight_stride, 1], [BLOCK_K, BLOCK_N])
    g = grad + row.to(tl.int64)[:, None] * depth
    dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, tl.where(any_of(seen), depth, 0), BLOCK_K):
        left = k0 + k < depth
        if DESCRIPTORS:
            tile_g, tile_w = g_tiles.load([row0, k0]), w_tiles.load([k0, column0])
        else:
            tile_g = load_tile(g + (k0 + k)[None, :], seen, left)
            w = weight + (k0 + k).to(tl.int64)[:, None] * weight_stride + column[None, :]
            tile_w = load_tile(w, left, kept)
        tile_w = tile_w.to(tile_g.dtype)
        dx = multiply(tile_g, tile_w, dx, PRECISION)
    dx = tl.where(seen[:, None], dx, 0.0)
    tl.store(
        out + row.to(tl.int64)[:, None] * width + column[None, :], dx, mask=inside[:, None] & kept[None, :]
    )


@triton.jit(do_not_specialize=["number", "rows", "per_sample", "chunk", "chunks_each"])
def grad_weight_kernel(
    out, out_stride, norm_weight_sum, norm_bias_sum, grad, source, weight_stride, present, num_sources,
    number, mean, rstd, norm_weight, norm_bias, grad_bias, rows, n1, n2, per_sample, height, chunk,
    chunks_each, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of ``grad.T`` [height, rows] @ ``norm(x)`` [rows, width], over this part's chunks of rows.

    A chunk without the source is skipped. Under a norm the product is with x hat, which gives all three:
    dW = product * norm_weight + grad_bias * norm_bias, d norm_weight = sum over o of W * product,
    d norm_bias = sum over o of W * grad_bias.
    """
    o0, k0, part = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    o, k = o0 + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    kept_o, kept_k = o < height, k < source.width
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        g_tiles = tl.make_tensor_descriptor(grad, [rows, height], [height, 1], [BLOCK_K, BLOCK_M])
        x_tiles = tl.make_tensor_descriptor(
            source.data, [rows, source.width], [source.strides[2], 1], [BLOCK_K, BLOCK_N]
        )
    for chunk0 in range(part * chunks_each, (part + 1) * chunks_each):
        first = chunk0 * chunk
        end = tl.minimum(first + chunk, rows)
        if present is not None and mean is None:
            probe = first + tl.arange(0, CHUNK)  # a chunk is CHUNK rows or the rows of one sample
            anywhere = any_of(rows_with(number, probe, probe < end, present, num_sources, per_sample))
            end = tl.where(anywhere, end, first)
        for row0 in range(first, end, BLOCK_K):
            row = row0 + tl.arange(0, BLOCK_K)
            inside = row < end
            seen = rows_with(number, row, inside, present, num_sources, per_sample)
            if DESCRIPTORS:
                g, x = g_tiles.load([row0, o0]), x_tiles.load([row0, k0])  # [K, M], [K, N]
            else:
                g = load_tile(grad + row.to(tl.int64)[:, None] * height + o[None, :], inside, kept_o)
                x = source.data + row_offset(row, n1, n2, source.strides)[:, None] + k[None, :]
                x = load_tile(x, seen, kept_k)
            if mean is not None:
                m = tl.load(mean + row, mask=inside, other=0.0)[:, None]
                x = (x.to(tl.float32) - m) * tl.load(rstd + row, mask=inside, other=0.0)[:, None]
            product = multiply(tl.trans(g), x.to(g.dtype), product, PRECISION)

    both = kept_o[:, None] & kept_k[None, :]
    if mean is not None:
        w = load_tile(source.weight + o.to(tl.int64)[:, None] * weight_stride + k[None, :], kept_o, kept_k)
        at = (part * tl.num_programs(0) + tl.program_id(0)) * source.width + k
        tl.store(norm_weight_sum + at, tl.sum(w.to(tl.float32) * product, 0), mask=kept_k)
        db = tl.load(grad_bias + o, mask=kept_o & (part == 0), other=0.0)[:, None]  # counted once
        tl.store(norm_bias_sum + at, tl.sum(w.to(tl.float32) * db, 0), mask=kept_k)
        scale = load_row(norm_weight, k, kept_k, 1.0)
        product = product * scale + db * load_row(norm_bias, k, kept_k, 0.0)
    tl.store(out + (part * height + o).to(tl.int64)[:, None] * out_stride + k[None, :], product, mask=both)


@triton.jit(do_not_specialize=["rows", "per_sample"])
def norm_backward_kernel(
    sources, present, num_sources, mean, rstd, norm_weight, total, rows, n1, n2, per_sample,
    SOURCES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the normalised rows into gradients of the rows, in place.

    dx = rstd * (dy w - mean(dy w) - x hat mean(dy w x hat)), the means over the whole concatenation.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    k = tl.arange(0, BLOCK_K)
    m = tl.load(mean + row, mask=inside, other=0.0)[:, None]
    r = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
    plain = tl.zeros([BLOCK_M], tl.float32)
    along = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(SOURCES):
        source = sources[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        dy = source.grad + row.to(tl.int64)[:, None] * source.width
        for k0 in range(0, source.width, BLOCK_K):
            left = k0 + k < source.width
            scale = load_row(norm_weight, source.column + k0 + k, left, 1.0)
            g = load_tile(dy + (k0 + k)[None, :], inside, left).to(tl.float32) * scale
            x_hat = (load_tile(x + (k0 + k)[None, :], seen, left).to(tl.float32) - m) * r
            plain += tl.sum(g, 1)
            along += tl.sum(g * x_hat, 1)
    plain = (plain / total)[:, None]
    along = (along / total)[:, None]
    for i in tl.static_range(SOURCES):
        source = sources[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        x = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        dy = source.grad + row.to(tl.int64)[:, None] * source.width
        for k0 in range(0, source.width, BLOCK_K):
            left = k0 + k < source.width
            scale = load_row(norm_weight, source.column + k0 + k, left, 1.0)
            g = load_tile(dy + (k0 + k)[None, :], inside, left).to(tl.float32) * scale
            x_hat = (load_tile(x + (k0 + k)[None, :], seen, left).to(tl.float32) - m) * r
            dx = tl.where(seen[:, None], r * (g - plain - x_hat * along), 0.0)
            tl.store(dy + (k0 + k)[None, :], dx, mask=inside[:, None] & left[None, :])


def concat_linear_backward(
    grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, present: Tensor | None, norm_eps: float | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str, gate: Tensor | None,
    preact: Tensor | None, mean: Tensor | None, rstd: Tensor | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Launches the backward; arguments and results are those of ``torch.ops.mmfast.concat_linear_backward``.

    A ``grad`` that is not contiguous, such as one expanded from a sum, is copied first; for the others see
    ``concat_linear``. Under a norm a broadcast source's gradient is made for every row and summed afterwards.
    """
    lead = lead_of("concat_linear_backward", inputs)
    rows, (height, depth) = lead.numel(), weight.shape
    *need_inputs, need_weight, _, need_norm_weight, need_norm_bias, _ = needs
    need_columns = need_weight or need_norm_weight or need_norm_bias
    shapes = [*(x.shape for x in inputs), weight.shape, (height,), (depth,), (depth,)]
    shapes.append((0,) if gate is None else gate.shape)
    if grad.numel() == 0:
        return [weight.new_zeros(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]

    weight = dense(weight)
    norm_weight, norm_bias, gate = contiguous(norm_weight, norm_bias, gate)
    preact, mean, rstd = contiguous(preact, mean, rstd)
    grads: list[Any] = [None] * len(inputs)
    grad_weight = weight.new_empty(height, depth)
    norm_sums = [weight.new_empty(depth, dtype=torch.float32) for _ in range(2)]
    with on(weight.device):
        grad = grad.contiguous().view(rows, -1)
        grad, grad_bias, grad_gate = _grad_preact(grad, preact, gate, activation, height)  # [rows, O or 2 O]
        for i, (x, columns) in enumerate(zip(inputs, columns_of(inputs), strict=True)):
            block, g, own, seen, norm = weight[:, columns], grad, lead, present, None
            if mean is not None and rstd is not None:
                scale, shift = (None if t is None else t[columns] for t in (norm_weight, norm_bias))
                norm = mean, rstd, scale, shift, grad_bias
            elif x.shape[:-1].numel() < rows:
                own = torch.Size((1,) * (len(lead) + 1 - x.ndim)) + x.shape[:-1]
                g, seen = row_sum(grad, lead, own, present, i)  # [own rows, O]
            if need_inputs[i] and norm is None:
                grads[i] = _grad_input(g, block, seen, i, x.dtype).view(x.shape)
            if need_columns:
                sums = _grad_weight(grad_weight[:, columns], g, own, x, block, seen, i, norm)
                if norm is not None:
                    norm_sums[0][columns], norm_sums[1][columns] = sums
        if mean is not None and rstd is not None and any(need_inputs):
            grads = _grad_normed_inputs(grad, inputs, lead, weight, present, mean, rstd, norm_weight)
    grads += [grad_weight, grad_bias, *norm_sums, grad_gate]
    return [t.to(weight.dtype) for t, needed in zip(grads, needs, strict=True) if needed]


def _grad_preact(
    grad: Tensor, preact: Tensor | None, gate: Tensor | None, activation: str, height: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient before the activation [rows, O or 2 O], and the gradients of bias and gate in float32."""
    rows, width = grad.shape
    each = triton.cdiv(rows, 32 * _PROGRAMS) * 32
    parts = triton.cdiv(rows, each)
    bias_sum = grad.new_empty(parts, height, dtype=torch.float32)
    gate_sum = grad.new_empty(parts, 0 if gate is None else width, dtype=torch.float32)
    before = None if preact is None else grad.new_empty(rows, height)
    gate_step = 0 if gate is None or len(gate) == 1 else 1
    grad_preact_kernel[parts, triton.cdiv(width, 64)](
        before, bias_sum, gate_sum, grad, preact, gate, gate_step, rows, each, width,
        ACTIVATION=activation, BLOCK_M=16, BLOCK_N=64,
    )  # fmt: skip
    grad_gate = gate_sum.sum(0)
    if gate is not None:
        grad_gate = (grad_gate if len(gate) > 1 else grad_gate.sum(0, True)) * (1 - gate.float().tanh() ** 2)
    return grad if before is None else before, bias_sum.sum(0), grad_gate


def _grad_input(
    grad: Tensor, weight: Tensor, present: Tensor | None, number: int, dtype: torch.dtype
) -> Tensor:
    """``grad`` [rows, O] @ ``weight`` [O, D], zeros in the rows without the source."""
    (rows, depth), width = grad.shape, weight.shape[1]
    out = grad.new_empty(rows, width, dtype=dtype)
    present, num_sources, per_sample = presence(present, rows)
    name = "grad_input_few_rows" if rows <= 256 else "grad_input"
    if not aligned((grad, ()), (weight, (weight.stride(0),))):
        name = "grad_input_unaligned"
    options = configuration("concat_linear", name, grad, dtype, UNTUNED)
    use_descriptors(options, present is None, (grad, depth), (weight, weight.stride(0)))
    grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
    grad_input_kernel[grid](
        out, grad, weight, weight.stride(0), present, num_sources, number, rows, per_sample, width, depth,
        **options,
    )  # fmt: skip
    return out


def _grad_weight(
    out: Tensor, grad: Tensor, lead: torch.Size, x: Tensor, weight: Tensor, present: Tensor | None,
    number: int, norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Writes ``grad.T`` @ ``norm(x)`` to ``out`` [O, D]; returns the norm's two gradients [2, D]."""
    (rows, height), width = grad.shape, x.shape[-1]
    sizes, (x,), (strides,) = walk(lead, [x])
    present, num_sources, per_sample = presence(present, rows)
    name = "grad_weight"
    if not aligned((grad, ()), (x, strides), (weight, (weight.stride(0),)), (out, (out.stride(0),))):
        name = "grad_weight_unaligned"
    options = configuration("concat_linear", name, grad, x.dtype, UNTUNED)
    possible = present is None and norm is None
    use_descriptors(options, possible, (grad, height), (x, row_step(sizes, strides)))
    tiles_m = triton.cdiv(height, options["BLOCK_M"])
    tiles_n = triton.cdiv(width, options["BLOCK_N"])
    if width == 0 or height == 0:
        return grad.new_zeros(2, width)

    parts = max(1, min(_PROGRAMS // (tiles_m * tiles_n), rows // 512))
    block = options["BLOCK_K"]  # a descriptor does not end with a chunk: that ends with a tile
    chunk = triton.cdiv(triton.cdiv(rows, parts), block) * block
    if present is not None and norm is None:
        chunk = per_sample if per_sample >= 64 else _CHUNK
    chunks_each = triton.cdiv(triton.cdiv(rows, chunk), parts)
    parts = triton.cdiv(rows, chunk * chunks_each)

    product = out if parts == 1 else out.new_empty(parts, height, width, dtype=torch.float32)
    sums = grad.new_empty(2, parts * tiles_m, 0 if norm is None else width, dtype=torch.float32)
    grad_weight_kernel[(tiles_m, tiles_n, parts)](
        product, product.stride(-2), sums[0], sums[1], grad, Source(x, strides, 0, width, weight),
        weight.stride(0), present, num_sources, number, *(norm or (None,) * 5), rows, *sizes[1:], per_sample,
        height, chunk, chunks_each, CHUNK=_CHUNK, **options,
    )  # fmt: skip
    if parts > 1:
        out.copy_(product.sum(0))
    return sums.sum(1)


def _grad_normed_inputs(
    grad: Tensor, inputs: Sequence[Tensor], lead: torch.Size, weight: Tensor, present: Tensor | None,
    mean: Tensor, rstd: Tensor, norm_weight: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the sources under a norm, which couples them: of each at every row first."""
    rows = lead.numel()
    (_, n1, n2), walked, strides = walk(lead, inputs)
    sources, grads = [], []
    for i, (x, steps, columns) in enumerate(zip(walked, strides, columns_of(inputs), strict=True)):
        block = weight[:, columns]
        grads.append(
            _grad_input(grad, block, None, i, x.dtype)
        )  # absent ones have a share in the row's means
        sources.append(Source(x, steps, i, x.shape[-1], block, columns.start, grads[i]))
    present, num_sources, per_sample = presence(present, rows)
    norm_backward_kernel[(triton.cdiv(rows, 8),)](
        tuple(sources), present, num_sources, mean, rstd, norm_weight, max(1, weight.shape[1]), rows, n1, n2,
        per_sample, SOURCES=len(sources), BLOCK_M=8, BLOCK_K=128, num_warps=8,
    )  # fmt: skip
    return [dx.view(*lead, -1).sum_to_size(x.shape).to(x.dtype) for dx, x in zip(grads, inputs, strict=True)]
