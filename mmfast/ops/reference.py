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


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(group_norm(input) * weight + bias + residual)``; see ``mmfast.ops``."""
    # Of channels_last input PyTorch makes contiguous output on CUDA, and on the CPU is 10 to 30 times slower.
    x = torch.group_norm(input.contiguous(), num_groups, weight, bias, eps)  # [B, C, ...]
    if not input.is_contiguous() and channels_last(input):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    if residual is not None:
        x = x + residual
    return x if activation == "none" else ACTIVATIONS[activation](x)


def channels_last(x: Tensor) -> bool:
    """Whether ``[B, C, ...]`` lies dense in memory as ``[B, ..., C]``."""
    return x.movedim(1, -1).is_contiguous()
