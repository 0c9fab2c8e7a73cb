"""The definition of every op in plain PyTorch. Every backend is tested against these, in float64."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class AttentionStats(NamedTuple):
    """What ``cross_attention`` knows about its softmax."""

    lse: Tensor  # [B, H, L] the logarithm of the sum of exp(logit); -inf where a query sees nothing
    mass: Tensor  # [B, H, L, n] how much of a query's attention each source got; has no gradient


def cross_attention(
    query: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    *,
    lengths: Sequence[Tensor | None] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    present: Tensor | None = None,
    causal: bool | Sequence[bool] = False,
    source_bias: Tensor | None = None,
    scale: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """One softmax over the keys of all sources; see ``mmfast.ops``."""
    n, heads = len(sources), query.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    sizes = [key.shape[2] for key, _ in sources]
    key = torch.cat([key.repeat_interleave(heads // key.shape[1], 1) for key, _ in sources], 2)
    value = torch.cat([value.repeat_interleave(heads // value.shape[1], 1) for _, value in sources], 2)
    visible = [
        _visible(
            query,
            size,
            lengths[i] if lengths else None,
            masks[i] if masks else None,
            None if present is None else present[..., i],
            causal if isinstance(causal, bool) else causal[i],
        )
        for i, size in enumerate(sizes)
    ]
    seen = torch.cat(visible, -1)  # [B, 1, L, sum S_i]
    if source_bias is not None:
        bias = source_bias.to(wide).expand(query.shape[0], heads, n)
        bias = torch.cat(
            [bias[:, :, i, None, None].expand(-1, -1, 1, s) for i, s in enumerate(sizes)], -1
        )  # [B, H, 1, sum S_i]
        seen = seen & (bias != -torch.inf)
        bias = torch.where(bias == -torch.inf, 0.0, bias)
    sees = seen.any(-1, keepdim=True)  # [B, H, L, 1]

    # Whatever is not finite is taken out before it is multiplied, since 0 * nan is nan, and put back as a nan
    # where it is seen: for the gradient too, which is that of the weights.
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = _product(torch.where(sees, query, 0.0), _finite(key).mT).to(wide) * scale
    logits = torch.where(key.isfinite().all(-1)[:, :, None], logits, torch.nan)
    if source_bias is not None:
        logits = logits + bias
    logits = torch.where(sees, torch.where(seen, logits, -torch.inf), 0.0)
    weights = torch.where(seen, logits.softmax(-1), 0.0)
    out = _product(weights.to(value.dtype), _finite(value))  # [B, H, L, Dv]
    spoilt = _product(seen.to(value.dtype), (~value.isfinite()).to(value.dtype))
    out = out + weights.sum(-1, keepdim=True).to(value.dtype) * spoilt.masked_fill(spoilt > 0, torch.nan)
    out = torch.where(sees, out, 0.0)
    if not return_stats:
        return out
    lse = torch.where(sees.squeeze(-1), logits.logsumexp(-1), -torch.inf)
    mass = torch.stack([part.sum(-1) for part in weights.detach().split(sizes, -1)], -1)
    return out, AttentionStats(lse, mass)


def _visible(
    query: Tensor, size: int, length: Tensor | None, mask: Tensor | None, present: Tensor | None, causal: bool
) -> Tensor:
    """bool ``[B, 1, L, S]``: which keys of one source each query sees."""
    batch, _, queries, _ = query.shape
    at = torch.arange(size, device=query.device)
    seen = torch.ones(batch, queries, size, dtype=torch.bool, device=query.device)
    if length is not None:
        seen = seen & (at < length[:, None, None])
    if mask is not None:
        seen = seen & mask[:, None]
    if present is not None:  # [B] or [B, L]
        seen = seen & (present[:, None] if present.dim() == 1 else present)[..., None]
    if causal:
        seen = seen & (at <= torch.arange(queries, device=query.device)[:, None] + size - queries)
    return seen[:, None]


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``. In bfloat16 on a CPU with AMX a nan would reach other rows, by oneDNN's issue 5717."""
    if a.dtype == torch.bfloat16 and a.device.type == "cpu":
        return (a.float() @ b.float()).to(a.dtype)
    return a @ b


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


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What tells pairs ``a[i], b[i]`` from all others, and how many there are; see ``mmfast.ops``."""
    wide = torch.promote_types(a.dtype, torch.float32)
    n = a.shape[0]
    if present is None:
        present = torch.ones(n, dtype=torch.bool, device=a.device)
    own = torch.eye(n, dtype=torch.bool, device=a.device)  # [N, N]
    a, b = (torch.where(present[:, None], x, 0.0) for x in (a, b))
    logits = (a @ b.mT).to(wide) * logit_scale.to(wide)  # [N, N]
    if logit_bias is not None:
        logits = logits + logit_bias.to(wide)
    seen = present[:, None] & present
    if kind == "softmax":
        logits = torch.where(seen | own, logits, -torch.inf)  # an absent pair sees itself, and does not count
        both = F.log_softmax(logits, 1).diagonal() + F.log_softmax(logits, 0).diagonal()
        losses = torch.where(present, -both / 2, 0.0)
    else:
        losses = torch.where(seen, -F.logsigmoid(torch.where(own, logits, -logits)), 0.0)
    return losses.sum(), present.sum()


def lowrank_fusion(
    inputs: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor | None = None,
    *,
    present: Tensor | None = None,
) -> Tensor:
    """``sum over r of rank_weight[r] * product over i of ([x_i, 1] @ factors_i[r])``; see ``mmfast.ops``."""
    product = None
    for i, (x, factor) in enumerate(zip(inputs, factors, strict=True)):
        if present is not None:
            x = torch.where(present[:, i, None], x, 0.0)
        projected = torch.cat([x, x.new_ones(len(x), 1)], 1) @ factor  # [R, B, O]
        if present is not None:  # an absent modality's factor is 1
            projected = torch.where(present[:, i, None], projected, 1.0)
        product = projected if product is None else product * projected
    out = torch.einsum("r,rbo->bo", rank_weight, product)
    return out if bias is None else out + bias


def weighted_fusion(inputs: Sequence[Tensor], logits: Tensor, *, present: Tensor | None = None) -> Tensor:
    """``sum over i of softmax(logits)_i * inputs_i`` over what is there; see ``mmfast.ops``."""
    if present is not None:
        lead = torch.broadcast_shapes(logits.shape[:-1], *[x.shape[:-1] for x in inputs])
        seen = present.view(-1, *[1] * (len(lead) - 1), len(inputs))  # [B, 1 ..., n]
        inputs = [torch.where(seen[..., i, None], x, 0.0) for i, x in enumerate(inputs)]
        logits = torch.where(seen, logits, -torch.inf)
        logits = torch.where(seen.any(-1, keepdim=True), logits, 0.0)  # a softmax over nothing is nan
    weights = logits.softmax(-1)  # [..., n]
    if present is not None:
        weights = torch.where(seen, weights, 0.0)
    return functools.reduce(operator.add, [weights[..., i, None] * x for i, x in enumerate(inputs)])
