"""What every launcher needs: rows and their strides, block sizes, precision and the device."""

import contextlib
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmfast.ops._backend import by_device, measured

Triple = tuple[int, int, int]
Blocks = dict[str, int]


def blocks(m: int, n: int, k: int, num_warps: int, num_stages: int) -> Blocks:
    """The sizes of a tiled product [M, K] @ [K, N], with Triton's launch options."""
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": num_warps, "num_stages": num_stages}


def described(sizes: Blocks) -> Blocks:
    """The same for a kernel that may read its tiles through tensor descriptors, by the TMA."""
    return {**sizes, "DESCRIPTORS": 1}


def configuration(
    op: str,
    kernel: str,
    like: Tensor,
    dtype: torch.dtype,
    untuned: Mapping[int, Mapping[str, Blocks]],
    exact: bool = False,
) -> dict[str, Any]:
    """Launch options of a kernel that multiplies tensors of ``like``'s dtype, in an op on ``dtype``.

    They come from the committed table's entry for this device, ``["triton"]["<kernel>.<half|tf32|ieee>"]``,
    else from the untuned ones of its generation. What ``tl.dot`` does with float32 follows PyTorch's own
    setting and never Triton's default, which is TF32; with ``exact`` it is exact.
    """
    exact = dtype == torch.float32 and (exact or torch.backends.cuda.matmul.fp32_precision != "tf32")
    precision = "ieee" if exact else "tf32"
    key = f"{kernel}.{'half' if like.dtype.itemsize == 2 else precision}"
    tuned = measured(op, like.device).get("triton", {}).get(key)
    if tuned is None:
        own = capability(like.device)
        tuned = untuned[max((cc for cc in untuned if cc <= own), default=min(untuned))][key]
    return {"PRECISION": precision, **tuned}


def capability(device: torch.device) -> int:
    """The compute capability as one number, 90 for 9.0; the interpreter is given the oldest blocks."""
    return _capability(device) if device.type == "cuda" else 80


