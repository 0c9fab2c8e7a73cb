"""Whether what was found is worth replacing: the one place where that is decided, by the committed table.

``table.json`` holds for an op, a device and a dtype how many floating point operations a layer must have
(``"flops"``), or how many of them, or of their like in time, the op must save (``"saved"``), for a model that
Inductor compiles to be faster with the op in it. ``"ordinary"`` is ``"flops"`` where PyTorch has a kernel for
the very thing, ``"ordinary_head"`` how many features a head must have there too, ``"written_head"`` how many
it may have at most where attention is written out: products of wider heads are fast. They are read off the
table that ``bench_compiler_thresholds`` prints.
"""

import math

import torch

from mmfast.compiler._match import Match
from mmfast.ops._backend import choose, measured


def slower(match: Match) -> str:
    """Why ``match`` would not be faster; empty if it would."""
    device, head = match.last.meta["example_value"].device, match.head if match.ordinary else 0
    return why_not(match.op, device, match.dtype, match.flops, match.saved, head, match.written_out)


def why_not(
    op: str, device: torch.device, dtype: torch.dtype, flops: float, saved: float, head: int, written: bool
) -> str:
    """The same by size; ``head`` is its features where PyTorch has a kernel for the very thing, else 0."""
    if choose(op, device) == "reference":
        return f"no kernel of it is measured for {device.type}"
    name = str(dtype).removeprefix("torch.")
    least = measured(op, device).get("compiler", {}).get(name, {})
    size = "ordinary" if head else "flops"
    if size not in least and "saved" not in least:
        return f"it is not measured in {name}"
    widest = least.get("written_head", head) if written else head
    if head and not least.get("ordinary_head", 0) <= head <= widest:
        return f"not faster: heads of {head} features, over one stream, without a mask"
    if flops >= least.get(size, math.inf) or saved >= least.get("saved", math.inf):
        return ""
    return f"not faster: {flops:.2g} operations, {saved:.2g} saved"
