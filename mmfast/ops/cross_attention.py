"""``cross_attention``: one softmax over the keys of several sources, which are never concatenated."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import autocast, choose, define, distinct, once_differentiable
from mmfast.ops._checks import require_dtype, wrong
from mmfast.ops.reference import AttentionStats

INTEGERS = (torch.int32, torch.int64)
MOST_SOURCES = 16
SEQUENCE = (list, tuple)  # once: `list | tuple` is made anew at each call

Source = tuple[Tensor, Tensor]
PerSource = Sequence[Tensor | None] | None

_wrong = functools.partial(wrong, "cross_attention")


@overload
def cross_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    lengths: PerSource = None,
    masks: PerSource = None,
    present: Tensor | None = None,
    causal: bool | Sequence[bool] = False,
    source_bias: Tensor | None = None,
    scale: float | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def cross_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    lengths: PerSource = None,
    masks: PerSource = None,
    present: Tensor | None = None,
    causal: bool | Sequence[bool] = False,
    source_bias: Tensor | None = None,
    scale: float | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, AttentionStats]: ...
def cross_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    lengths: PerSource = None,
    masks: PerSource = None,
    present: Tensor | None = None,
    causal: bool | Sequence[bool] = False,
    source_bias: Tensor | None = None,
    scale: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, AttentionStats]:
    """``softmax(scale * query @ cat(keys).mT + bias) @ cat(values)`` over what is visible, without a ``cat``.

    A key is visible to a query where ``lengths``, ``masks``, ``present``, ``causal`` and ``source_bias`` all
    let it be. What no query sees is not read: whatever stands there, NaN and infinity included, no bit of the
    output or of a gradient changes. A query that sees nothing gets 0, and gives no gradient.

    Args:
        query: ``[B, H, L, D]``.
        sources: 1 to 16 pairs of key ``[B, Hkv, S_i, D]`` and value ``[B, Hkv, S_i, Dv]``; H is a multiple of
            Hkv, and query head h reads key head ``h // (H // Hkv)``.
        lengths: per source None or integers ``[B]``: keys from there on are padding. Clamped to [0, S_i].
        masks: per source None or bool ``[B, S_i]``, True where a key is visible.
        present: bool ``[B, n]``, or ``[B, L, n]`` where each query sees some of the sources only.
        causal: one for all sources or one for each: query l sees key s where ``s <= l + S_i - L``.
        source_bias: ``[n]``, ``[H, n]`` or ``[B, H, n]`` in query's dtype or float32, added to every logit of
            a source; -inf makes it absent.
        scale: of the logits; ``D ** -0.5`` when None.
        return_stats: also return ``AttentionStats``: ``lse [B, H, L]``, which has a gradient, and ``mass
            [B, H, L, n]``, which has none, both float32 (float64 for float64).

    Returns:
        ``[B, H, L, Dv]`` in query's dtype: float32, bfloat16, float16, and float64 on the CPU. Logits,
        softmax and sums are made in float32 or better. Under autocast every floating argument but float64 and
        source_bias is cast.

    Raises:
        TypeError: an argument is not of the kind above.
        ValueError: a shape, dtype or device does not fit, or the forced backend cannot run.

    On the CPU, copies are made of a tensor whose last dimension is not dense, and of everything in float16,
    as float32: whole ones, with what is hidden.

    The online softmax is that of Milakov and Gimelshein (2018), its tiling and backward those of Dao,
    FlashAttention-2 (2023).
    """
    keys, values = _pairs(sources)
    n = len(keys)
    _require("query", query, Tensor, "a tensor")
    if scale is not None:
        _require("scale", scale, (int, float), "a number or None")
    _require("return_stats", return_stats, bool, "a bool")
    lengths = [None] * n if lengths is None else _per_source("lengths", lengths, n)
    masks = [None] * n if masks is None else _per_source("masks", masks, n)
    causal = _causal_of_each(causal, n)
    query, *kv = autocast(query, *keys, *values)
    keys, values = kv[:n], kv[n:]
    device = query.device  # once: to ask for it takes six times as long as is_cpu
    _check(query, device, keys, values, lengths, masks, present, source_bias)
    backend = choose("cross_attention", device)
    if backend == "reference":
        return reference.cross_attention(
            query,
            list(zip(keys, values, strict=True)),
            lengths=lengths,
            masks=masks,
            present=present,
            causal=causal,
            source_bias=source_bias,
            scale=scale,
            return_stats=return_stats,
        )
    if source_bias is not None:
        wide = torch.promote_types(query.dtype, torch.float32)
        source_bias = source_bias.to(wide).expand(*query.shape[:2], n)
    tensors = (query, *kv, source_bias)
    if torch.is_grad_enabled() and [t for t in tensors if t is not None and t.requires_grad]:
        out, lse, *mass = _CrossAttention.apply(
            backend, causal, scale, return_stats, present, *lengths, *masks, *distinct(*tensors)
        )
    else:
        out, lse, _, *mass = _FORWARD[backend](
            query, keys, values, lengths, masks, present, causal, source_bias, scale, return_stats
        )
    return (out, AttentionStats(lse, mass[0])) if return_stats else out


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        causal: list[bool],
        scale: float | None,
        mass: bool,
        present: Tensor | None,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        n = len(causal)
        lengths, masks = list(tensors[:n]), list(tensors[n : 2 * n])
        query, *kv, source_bias = tensors[2 * n :]
        out, lse, normalizers, *shares = _FORWARD[backend](
            query, kv[:n], kv[n:], lengths, masks, present, causal, source_bias, scale, mass
        )
        ctx.options = backend, causal, scale
        ctx.save_for_backward(present, *tensors, out, lse, normalizers)
        ctx.mark_non_differentiable(*shares)
        return out, lse, *shares

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        backend, causal, scale = ctx.options
        n = len(causal)
        present, *tensors, out, lse, normalizers = ctx.saved_tensors
        lengths, masks = tensors[:n], tensors[n : 2 * n]
        query, *kv, source_bias = tensors[2 * n :]
        if grad is None:
            grad = torch.zeros_like(out)
        needs = list(ctx.needs_input_grad[5 + 2 * n :])
        grads = iter(_BACKWARD[backend](
            grad, grad_lse, query, kv[:n], kv[n:], lengths, masks, present, causal, source_bias, scale,
            out, lse, normalizers, needs,
        ))  # fmt: skip
        return (*[None] * (5 + 2 * n), *[next(grads) if needed else None for needed in needs])


def _require(name: str, given: Any, kind: Any, wanted: str) -> None:
    if not isinstance(given, kind):
        raise TypeError(f"cross_attention: {name} is a {type(given).__name__}, wanted {wanted}")


def _pairs(sources: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values."""
    _require("sources", sources, SEQUENCE, "a list of (key, value) pairs")
    if not 1 <= len(sources) <= MOST_SOURCES:
        raise _wrong("the number of sources", len(sources), f"1 to {MOST_SOURCES}")
    keys, values = [], []
    for i, source in enumerate(sources):
        if isinstance(source, SEQUENCE) and len(source) == 2:
            key, value = source
            if isinstance(key, Tensor) and isinstance(value, Tensor):
                keys.append(key)
                values.append(value)
                continue
        raise TypeError(f"cross_attention: sources[{i}] is a {type(source).__name__}, wanted (key, value)")
    return keys, values


