"""``contrastive_loss``: every pair against all others, tile by tile: the matrix of logits is never there."""

import functools
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import autocast, choose, define, distinct, once_differentiable
from mmfast.ops._checks import require_dtype, require_flags, require_tensor, wrong

KINDS = ("softmax", "sigmoid")

_wrong = functools.partial(wrong, "contrastive_loss")


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: str = "softmax",
    present: Tensor | None = None,
    group: None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of pairs ``a[i], b[i]`` that are to be told from all ``a[i], b[j]``, and the number of pairs.

    With ``z[i, j] = logit_scale * (a[i] . b[j]) + logit_bias`` the loss is, summed over all i,

    - ``softmax``: half of the cross-entropies of ``z[i, :]`` and of ``z[:, i]`` with target i (Radford et al.
      2021, CLIP, figure 3, times N);
    - ``sigmoid``: ``softplus(-z[i, i])`` and, over all j but i, ``softplus(z[i, j])`` (Zhai et al. 2023,
      "Sigmoid Loss for Language Image Pre-Training", section 3.2, times N).

    Divided by the number of pairs it is these papers' loss.

    Args:
        a: ``[N, E]``, used as it is: normalise it first where that is wanted.
        b: ``[N, E]``.
        logit_scale: ``[]`` or ``[1]``, the factor itself and not its logarithm.
        logit_bias: ``[]`` or ``[1]``, 0 when None. A softmax does not change with it: its gradient is 0.
        kind: ``softmax`` or ``sigmoid``.
        present: bool ``[N]``. An absent pair is in no row and no column: what its elements hold reaches no
            bit of the loss or of a gradient.
        group: None. The loss over a process group is not there yet.

    Returns:
        The loss, ``[]`` in float32 (float64 for float64), and the number of present pairs, ``[]`` in int64.
        With no pair present both are 0.

    ``a`` and ``b`` are float32, bfloat16, float16, or float64 on the CPU; the scale and the bias are in the
    same dtype or float32. Logits and sums are made in float32 or better, but for one: on the CPU a bfloat16
    gradient keeps 16 significant bits from each 128 or 192 pairs to the next. Under autocast a and b are
    cast.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device or ``kind`` does not fit, or the forced backend cannot run.
        NotImplementedError: a ``group`` is given.

    Memory beside gradients grows with N, and never with N x N: where it is not the reference that runs. On
    the CPU, copies are made of an ``a`` or ``b`` whose last dimension is not dense, and of everything in
    float16, as float32.
    """
    if group is not None:
        raise NotImplementedError(
            f"contrastive_loss: group is of type {type(group).__name__}, wanted None: "
            "the loss over a process group is not there yet"
        )
    require_tensor("contrastive_loss", "a", a)
    require_tensor("contrastive_loss", "b", b)
    a, b = autocast(a, b)
    _check(a, b, logit_scale, logit_bias, kind, present)
    backend = choose("contrastive_loss", a.device)
    if backend == "reference":
        return reference.contrastive_loss(a, b, logit_scale, logit_bias, kind=kind, present=present)
    if present is None:
        count = torch.full((), a.shape[0], dtype=torch.int64, device=a.device)
    else:
        count = present.sum()
    wide = torch.promote_types(a.dtype, torch.float32)
    scale = logit_scale.to(wide).reshape(())
    bias = None if logit_bias is None else logit_bias.to(wide).reshape(())
    tensors = (a, b, scale, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        loss: Tensor = _ContrastiveLoss.apply(backend, kind, present, *distinct(*tensors))
    else:
        loss = _FORWARD[backend](a, b, scale, bias, kind, present)[0]
    return loss, count


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, kind: str, present: Tensor | None, *tensors: Any) -> Tensor:
        loss, *lse = _FORWARD[backend](*tensors, kind, present)
        ctx.options = backend, kind
        ctx.save_for_backward(present, *tensors, *lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, kind = ctx.options
        present, a, b, scale, bias, *lse = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[3:])
        grads = iter(
            _BACKWARD[backend](grad, a, b, scale, bias, kind, present, lse[0] if lse else None, needs)
        )
        return (None, None, None, *[next(grads) if needed else None for needed in needs])


def _check(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    present: Tensor | None,
) -> None:
    if kind not in KINDS:
        raise _wrong("kind", repr(kind), "one of " + ", ".join(KINDS))
    dtype, device = a.dtype, a.device
    require_dtype("contrastive_loss", "a", dtype)
    if a.dim() != 2:
        raise _wrong("a", a.shape, "[N, E]")
    if b.dtype != dtype or b.device != device:
        raise _wrong("b", f"{b.dtype} on {b.device}", f"a's {dtype} on {device}")
    if b.shape != a.shape:
        raise _wrong("b", b.shape, f"{list(a.shape)} as a has it")
    for name, t in (("logit_scale", logit_scale), ("logit_bias", logit_bias)):
        if t is None and name == "logit_bias":
            continue
        if not isinstance(t, Tensor):
            got = type(t).__name__
            raise TypeError(f"contrastive_loss: {name} is a {got}, wanted a tensor of one element")
        if t.dtype not in (dtype, torch.float32) or t.device != device:
            raise _wrong(name, f"{t.dtype} on {t.device}", f"a's {dtype} or torch.float32 on {device}")
        if t.dim() > 1 or t.numel() != 1:
            raise _wrong(name, t.shape, "[] or [1]")
    if present is not None:
        require_flags("contrastive_loss", "present", present, device, a.shape[:1], ", one for each pair")


def _forward_fake(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    present: Tensor | None,
) -> list[Tensor]:
    made = [logit_scale.new_empty(())]
    if kind == "softmax":
        made.append(logit_scale.new_empty(2, 2, a.shape[0]))
    return made


def _backward_fake(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    present: Tensor | None,
    lse: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (a, b, logit_scale, logit_scale)  # the bias is alike
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed]


# The scale and the bias are scalars as wide as the sums. The forward makes the loss and, for softmax, `lse`
# [2, 2, N]: of each row and of each column two numbers that stand for the log-sum-exp of its logits, each
# backend's own; 0 where a pair is absent. One would not do: a weight near 1 is to come back with all its
# digits, so that the slope in it, the weight less 1, is right too. The backward makes the gradients that
# `needs` asks for, in the order a, b, logit_scale, logit_bias.
_FORWARD = define(
    "contrastive_loss",
    "contrastive_loss",
    "(Tensor a, Tensor b, Tensor logit_scale, Tensor? logit_bias, str kind, Tensor? present) -> Tensor[]",
    _forward_fake,
)
_BACKWARD = define(
    "contrastive_loss",
    "contrastive_loss_backward",
    "(Tensor grad, Tensor a, Tensor b, Tensor logit_scale, Tensor? logit_bias, str kind, Tensor? present, "
    "Tensor? lse, bool[] needs) -> Tensor[]",
    _backward_fake,
)
