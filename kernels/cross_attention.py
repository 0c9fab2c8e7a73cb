"""Triton kernel of ``cross_attention``'s forward and its launcher; the backward is in
``cross_attention_backward.py``.

A program owns a block of queries of one head and walks the keys of source after source in one online softmax,
so neither a concatenation, nor a mask, nor a merge of several results exists anywhere. It stops in each
source at the last key that any of its rows sees. Two loops walk a source:

- up to the last whole tile that all rows see, nothing depends on the row;
- behind it rows differ in what they see (the edge of a causal source, of a length, of a presence), and what
  one row sees may be nan and hidden from the next. Logits are selected, but the values of all keys are summed
  over, and 0 * nan is nan: there values that are not finite are taken out, and put back as nan where they are
  seen.

Keys that no row of the tile sees are never loaded.

Where there are too few blocks of queries to fill the device, several programs share the keys of one, and a
second kernel puts together what they found.
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
    is_finite,
    keys_and_values_of,
    load_rows,
    nth,
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
from mmfast.kernels._tiles import multiply
from mmfast.kernels.cross_attention_backward import cross_attention_backward

__all__ = ["cross_attention", "cross_attention_backward"]

# By the oldest compute capability they are for, and by depth: large ones that do not spill. No device tuned
# them yet.
UNTUNED = {
    80: {
        "forward_64.half": tiles(128, 64, num_warps=8, num_stages=3),
        "forward_64.tf32": tiles(64, 32, num_warps=4, num_stages=3),
        "forward_64.ieee": tiles(32, 32, num_warps=8, num_stages=2),
        "forward_128.half": tiles(128, 32, num_warps=8, num_stages=3),
        "forward_128.tf32": tiles(32, 32, num_warps=8, num_stages=3),
        "forward_128.ieee": tiles(32, 16, num_warps=8, num_stages=1),
        "forward_256.half": tiles(32, 16, num_warps=8, num_stages=2),
        "forward_256.tf32": tiles(32, 32, num_warps=8, num_stages=1),
        "forward_256.ieee": tiles(16, 16, num_warps=8, num_stages=1),
    },
}
UNTUNED[90] = {
    **UNTUNED[80],
    "forward_128.tf32": tiles(64, 16, num_warps=8, num_stages=3),
    "forward_256.half": tiles(64, 16, num_warps=8, num_stages=2),
    "forward_256.tf32": tiles(32, 32, num_warps=8, num_stages=2),
}
UNTUNED[100] = {
    **UNTUNED[90],
    "forward_128.tf32": tiles(32, 32, num_warps=8, num_stages=3),
    "forward_256.half": tiles(64, 16, num_warps=8, num_stages=1),
    "forward_256.tf32": tiles(16, 64, num_warps=8, num_stages=1),
    "forward_256.ieee": tiles(16, 16, num_warps=4, num_stages=1),
}


@triton.jit
def attend(
    q, top, total, acc, key, key_stride, value, value_stride, mask, is_masked, scale, bias, end, first, last,
    ROWS_DIFFER: tl.constexpr, PRECISION: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys from ``first`` to ``last``.

    Per row: ``top`` is the largest logit so far, ``total`` the sum of 2 ** (logit - top) over this source,
    and ``acc`` that of 2 ** (logit - top) * value over all. Rows see keys below their ``end``.
    """
    spoilt = 0
    for k0 in tl.range(first, last, BLOCK_N, num_stages=1 if ROWS_DIFFER else None):
        k = k0 + tl.arange(0, BLOCK_N)
        inside = unmasked(mask, is_masked, k, k < last)  # [N]
        keys = load_rows(key, key_stride, k, inside, DEPTH, BLOCK_D)  # [N, D]
        logits = multiply(q, tl.trans(keys), None, PRECISION) * scale + bias  # [M, N]
        if ROWS_DIFFER:
            seen = inside[None, :] & (k[None, :] < end[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        elif mask is not None:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row may have seen nothing yet
        weights = tl.exp2(logits - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        values = load_rows(value, value_stride, k, inside, VALUE_DEPTH, BLOCK_DV)  # [N, Dv]
        if ROWS_DIFFER:
            spoilt = tl.maximum(spoilt, tl.max(tl.max((is_finite(values) == 0).to(tl.int32), 1), 0))
            values = tl.where(is_finite(values), values, 0.0)
        acc = multiply(weights.to(values.dtype), values, acc, PRECISION)
        top = higher
    if ROWS_DIFFER:
        d = tl.arange(0, BLOCK_DV)
        for step in range(tl.where(spoilt > 0, last - first, 0)):
            k = first + step
            seen, there = (k < end) & (k < last), d < VALUE_DEPTH  # [M], [Dv]
            if mask is not None:
                there &= unmasked(mask, is_masked, k, k < last)
            row = tl.load(value + k.to(tl.int64) * value_stride + d, mask=there, other=0.0)
            acc = tl.where(seen[:, None] & (is_finite(row) == 0)[None, :], float("nan"), acc)
    return top, total, acc


@triton.jit(do_not_specialize=["present_step", "flag_step", "num_sources", "queries", "heads", "group"])
def forward_kernel(
    out, lse, normalizers, mass, query, query_strides, sources, present, present_step, flag_step,
    source_bias, bias_strides, num_sources, scale, queries, heads, group,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr, VALUE_DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOURCES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp, normalizers and masses of a block of queries of one head.

    Of a split, in float32, what ``combine_kernel`` makes these of: acc as ``out``, top as ``lse`` and totals
    as ``mass``.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    both = tl.program_id(0) // blocks  # sample and head
    sample, head = both // heads, both % heads
    # From the last rows on: under causality they see most, and what takes longest had better start first.
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < queries
    q = load_rows(
        start_of(query, query_strides, sample, head), query_strides[2], row, real, DEPTH, BLOCK_D
    )  # [M, D]

    number = tl.arange(0, SOURCES)[None, :]
    totals = tl.zeros([BLOCK_M, SOURCES], tl.float32)  # of each source, below the common top
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
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
        before = top
        total = tl.zeros([BLOCK_M], tl.float32)
        top, total, acc = attend(
            q, top, total, acc, key, key_stride, value, value_stride, mask,
            (packed & 4) != 0, scale * LOG2E, bias * LOG2E, end, first, whole, False,
            PRECISION, DEPTH, VALUE_DEPTH, BLOCK_D, BLOCK_DV, BLOCK_N,
        )  # fmt: skip
        last = tl.max(end, 0)  # not before: it would hold a register through the first loop
        if SPLIT:
            last = tl.minimum(last, (tile + share) * BLOCK_N)
            tile -= tl.cdiv(most, BLOCK_N)  # from here on counted in the next source
        top, total, acc = attend(
            q, top, total, acc, key, key_stride, value, value_stride, mask,
            (packed & 4) != 0, scale * LOG2E, bias * LOG2E, end, whole, last, True,
            PRECISION, DEPTH, VALUE_DEPTH, BLOCK_D, BLOCK_DV, EDGE,
        )  # fmt: skip
        fade = tl.exp2(before - tl.where(top == float("-inf"), 0.0, top))
        totals = tl.where(number == i, total[:, None], totals * fade[:, None])

    at = both.to(tl.int64) * queries + row
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) * queries
        d = tl.arange(0, BLOCK_DV)
        seen = real & (tl.sum(totals, 1) != 0)
        tl.store(
            out + at[:, None] * VALUE_DEPTH + d[None, :], acc,
            mask=seen[:, None] & (d < VALUE_DEPTH)[None, :],
        )  # fmt: skip
        tl.store(lse + at, top, mask=real)
        tl.store(mass + at[:, None] * SOURCES + number, totals, mask=real[:, None])
    else:
        store_results(out, lse, normalizers, mass, at, real, acc, top, totals, num_sources, VALUE_DEPTH)


@triton.jit
def store_results(
    out, lse, normalizers, mass, at, real, acc, top, totals, num_sources, VALUE_DEPTH: tl.constexpr
):
    total = tl.sum(totals, 1)
    total = tl.where(total == 0, 1.0, total)  # nothing is seen where it is 0: the top one alone adds 1
    d = tl.arange(0, acc.shape[1])
    tl.store(
        out + at[:, None] * VALUE_DEPTH + d[None, :], acc / total[:, None],
        mask=real[:, None] & (d < VALUE_DEPTH)[None, :],
    )  # fmt: skip
    tl.store(lse + at, (top + tl.log2(total)) / LOG2E, mask=real)
    tl.store(normalizers + 2 * at, top, mask=real)
    tl.store(normalizers + 2 * at + 1, 1 / total, mask=real)
    if mass is not None:
        number = tl.arange(0, totals.shape[1])[None, :]
        tl.store(
            mass + at[:, None] * num_sources + number, totals / total[:, None],
            mask=real[:, None] & (number < num_sources),
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_sources", "splits"])
def combine_kernel(
    out, lse, normalizers, mass, accs, tops, totals, num_sources, splits,
    SOURCES: tl.constexpr, VALUE_DEPTH: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What ``store_results`` is given of one row, from what its splits found, ``BLOCK_S`` at a time."""
    rows = tl.num_programs(0)
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    number = tl.arange(0, SOURCES)[None, :]
    top = tl.full([1], float("-inf"), tl.float32)
    for split0 in range(0, splits, BLOCK_S):
        split = split0 + tl.arange(0, BLOCK_S)
        own_top = tl.load(tops + split * rows + row, mask=split < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(own_top, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([1, SOURCES], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for split0 in range(0, splits, BLOCK_S):
        split = split0 + tl.arange(0, BLOCK_S)
        inside = split < splits
        at = split * rows + row  # [S]
        fade = tl.exp2(tl.load(tops + at, mask=inside, other=float("-inf")) - shift)[:, None]
        own_total = tl.load(totals + at[:, None] * SOURCES + number, mask=inside[:, None], other=0.0)
        seen = tl.sum(own_total, 1) != 0  # only there a split has left its acc
        own_acc = load_rows(accs, VALUE_DEPTH, at, seen, VALUE_DEPTH, BLOCK_DV)
        total += tl.sum(own_total * fade, 0, keep_dims=True)
        acc += tl.sum(own_acc * fade, 0, keep_dims=True)
    store_results(out, lse, normalizers, mass, row, row < rows, acc, top, total, num_sources, VALUE_DEPTH)


def cross_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor | None],
    masks: Sequence[Tensor | None], present: Tensor | None, causal: Sequence[bool], source_bias: Tensor |
    None, scale: float | None, mass: bool,
) -> list[Tensor]:  # fmt: skip
    """Launches the forward; arguments and results are those of ``torch.ops.mmfast.cross_attention``.

    Copied first: a query, key or value whose last dimension is not dense, lengths, masks and presence that
    are not contiguous, and int32 lengths beside int64 ones.
    """
    depth, size = depths("cross_attention", query, values[0])
    batch, heads, queries, _ = query.shape
    rows = query.shape[:3]
    out = query.new_empty(*rows, depth["VALUE_DEPTH"])
    lse = query.new_empty(rows, dtype=torch.float32)
    normalizers = lse.new_empty(*rows, 2)
    shares = lse.new_empty(*rows, len(keys)) if mass else None
    results = out, lse, normalizers, shares
    made = [t for t in results if t is not None]
    if lse.numel() == 0:
        return made

    query = dense(query)
    options = configuration("cross_attention", f"forward_{size}", query, query.dtype, UNTUNED)
    programs = batch * heads * triton.cdiv(queries, options["BLOCK_M"])
    splits = splits_of(programs, keys, options["num_warps"])
    sources = sources_of(keys, values, lengths, masks, causal)
    accs, tops, totals = [
        lse.new_empty(splits, *rows, *width) for width in ((depth["VALUE_DEPTH"],), (), (len(sources),))
    ] if splits > 1 else [None] * 3  # fmt: skip
    with on(query.device):
        forward_kernel[programs, splits](
            *(results if splits == 1 else (accs, tops, None, totals)), query, query.stride()[:3], sources,
            *presence(present), *bias_of_sources(source_bias), len(keys),
            query.shape[-1] ** -0.5 if scale is None else scale, queries, heads, heads // keys[0].shape[1],
            **depth, **options, SOURCES=len(sources), SPLIT=splits > 1,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[(lse.numel(),)](
                *results, accs, tops, totals, len(keys), splits, SOURCES=len(sources),
                VALUE_DEPTH=depth["VALUE_DEPTH"], BLOCK_DV=depth["BLOCK_DV"], BLOCK_S=16,
            )  # fmt: skip
    return made
