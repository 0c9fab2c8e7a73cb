"""``concat_linear``: a linear layer over a concatenation that is never made."""

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import choose, define

ACTIVATIONS = ("none", "relu", "gelu", "silu", "swiglu")


def concat_linear(
    inputs: list[Tensor] | tuple[Tensor, ...],
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

    Each source is projected at its own size by its own columns of ``weight``, and a source that is broadcast, such
    as one pooled vector per sample, is broadcast after its projection.

    Args:
        inputs: n sources ``[..., D_i]``; the leading dimensions broadcast as PyTorch broadcasts.
        weight: ``[O, sum D_i]``, as in ``nn.Linear``; ``[2 O, sum D_i]`` for swiglu.
        bias: ``[O]``, ``[2 O]`` for swiglu.
        present: bool ``[B, n]``, B being the first leading dimension. An absent source counts as zeros, in the
            norm's statistics too, and what its elements hold reaches no bit of the output or of a gradient.
        norm_eps: if given, a LayerNorm over the concatenation comes first.
        norm_weight: ``[sum D_i]``, 1 when None.
        norm_bias: ``[sum D_i]``, 0 when None.
        activation: ``none``, ``relu``, ``gelu`` (erf), ``silu``, or ``swiglu``: ``silu(first half) * second half``.
        residual: ``[..., O]``, broadcast to the output.
        gate: ``[1]`` or ``[O]``; 1 instead of ``tanh(gate)`` when None.

    Returns:
        ``[..., O]`` in the dtype of the inputs: float32, bfloat16 or float16, float64 on the CPU. Sums are made in
        float32 or better; float16 on the CPU goes through float32 copies. A source whose last dimension is not
        dense is copied first, and so is one whose rows cannot be walked in runs of 32 or more at a fixed stride.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``activation`` is unknown.
        TypeError: ``inputs`` is not a list or tuple of tensors.
    """
    inputs, weight, bias, norm_weight, norm_bias, residual, gate = _autocast(
        inputs, weight, bias, norm_weight, norm_bias, residual, gate
    )
    _check(inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate)
    name = choose("concat_linear", weight.device)
    if name == "reference":
        return reference.concat_linear(
            inputs, weight, bias, present=present, norm_eps=norm_eps, norm_weight=norm_weight,
            norm_bias=norm_bias, activation=activation, residual=residual, gate=gate,
        )  # fmt: skip
    floats = (weight, bias, norm_weight, norm_bias, residual, gate, *inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in floats):
        out: Tensor = _ConcatLinear.apply(name, present, norm_eps, activation, *floats)
        return out
    return _FORWARD[name](
        inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate, False
    )[0]


class _ConcatLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        name,
        present,
        norm_eps,
        activation,
        weight,
        bias,
        norm_weight,
        norm_bias,
        residual,
        gate,
        *inputs,
    ):  # type: ignore  # noqa: E501
        out, preact, mean, rstd = _FORWARD[name](
            inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate, True
        )
        ctx.options = name, norm_eps, activation
        ctx.residual_shape = None if residual is None else residual.shape
        ctx.save_for_backward(weight, present, norm_weight, norm_bias, gate, preact, mean, rstd, *inputs)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore
        name, norm_eps, activation = ctx.options
        weight, present, norm_weight, norm_bias, gate, preact, mean, rstd, *inputs = ctx.saved_tensors
        _, _, _, _, weight_, bias_, norm_weight_, norm_bias_, residual_, gate_, *inputs_ = (
            ctx.needs_input_grad
        )
        needs = [*inputs_, weight_, bias_, norm_weight_, norm_bias_, gate_]
        grads = _BACKWARD[name](
            grad, inputs, weight, present, norm_eps, norm_weight, norm_bias, activation, gate,
            preact, mean, rstd, needs,
        )  # fmt: skip
        *dinputs, dweight, dbias, dnorm_weight, dnorm_bias, dgate = [
            g if needed else None for g, needed in zip(grads, needs, strict=True)
        ]
        dresidual = grad.sum_to_size(ctx.residual_shape) if residual_ else None
        return None, None, None, None, dweight, dbias, dnorm_weight, dnorm_bias, dresidual, dgate, *dinputs


def _autocast(inputs, *tensors):  # type: ignore
    device = inputs[0].device.type if inputs else "cpu"
    if not torch.is_autocast_enabled(device):
        return inputs, *tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Tensor | None:
        return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    return [cast(x) for x in inputs], *[cast(t) for t in tensors]


def _check(inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate):  # type: ignore
    pass


def _forward_fake(
    inputs, weight, bias, present, norm_eps, norm_weight, norm_bias, activation, residual, gate, save
):  # type: ignore  # noqa: E501
    lead = torch.broadcast_shapes(*[x.shape[:-1] for x in inputs])
    width = weight.shape[0]
    kept = save and (activation != "none" or gate is not None)
    stats = torch.float64 if weight.dtype == torch.float64 else torch.float32
    moments = lead if norm_eps is not None else (0,)
    return (
        weight.new_empty(*lead, width // 2 if activation == "swiglu" else width),
        weight.new_empty((*lead, width) if kept else (0,)),
        weight.new_empty(moments, dtype=stats),
        weight.new_empty(moments, dtype=stats),
    )


def _backward_fake(
    grad,
    inputs,
    weight,
    present,
    norm_eps,
    norm_weight,
    norm_bias,
    activation,
    gate,
    preact,
    mean,
    rstd,
    needs,
):  # type: ignore  # noqa: E501
    width, depth = weight.shape
    shapes = [x.shape for x in inputs] + [weight.shape, (width,), (depth,), (depth,)]
    shapes.append((0,) if gate is None else gate.shape)
    return [weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


_FORWARD = define(
    "concat_linear",
    "concat_linear",
    "(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor? present, float? norm_eps, Tensor? norm_weight, "
    "Tensor? norm_bias, str activation, Tensor? residual, Tensor? gate, bool save) "
    "-> (Tensor out, Tensor preact, Tensor mean, Tensor rstd)",
    _forward_fake,
)
_BACKWARD = define(
    "concat_linear",
    "concat_linear_backward",
    "(Tensor grad, Tensor[] inputs, Tensor weight, Tensor? present, float? norm_eps, Tensor? norm_weight, "
    "Tensor? norm_bias, str activation, Tensor? gate, Tensor preact, Tensor mean, Tensor rstd, bool[] needs) "
    "-> Tensor[]",
    _backward_fake,
)
