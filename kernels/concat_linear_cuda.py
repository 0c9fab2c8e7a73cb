"""Backend ``cuda`` of ``concat_linear``: matrix products by cuBLASLt, and an epilogue in ``csrc/cuda/``.

Each source is multiplied by its own columns of the weight. Where nothing can be absent and nothing but relu
is asked of the sum, cuBLASLt makes the output at once: it takes on one source after another, and the last
product adds what does not differ along rows, pooled sources and bias, as that product's bias. In half
precision, where the output is too narrow for sums, that is one source.

Else the sources that have a row for every output row are added up in one float32 sum, one after another; of
one that may be absent, or that a norm is taken of, there is a copy meanwhile. The epilogue adds the pooled
ones, where they are present, which were multiplied at their own size, and applies bias, activation, gate and
residual. So it is under a norm too, by the maths of ``csrc/cpu/concat_linear.h``; statistics, and in the
backward what couples the sources, are plain PyTorch.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.kernels._launch import columns_of, is_pooled, lead_of, own_lead, row_sum, times, unit, walk
from mmfast.ops._backend import LIB

LIB.define(
    "concat_linear_products.cuda(Tensor[] inputs, Tensor[] weights, Tensor? bias, Tensor? residual, "
    "bool tf32, Tensor(a!) workspace, Tensor(b!) out) -> bool"
)
LIB.define(
    "concat_linear_epilogue.cuda(Tensor[] products, int[] sources, Tensor[] means, Tensor[] along, "
    "Tensor? mean, Tensor? rstd, int[] walks, Tensor? present, Tensor? bias, str activation, "
    "Tensor? residual, Tensor? gate, Tensor(a!) out, Tensor(b!)? preact) -> ()"
)
LIB.define(
    "concat_linear_epilogue_backward.cuda(Tensor grad, Tensor? preact, Tensor? gate, str activation, "
    "int rows_each, Tensor(a!)? grad_preact, Tensor(b!) bias_sum, Tensor(c!)? gate_sum) -> ()"
)
PRODUCTS = torch.ops.mmfast.concat_linear_products.cuda
EPILOGUE = torch.ops.mmfast.concat_linear_epilogue.cuda
EPILOGUE_BACKWARD = torch.ops.mmfast.concat_linear_epilogue_backward.cuda
WORKSPACE = 32 << 20  # bytes, of which cuBLASLt takes as many as its algorithm wants


@torch.autocast("cuda", enabled=False)  # the public function has cast already
def concat_linear(
    inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, present: Tensor | None,
    norm_eps: float | None, norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str,
    residual: Tensor | None, gate: Tensor | None, save: bool,
) -> list[Tensor]:  # fmt: skip
    """The forward; arguments and results are those of ``torch.ops.mmfast.concat_linear``.

    It is for any number of sources with all rows, and up to 16 that are broadcast. Copied first: sources that
    have all rows and are normed or, where there are several, may be absent, one at a time and in float32 on
    the way; what ``mmfast.kernels._launch.walk`` does; and before cuBLASLt multiplies, sources, weight and
    residual whose rows overlap, are not dense or are not evenly apart. It works in 32 MiB of memory.
    """
    lead = lead_of("concat_linear", inputs)
    height = weight.shape[0]
    width = height // 2 if activation == "swiglu" else height
    out = weight.new_empty(*lead, width)
    preact = weight.new_empty(*lead, height) if save else None
    mean = rstd = None
    if norm_eps is not None:
        mean, rstd = _statistics(inputs, lead, present, norm_eps)
    made = [t for t in (out, preact, mean, rstd) if t is not None]
    if out.numel() == 0:
        return made

    columns = columns_of(inputs)
    blocks = [weight[:, own] for own in columns]
    if len(made) == 1 and present is None and gate is None and activation in ("none", "relu"):
        if _make_at_once(out, inputs, blocks, bias, residual, activation):
            return made
    full = [i for i, x in enumerate(inputs) if not is_pooled(x, lead, mean is not None)]
    if len(inputs) - len(full) > 16:
        raise ValueError(f"inputs: got {len(inputs) - len(full)} that are broadcast, wanted at most 16")
    selects = len(full) == 1 and mean is None  # the epilogue can, what is one source's own product
    total: Tensor | None = None  # of the sources with all rows, [..., O] in float32
    products, sources, means, along = [], [], [], []
    for i, (x, block, own) in enumerate(zip(inputs, blocks, columns, strict=True)):
        scale = None if norm_weight is None else norm_weight[own]
        if i in full:
            if not selects:
                x = _where(present, i, x, lead)
            if mean is not None and rstd is not None:
                shift = None if norm_bias is None else norm_bias[own]
                x = _affine(_normed(x, mean, rstd), scale, shift).to(weight.dtype)
            total = _add_product(total, x, block)
        elif mean is None:
            products.append(_product(x, block))
            sources.append(i)
        else:
            product, m = _centred_product(x, block, scale)
            products.append(product)
            sources.append(i)
            means.append(m)
            along.append(times(block, scale))
            if norm_bias is not None:
                constant = times(block, norm_bias[own])
                bias = constant if bias is None else bias + constant
    if total is not None:
        products.append(total)
        sources.append(full[0] if selects else -1)  # what is absent was selected away, or is normed
    if bias is not None and bias.dtype != weight.dtype:  # with what the norm's bias makes, in float32
        products.append(bias)
        sources.append(-1)
        bias = None
    added = [] if residual is None else [residual.expand(*residual.shape[:-1], width)]
    sizes, tensors, strides = walk(lead, [*products, *means, *added])
    ends = len(products), len(products) + len(means)
    EPILOGUE(
        tensors[: ends[0]], sources, tensors[slice(*ends)], along, mean, rstd,
        [*sizes, *(step for steps in strides for step in steps)], _dense(present), _dense(bias),
        activation, tensors[-1] if added else None, _dense(gate), out, preact,
    )  # fmt: skip
    return made


@torch.autocast("cuda", enabled=False)
def concat_linear_backward(
    grad: Tensor, inputs: Sequence[Tensor], weight: Tensor, present: Tensor | None, norm_eps: float | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str, gate: Tensor | None,
    preact: Tensor | None, mean: Tensor | None, rstd: Tensor | None, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The backward; arguments and results are those of ``torch.ops.mmfast.concat_linear_backward``."""
    lead = lead_of("concat_linear_backward", inputs)
    (height, depth), dtype = weight.shape, weight.dtype
    shapes = [*(x.shape for x in inputs), weight.shape, (height,), (depth,), (depth,)]
    shapes.append((0,) if gate is None else gate.shape)
    if grad.numel() == 0:
        return [weight.new_zeros(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]

    *need_inputs, need_weight, _, need_norm_weight, need_norm_bias, _ = needs
    need_columns = need_weight or need_norm_weight or need_norm_bias
    g, grad_bias, grad_gate = _before_activation(grad, preact, gate, activation, height)  # [rows, O or 2 O]
    grad_weight = weight.new_empty(height, depth)
    norm_sums = [g.new_empty(depth, dtype=torch.float32) for _ in range(2)]
    grads: list[Any] = [None] * len(inputs)
    if mean is None or rstd is None:
        for i, (x, columns) in enumerate(zip(inputs, columns_of(inputs), strict=True)):
            if not (need_inputs[i] or need_columns):
                continue
            own, mine, seen, block = own_lead(x, lead), g, present, weight[:, columns]
            if is_pooled(x, lead, False):
                mine, seen = row_sum(g, lead, own, present, i)  # [own rows, O], float32
            if need_inputs[i]:
                dx = (mine @ block.to(mine.dtype)).view(*own, x.shape[-1])
                grads[i] = _where(seen, i, dx, own).to(dtype).view(x.shape)
            if need_columns:
                grad_weight[:, columns] = mine.t() @ _rows(_where(seen, i, x, own)).to(mine.dtype)
    elif need_columns or any(need_inputs):
        norm = mean, rstd, norm_weight, norm_bias
        of_columns = [grad_weight, *norm_sums] if need_columns else []
        grads = _normed_backward(g, grad_bias, inputs, lead, weight, present, norm, need_inputs, of_columns)
    grads += [grad_weight, grad_bias, *norm_sums, grad_gate]
    return [t.to(dtype) for t, needed in zip(grads, needs, strict=True) if needed]


def _normed_backward(
    g: Tensor, grad_bias: Tensor, inputs: Sequence[Tensor], lead: torch.Size, weight: Tensor,
    present: Tensor | None, norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    need_inputs: Sequence[bool], of_columns: Sequence[Tensor],
) -> list[Any]:  # fmt: skip
    """Gradients of the sources that need one; writes those of the weight and of the norm's weight and bias to
    ``of_columns``, unless it is empty.

    With dy = g @ weight * norm_weight, and x^ the normed concatenation of depth D, a source's gradient is
    rstd (dy - plain - x^ along) where plain = sum(dy) / D and along = sum(dy x^) / D. Of a row that was
    broadcast it is the sum over the rows it went to, and g is summed before it is multiplied.
    """
    mean, rstd, norm_weight, norm_bias = norm
    dtype, depth = weight.dtype, max(1, weight.shape[1])
    needs_any = any(need_inputs)  # then all sources are asked what they add to the averages
    grads: list[Any] = []
    plain, along = (torch.zeros_like(mean, dtype=torch.float64) for _ in range(2))  # [...]
    wide = g.view(*lead, -1)
    weighted = _rows(wide * rstd.unsqueeze(-1)) if any(is_pooled(x, lead, True) for x in inputs) else None
    pooled = {}
    for i, (x, columns) in enumerate(zip(inputs, columns_of(inputs), strict=True)):
        block = weight[:, columns]
        scale = None if norm_weight is None else norm_weight[columns]
        shift = None if norm_bias is None else norm_bias[columns]
        if weighted is None or not is_pooled(x, lead, True):
            x_hat = _normed(_where(present, i, x, lead), mean, rstd)
            dy = (g @ block).view(x_hat.shape)
            if of_columns:
                of_columns[0][:, columns] = g.t() @ _rows(_affine(x_hat, scale, shift).to(dtype))
                of_columns[1][columns] = _rows(dy * x_hat).sum(0)
            grads.append(dy if need_inputs[i] else None)
            if needs_any:
                dy = _affine(dy.float(), scale, None)
                plain += dy.sum(-1)
                along += (dy * x_hat).sum(-1)
        else:
            own = own_lead(x, lead)
            m, _ = _moments(x)
            away = rstd * (_where(present, i, m, lead).squeeze(-1) - mean)  # [...]
            if of_columns or need_inputs[i]:
                mine, seen = row_sum(weighted, lead, own, present, i)  # [own rows, O]
                centred = _rows(_where(seen, i, x - m, own))  # [own rows, D_i]
                dy = mine @ block.float()
                pooled[i] = own, seen, centred, away
            if of_columns:
                rest = _rows(wide * away.unsqueeze(-1)).sum(0)  # [O]
                column = mine.t() @ _affine(centred, scale, None)
                column += rest.unsqueeze(1) * (1 if scale is None else scale)
                column += 0 if shift is None else grad_bias.unsqueeze(1) * shift
                of_columns[0][:, columns] = column
                of_columns[1][columns] = (dy * centred).sum(0) + rest @ block.float()
            grads.append(_affine(dy, scale, None).view(*own, x.shape[-1]) if need_inputs[i] else None)
            if needs_any:
                product, _ = _centred_product(x, block, scale)
                sums = (wide * times(block, scale)).sum(-1)
                plain += sums
                along += away * sums + rstd * _where(present, i, wide * product, lead).sum(-1)
        if of_columns:
            of_columns[2][columns] = grad_bias @ block.float()

    plain, along = (plain / depth).float(), (along / depth).float()
    for i, (x, columns) in enumerate(zip(inputs, columns_of(inputs), strict=True)):
        if not need_inputs[i]:
            continue
        if i in pooled:
            own, seen, centred, away = pooled[i]
            # in float64: these cancel against each other
            factors = torch.stack([rstd * (plain + away * along), rstd.square() * along], -1).double()
            sums, _ = row_sum(_rows(factors), lead, own, present, i)
            of_one, of_x = sums.float().split(1, -1)  # [own rows, 1]
            dx = _where(seen, i, grads[i] - (of_one + of_x * centred).view(grads[i].shape), own)
        else:
            scale = None if norm_weight is None else norm_weight[columns]
            x_hat = _normed(_where(present, i, x, lead), mean, rstd)
            dx = _affine(grads[i].float(), scale, None) - plain.unsqueeze(-1)
            dx -= x_hat * along.unsqueeze(-1)
            dx = _where(present, i, dx * rstd.unsqueeze(-1), lead).sum_to_size(x.shape)
        grads[i] = dx.to(dtype).view(x.shape)
    return grads


def _before_activation(
    grad: Tensor, preact: Tensor | None, gate: Tensor | None, activation: str, height: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient before the activation, and those of bias and gate in float32: fixed parts, added in order."""
    width = grad.shape[-1]
    grad = grad.contiguous().view(-1, width)
    each = 64 * -(-grad.shape[0] // (64 * 256))
    parts = -(-grad.shape[0] // each)
    before = None if preact is None else grad.new_empty(grad.shape[0], height)
    bias_sum = grad.new_empty(parts, height, dtype=torch.float32)
    gate_sum = None if gate is None else grad.new_empty(parts, width, dtype=torch.float32)
    EPILOGUE_BACKWARD(grad, preact, _dense(gate), activation, each, before, bias_sum, gate_sum)
    grad_gate = None
    if gate is not None and gate_sum is not None:
        grad_gate = gate_sum.sum(0) if len(gate) > 1 else gate_sum.sum().view(1)
        grad_gate = grad_gate * (1 - gate.float().tanh() ** 2)
    return grad if before is None else before, bias_sum.sum(0), grad_gate


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [..., D] @ ``weight`` [O, D] transposed, in float32 whatever the dtype."""
    rows = _rows(x)
    if x.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        rows, weight = rows.float(), weight.float()  # PyTorch would refuse
    if rows.dtype == torch.float32:
        return torch.mm(rows, weight.t()).view(*x.shape[:-1], len(weight))
    return torch.mm(rows, weight.t(), out_dtype=torch.float32).view(*x.shape[:-1], len(weight))


def _make_at_once(
    out: Tensor, inputs: Sequence[Tensor], blocks: Sequence[Tensor], bias: Tensor | None,
    residual: Tensor | None, activation: str,
) -> bool:  # fmt: skip
    """Makes ``out`` by cuBLASLt, or returns False.

    It cannot where relu comes before a residual, where a source is broadcast along other leading dimensions
    than the last ones or a residual along any, where no source has all rows, where half precision would have
    to hold a sum that is not the last, and where cuBLASLt says so.

    relu is a pass of its own, since cuBLASLt does not say what becomes of nan.
    """
    *lead, width = out.shape
    own = [(*(1,) * (len(lead) + 1 - x.ndim), *x.shape[:-1]) for x in inputs]
    dense = [i for i, mine in enumerate(own) if mine == (*lead,) and inputs[i].shape[-1]]
    pooled = [i for i in range(len(inputs)) if i not in dense and inputs[i].shape[-1]]
    each = torch.broadcast_shapes(*(own[i] for i in pooled))  # what the pooled have a sum for
    outer = max((d + 1 for d, size in enumerate(each) if size > 1), default=0)
    if not dense or each[:outer] != (*lead[:outer],):
        return False
    if out.dtype != torch.float32 and len(dense) + len(pooled) > 1:
        return False
    if residual is not None and (activation == "relu" or residual.shape[:-1] != (*lead,)):
        return False

    batch = math.prod(lead[:outer])
    added = [_product(inputs[i], blocks[i]) for i in pooled]  # [..., O]
    if bias is not None:
        added.append(bias)
    if added:
        rows = out.new_empty(batch, -(-width // 8) * 8)[:, :width]  # each begins at a multiple of 16 bytes
        bias = rows.copy_(functools.reduce(torch.add, added).reshape(-1, width))
    made: bool = PRODUCTS(
        [_in_rows(inputs[i], batch) for i in dense],
        [_in_rows(blocks[i], 1)[0] for i in dense],
        bias,
        None if residual is None else _in_rows(residual, batch),
        _tf32(out.dtype),
        out.new_empty(WORKSPACE, dtype=torch.uint8),
        out.view(batch, -1, width),
    )
    if made and activation == "relu":
        out.relu_()
    return made


def _tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [rows, D], of which either may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _in_rows(x: Tensor, batch: int) -> Tensor:
    """[batch, rows, D], a copy where rows overlap or are not dense."""
    x = x.reshape(batch, -1, x.shape[-1])
    return x if x.stride(2) == 1 and (x.stride(1) >= x.shape[2] or x.shape[1] == 1) else x.contiguous()


def _add_product(total: Tensor | None, x: Tensor, weight: Tensor) -> Tensor | None:
    """``total`` + ``x`` [..., D] @ ``weight`` [O, D] transposed, in float32; ``total`` where D is 0."""
    if x.shape[-1] == 0:
        return total
    made = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32) if total is None else total
    rows = made.view(1, -1, len(weight))
    if PRODUCTS(
        [_in_rows(x, 1)], [_in_rows(weight, 1)[0]], None, None if total is None else rows, _tf32(x.dtype),
        x.new_empty(WORKSPACE, dtype=torch.uint8), rows,
    ):  # fmt: skip
        return made
    return _product(x, weight) if total is None else total.add_(_product(x, weight))


def _statistics(
    inputs: Sequence[Tensor], lead: torch.Size, present: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation [...] of each row of the concatenation, from those of its parts."""
    widths = [x.shape[-1] for x in inputs]
    depth = max(1, sum(widths))
    moments = [[_where(present, i, t, lead).squeeze(-1) for t in _moments(x)] for i, x in enumerate(inputs)]
    mean = torch.stack([n * m for n, (m, _) in zip(widths, moments, strict=True)]).sum(0) / depth
    squares = [n * (v + (m - mean).square()) for n, (m, v) in zip(widths, moments, strict=True)]
    return mean, (torch.stack(squares).sum(0) / depth + eps).rsqrt()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [..., 1] of a source's own rows."""
    width = max(1, x.shape[-1])
    mean = x.sum(-1, keepdim=True, dtype=torch.float32) / width
    return mean, (x - mean).square().sum(-1, keepdim=True) / width


def _centred_product(x: Tensor, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(x - its mean) * scale`` @ ``weight`` transposed in float32, and the mean [..., 1]."""
    mean, _ = _moments(x)
    centred, to_one = unit(x, mean, scale)
    return _product(centred, weight) / to_one, mean


def _where(present: Tensor | None, number: int, x: Tensor, lead: torch.Size) -> Tensor:
    """``x`` at the leading dimensions ``lead``, 0 where source ``number`` is absent."""
    x = x.expand(*lead, x.shape[-1])
    return x if present is None else torch.where(present[:, number].view(-1, *[1] * len(lead)), x, 0)


def _normed(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - mean.unsqueeze(-1)).mul_(rstd.unsqueeze(-1))


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x * scale + shift``, where there are such."""
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
