"""Triton kernels of the backward of ``concat_linear``, and their launcher.

With g the gradient before the activation, a pooled source's g is summed over the rows that its own rows were
broadcast to, and what is multiplied are the sums. So it is under a norm too, where with d = g @ W norm_weight

    dx = rstd (d - avg(d) - x^ avg(d x^)), averages over the whole concatenation

and a pooled row p of mean m has x^ = rstd (p - m) + rstd (m - mean). Its source's share in the averages of an
output row is a dot product of g with what the forward added there. Its gradient is the same formula with sums
over output rows: of rstd g, to be multiplied by W, and of the factors of 1 and of p - m. In the weight's
gradient the first part of x^ is a product over own rows, and the second is the same in every column.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._activations import activate, derivative, tanh
from mmfast.kernels._launch import (
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
    own_lead,
    presence,
    row_step,
    row_sum,
    use_descriptors,
    walk,
)
from mmfast.kernels._tiles import (
    Source,
    any_of,
    load_row,
    load_tile,
    multiply,
    row_offset,
    rows_with,
    walk_with,
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
    number, mean, rstd, norm_weight, norm_bias, grad_bias, rest, rows, n1, n2, per_sample, height, chunk,
    chunks_each, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A tile of ``grad.T`` [height, rows] @ ``norm(x)`` [rows, width], over this part's chunks of rows.

    A chunk without the source is skipped. Under a norm the product is with x hat, but for ``rest`` [height],
    which is the same in each of its columns and added to them. That gives all three:
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
    if rest is not None:
        product += tl.load(rest + o, mask=kept_o & (part == 0), other=0.0)[:, None]
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
    averages, sources, pooled, grad, height, present, num_sources, mean, rstd, norm_weight, total,
    rows, n1, n2, per_sample,
    SOURCES: tl.constexpr, POOLED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradients of the normalised rows into gradients of the rows, in place.

    dx = rstd * (dy w - mean(dy w) - x hat mean(dy w x hat)), the means over the whole concatenation. They are
    kept for the pooled sources, of which nothing but their shares in them is made here.
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
    for i in tl.static_range(POOLED):
        source = pooled[i]
        seen = rows_with(source.number, row, inside, present, num_sources, per_sample)
        part = source.data + row_offset(row, n1, n2, source.strides)[:, None]
        own = source.mean + row_offset(row, n1, n2, source.moment_strides)
        away = tl.load(own, mask=seen, other=0.0)[:, None] - m
        for k0 in range(0, height, BLOCK_K):
            left = k0 + k < height
            g = load_tile(grad + row.to(tl.int64)[:, None] * height + (k0 + k)[None, :], inside, left)
            g = g.to(tl.float32)
            flat = load_row(source.along, k0 + k, left, 0.0)
            plain += tl.sum(g * flat, 1)
            along += tl.sum(g * r * (load_tile(part + (k0 + k)[None, :], seen, left) + away * flat), 1)
    plain = plain / total
    along = along / total
    tl.store(averages + row, plain, mask=inside)
    tl.store(averages + rows + row, along, mask=inside)
    plain, along = plain[:, None], along[:, None]
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
    ``concat_linear``.
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
        if mean is None or rstd is None:
            for i, (x, columns) in enumerate(zip(inputs, columns_of(inputs), strict=True)):
                block, g, own, seen = weight[:, columns], grad, lead, present
                if is_pooled(x, lead, False):
                    own = own_lead(x, lead)
                    g, seen = row_sum(grad, lead, own, present, i)  # [own rows, O]
                if need_inputs[i]:
                    grads[i] = _grad_input(g, block, seen, i, x.dtype).view(x.shape)
                if need_columns:
                    _grad_weight(grad_weight[:, columns], g, own, x, block, seen, i, None)
        else:
            sources = _under_norm(grad, inputs, lead, weight, present, mean, rstd, norm_weight)
            if need_columns:
                _grad_columns(grad_weight, norm_sums, grad, grad_bias, sources, lead, mean, rstd, norm_bias)
            if any(need_inputs):
                norm = mean, rstd, norm_weight
                grads = _grad_normed_inputs(grad, sources, need_inputs, lead, present, norm)
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
    options = configuration("concat_linear", name, grad, weight.dtype, UNTUNED)
    use_descriptors(options, present is None, (grad, depth), (weight, weight.stride(0)))
    grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
    grad_input_kernel[grid](
        out, grad, weight, weight.stride(0), present, num_sources, number, rows, per_sample, width, depth,
        **options,
    )  # fmt: skip
    return out


def _grad_weight(
    out: Tensor, grad: Tensor, lead: torch.Size, x: Tensor, weight: Tensor, present: Tensor | None,
    number: int, norm: tuple[Tensor | None, ...] | None,
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
        weight.stride(0), present, num_sources, number, *(norm or (None,) * 6), rows, *sizes[1:], per_sample,
        height, chunk, chunks_each, CHUNK=_CHUNK, **options,
    )  # fmt: skip
    if parts > 1:
        out.copy_(product.sum(0))
    return sums.sum(1)


class _Normed(NamedTuple):
    """A source under a norm; g and what follows are those of a pooled one, at its own size."""

    x: Tensor
    columns: slice
    weight: Tensor  # its block
    scale: Tensor | None  # its part of the norm's weight
    g: Tensor  # [rows, O], or the sums of rstd g [own rows, O]
    own: torch.Size
    seen: Tensor | None
    moments: tuple[Tensor, Tensor] | None = None  # mean and 1 / standard deviation of its own rows
    away: Tensor | None = None  # [rows], rstd (m - mean): how far its mean is away from the output row's


def _under_norm(
    grad: Tensor, inputs: Sequence[Tensor], lead: torch.Size, weight: Tensor, present: Tensor | None,
    mean: Tensor, rstd: Tensor, norm_weight: Tensor | None,
) -> list[_Normed]:  # fmt: skip
    from mmfast.kernels.concat_linear import own_moments  # which imports this module

    rows, sources, weighted = lead.numel(), [], None
    for i, (x, columns) in enumerate(zip(inputs, columns_of(inputs), strict=True)):
        scale = None if norm_weight is None else norm_weight[columns]
        source = _Normed(x, columns, weight[:, columns], scale, grad, lead, present)
        if is_pooled(x, lead, True):
            if weighted is None:
                weighted = grad * rstd.view(rows, 1)
            own, moments = own_lead(x, lead), own_moments(x)
            g, seen = row_sum(weighted, lead, own, present, i)
            m = moments[0].squeeze(-1)
            if present is not None:
                m = torch.where(_flags(present, i, len(lead)), m, 0)
            away = (rstd * (m - mean)).view(rows)
            source = source._replace(g=g, own=own, seen=seen, moments=moments, away=away)
        sources.append(source)
    return sources


def _flags(present: Tensor, number: int, dims: int) -> Tensor:
    return present[:, number].view(-1, *[1] * (dims - 1))


def _grad_columns(
    grad_weight: Tensor, norm_sums: Sequence[Tensor], grad: Tensor, grad_bias: Tensor,
    sources: Sequence[_Normed], lead: torch.Size, mean: Tensor, rstd: Tensor, norm_bias: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradients of the weight [O, sum D_i] and of the norm's two vectors."""
    rows, height = grad.shape
    aways = [source.away for source in sources if source.away is not None]
    rest = grad.new_empty(height, len(aways), dtype=torch.float32)
    if aways:  # sums of g away, as the gradient of a source with these features
        away = torch.stack(aways, -1).to(grad.dtype)
        _grad_weight(rest, grad, torch.Size((rows,)), away, rest, None, 0, None)
    rests = iter(rest.t().contiguous())
    for i, source in enumerate(sources):
        shift = None if norm_bias is None else norm_bias[source.columns]
        norm: tuple[Tensor | None, ...] = mean, rstd, source.scale, shift, grad_bias, None
        if source.moments is not None:
            m = source.moments[0]
            if source.seen is not None:
                m = torch.where(_flags(source.seen, i, m.ndim), m, 0)
            norm = m, torch.ones_like(m), source.scale, shift, grad_bias, next(rests)
        g, own, x, columns = source.g, source.own, source.x, source.columns
        sums = _grad_weight(grad_weight[:, columns], g, own, x, source.weight, source.seen, i, norm)
        norm_sums[0][columns], norm_sums[1][columns] = sums


