"""``lowrank_fusion``: the tensor product of several vectors, under a weight of low rank."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import autocast, choose, define, distinct, once_differentiable
from mmfast.ops._checks import require_dtype, require_flags, require_tensor, require_tensors, wrong

_wrong = functools.partial(wrong, "lowrank_fusion")


def lowrank_fusion(
    inputs: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor | None = None,
    *,
    present: Tensor | None = None,
) -> Tensor:
    """``sum over r of rank_weight[r] * product over i of ([x_i, 1] @ factors_i[r])``, ``+ bias``.

    A linear layer over the outer product of all ``[x_i, 1]``, its weight being the sum over r of the outer
    products of the factors: neither is ever made (Liu et al. 2018, "Efficient Low-rank Multimodal Fusion with
    Modality-Specific Factors", equations 4 to 6).

    Args:
        inputs: n modalities ``[B, D_i]``.
        factors: ``[R, D_i + 1, O]`` for each of them; row ``D_i`` belongs to the 1.
        rank_weight: ``[R]``.
        bias: ``[O]``.
        present: bool ``[B, n]``. An absent modality's factor counts as 1; what its elements hold reaches no
            bit of the output or of a gradient. Where all are absent the sum of ``rank_weight`` is left.

    Returns:
        ``[B, O]`` in the dtype of the inputs: float32, bfloat16, float16, and float64 on the CPU. Sums are
        made in float32 or better. Under autocast every floating argument but float64 is cast.

    Raises:
        TypeError: ``inputs`` or ``factors`` is not a list or tuple of tensors.
        ValueError: a shape, dtype or device does not fit, or the forced backend cannot run.

    Copies are made of a tensor whose last dimension is not dense, of a gradient that is not contiguous, and
    on the CPU of everything in float16, as float32. For the backward, all modalities' products are kept:
    n B R O elements.
    """
    require_tensors("lowrank_fusion", "inputs", inputs)
    require_tensors("lowrank_fusion", "factors", factors)
    if len(factors) != len(inputs):
        raise _wrong("factors", f"{len(factors)} tensors", f"{len(inputs)}, one for each of the inputs")
    require_tensor("lowrank_fusion", "rank_weight", rank_weight)
    require_tensor("lowrank_fusion", "bias", bias, optional=True)
    n = len(inputs)
    rank_weight, bias, *both = autocast(rank_weight, bias, *inputs, *factors)
    inputs, factors = both[:n], both[n:]
    _check(inputs, factors, rank_weight, bias, present)
    backend = choose("lowrank_fusion", rank_weight.device)
    if backend == "reference":
        return reference.lowrank_fusion(inputs, factors, rank_weight, bias, present=present)
    tensors = (*inputs, *factors, rank_weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out: Tensor = _LowRankFusion.apply(backend, n, present, *distinct(*tensors))
        return out
    return _FORWARD[backend](inputs, factors, rank_weight, bias, present, False)[0]


class _LowRankFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, n: int, present: Tensor | None, *tensors: Any) -> Tensor:
        inputs, factors, (rank_weight, bias) = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        out, products = _FORWARD[backend](inputs, factors, rank_weight, bias, present, True)
        ctx.options = backend, n
        ctx.save_for_backward(present, products, *tensors[:-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, n = ctx.options
        present, products, *tensors, rank_weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3:])
        grads = iter(
            _BACKWARD[backend](grad, tensors[:n], tensors[n:], rank_weight, present, products, needs)
        )
        return (None, None, None, *[next(grads) if needed else None for needed in needs])


def _check(
    inputs: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor | None,
    present: Tensor | None,
) -> None:
    dtype, device = rank_weight.dtype, rank_weight.device
    require_dtype("lowrank_fusion", "rank_weight", dtype)
    if rank_weight.dim() != 1:
        raise _wrong("rank_weight", rank_weight.shape, "[R]")
    for i, t in enumerate((*inputs, *factors, bias)):
        if t is not None and (t.dtype != dtype or t.device != device):
            which, k = divmod(i, len(inputs))
            name = "bias" if which > 1 else f"{('inputs', 'factors')[which]}[{k}]"
            raise _wrong(name, f"{t.dtype} on {t.device}", f"rank_weight's {dtype} on {device}")
    if factors[0].dim() != 3:
        raise _wrong("factors[0]", factors[0].shape, "[R, D + 1, O]")
    (ranks,), (_, _, width) = rank_weight.shape, factors[0].shape
    rows: Any = "B"
    for i, (x, factor) in enumerate(zip(inputs, factors, strict=True)):
        shape = x.shape
        if len(shape) != 2 or (i and shape[0] != rows):
            raise _wrong(f"inputs[{i}]", shape, f"[{rows}, D]")
        rows, wanted = shape[0], (ranks, shape[1] + 1, width)
        if factor.shape != wanted:
            raise _wrong(f"factors[{i}]", factor.shape, f"{list(wanted)}: ranks, features and 1, outputs")
    if bias is not None and bias.shape != (width,):
        raise _wrong("bias", bias.shape, f"[{width}]")
    if present is not None:
        require_flags("lowrank_fusion", "present", present, device, (rows, len(inputs)), ": samples, inputs")


def _forward_fake(
    inputs: list[Tensor],
    factors: list[Tensor],
    rank_weight: Tensor,
    bias: Tensor | None,
    present: Tensor | None,
    save: bool,
) -> list[Tensor]:
    rows, (ranks, _, width) = inputs[0].shape[0], factors[0].shape
    made = [inputs[0].new_empty(rows, width)]
    return [*made, inputs[0].new_empty(len(inputs), rows, ranks, width)] if save else made


def _backward_fake(
    grad: Tensor,
    inputs: list[Tensor],
    factors: list[Tensor],
    rank_weight: Tensor,
    present: Tensor | None,
    products: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    shapes = [t.shape for t in (*inputs, *factors, rank_weight)] + [grad.shape[1:]]
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


# The forward makes the output and, if `save`, [x_i, 1] @ factors_i of every modality, 1 where it is absent:
# [n, B, R, O]. The backward makes the gradients that `needs` asks for, in the order *inputs, *factors,
# rank_weight, bias.
_FORWARD = define(
    "lowrank_fusion",
    "lowrank_fusion",
    "(Tensor[] inputs, Tensor[] factors, Tensor rank_weight, Tensor? bias, Tensor? present, bool save) "
    "-> Tensor[]",
    _forward_fake,
)
_BACKWARD = define(
    "lowrank_fusion",
    "lowrank_fusion_backward",
    "(Tensor grad, Tensor[] inputs, Tensor[] factors, Tensor rank_weight, Tensor? present, Tensor products, "
    "bool[] needs) -> Tensor[]",
    _backward_fake,
)
