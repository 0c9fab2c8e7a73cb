"""The definition of every op in plain PyTorch. Every backend is tested against these, in float64."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def concat_linear(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    present: Tensor | None = None,
    norm_eps: float | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """``residual + tanh(gate) * activation(norm(cat(inputs)) @ weight.T + bias)``; see ``mmfast.ops``."""
    lead = torch.broadcast_shapes(*[x.shape[:-1] for x in inputs])
    if present is not None:  # an absent source is zeros, by selection: 0 * nan would be nan
        seen = present.view(-1, *[1] * len(lead), present.shape[-1])  # [B, 1 ..., 1, n]
        inputs = [torch.where(seen[..., i], x, 0.0) for i, x in enumerate(inputs)]
    x = torch.cat([x.expand(*lead, x.shape[-1]) for x in inputs], dim=-1)  # [..., sum D_i]
    if norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    x = F.linear(x, weight, bias)  # [..., O], for swiglu [..., 2 O]
    if activation == "swiglu":
        a, b = x.chunk(2, dim=-1)
        x = F.silu(a) * b
    elif activation != "none":
        x = ACTIVATIONS[activation](x)
    if gate is not None:
        x = torch.tanh(gate) * x
    return x if residual is None else residual + x
