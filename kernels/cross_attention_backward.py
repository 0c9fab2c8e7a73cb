"""Triton kernels of the backward of ``cross_attention``, and their launcher.

With weights P = softmax(logits): dV = P.T dO, dS = P * (dO V.T - delta), dQ = scale * dS K, dK = scale * dS.T
Q and the bias of a source gets the sum of its dS. Weights are made again from the log-sum-exp, or from what
it was made of. One launch goes through the sources for a block of queries (dQ, bias), one through the queries
for a block of keys of one source (dK, dV): every sum has one owner and one order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._attention import (
    EDGE,
    LOG2E,
    bias_of_sources,
    depths,
    ends_of,
    is_finite,
    keys_and_values_of,
    limits,
    load_rows,
    nth,
    number_of,
    packed_of,
    presence,
    seen_of,
    share_of_tiles,
    size_of,
    sources_of,
    splits_of,
    start_of,
    tiles,
    unmasked,
)  # fmt: skip
from mmfast.kernels._launch import configuration, dense, on
from mmfast.kernels._tiles import any_of, multiply

# By the oldest compute capability they are for, and by depth: large ones that do not spill. No device tuned
# them yet.
UNTUNED = {
    80: {
        "grad_query_64.half": tiles(128, 64, num_warps=8, num_stages=2),
        "grad_query_64.tf32": tiles(32, 32, num_warps=8, num_stages=1),
        "grad_query_64.ieee": tiles(32, 32, num_warps=8, num_stages=1),
        "grad_query_128.half": tiles(64, 64, num_warps=8, num_stages=2),
        "grad_query_128.tf32": tiles(32, 32, num_warps=8, num_stages=2),
        "grad_query_128.ieee": tiles(16, 16, num_warps=8, num_stages=1),
        "grad_query_256.half": tiles(32, 32, num_warps=8, num_stages=2),
        "grad_query_256.tf32": tiles(16, 32, num_warps=8, num_stages=1),
        "grad_query_256.ieee": tiles(16, 16, num_warps=8, num_stages=1),
        "grad_source_64.half": tiles(32, 128, num_warps=8, num_stages=2),
        "grad_source_64.tf32": tiles(32, 32, num_warps=8, num_stages=2),
        "grad_source_64.ieee": tiles(32, 32, num_warps=8, num_stages=1),
        "grad_source_128.half": tiles(32, 64, num_warps=8, num_stages=2),
        "grad_source_128.tf32": tiles(32, 32, num_warps=8, num_stages=2),
        "grad_source_128.ieee": tiles(16, 16, num_warps=8, num_stages=2),
        "grad_source_256.half": tiles(32, 32, num_warps=8, num_stages=2),
        "grad_source_256.tf32": tiles(16, 16, num_warps=8, num_stages=1),
        "grad_source_256.ieee": tiles(16, 16, num_warps=8, num_stages=1),
    },
}
UNTUNED[90] = {
    **UNTUNED[80],
    "grad_query_64.tf32": tiles(64, 32, num_warps=8, num_stages=2),
    "grad_query_128.half": tiles(128, 32, num_warps=8, num_stages=2),
    "grad_query_128.tf32": tiles(32, 32, num_warps=8, num_stages=1),
    "grad_query_128.ieee": tiles(16, 16, num_warps=8, num_stages=2),
    "grad_source_64.tf32": tiles(32, 64, num_warps=8, num_stages=2),
    "grad_source_128.half": tiles(32, 64, num_warps=8, num_stages=1),
    "grad_source_128.ieee": tiles(16, 16, num_warps=4, num_stages=2),
}
UNTUNED[100] = {
    **UNTUNED[90],
    "grad_query_128.half": tiles(64, 64, num_warps=8, num_stages=2),
    "grad_query_128.tf32": tiles(32, 32, num_warps=8, num_stages=2),
    "grad_source_64.half": tiles(64, 64, num_warps=8, num_stages=1),
    "grad_source_64.tf32": tiles(64, 32, num_warps=8, num_stages=1),
    "grad_source_128.half": tiles(32, 64, num_warps=4, num_stages=1),
}


@triton.jit(do_not_specialize=["present_step", "flag_step", "queries", "heads"])
def delta_kernel(
    delta, alone, grad, grad_strides, out, out_strides, grad_lse, sources,
    present, present_step, flag_step, source_bias, bias_strides, queries, heads,
    SOURCES: tl.constexpr, VALUE_DEPTH: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = sum(grad * out) - grad_lse``: softmax takes it from the gradient of each weight.

    A row is ``alone`` with one key. There ``sum(grad * out)`` is the gradient of its weight, made in another
    order, and what rounding leaves of their difference would be all there is: both are left out.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    both = tl.program_id(0) // blocks
    sample, head = both // heads, both % heads
    row = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < queries
    g = load_rows(
        start_of(grad, grad_strides, sample, head), grad_strides[2], row, real, VALUE_DEPTH, BLOCK_DV
    )
    o = load_rows(start_of(out, out_strides, sample, head), out_strides[2], row, real, VALUE_DEPTH, BLOCK_DV)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    count = tl.zeros([BLOCK_M], tl.int32)
    for i in range(SOURCES):
        _, end, _, _ = seen_of(
            sources, i, sample, head, row, queries, present, present_step, flag_step,
            source_bias, bias_strides,
        )  # fmt: skip
        count = count_up_to_two(count, sources, i, sample, end)
    d = tl.where(count == 1, 0.0, d)
    at = both.to(tl.int64) * queries + row
    tl.store(alone + at, count == 1, mask=real)
    if grad_lse is not None:
        d -= tl.load(grad_lse + at, mask=real, other=0.0)
    tl.store(delta + at, d, mask=real)


@triton.jit
def count_up_to_two(count, sources, i, sample, end):
    """Adds to ``count`` the keys below ``end`` that the mask leaves, at least until there are two."""
    if sources[0].mask is None:
        count += end
    else:
        packed = packed_of(sources, i)
        size, is_masked = size_of(packed), (packed & 4) != 0
        count += tl.where(is_masked, 0, end)
        mask = nth([source.mask for source in sources], i) + sample.to(tl.int64) * size
        k0 = tl.where(is_masked, 0, size)
        while tl.max(((count < 2) & (k0 < end)).to(tl.int32), 0) > 0:
            k = k0 + tl.arange(0, 64)
            left = unmasked(mask, is_masked, k, k < size)  # [N]
            count += tl.sum((left[None, :] & (k[None, :] < end[:, None])).to(tl.int32), 1)
            k0 += 64
    return count


@triton.jit
def shift_of(lse, normalizers, at, real, PRECISION: tl.constexpr):
    """With what ``2 ** (logit - shift)`` is a weight, in exact float32 all but for its row's ``inverse``.

    There the rounding of the logarithm, which grows with the logits, would be seen. So the shift is the row's
    maximum, and the reciprocal of its sum goes to what weights are multiplied with.
    """
    if PRECISION == "ieee":
        return tl.load(normalizers + 2 * at, mask=real, other=0.0)
    else:
        return tl.load(lse + at, mask=real, other=0.0) * LOG2E


@triton.jit
def normalized(g, delta, normalizers, at, real, PRECISION: tl.constexpr):
    """Gradients of a block of rows, times ``inverse`` where their weights lack it."""
    if PRECISION == "ieee":
        inverse = tl.load(normalizers + 2 * at + 1, mask=real, other=0.0)
        return g * inverse[:, None], delta * inverse
    else:
        return g, delta


@triton.jit
def differentiate(
    q, g, shift, delta, dq, key, key_stride, value, value_stride, mask, is_masked, scale, bias, end,
    first, last,
    ROWS_DIFFER: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds the keys from ``first`` to ``last`` to ``dq`` [M, D], and returns with it each row's sum of dS."""
    total = tl.zeros_like(delta)
    for k0 in tl.range(first, last, BLOCK_N, num_stages=1 if ROWS_DIFFER else None):
        k = k0 + tl.arange(0, BLOCK_N)
        inside = unmasked(mask, is_masked, k, k < last)  # [N]
        keys = load_rows(key, key_stride, k, inside, DEPTH, BLOCK_D)  # [N, D]
        values = load_rows(value, value_stride, k, inside, VALUE_DEPTH, BLOCK_DV)  # [N, Dv]
        logits = multiply(q, tl.trans(keys), None, PRECISION) * scale + bias  # [M, N]
        weights = tl.exp2(logits - shift[:, None])
        ds = weights * (multiply(g, tl.trans(values), None, PRECISION) - delta[:, None])
        if ROWS_DIFFER:
            ds = tl.where(inside[None, :] & (k[None, :] < end[:, None]), ds, 0.0)
            keys = tl.where(is_finite(keys), keys, 0.0)  # where it is seen, ds is nan and stays it
        elif mask is not None:
            ds = tl.where(inside[None, :], ds, 0.0)
        total += tl.sum(ds, 1)
        dq = multiply(ds.to(keys.dtype), keys, dq, PRECISION)
    return dq, total


