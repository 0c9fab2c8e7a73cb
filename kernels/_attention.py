"""What the attention kernels share: sources as a kernel sees them, who sees which keys, and loads.

Which keys of a source a query sees is a prefix, bounded by size, length, causality and presence, without the
keys that the source's mask hides. So a kernel needs one number per row and no mask tensor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels._launch import Blocks, dense

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2: one instruction
# Keys taken at once where rows differ in what they see. Few, for there each value is held in registers and
# looked at, and what lies beyond the edge is computed for nothing.
EDGE: tl.constexpr = tl.constexpr(16)
_DEEPEST = 256
_LEAST_KEYS = 256  # of a split: of fewer the partial sums would weigh too much. No device tuned it yet.


class Source(NamedTuple):
    """One source as a kernel sees it."""

    key: Tensor  # [B, Hkv, S, D], the last dimension dense
    value: Tensor  # [B, Hkv, S, Dv], likewise
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    number: int  # its column of `present` and `source_bias`, as `_odd` makes it
    packed: int  # size and flags, see `_packed`
    length: Tensor | None  # [B]; another source's where only others have one
    mask: Tensor | None  # [B, S] dense; likewise
    grad_key: Tensor | None = None  # as key, dense
    grad_value: Tensor | None = None


def _odd(number: int) -> int:
    """The number as one that is odd and never 1: Triton would compile anew for 1 and for multiples of 16,
    source by source, since within a tuple no number is exempt from that.
    """
    return number << 2 | 3


def _packed(size: int, causal: bool, bounded: bool, masked: bool) -> int:
    """Size and flags in one number."""
    return _odd(size << 3 | causal << 2 | bounded << 1 | masked)


def sources_of(
    keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor | None],
    masks: Sequence[Tensor | None], causal: Sequence[bool],
    grads: Sequence[tuple[Tensor | None, Tensor | None]] | None = None, chosen: Sequence[int] | None = None,
) -> tuple[Source, ...]:  # fmt: skip
    """The chosen sources (all by default), filled up with empty ones to a power of two.

    So three and four of them share a kernel, whichever of them have a length or a mask.
    """
    chosen = range(len(keys)) if chosen is None else chosen
    if len({t.dtype for t in lengths if t is not None}) > 1:  # a kernel picks one pointer of several
        lengths = [None if t is None else t.long() for t in lengths]
    any_length = next((t.contiguous() for t in lengths if t is not None), None)
    any_mask = next((t for t in masks if t is not None), None)
    made = []
    for i in chosen:
        key, value, length, mask = dense(keys[i]), dense(values[i]), lengths[i], masks[i]
        made.append(Source(
            key, value, key.stride()[:3], value.stride()[:3], _odd(i),
            _packed(key.shape[2], causal[i], length is not None, mask is not None),
            any_length if length is None else length.contiguous(),
            any_mask if mask is None else mask.contiguous(),
            *(grads[i] if grads else ()),
        ))  # fmt: skip
    empty = made[0]._replace(number=_odd(0), packed=_packed(0, False, False, False))
    return (*made, *[empty] * ((1 << (len(made) - 1).bit_length()) - len(made)))


def presence(present: Tensor | None) -> tuple[Tensor | None, int, int | None]:
    """``present`` [B, n] or [B, L, n] for a kernel, its step from sample to sample, and from row to row if it
    has one.
    """
    if present is None:
        return None, 0, None
    present = present.contiguous()
    return present, present.stride(0), present.stride(1) if present.dim() == 3 else None


def bias_of_sources(source_bias: Tensor | None) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """``source_bias`` [B, H, n] for a kernel, with its strides as ``_odd`` makes them."""
    return source_bias, None if source_bias is None else tuple(map(_odd, source_bias.stride()))


def tiles(m: int, n: int, num_warps: int, num_stages: int) -> Blocks:
    """Queries by keys, with Triton's launch options."""
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": num_warps, "num_stages": num_stages}


def depths(op: str, query: Tensor, value: Tensor) -> tuple[dict[str, int], int]:
    """The depths of key and value, each with the power of two that it is filled up to, and the class of
    blocks they belong to: 64, 128 or 256.
    """
    if query.dtype == torch.float64:
        raise TypeError(f"{op}: got float64, wanted float32, bfloat16 or float16: Triton adds in float32")
    depth, value_depth = query.shape[-1], value.shape[-1]
    if max(depth, value_depth) > _DEEPEST:
        raise ValueError(f"{op}: got {depth} and {value_depth} features a head, wanted at most {_DEEPEST}")
    filled = [max(16, triton.next_power_of_2(d)) for d in (depth, value_depth)]
    made = {"DEPTH": depth, "VALUE_DEPTH": value_depth, "BLOCK_D": filled[0], "BLOCK_DV": filled[1]}
    return made, max(64, *filled)


def programs_wanted(device: torch.device, num_warps: int) -> int:
    """How many programs keep a device at work: 8 warps can fill a multiprocessor's registers.

    The interpreter runs one program after the other.
    """
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count * 8 // num_warps


