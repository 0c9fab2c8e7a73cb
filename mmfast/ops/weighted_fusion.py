"""``weighted_fusion``: a mean of several sources with learned weights, over those that are there."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.ops import reference
from mmfast.ops._backend import autocast, choose, define, distinct, once_differentiable
from mmfast.ops._checks import require_dtype, require_flags, require_tensor, require_tensors, wrong

_wrong = functools.partial(wrong, "weighted_fusion")


def weighted_fusion(inputs: Sequence[Tensor], logits: Tensor, *, present: Tensor | None = None) -> Tensor:
    """``sum over i of softmax(logits)_i * inputs_i``, the softmax over the sources that a sample has.

    With learned logits ``[n]`` one weight for each source, with ``[..., n]`` made from the inputs a mixture
    for each row (Jacobs et al. 1991, "Adaptive Mixtures of Local Experts").

    Args:
        inputs: n sources ``[..., D]``; the leading dimensions broadcast as PyTorch broadcasts.
        logits: ``[n]`` or ``[..., n]``, broadcast with the leading dimensions of the inputs.
        present: bool ``[B, n]``, B being the first leading dimension. An absent source has no weight; what
            its elements and its logit hold reaches no bit of the output or of a gradient. A sample without
            any source gets 0.

    Returns:
        ``[..., D]`` in the dtype of the inputs: float32, bfloat16, float16, and float64 on the CPU. Sums are
        made in float32 or better. Under autocast every floating argument but float64 is cast.

    Raises:
        TypeError: ``inputs`` is not a list or tuple of tensors.
        ValueError: a shape, dtype or device does not fit, or the forced backend cannot run.

    Copies are made of a tensor whose last dimension is not dense, of a gradient that is not contiguous, and
    on the CPU of everything in float16, as float32. The gradient of a source that is broadcast is made for
    every row and summed afterwards.
    """
    require_tensors("weighted_fusion", "inputs", inputs)
    require_tensor("weighted_fusion", "logits", logits)
    logits, *inputs = autocast(logits, *inputs)
    _check(inputs, logits, present)
    backend = choose("weighted_fusion", logits.device)
    if backend == "reference":
        # autocast would leave a softmax's float32
        return reference.weighted_fusion(inputs, logits, present=present).to(inputs[0].dtype)
    tensors = (*inputs, logits)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out: Tensor = _WeightedFusion.apply(backend, present, *distinct(*tensors))
        return out
    made: Tensor = _FORWARD[backend](inputs, logits, present)
    return made


class _WeightedFusion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, present: Tensor | None, *tensors: Tensor) -> Tensor:
        *inputs, logits = tensors
        ctx.backend = backend
        ctx.save_for_backward(present, *tensors)
        out: Tensor = _FORWARD[backend](inputs, logits, present)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        present, *tensors = ctx.saved_tensors
        *inputs, logits = tensors
        needs = list(ctx.needs_input_grad[2:])
        grads = iter(_BACKWARD[ctx.backend](grad, inputs, logits, present, needs))
        return (
            None,
            None,
            *(
                next(grads).sum_to_size(t.shape).to(t.dtype) if needed else None
                for t, needed in zip(tensors, needs, strict=True)
            ),
        )


def _check(inputs: Sequence[Tensor], logits: Tensor, present: Tensor | None) -> None:
    n, dtype, device = len(inputs), logits.dtype, logits.device
    require_dtype("weighted_fusion", "logits", dtype)
    if logits.dim() == 0 or logits.shape[-1] != n:
        raise _wrong("logits", logits.shape, f"[..., {n}], one for each of the inputs")
    lead = logits.shape[:-1]
    for i, x in enumerate(inputs):
        if x.dtype != dtype or x.device != device:
            raise _wrong(f"inputs[{i}]", f"{x.dtype} on {x.device}", f"logits' {dtype} on {device}")
        if x.dim() == 0:
            raise _wrong(f"inputs[{i}]", "a scalar", "at least one dimension")
        if x.shape[-1] != inputs[0].shape[-1]:
            raise _wrong(f"inputs[{i}]", x.shape, f"[..., {inputs[0].shape[-1]}], as wide as inputs[0]")
        if x.shape[:-1] != lead:
            try:
                lead = torch.broadcast_shapes(lead, x.shape[:-1])
            except RuntimeError:
                before = ", ".join(str(list(t.shape)) for t in (logits, *inputs[:i]))
                wanted = f"leading dimensions that broadcast with those of {before}"
                raise _wrong(f"inputs[{i}]", x.shape, wanted) from None
    if present is not None:
        if not lead:
            raise _wrong("present", present.shape, "None, since the inputs have no leading dimension")
        require_flags("weighted_fusion", "present", present, device, (lead[0], n), ": samples, inputs")


def _lead(inputs: list[Tensor], logits: Tensor) -> torch.Size:
    return torch.broadcast_shapes(logits.shape[:-1], *[x.shape[:-1] for x in inputs])


def _forward_fake(inputs: list[Tensor], logits: Tensor, present: Tensor | None) -> Tensor:
    return logits.new_empty(*_lead(inputs, logits), inputs[0].shape[-1])


def _backward_fake(
    grad: Tensor, inputs: list[Tensor], logits: Tensor, present: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    lead, width = _lead(inputs, logits), inputs[0].shape[-1]
    made = [logits.new_empty(*lead, width) for needed in needs[:-1] if needed]
    if needs[-1]:
        wide = torch.promote_types(logits.dtype, torch.float32)
        made.append(logits.new_empty(*lead, len(inputs), dtype=wide))
    return made


# The backward makes the gradients that `needs` asks for, in the order *inputs, logits: of each at every row,
# before they are summed over what was broadcast; the logits' in float32 or better.
_FORWARD = define(
    "weighted_fusion",
    "weighted_fusion",
    "(Tensor[] inputs, Tensor logits, Tensor? present) -> Tensor",
    _forward_fake,
)
_BACKWARD = define(
    "weighted_fusion",
    "weighted_fusion_backward",
    "(Tensor grad, Tensor[] inputs, Tensor logits, Tensor? present, bool[] needs) -> Tensor[]",
    _backward_fake,
)