@triton.jit(do_not_specialize=["present_step", "flag_step", "num_sources", "queries", "heads", "group"])
def grad_query_kernel(
    grad_query, bias_sum, grad, grad_strides, lse, normalizers, delta, alone, query, query_strides, sources,
    present, present_step, flag_step, source_bias, bias_strides, num_sources, scale, queries, heads, group,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOURCES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries of one head, and what the block adds to the gradients of the biases.

    Of a split, in float32, its part of the gradient.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    both = tl.program_id(0) // blocks
    sample, head = both // heads, both % heads
    block = blocks - 1 - tl.program_id(0) % blocks
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < queries
    at = both.to(tl.int64) * queries + row
    q = load_rows(start_of(query, query_strides, sample, head), query_strides[2], row, real, DEPTH, BLOCK_D)
    g = load_rows(
        start_of(grad, grad_strides, sample, head), grad_strides[2], row, real, VALUE_DEPTH, BLOCK_DV
    )
    g = tl.where((tl.load(alone + at, mask=real, other=1) == 0)[:, None], g, 0.0)
    shift = shift_of(lse, normalizers, at, real, PRECISION)
    g, d = normalized(g, tl.load(delta + at, mask=real, other=0.0), normalizers, at, real, PRECISION)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SPLIT:
        tile, share = share_of_tiles(
            sources, sample, queries, present, present_step, flag_step, SOURCES, BLOCK_N
        )
    for i in range(SOURCES):
        bias, end, whole, most = seen_of(
            sources, i, sample, head, row, queries, present, present_step, flag_step,
            source_bias, bias_strides,
        )  # fmt: skip
        first, whole = 0, whole // BLOCK_N * BLOCK_N
        if SPLIT:
            first = tl.maximum(tile, 0) * BLOCK_N
            whole = tl.minimum(tl.maximum(whole, first), (tile + share) * BLOCK_N)
        key, key_stride, value, value_stride = keys_and_values_of(sources, i, sample, head // group)
        packed = packed_of(sources, i)
        mask = None
        if sources[0].mask is not None:
            mask = nth([source.mask for source in sources], i) + sample.to(tl.int64) * size_of(packed)
        dq, inner = differentiate(
            q, g, shift, d, dq, key, key_stride, value, value_stride, mask,
            (packed & 4) != 0, scale * LOG2E, bias * LOG2E, end, first, whole, False,
            PRECISION, DEPTH, VALUE_DEPTH, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
        last = tl.max(end, 0)  # not before: it would hold a register through the first loop
        if SPLIT:
            last = tl.minimum(last, (tile + share) * BLOCK_N)
            tile -= tl.cdiv(most, BLOCK_N)  # from here on counted in the next source
        dq, edge = differentiate(
            q, g, shift, d, dq, key, key_stride, value, value_stride, mask,
            (packed & 4) != 0, scale * LOG2E, bias * LOG2E, end, whole, last, True,
            PRECISION, DEPTH, VALUE_DEPTH, BLOCK_D, BLOCK_DV, EDGE,
        )  # fmt: skip
        if bias_sum is not None:
            total = tl.sum(tl.where(real, inner + edge, 0.0), 0)
            line = (both.to(tl.int64) * num_sources + i) * tl.num_programs(1) + tl.program_id(1)
            tl.store(bias_sum + line * blocks + block, total, mask=i < num_sources)
    if grad_query is not None:
        if SPLIT:
            at += tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) * queries
        d = tl.arange(0, BLOCK_D)
        tl.store(
            grad_query + at[:, None] * DEPTH + d[None, :],
            dq * scale,
            mask=real[:, None] & (d < DEPTH)[None, :],
        )


@triton.jit
def rows_with(flags, flag_step, queries, CHUNK: tl.constexpr):
    """From which to which row a source is present."""
    first = queries
    last = 0
    for row0 in range(0, queries, CHUNK):
        row = row0 + tl.arange(0, CHUNK)
        flag = tl.load(flags + row.to(tl.int64) * flag_step, mask=row < queries, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(flag, row, queries), 0))
        last = tl.maximum(last, tl.max(tl.where(flag, row + 1, 0), 0))
    return first, last


@triton.jit(do_not_specialize=["present_step", "flag_step", "queries", "kv_heads", "group"])
def grad_source_kernel(
    grad, grad_strides, lse, normalizers, delta, alone, query, query_strides, sources,
    present, present_step, flag_step, source_bias, bias_strides, scale, queries, kv_heads, group,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOURCES: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values of one source, over all queries of the heads that read them."""
    blocks = 0
    for j in tl.static_range(SOURCES):
        blocks += tl.cdiv(size_of(sources[j].packed), BLOCK_N)
    both = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    sample, kv_head = both // kv_heads, both % kv_heads

    # The blocks of all sources stand in one row. A block is of the last source that begins at it or before
    # it.
    begin, first, i = 0, 0, 0
    for j in tl.static_range(SOURCES):
        i, first = tl.where(block >= begin, j, i), tl.where(block >= begin, begin, first)
        begin += tl.cdiv(size_of(sources[j].packed), BLOCK_N)
    limit, lead = limits(sources, i, sample, queries, present, present_step, flag_step)
    key, key_stride, value, value_stride = keys_and_values_of(sources, i, sample, kv_head)
    number, packed = number_of(sources, i), packed_of(sources, i)
    size = size_of(packed)
    mask = None
    if sources[0].mask is not None:
        mask = nth([source.mask for source in sources], i) + sample.to(tl.int64) * size
    k0 = (block - first) * BLOCK_N
    k = k0 + tl.arange(0, BLOCK_N)
    inside = unmasked(mask, (packed & 4) != 0, k, k < limit)  # [N]
    keys = load_rows(key, key_stride, k, inside, DEPTH, BLOCK_D)  # [N, D]
    values = load_rows(value, value_stride, k, inside, VALUE_DEPTH, BLOCK_DV)  # [N, Dv]
    flags = None
    if flag_step is not None:
        flags = present + sample.to(tl.int64) * present_step + number
    first_row, last_row = tl.maximum(k0 - lead + 1, 0), tl.where(any_of(inside), queries, 0)
    if flags is not None:
        first_present, last_present = rows_with(flags, flag_step, queries, 256)
        first_row, last_row = tl.maximum(first_row, first_present), tl.minimum(last_row, last_present)

    if source_bias is not None:  # that of the first head; to hold all strides would take too many registers
        source_bias += (
            sample.to(tl.int64) * (bias_strides[0] >> 2)
            + (kv_head * group).to(tl.int64) * (bias_strides[1] >> 2)
            + number * (bias_strides[2] >> 2)
        )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for reader in range(group):
        head = kv_head * group + reader
        bias = 0.0
        if source_bias is not None:
            bias = tl.load(source_bias + reader * (bias_strides[1] >> 2))
        row_of = (sample * kv_heads * group + head).to(tl.int64) * queries
        q_start = start_of(query, query_strides, sample, head)
        g_start = start_of(grad, grad_strides, sample, head)
        for row0 in range(first_row, tl.where(bias == float("-inf"), first_row, last_row), BLOCK_M):
            row = row0 + tl.arange(0, BLOCK_M)
            end = ends_of(row, queries, limit, lead, flags, flag_step)  # [M]
            real = row < queries
            shift = shift_of(lse, normalizers, row_of + row, real, PRECISION)
            d = tl.load(delta + row_of + row, mask=real, other=0.0)
            sees = end > k0
            if mask is not None:
                sees &= shift != float("-inf")
            q = load_rows(q_start, query_strides[2], row, sees, DEPTH, BLOCK_D)  # [M, D]
            g = load_rows(g_start, grad_strides[2], row, sees, VALUE_DEPTH, BLOCK_DV)  # [M, Dv]
            g, d = normalized(g, d, normalizers, row_of + row, real, PRECISION)
            seen = inside[:, None] & (k[:, None] < end[None, :])
            logits = multiply(keys, tl.trans(q), None, PRECISION) * (scale * LOG2E) + bias * LOG2E
            weights = tl.where(seen, tl.exp2(logits - shift[None, :]), 0.0)  # [N, M]
            if sources[0].grad_value is not None:
                dv = multiply(weights.to(g.dtype), g, dv, PRECISION)
            if sources[0].grad_key is not None:
                is_alone = tl.load(alone + row_of + row, mask=real, other=1) != 0
                dp = multiply(values, tl.trans(g), None, PRECISION)
                dp = tl.where(is_alone[None, :], 0.0, dp)
                ds = tl.where(seen, weights * (dp - d[None, :]), 0.0)
                dk = multiply(ds.to(q.dtype), q, dk, PRECISION)
    if sources[0].grad_key is not None:  # picked here, not to hold registers through the loops
        grad_key = nth([source.grad_key for source in sources], i) + both.to(tl.int64) * size * DEPTH
        store_rows(grad_key, dk * scale, k, k < size, inside, DEPTH, BLOCK_D)
    if sources[0].grad_value is not None:
        grad_value = nth([source.grad_value for source in sources], i)
        grad_value += both.to(tl.int64) * size * VALUE_DEPTH
        store_rows(grad_value, dv, k, k < size, inside, VALUE_DEPTH, BLOCK_DV)


@triton.jit
def store_rows(start, x, row, real, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a dense matrix; zeros where nobody may see them."""
    d = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * WIDTH + d[None, :]
    tl.store(start + at, tl.where(seen[:, None], x, 0.0), mask=real[:, None] & (d < WIDTH)[None, :])


def cross_attention_backward(
    grad: Tensor, grad_lse: Tensor | None, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor],
    lengths: Sequence[Tensor | None], masks: Sequence[Tensor | None], present: Tensor | None,
    causal: Sequence[bool], source_bias: Tensor | None, scale: float | None, out: Tensor, lse: Tensor,
    normalizers: Tensor, needs: Sequence[bool], exact: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Launches the backward; arguments and results are those of
    ``torch.ops.mmfast.cross_attention_backward``. ``exact``: float32 is multiplied so whatever PyTorch's
    setting, as its forward has done.

    A gradient whose last dimension is not dense, such as one expanded from a sum, is copied first; for the
    others see ``cross_attention``.
    """
    depth, size = depths("cross_attention_backward", query, values[0])
    batch, heads, queries, _ = query.shape
    n, kv_heads = len(keys), keys[0].shape[1]
    inputs = (query, *keys, *values, source_bias)
    if lse.numel() == 0:
        return [
            t.new_zeros(t.shape) for t, needed in zip(inputs, needs, strict=True) if t is not None and needed
        ]

    made = [
        t.new_empty(t.shape) if t is not None and needed else None
        for t, needed in zip(inputs, needs, strict=True)
    ]
    grad_query, grad_keys, grad_values, grad_bias = made[0], made[1 : n + 1], made[n + 1 : -1], made[-1]
    query, grad, out, lse, normalizers = (
        dense(query), dense(grad), dense(out), lse.contiguous(), normalizers.contiguous()
    )  # fmt: skip
    delta, alone = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.bool)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    seen_by = (*presence(present), *bias_of_sources(source_bias))
    sources = sources_of(keys, values, lengths, masks, causal)
    with on(query.device):
        delta_kernel[(batch * heads * triton.cdiv(queries, 8),)](
            delta, alone, grad, grad.stride()[:3], out, out.stride()[:3],
            None if grad_lse is None else grad_lse.contiguous(),
            sources, *seen_by, queries, heads, SOURCES=len(sources),
            VALUE_DEPTH=depth["VALUE_DEPTH"], BLOCK_DV=depth["BLOCK_DV"], BLOCK_M=8,
        )  # fmt: skip
        upstream = grad, grad.stride()[:3], lse, normalizers, delta, alone, query, query.stride()[:3]

        if grad_query is not None or grad_bias is not None:
            options = configuration(
                "cross_attention", f"grad_query_{size}", query, query.dtype, UNTUNED, exact
            )
            blocks = triton.cdiv(queries, options["BLOCK_M"])
            splits = splits_of(batch * heads * blocks, keys, options["num_warps"])
            bias_sum = None if grad_bias is None else lse.new_empty(batch, heads, n, splits * blocks)
            parts = grad_query
            if grad_query is not None and splits > 1:
                parts = lse.new_empty(splits, *query.shape)
            grad_query_kernel[batch * heads * blocks, splits](
                parts, bias_sum, *upstream, sources, *seen_by, n, scale, queries, heads, heads // kv_heads,
                **depth, **options, SOURCES=len(sources), SPLIT=splits > 1,
            )  # fmt: skip
            if grad_query is not None and parts is not None and splits > 1:
                grad_query.copy_(parts.sum(0))
            if grad_bias is not None and bias_sum is not None:
                torch.sum(bias_sum, -1, out=grad_bias)

        # Where one gradient is wanted of some sources and the other of others, both are made of all of these.
        wanted = [i for i in range(n) if grad_keys[i] is not None or grad_values[i] is not None]
        options = configuration("cross_attention", f"grad_source_{size}", query, query.dtype, UNTUNED, exact)
        blocks = sum(triton.cdiv(keys[i].shape[2], options["BLOCK_N"]) for i in wanted)
        if blocks:
            any_key = any(t is not None for t in grad_keys)
            any_value = any(t is not None for t in grad_values)
            grads = [
                (
                    (key.new_empty(key.shape) if dk is None else dk) if any_key else None,
                    (value.new_empty(value.shape) if dv is None else dv) if any_value else None,
                )
                for key, value, dk, dv in zip(keys, values, grad_keys, grad_values, strict=True)
            ]
            sources = sources_of(keys, values, lengths, masks, causal, grads, wanted)
            grad_source_kernel[(batch * kv_heads * blocks,)](
                *upstream, sources, *seen_by, scale, queries, kv_heads, heads // kv_heads, **depth, **options,
                SOURCES=len(sources),
            )  # fmt: skip
    return [t for t in made if t is not None]
