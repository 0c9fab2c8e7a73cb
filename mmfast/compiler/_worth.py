"""Whether what was found is worth replacing: the one place where that is decided, by the committed table.

``table.json`` holds for an op, a device and a dtype how many floating point operations a layer must have
(``"flops"``), or how many of them, or of their like in time, the op must save (``"saved"``), for a model that
Inductor compiles to be faster with the op in it. ``"ordinary"`` is ``"flops"`` where PyTorch has a kernel for
the very thing, ``"ordinary_head"`` how many features a head must have there too.
"""

import math

from mmfast.compiler._match import Match
from mmfast.ops._backend import choose, measured


def slower(match: Match) -> str:
    """Why ``match`` would not be faster; empty if it would."""
    device = match.last.meta["example_value"].device
    if choose(match.op, device) == "reference":
        return f"no kernel of it is measured for {device.type}"
    dtype = str(match.dtype).removeprefix("torch.")
    least = measured(match.op, device).get("compiler", {}).get(dtype, {})
    size = "ordinary" if match.ordinary else "flops"
    if size not in least and "saved" not in least:
        return f"it is not measured in {dtype}"
    if match.ordinary and match.head < least.get("ordinary_head", 0):
        return f"not faster: heads of {match.head} features, over one stream, without a mask"
    if match.flops >= least.get(size, math.inf) or match.saved >= least.get("saved", math.inf):
        return ""
    return f"not faster: {match.flops:.2g} operations, {match.saved:.2g} saved"
