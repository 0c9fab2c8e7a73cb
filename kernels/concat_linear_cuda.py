"""Backend ``cuda`` of ``concat_linear``: matrix products by cuBLASLt, and an epilogue in ``csrc/cuda/``.

Each source is multiplied by its own columns of the weight. Where nothing can be absent and nothing but relu
is asked of the sum, cuBLASLt makes the output at once: it takes on one source after another, and the last
product adds what does not differ along rows, pooled sources and bias, as that product's bias. In half
precision, where the output is too narrow for sums, that is one source. Else products are float32, and the
epilogue broadcasts the pooled ones, selects what is present, and applies bias, activation, gate and residual.
The product of an absent source is made and left unread. A norm is plain PyTorch for now, and makes a
normalised copy of each source.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.kernels._launch import lead_of, row_sum, walk
from mmfast.ops._backend import LIB

LIB.define(
    "concat_linear_products.cuda(Tensor[] inputs, Tensor[] weights, Tensor? bias, Tensor? residual, "
    "bool tf32, Tensor(a!) workspace, Tensor(b!) out) -> bool"
)
LIB.define(
    "concat_linear_epilogue.cuda(Tensor[] products, int[] sources, int[] walks, Tensor? present, "
    "Tensor? bias, str activation, Tensor? residual, Tensor? gate, Tensor(a!) out, Tensor(b!)? preact) -> ()"
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
    """The forward, for up to 16 sources; arguments and results as of ``torch.ops.mmfast.concat_linear``.

    Copied first: sources whose rows ``torch.mm`` cannot walk, and what ``mmfast.kernels._launch.walk`` does;
    before cuBLASLt makes the output, sources, weight and residual whose rows overlap, are not dense or are
    not evenly apart. It works in 32 MiB of memory.
    """
    lead = lead_of("concat_linear", inputs)
    height = weight.shape[0]
    width = height // 2 if activation == "swiglu" else height
    out = weight.new_empty(*lead, width)
    preact = weight.new_empty(*lead, height) if save else None
    made = [out] if preact is None else [out, preact]
    if norm_eps is not None:
        seen, depth = _selected(inputs, lead, present), max(1, weight.shape[1])
        mean = torch.stack([x.sum(-1) for x in seen]).sum(0) / depth  # [...]
        squares = [(x - mean.unsqueeze(-1)).square().sum(-1) for x in seen]
        rstd = (torch.stack(squares).sum(0) / depth + norm_eps).rsqrt()
        made += [mean, rstd]
        normalised = _normalised(seen, mean, rstd)
        inputs = [x.to(weight.dtype) for x in _scaled(normalised, norm_weight, norm_bias)]
        present = None
    if out.numel() == 0:
        return made

    blocks = weight.split([x.shape[-1] for x in inputs], dim=1)
    if len(made) == 1 and present is None and gate is None and activation in ("none", "relu"):
        if _make_at_once(out, inputs, blocks, bias, residual, activation):
            return made
    products = [_product(x, block) for x, block in zip(inputs, blocks, strict=True)]  # [..., O] in float32
    added = [] if residual is None else [residual.expand(*residual.shape[:-1], width)]
    sizes, tensors, strides = walk(lead, [*products, *added])
    walks = [*sizes, *(step for steps in strides for step in steps)]
    EPILOGUE(
        tensors[: len(products)], list(range(len(products))), walks, _dense(present), _dense(bias),
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

    g, grad_bias, grad_gate = _before_activation(grad, preact, gate, activation, height)  # [rows, O or 2 O]
    widths = [x.shape[-1] for x in inputs]
    blocks, columns = weight.split(widths, dim=1), weight.new_empty(height, depth)
    grads: list[Any] = []
    norm_sums: list[Any] = [None, None]
    if mean is not None and rstd is not None:
        x_hats = _normalised(_selected(inputs, lead, present), mean, rstd)
        scaled = _scaled(x_hats, norm_weight, norm_bias)
        for x, column in zip(scaled, columns.split(widths, dim=1), strict=True):
            column.copy_(g.t() @ _rows(x.to(dtype)))
        dys = [(g @ block).float().view(*lead, block.shape[1]) for block in blocks]
        rows = list(range(len(lead)))
        norm_sums = [
            torch.cat([(dy * x).sum(rows) for dy, x in zip(dys, x_hats, strict=True)]),
            torch.cat([dy.sum(rows) for dy in dys]),
        ]
        dys = _scaled(dys, norm_weight, None)
        plain = torch.stack([dy.sum(-1) for dy in dys]).sum(0).unsqueeze(-1) / max(1, depth)
        along = [(dy * x).sum(-1) for dy, x in zip(dys, x_hats, strict=True)]
        slope = torch.stack(along).sum(0).unsqueeze(-1) / max(1, depth)
        dxs = [rstd.unsqueeze(-1) * (dy - plain - x * slope) for dy, x in zip(dys, x_hats, strict=True)]
        dxs = _selected(dxs, lead, present)
        grads = [dx.sum_to_size(x.shape).to(dtype) for dx, x in zip(dxs, inputs, strict=True)]
    else:
        for i, (x, block) in enumerate(zip(inputs, blocks, strict=True)):
            own = torch.Size((1,) * (len(lead) + 1 - x.ndim)) + x.shape[:-1]
            mine, seen = g, present
            if own.numel() < lead.numel():
                mine, seen = row_sum(g, lead, own, present, i)  # [own rows, O], float32
            dx = (mine @ block.to(mine.dtype)).view(*own, x.shape[-1])
            x = x.view(*own, x.shape[-1])
            if seen is not None:
                flag = seen[:, i].view(-1, *[1] * len(own))
                dx, x = torch.where(flag, dx, 0), torch.where(flag, x, 0)
            grads.append(dx.to(dtype).view(inputs[i].shape))
            column = columns.split(widths, dim=1)[i]
            column.copy_(mine.t() @ _rows(x).to(mine.dtype))
    grads += [columns, grad_bias, *norm_sums, grad_gate]
    return [t.to(dtype) for t, needed in zip(grads, needs, strict=True) if needed]


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
        out.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
        out.new_empty(WORKSPACE, dtype=torch.uint8),
        out.view(batch, -1, width),
    )
    if made and activation == "relu":
        out.relu_()
    return made


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [rows, D], of which either may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _in_rows(x: Tensor, batch: int) -> Tensor:
    """[batch, rows, D], a copy where rows overlap or are not dense."""
    x = x.reshape(batch, -1, x.shape[-1])
    return x if x.stride(2) == 1 and (x.stride(1) >= x.shape[2] or x.shape[1] == 1) else x.contiguous()


def _selected(tensors: Sequence[Tensor], lead: torch.Size, present: Tensor | None) -> list[Tensor]:
    """Each at every row in float32, zeros where it is absent."""
    wide = [t.float().expand(*lead, t.shape[-1]) for t in tensors]
    if present is None:
        return wide
    return [torch.where(present[:, i].view(-1, *[1] * len(lead)), t, 0) for i, t in enumerate(wide)]


def _normalised(tensors: Sequence[Tensor], mean: Tensor, rstd: Tensor) -> list[Tensor]:
    return [(t - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) for t in tensors]


def _scaled(tensors: Sequence[Tensor], scale: Tensor | None, shift: Tensor | None) -> list[Tensor]:
    """Each source times its columns of ``scale`` plus those of ``shift``."""
    ends, out = 0, []
    for t in tensors:
        mine = slice(ends, ends := ends + t.shape[-1])
        t = t if scale is None else t * scale[mine]
        out.append(t if shift is None else t + shift[mine])
    return out


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
