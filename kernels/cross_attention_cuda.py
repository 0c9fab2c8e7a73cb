"""Backend ``cuda`` of ``cross_attention``: the forward by ``csrc/cuda/``, the backward by the Triton kernels.

It is made for few queries over long sources; any number works. All queries of the heads that share a kv head
are rows of one product, 32 or 64 to a block of threads. The keys are split among blocks, whose sums are added
in a fixed order.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.kernels._launch import dense
from mmfast.ops._backend import LIB

LIB.define(
    "cross_attention_split.cuda(Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] lengths, "
    "Tensor?[] masks, Tensor? present, bool[] causal, Tensor? source_bias, float scale, int block, "
    "int splits, Tensor(a!) parts, Tensor(b!) totals, Tensor(c!) tops, Tensor(d!) out, Tensor(e!) lse, "
    "Tensor(f!) normalizers, Tensor(g!)? mass) -> ()"
)
SPLIT = torch.ops.mmfast.cross_attention_split.cuda
torch.library.register_fake("mmfast::cross_attention_split.cuda", lambda *args: None, lib=LIB)

DEEPEST = 256
ROOM = 163 << 10  # bytes of shared memory of a block with more than 128 features
MOST_SLOTS = 128  # that the kernel which adds them up has room for
ROWS = 64  # of a block's four warps; of 32 rows each has two warps, which share the keys, and a slot for each
FEWEST_TILES = 4  # for a split: for fewer, its sums would be more to write than its keys are to read


class Plan(NamedTuple):
    """How the work is cut: rows to a block, ranges of keys, and the slots that their sums take."""

    block: int
    splits: int
    slots: int


def plan(
    batch: int, kv_heads: int, rows: int, sizes: Sequence[int], depth: int, itemsize: int, processors: int
) -> Plan:
    """The cut for ``rows`` queries and heads to a kv head, by sizes alone: lengths stay on the device.

    Splits are as many as give each of ``processors`` the blocks that it has shared memory for.
    """
    narrow = itemsize == 4 and depth > 128  # of such rows no more fit into shared memory
    block = 32 if narrow or rows <= 32 else ROWS
    blocks = batch * kv_heads * math.ceil(rows / block)
    tiles = sum(math.ceil(size / (128 // itemsize)) for size in sizes)
    wanted = processors * (1 if depth > 128 else 2) // max(1, blocks)
    splits = max(1, min(wanted, tiles // FEWEST_TILES, MOST_SLOTS * block // ROWS))
    return Plan(block, splits, splits * ROWS // block)


def cross_attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor | None],
    masks: Sequence[Tensor | None], present: Tensor | None, causal: Sequence[bool], source_bias: Tensor |
    None, scale: float | None, mass: bool,
) -> list[Tensor]:  # fmt: skip
    """Launches the forward; arguments and results are those of ``torch.ops.mmfast.cross_attention``.

    float32 is multiplied exactly, whatever PyTorch's setting of its precision. Copied first: a query, key or
    value whose last dimension is not dense. Where rows do not begin at multiples of 16 bytes, elements are
    read one by one.

    Raises:
        TypeError: for float64.
        ValueError: for more than 256 features a head, or none in the values; for more than 128 on a GPU whose
            blocks have less shared memory than data centres' (8.6, 8.9, 12.0).
    """
    if query.dtype == torch.float64:
        raise TypeError("cross_attention: query is float64, wanted float32, bfloat16 or float16")
    (batch, heads, queries, depth), value_depth = query.shape, values[0].shape[-1]
    deepest = DEEPEST if shared_memory(query.device) >= ROOM else 128
    if max(depth, value_depth) > deepest or value_depth == 0:
        raise ValueError(
            f"cross_attention: query and values have {depth} and {value_depth} features a head, "
            f"wanted 1 to {deepest}"
        )
    out = query.new_empty(batch, heads, queries, value_depth)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    normalizers = lse.new_empty(*lse.shape, 2)
    shares = lse.new_empty(*lse.shape, len(keys)) if mass else None
    made = [t for t in (out, lse, normalizers, shares) if t is not None]
    if lse.numel() == 0:
        return made

    kv_heads = keys[0].shape[1]
    cut = plan(
        batch, kv_heads, heads // kv_heads * queries, [key.shape[2] for key in keys], max(depth, value_depth),
        query.element_size(), processors(query.device),
    )  # fmt: skip
    parts = lse.new_empty(cut.slots, lse.numel(), value_depth)
    totals, tops = lse.new_empty(2, cut.slots, lse.numel(), len(keys))
    SPLIT(
        dense(query), [dense(key) for key in keys], [dense(value) for value in values], lengths, masks,
        present, causal, source_bias, depth**-0.5 if scale is None else scale, cut.block, cut.splits, parts,
        totals, tops, out, lse, normalizers, shares,
    )  # fmt: skip
    return made


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """How many bytes of it a block may ask for."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def cross_attention_backward(*args: Any) -> list[Tensor]:
    """Hands over to the launcher of the Triton kernels: there is no CUDA kernel of the backward.

    It multiplies float32 exactly, as the forward did: weights made again from TF32's logits would not add
    up to 1.
    """
    from mmfast.kernels import cross_attention_backward as triton

    backward: Any = triton.cross_attention_backward
    made: list[Tensor] = backward(*args, exact=True)
    return made