def splits_of(programs: int, keys: Sequence[Tensor], num_warps: int) -> int:
    """Into how many parts the keys are split, so that ``programs`` blocks of queries fill the device.

    It follows from sizes alone: every run adds in the same order.
    """
    size = sum(key.shape[2] for key in keys)
    return max(1, min(programs_wanted(keys[0].device, num_warps) // programs, size // _LEAST_KEYS))


@triton.jit
def nth(values, i):
    """``values[i]``, where only the run knows ``i``: to unroll a kernel over 16 sources takes minutes."""
    found = values[0]
    for j in tl.static_range(1, len(values)):
        found = tl.where(i == j, values[j], found)
    return found


@triton.jit
def packed_of(sources, i):
    return nth([source.packed for source in sources], i)


@triton.jit
def number_of(sources, i):
    return nth([source.number for source in sources], i) >> 2


@triton.jit
def size_of(packed):
    return packed >> 5


@triton.jit
def limits(sources, i, sample, queries, present, present_step, flag_step):
    """``(limit, lead)``: row l sees keys below ``min(limit, l + lead)``, as far as its own presence and the
    mask let it.
    """
    packed = packed_of(sources, i)
    size = size_of(packed)
    limit = size
    if sources[0].length is not None:
        length = nth([source.length for source in sources], i)
        length = tl.load(length + sample, mask=(packed & 8) != 0, other=size)
        limit = tl.minimum(tl.maximum(length, 0), size).to(tl.int32)
    if present is not None and flag_step is None:
        flag = tl.load(present + sample.to(tl.int64) * present_step + number_of(sources, i))
        limit = tl.where(flag != 0, limit, 0)
    return limit, tl.where((packed & 16) != 0, size - queries + 1, size)


@triton.jit
def ends_of(row, queries, limit, lead, flags, flag_step):
    """How many keys each row sees before the mask; ``flags`` is where the presence begins that each row has
    for itself.
    """
    end = tl.where(row < queries, tl.maximum(tl.minimum(limit, row + lead), 0), 0)
    if flags is not None:
        flag = tl.load(flags + row.to(tl.int64) * flag_step, mask=row < queries, other=0)
        end = tl.where(flag != 0, end, 0)
    return end


@triton.jit
def bias_of(source_bias, strides, sample, head, number):
    """The source's bias for one head, as a scalar."""
    bias = 0.0
    if source_bias is not None:
        bias = tl.load(
            source_bias
            + sample.to(tl.int64) * (strides[0] >> 2)
            + head.to(tl.int64) * (strides[1] >> 2)
            + number * (strides[2] >> 2)
        )
    return bias


@triton.jit
def seen_of(
    sources, i, sample, head, row, queries, present, present_step, flag_step, source_bias, bias_strides
):
    """The bias of a source, and before the mask how many of its keys each row sees, all rows see, and the
    sample has.
    """
    number = number_of(sources, i)
    bias = bias_of(source_bias, bias_strides, sample, head, number)
    most, lead = limits(sources, i, sample, queries, present, present_step, flag_step)
    limit = tl.where(bias == float("-inf"), 0, most)
    flags = None
    if flag_step is not None:
        flags = present + sample.to(tl.int64) * present_step + number
    end = ends_of(row, queries, limit, lead, flags, flag_step)  # [M]
    return bias, end, tl.min(tl.where(row < queries, end, limit), 0), most


@triton.jit
def share_of_tiles(
    sources, sample, queries, present, present_step, flag_step, SOURCES: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The first tile of this split, and how many it has.

    The tiles that a sample sees of all sources stand in one row, and every split has as many of them.
    """
    tiles = 0
    for i in tl.static_range(SOURCES):
        most, _ = limits(sources, i, sample, queries, present, present_step, flag_step)
        tiles += tl.cdiv(most, BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(1))
    return tl.program_id(1) * share, share


@triton.jit
def unmasked(mask, is_masked, k, inside):
    """Which of the keys the mask leaves; ``mask`` points at the sample's."""
    if mask is not None:
        inside = inside & (tl.load(mask + k, mask=inside & is_masked, other=1) != 0)
    return inside


@triton.jit
def start_of(tensor, strides, sample, head):
    return tensor + sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def rows_of(tensors, strides, i, sample, head):
    """Where the i-th tensor begins for one head, and the step from row to row."""
    across = nth([stride[0] for stride in strides], i), nth([stride[1] for stride in strides], i)
    return start_of(nth(tensors, i), across, sample, head), nth([stride[2] for stride in strides], i)


@triton.jit
def keys_and_values_of(sources, i, sample, head):
    """Source ``i``'s keys for one head, and the step from row to row; then the same of its values."""
    key, key_stride = rows_of(
        [source.key for source in sources], [source.key_strides for source in sources], i, sample, head
    )
    value, value_stride = rows_of(
        [source.value for source in sources], [source.value_strides for source in sources], i, sample, head
    )
    return key, key_stride, value, value_stride


@triton.jit
def load_rows(start, stride, row, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix with a dense last dimension [rows, BLOCK]; zeros in what is not to be seen."""
    d = tl.arange(0, BLOCK)
    pointers = start + row.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=seen[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")
