"""``group_norm``: a group norm with the sum and the activation that follow it."""

import functools
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import autocast, choose, define, distinct, once_differentiable
from mmfast.ops._checks import require_dtype, require_tensor, wrong

ACTIVATIONS = ("none", "relu")

_wrong = functools.partial(wrong, "group_norm")


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
    """``activation(group_norm(input) * weight + bias + residual)`` (Wu & He 2018, "Group Normalization").

    Channels are cut into ``num_groups`` runs; each sample's run is brought to mean 0 and variance 1.

    Args:
        input: ``[B, C, ...]`` with any number of further dimensions, contiguous or channels_last
            (``[B, ..., C]`` in memory). B alone may be 0.
        num_groups: divides C.
        weight: ``[C]``, 1 when None.
        bias: ``[C]``, 0 when None.
        eps: added to the variance.
        activation: ``none`` or ``relu``.
        residual: in the shape of ``input``.

    Returns:
        In the shape, dtype and memory format of ``input``, which is float32, bfloat16, float16, or float64 on
        the CPU. Sums are made in float32 or better. Under autocast every floating argument but float64 is
        cast.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device, ``num_groups`` or ``activation`` does not fit, or the forced
            backend cannot run.

    Copies are made of an ``input`` in any other layout, as contiguous; on the CPU of a ``residual`` or an
    arriving gradient that is not laid out as ``input`` is, and of everything in float16, as float32.
    """
    require_tensor("group_norm", "input", input)
    input, weight, bias, residual = autocast(input, weight, bias, residual)
    _check(input, num_groups, weight, bias, activation, residual)
    backend = choose("group_norm", input.device)
    if backend == "reference":
        out = reference.group_norm(
            input, num_groups, weight, bias, eps=eps, activation=activation, residual=residual
        )
        return out.to(input.dtype)  # autocast would leave a norm's float32
    tensors = (input, weight, bias, residual)
    x = input if reference.channels_last(input) else input.contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = _GroupNorm.apply(backend, num_groups, eps, activation, *distinct(x, weight, bias, residual))
        return out
    out, _, _ = _FORWARD[backend](x, num_groups, weight, bias, eps, activation, residual)
    return out


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, num_groups: int, eps: float, activation: str, *tensors: Any
    ) -> Tensor:
        input, weight, bias, residual = tensors
        out, mean, rstd = _FORWARD[backend](input, num_groups, weight, bias, eps, activation, residual)
        ctx.options = backend, num_groups, activation
        # relu passes a gradient where its output is above zero, so what was before it need not be kept.
        ctx.save_for_backward(input, weight, out if activation == "relu" else mean, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, num_groups, activation = ctx.options
        input, weight, out, mean, rstd = ctx.saved_tensors
        *affine, need_residual = ctx.needs_input_grad[4:]
        needs = [*affine, need_residual and activation != "none"]
        grads = iter(_BACKWARD[backend](grad, input, num_groups, weight, activation, out, mean, rstd, needs))
        d_input, d_weight, d_bias, d_residual = [next(grads) if needed else None for needed in needs]
        if need_residual and activation == "none":
            d_residual = grad
        return None, None, None, None, d_input, d_weight, d_bias, d_residual


def _check(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
) -> None:
    if activation not in ACTIVATIONS:
        raise _wrong("activation", repr(activation), "one of " + ", ".join(ACTIVATIONS))
    if input.dim() < 2 or 0 in input.shape[1:]:
        raise _wrong("input", input.shape, "[B, C, ...], of which B alone may be 0")
    dtype, device, channels = input.dtype, input.device, input.shape[1]
    require_dtype("group_norm", "input", dtype)
    if num_groups < 1 or channels % num_groups:
        raise _wrong("num_groups", num_groups, f"a divisor of input's {channels} channels")
    for name, t, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("residual", residual, input.shape),
    ):
        require_tensor("group_norm", name, t, optional=True)
        if t is None:
            continue
        if t.dtype != dtype or t.device != device:
            raise _wrong(name, f"{t.dtype} on {t.device}", f"input's {dtype} on {device}")
        if t.shape != shape:
            raise _wrong(name, t.shape, str(list(shape)))


def _forward_fake(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(input.dtype, torch.float32)
    return (
        input.new_empty_strided(input.shape, input.stride()),
        input.new_empty(input.shape[0], num_groups, dtype=wide),
        input.new_empty(input.shape[0], num_groups, dtype=wide),
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    activation: str,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    like, channels = (input.shape, input.stride()), ((input.shape[1],), (1,))
    each = (like, channels, channels, like)
    return [input.new_empty_strided(*one) for one, needed in zip(each, needs, strict=True) if needed]


# `input` is contiguous or channels_last, and so are, alike, the outputs of its shape. The backward's `out` is
# looked at for relu only; it makes the gradients that `needs` asks for, in the order input, weight, bias,
# residual.
_FORWARD = define(
    "group_norm",
    "group_norm",
    "(Tensor input, int num_groups, Tensor? weight, Tensor? bias, float eps, str activation, "
    "Tensor? residual) -> (Tensor out, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_BACKWARD = define(
    "group_norm",
    "group_norm_backward",
    "(Tensor grad, Tensor input, int num_groups, Tensor? weight, str activation, Tensor out, Tensor mean, "
    "Tensor rstd, bool[] needs) -> Tensor[]",
    _backward_fake,
)