def _per_source(name: str, given: Any, n: int) -> list[Tensor | None]:
    _require(name, given, SEQUENCE, "a list, one for each source")
    if len(given) != n:
        raise _wrong(f"the number of {name}", len(given), f"{n}, one for each source")
    return list(given)


def _causal_of_each(given: Any, n: int) -> list[bool]:
    if isinstance(given, bool):
        return [given] * n
    _require("causal", given, list | tuple, "a bool or a list of them, one for each source")
    if len(given) != n or not all(isinstance(one, bool) for one in given):
        raise _wrong("causal", list(given), f"a bool or {n} of them, one for each source")
    return list(given)


def _check(
    query: Tensor,
    device: torch.device,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    present: Any,
    source_bias: Any,
) -> None:
    dtype, n = query.dtype, len(keys)
    require_dtype("cross_attention", "query", dtype)
    if query.dim() != 4:
        raise _wrong("query", query.shape, "[B, H, L, D]")
    batch, heads, queries, depth = query.shape
    if depth == 0:
        raise _wrong("query", query.shape, "at least one feature a head")
    kv_heads = value_depth = None
    on_cpu = query.is_cpu
    for i in range(n):  # a zip that is strict takes as long as four looks at a tensor
        key, value, length, mask = keys[i], values[i], lengths[i], masks[i]
        of_key, of_value = key.shape, value.shape  # once: to look at a tensor takes time
        there = key.is_cpu and value.is_cpu if on_cpu else key.device == device == value.device
        alike = key.dtype is dtype is value.dtype and there
        if not alike or len(of_key) != 4 or len(of_value) != 4:
            for name, one in (("key", key), ("value", value)):
                if one.dtype != dtype or one.device != device:
                    got = f"{one.dtype} on {one.device}"
                    raise _wrong(f"{name} of sources[{i}]", got, f"query's {dtype} on {device}")
                if one.dim() != 4:
                    raise _wrong(f"{name} of sources[{i}]", one.shape, "[B, Hkv, S, features]")
        size = of_key[2]
        if kv_heads is None:
            kv_heads, value_depth = of_key[1], of_value[3]
        if of_key != (batch, kv_heads, size, depth):
            if of_key[0] != batch or of_key[3] != depth:
                raise _wrong(f"key of sources[{i}]", of_key, f"[{batch}, Hkv, S, {depth}] like query")
            raise _wrong(f"key of sources[{i}]", of_key, f"{kv_heads} heads as in sources[0]")
        if i == 0 and (kv_heads == 0 or heads % kv_heads):
            raise _wrong(f"key of sources[{i}]", of_key, f"heads that divide query's {heads}")
        if of_value != (batch, kv_heads, size, value_depth):
            wanted = [batch, kv_heads, size, value_depth]
            raise _wrong(f"value of sources[{i}]", of_value, f"{wanted} as its key and the first value")
        if length is not None:
            _check_visible(f"lengths[{i}]", length, INTEGERS, (batch,), device)
        if mask is not None:
            _check_visible(f"masks[{i}]", mask, (torch.bool,), (batch, size), device)
    if present is not None:
        _require("present", present, Tensor, "a tensor or None")
        if present.dtype != torch.bool or present.device != device:
            raise _wrong("present", f"{present.dtype} on {present.device}", f"torch.bool on {device}")
        if present.shape not in ((batch, n), (batch, queries, n)):
            raise _wrong("present", present.shape, f"[{batch}, {n}] or [{batch}, {queries}, {n}]")
    if source_bias is not None:
        _require("source_bias", source_bias, Tensor, "a tensor or None")
        if source_bias.dtype not in (dtype, torch.float32) or source_bias.device != device:
            got = f"{source_bias.dtype} on {source_bias.device}"
            raise _wrong("source_bias", got, f"{dtype} or torch.float32 on {device}")
        if source_bias.shape not in ((n,), (heads, n), (batch, heads, n)):
            raise _wrong(
                "source_bias", source_bias.shape, f"[{n}], [{heads}, {n}] or [{batch}, {heads}, {n}]"
            )