@by_device
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def use_descriptors(
    options: dict[str, Any], possible: bool, *matrices: tuple[Tensor | None, int | None]
) -> None:
    """Leaves ``DESCRIPTORS`` on where that is possible and a descriptor can be made of each matrix.

    A matrix is given with the step of its rows. It must begin at a multiple of 16 bytes; so must its rows,
    which may not overlap, nor end elsewhere. Then Triton gets memory to keep descriptors in, and keeps that
    allocator, as it does Inductor's.
    """

    def fits(t: Tensor | None, step: int | None) -> bool:
        if t is None or step is None or t.numel() == 0 or step < t.shape[-1]:
            return False
        return _rows_at_multiples_of(16 // t.itemsize, t, step)

    wanted = bool(options.get("DESCRIPTORS")) and possible and bool(matrices)
    options["DESCRIPTORS"] = wanted and all(fits(*matrix) for matrix in matrices)
    if options["DESCRIPTORS"]:
        import triton  # not before: what else is here is used without it too

        triton.set_allocator(_memory_for_descriptors)


def aligned(*matrices: tuple[Tensor | None, Sequence[int] | None]) -> bool:
    """Whether Triton sees that every matrix, given with its rows' strides, lies in whole vectors.

    It looks for multiples of 16 elements, of whatever size. Where there are none, each element is loaded or
    stored by a pointer and an instruction of its own: a kernel then wants smaller tiles, or it spills.
    """
    return all(t is None or _rows_at_multiples_of(16, t, *(strides or ())) for t, strides in matrices)


def _rows_at_multiples_of(elements: int, t: Tensor, *strides: int) -> bool:
    """Whether rows begin and end there, and the first one at a multiple of 16 bytes."""
    return t.data_ptr() % 16 == 0 and not any(n % elements for n in (t.shape[-1], *strides))


def _memory_for_descriptors(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # the current one: see `on`


def row_step(sizes: Triple, strides: Triple) -> int | None:
    """The step from each row to the next where it is the same everywhere."""
    step, expected = strides[2], strides[2]
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return None
        expected *= size
    return step


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' device the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def lead_of(op: str, inputs: Sequence[Tensor]) -> torch.Size:
    """The leading dimensions that the inputs ``[..., D_i]`` broadcast to."""
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    if inputs[0].dtype == torch.float64:
        raise TypeError(f"{op}: got float64, wanted float32, bfloat16 or float16: Triton adds in float32")
    if lead.numel() >= 2**30:  # counted in 32 bits, past the last one to the end of a tile or of a part
        raise ValueError(
            f"{op}: got {lead.numel()} rows, wanted fewer than 2**30, as Triton's kernels count them"
        )
    return lead


def columns_of(inputs: Sequence[Tensor]) -> list[slice]:
    """Each source's columns of the weight."""
    ends = list(accumulate(x.shape[-1] for x in inputs))
    return [slice(end - x.shape[-1], end) for end, x in zip(ends, inputs, strict=True)]


def collapse(lead: Sequence[int], tensors: Sequence[Tensor]) -> tuple[Triple, list[Triple]] | None:
    """The leading dimensions of several tensors as three that they share, and each tensor's strides in them.

    Every tensor broadcasts to ``lead``, its last dimension left aside. Neighbouring dimensions are merged
    where all tensors allow it: ``[B, T, D]`` beside ``[B, 1, D]`` needs two. None: more than three needed.
    """
    expanded = [t.expand(*lead, t.shape[-1]).stride() for t in tensors]
    merged: list[tuple[int, tuple[int, ...]]] = []  # size, and the step of each tensor
    for dim, size in enumerate(lead):
        steps = tuple(stride[dim] for stride in expanded)
        if size == 1:
            continue
        if merged and all(outer == step * size for outer, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    if len(merged) > 3:
        return None
    merged = [(1, (0,) * len(tensors))] * (3 - len(merged)) + merged
    (n0, steps0), (n1, steps1), (n2, steps2) = merged
    return (n0, n1, n2), list(zip(steps0, steps1, steps2, strict=True))


def times(weight: Tensor, vector: Tensor | None) -> Tensor:
    """``weight`` [O, D] @ ``vector`` [D] in float32, whatever PyTorch's products are made in; None: ones."""
    return (weight if vector is None else weight * vector.float()).sum(1, dtype=torch.float32)


def unit(x: Tensor, mean: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(x - mean) * scale`` at a mean square of 1, and what that takes [..., 1].

    So it is in the range of half precision.
    """
    centred = (x - mean) * (1 if scale is None else scale)
    square = centred.square().sum(-1, keepdim=True) / max(1, x.shape[-1])
    to_one = (square + 1e-30).rsqrt().clamp_min(1e-30)  # not 0 where the square overflows
    return (centred * to_one).to(x.dtype), to_one


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors as a kernel reads them that is told no strides."""
    return [None if t is None else t.contiguous() for t in tensors]


def walk(lead: torch.Size, tensors: Sequence[Tensor]) -> tuple[Triple, list[Tensor], list[Triple]]:
    """Sizes, tensors and strides for a kernel: copies where ``dense`` or ``collapse`` cannot do without."""
    tensors = [dense(t) for t in tensors]
    found = collapse(lead, tensors)
    if found is None:
        tensors = [t.expand(*lead, t.shape[-1]).contiguous() for t in tensors]
        found = collapse(lead, tensors)
        assert found is not None  # contiguous rows are one dimension
    return found[0], tensors, found[1]


def presence(present: Tensor | None, rows: int) -> tuple[Tensor | None, int, int]:
    """``present`` [B, n] for a kernel, with n and the number of rows that share one of its lines."""
    if present is None:
        return None, 1, 1
    return present.contiguous(), present.shape[1], rows // present.shape[0]


def is_pooled(x: Tensor, lead: torch.Size, normed: bool) -> bool:
    """Whether a source has fewer rows than the output, and is multiplied at its own size.

    Under a norm one of few features is not, which costs next to nothing: its gradient is what is left where
    most of the sums over the rows would cancel.
    """
    return x.shape[:-1].numel() < lead.numel() and not (normed and x.shape[-1] < 8)


def own_lead(x: Tensor, lead: torch.Size) -> torch.Size:
    """A source's own leading dimensions, as many as the output's."""
    return torch.Size((1,) * (len(lead) + 1 - x.ndim)) + x.shape[:-1]


def seen_by(present: Tensor | None, lead: torch.Size, own: torch.Size) -> Tensor | None:
    """Who sees a row of a source: its sample, or any sample where the samples share it."""
    if present is None or own[0] == lead[0]:
        return present
    return present.any(0, keepdim=True)


def row_sum(
    grad: Tensor, lead: torch.Size, own: torch.Size, present: Tensor | None, number: int
) -> tuple[Tensor, Tensor | None]:
    """``grad`` [rows, O] summed over the rows that a source of leading dimensions ``own`` went to.

    In float32, or as it is in float64. With it, who sees a row of the source.
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    g = grad.view(*lead, -1)
    dims = [d for d in range(1, len(lead)) if own[d] != lead[d]]
    if dims:
        g = g.sum(dims, keepdim=True, dtype=wide)
    if present is not None:  # one flag per sample: where there are sums, it is they that are selected
        g = torch.where(present[:, number].view(-1, *[1] * len(lead)), g, 0)
    if own[0] != lead[0]:
        g = g.sum(0, keepdim=True, dtype=wide)
    return g.reshape(own.numel(), -1), seen_by(present, lead, own)