def _grad_normed_inputs(
    grad: Tensor, sources: Sequence[_Normed], needs: Sequence[bool], lead: torch.Size,
    present: Tensor | None, norm: tuple[Tensor, Tensor, Tensor | None],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the sources under a norm, which couples them."""
    from mmfast.kernels.concat_linear import project_centred  # which imports this module

    rows, height = grad.shape
    full, pooled = {}, []
    for i, source in enumerate(sources):
        if source.moments is None:  # absent or not, it has a share in the averages
            full[i] = _grad_input(grad, source.weight, None, i, source.x.dtype)
        else:
            pooled.append(project_centred(source.x, i, source.weight, source.scale, source.moments))
    (_, n1, n2), rows_of, pooled = walk_with(lead, [sources[i].x for i in full], pooled)
    walked = [
        Source(*at, i, sources[i].x.shape[-1], None, sources[i].columns.start, dx)
        for (i, dx), at in zip(full.items(), rows_of, strict=True)
    ]
    averages = grad.new_empty(2, rows, dtype=torch.float32)
    flags, num_sources, per_sample = presence(present, rows)
    depth = sum(source.x.shape[-1] for source in sources)
    norm_backward_kernel[(triton.cdiv(rows, 8),)](
        averages, tuple(walked), tuple(pooled), grad, height, flags, num_sources, *norm,
        max(1, depth), rows, n1, n2, per_sample, SOURCES=len(walked), POOLED=len(pooled),
        BLOCK_M=8, BLOCK_K=128, num_warps=8,
    )  # fmt: skip
    grads: list[Tensor | None] = []
    for i, source in enumerate(sources):
        if i in full:
            dx, own = full[i], own_lead(source.x, lead)
            dx = dx if own == lead else row_sum(dx, lead, own, None, i)[0]
            grads.append(dx.view(source.x.shape))
        else:
            grads.append(_grad_pooled(source, i, averages, norm[1], lead, present) if needs[i] else None)
    return grads


def _grad_pooled(
    source: _Normed, number: int, averages: Tensor, rstd: Tensor, lead: torch.Size, present: Tensor | None
) -> Tensor:
    """Gradient of a pooled source under a norm; sums that cancel against each other are made in float64."""
    assert source.moments is not None and source.away is not None
    x, (plain, along), r = source.x, averages.double(), rstd.view(-1).double()
    factors = torch.stack([r * (plain + source.away * along), r * r * along], -1)
    sums, seen = row_sum(factors, lead, source.own, present, number)
    of_one, of_x = sums.float().view(*x.shape[:-1], 2).split(1, -1)
    d = _grad_input(source.g, source.weight, seen, number, torch.float32).view(x.shape)
    if source.scale is not None:
        d *= source.scale
    dx = d - of_one - of_x * (x - source.moments[0])
    return dx if seen is None else torch.where(_flags(seen, number, x.ndim), dx, 0)