def _check_visible(
    name: str, given: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    _require(name, given, Tensor, "a tensor or None")
    if given.dtype not in dtypes or given.device != device:
        wanted = " or ".join(map(str, dtypes))
        raise _wrong(name, f"{given.dtype} on {given.device}", f"{wanted} on {device}")
    if given.shape != shape:
        raise _wrong(name, given.shape, f"{list(shape)}")


def _forward_fake(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: list[Tensor | None],
    masks: list[Tensor | None],
    present: Tensor | None,
    causal: list[bool],
    source_bias: Tensor | None,
    scale: float | None,
    mass: bool,
) -> list[Tensor]:
    rows = query.shape[:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    made = [
        query.new_empty(*rows, values[0].shape[3]),
        query.new_empty(rows, dtype=wide),
        query.new_empty(*rows, 2, dtype=wide),
    ]
    if mass:
        made.append(query.new_empty(*rows, len(keys), dtype=wide))
    return made


def _backward_fake(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: list[Tensor | None],
    masks: list[Tensor | None],
    present: Tensor | None,
    causal: list[bool],
    source_bias: Tensor | None,
    scale: float | None,
    out: Tensor,
    lse: Tensor,
    normalizers: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (query, *keys, *values, source_bias)
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if t is not None and needed]


# The forward makes the output, the logarithm of each row's sum of exponentials, its normalizers, and if
# `mass` the share of each source. Normalizers [B, H, L, 2] are a maximum of the row's logits in units of ln
# 2, and the reciprocal of the sum of 2 ** (logit - maximum); nobody reads those of a row that sees nothing.
# Weights made again from the logarithm carry its rounding, which grows with the logits and is common to the
# row. The backward makes the gradients that `needs` asks for, in the order query, *keys, *values,
# source_bias; the last is [B, H, n] and as wide as the sums.
_FORWARD = define(
    "cross_attention",
    "cross_attention",
    "(Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] lengths, Tensor?[] masks, Tensor? present, "
    "bool[] causal, Tensor? source_bias, float? scale, bool mass) -> Tensor[]",
    _forward_fake,
)
_BACKWARD = define(
    "cross_attention",
    "cross_attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] lengths, "
    "Tensor?[] masks, Tensor? present, bool[] causal, Tensor? source_bias, float? scale, Tensor out, "
    "Tensor lse, Tensor normalizers, bool[] needs) -> Tensor[]",
    _backward_fake,
)
