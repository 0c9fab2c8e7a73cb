"""``concat_linear``: a linear layer over a concatenation that is never made."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import autocast, choose, define, distinct, once_differentiable
from mmfast.ops._checks import require_dtype, require_flags, require_tensor, require_tensors, wrong

ACTIVATIONS = ("none", "relu", "gelu", "silu", "swiglu")

_wrong = functools.partial(wrong, "concat_linear")


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
    """``residual + tanh(gate) * activation(norm(cat(inputs)) @ weight.T + bias)``, without the ``cat``.

    Each source is projected at its own size by its own columns of ``weight``; one that is broadcast, such as
    a pooled vector per sample, is broadcast after its projection.

    Args:
        inputs: n sources ``[..., D_i]``; the leading dimensions broadcast as PyTorch broadcasts.
        weight: ``[O, sum D_i]``, as in ``nn.Linear``; ``[2 O, sum D_i]`` for swiglu.
        bias: ``[O]``, ``[2 O]`` for swiglu.
        present: bool ``[B, n]``, B being the first leading dimension. An absent source counts as zeros, in
            the norm's statistics too; what its elements hold reaches no bit of the output or of a gradient.
        norm_eps: if given, a LayerNorm over the concatenation comes first.
        norm_weight: ``[sum D_i]``, 1 when None.
        norm_bias: ``[sum D_i]``, 0 when None.
        activation: ``none``, ``relu``, ``gelu`` (erf), ``silu``, or ``swiglu``, which is
            ``silu(first half) * second half``.
        residual: ``[..., O]``, broadcast to the output.
        gate: ``[1]`` or ``[O]``; None stands for a factor of 1.

    Returns:
        ``[..., O]`` in the dtype of the inputs: float32, bfloat16, float16, and float64 on the CPU. Sums are
        made in float32 or better. Under autocast every floating argument but float64 is cast.

    Raises:
        TypeError: ``inputs`` is not a list or tuple of tensors.
        ValueError: a shape, dtype, device or ``activation`` does not fit, or the forced backend cannot run.

    On the CPU, copies are made of a tensor whose last dimension is not dense, of a gradient that is not
    contiguous, of rows that a norm comes before (a few at a time in each thread), and of everything in
    float16, as float32. The weight is packed once a call.
    """
    require_tensors("concat_linear", "inputs", inputs)
    require_tensor("concat_linear", "weight", weight)
    weight, bias, norm_weight, norm_bias, residual, gate, *inputs = autocast(
        weight, bias, norm_weight, norm_bias, residual, gate, *inputs
    )
    tensors = (weight, bias, norm_weight, norm_bias, residual, gate, *inputs)
    _check(activation, norm_eps, present, *tensors)
    backend = choose("concat_linear", weight.device)
    if backend == "reference":
        return reference.concat_linear(
            inputs,
            weight,
            bias,
            present=present,
            norm_eps=norm_eps,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            activation=activation,
            residual=residual,
            gate=gate,
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out: Tensor = _ConcatLinear.apply(backend, norm_eps, activation, present, *distinct(*tensors))
        return out
    return _FORWARD[backend](
        inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate, False
    )[0]


class _ConcatLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, norm_eps: float | None, activation: str, present: Tensor | None, *tensors: Any
    ) -> Tensor:
        weight, bias, norm_weight, norm_bias, residual, gate, *inputs = tensors
        # where relu comes last, its output shows as well where its input was positive
        relu_last = activation == "relu" and gate is None and residual is None
        save = (activation != "none" or gate is not None) and not relu_last
        out, *made = _FORWARD[backend](
            inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate, save
        )
        preact = out if relu_last else None
        if save:
            preact, *made = made
        mean, rstd = made or (None, None)
        ctx.options = backend, norm_eps, activation, None if residual is None else residual.shape
        ctx.save_for_backward(present, weight, norm_weight, norm_bias, gate, preact, mean, rstd, *inputs)
        if not torch.compiler.is_compiling():
            ctx.unsaved = (bias,)  # an activation's slope depends on it
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, norm_eps, activation, residual_shape = ctx.options
        present, weight, norm_weight, norm_bias, gate, preact, mean, rstd, *inputs = ctx.saved_tensors
        need_weight, need_bias, *need_norm, need_residual, need_gate = ctx.needs_input_grad[4:10]
        needs = [*ctx.needs_input_grad[10:], need_weight, need_bias, *need_norm, need_gate]
        grads = iter(_BACKWARD[backend](
            grad, inputs, weight, present, norm_eps, norm_weight, norm_bias, activation, gate,
            preact, mean, rstd, needs,
        ))  # fmt: skip
        *d_inputs, d_weight, d_bias, d_norm_weight, d_norm_bias, d_gate = [
            next(grads) if needed else None for needed in needs
        ]
        d_residual = grad.sum_to_size(residual_shape) if need_residual else None
        return (
            None, None, None, None,
            d_weight, d_bias, d_norm_weight, d_norm_bias, d_residual, d_gate, *d_inputs,
        )  # fmt: skip


def _check(
    activation: str,
    norm_eps: float | None,
    present: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    *inputs: Tensor,
) -> None:
    if activation not in ACTIVATIONS:
        raise _wrong("activation", repr(activation), "one of " + ", ".join(ACTIVATIONS))
    dtype, device = weight.dtype, weight.device
    require_dtype("concat_linear", "weight", dtype)
    for i, t in enumerate((*inputs, bias, norm_weight, norm_bias, residual, gate)):
        if t is None:
            continue
        if not isinstance(t, Tensor) or t.dtype != dtype or t.device != device or t.dim() == 0:
            names = ("bias", "norm_weight", "norm_bias", "residual", "gate")
            name = f"inputs[{i}]" if i < len(inputs) else names[i - len(inputs)]
            require_tensor("concat_linear", name, t, optional=True)
            if t.dim() == 0:
                raise _wrong(name, "a scalar", "at least one dimension")
            raise _wrong(name, f"{t.dtype} on {t.device}", f"weight's {dtype} on {device}")

    if weight.dim() != 2:
        raise _wrong("weight", weight.shape, "[O, sum of the inputs' last dimensions]")
    width, depth = weight.shape
    shapes = [x.shape for x in inputs]
    depths = [shape[-1] for shape in shapes]
    if depth != sum(depths):
        parts = " + ".join(map(str, depths))
        raise _wrong("weight", weight.shape, f"{sum(depths)} columns, the inputs' features being {parts}")
    if activation == "swiglu" and width % 2:
        raise _wrong("weight", weight.shape, "an even number of rows for swiglu: two halves")
    out = width // 2 if activation == "swiglu" else width
    if norm_eps is None and not (norm_weight is None and norm_bias is None):
        raise _wrong("norm_eps", None, "a number, since norm_weight or norm_bias is given")
    if bias is not None and bias.shape != (width,):
        raise _wrong("bias", bias.shape, f"[{width}]")
    if norm_weight is not None and norm_weight.shape != (depth,):
        raise _wrong("norm_weight", norm_weight.shape, f"[{depth}]")
    if norm_bias is not None and norm_bias.shape != (depth,):
        raise _wrong("norm_bias", norm_bias.shape, f"[{depth}]")
    if gate is not None and gate.shape != (1,) and gate.shape != (out,):
        raise _wrong("gate", gate.shape, f"[1] or [{out}]")

    lead = shapes[0][:-1]
    for i, shape in enumerate(shapes):
        if shape[:-1] != lead:
            together = _broadcast(lead, shape[:-1])
            if together is None:
                before = ", ".join(str(list(other)) for other in shapes[:i])
                raise _wrong(
                    f"inputs[{i}]", shape, f"leading dimensions that broadcast with those of {before}"
                )
            lead = together
    if present is not None:
        if not lead:
            raise _wrong("present", present.shape, "None, since the inputs have no leading dimension")
        require_flags(
            "concat_linear", "present", present, device, (lead[0], len(inputs)), ": samples, inputs"
        )
    if residual is not None and (residual.shape[-1] != out or _broadcast(lead, residual.shape[:-1]) != lead):
        raise _wrong("residual", residual.shape, f"[..., {out}] that broadcasts to {[*lead, out]}")


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        return None


def _forward_fake(
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    present: Tensor | None,
    norm_eps: float | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    gate: Tensor | None,
    save: bool,
) -> list[Tensor]:
    lead = torch.broadcast_shapes(*[x.shape[:-1] for x in inputs])
    width = weight.shape[0]
    made = [weight.new_empty(*lead, width // 2 if activation == "swiglu" else width)]
    if save:
        made.append(weight.new_empty(*lead, width))
    if norm_eps is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        made += [weight.new_empty(lead, dtype=wide) for _ in range(2)]
    return made


def _backward_fake(
    grad: Tensor,
    inputs: list[Tensor],
    weight: Tensor,
    present: Tensor | None,
    norm_eps: float | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    gate: Tensor | None,
    preact: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    width, depth = weight.shape
    shapes: list[Any] = [x.shape for x in inputs]
    shapes += [weight.shape, (width,), (depth,), (depth,), () if gate is None else gate.shape]
    return [weight.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


# The forward makes the output, what came before gate and activation if `save`, and under a norm each row's
# mean and 1 / standard deviation. The backward makes the gradients that `needs` asks for, in the order
# *inputs, weight, bias, norm_weight, norm_bias, gate.
_FORWARD = define(
    "concat_linear",
    "concat_linear",
    "(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor? present, float? norm_eps, Tensor? norm_weight, "
    "Tensor? norm_bias, str activation, Tensor? residual, Tensor? gate, bool save) "
    "-> Tensor[]",
    _forward_fake,
)
_BACKWARD = define(
    "concat_linear",
    "concat_linear_backward",
    "(Tensor grad, Tensor[] inputs, Tensor weight, Tensor? present, float? norm_eps, Tensor? norm_weight, "
    "Tensor? norm_bias, str activation, Tensor? gate, Tensor? preact, Tensor? mean, Tensor? rstd, "
    "bool[] needs) -> Tensor[]",
    _backward_fake,
)
