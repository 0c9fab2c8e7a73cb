"""``lowrank_fusion`` against the published way, the same compiled, and one product for each modality.

Published: for each modality a column of ones appended, ``matmul`` of ``[B, D + 1]`` with ``[R, D + 1, O]``,
the product over the modalities, ``permute``, and a ``matmul`` with the rank weights (Liu et al. 2018, their
module). "gemm" is what a careful user of PyTorch writes: all ranks in one ``addmm`` for each modality.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work, forward_backward, present_mix
from mmfast.bench.tune import with_backends

# samples, widths of the modalities, rank, outputs
SHAPES = {
    "hidden": (32, (32, 32, 64), 4, 64),  # the paper's own size: small hidden states, few samples
    "features": (128, (300, 74, 35), 4, 64),  # words, sound and faces as that literature has them
    "features, large batch": (1024, (300, 74, 35), 8, 128),
    "encoders": (256, (768, 512, 128), 4, 128),  # pooled outputs of today's encoders
    "encoders, rank 8": (512, (768, 512, 128), 8, 256),
}
REQUIRED = {"published": 3.0}


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured for this op, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = []
    for dtype, shape, absent, backward in itertools.product(
        (torch.float32, torch.bfloat16), SHAPES, (0.0, 0.5), (False, True)
    ):
        samples, depths, ranks, width = SHAPES[shape]
        variants = _variants(device)
        made.append(
            Work(
                name=f"{shape}{' half absent' if absent else ''} forward{' + backward' if backward else ''}",
                variants={n: forward_backward(c) for n, c in variants.items()} if backward else variants,
                inputs=functools.partial(_inputs, shape, absent, backward, dtype, device),
                reference=forward_backward(_reference) if backward else _reference,
                dtype=dtype,
                device=device,
                flops=2.0 * samples * sum(depths) * ranks * width * (1 - absent) * (3 if backward else 1),
                required=REQUIRED if backward else {},
            )
        )
    return made


def test_lowrank_fusion(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds."""
    rounds(benchmark)


def _inputs(
    shape: str, absent: float, backward: bool, dtype: torch.dtype, device: str, seed: int
) -> tuple[Any, ...]:
    samples, depths, ranks, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0, grad: bool = backward) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale
        return x.to(device, dtype).requires_grad_(grad)

    present = present_mix(seed, samples, len(depths), absent).to(device) if absent else None
    factors = [random(ranks, depth + 1, width, scale=(depth + 1) ** -0.5) for depth in depths]
    args = [random(samples, depth) for depth in depths], factors, random(ranks), random(width), present
    return (random(samples, width, grad=False), *args) if backward else args


def _reference(
    inputs: Sequence[Tensor],
    factors: Sequence[Tensor],
    rank_weight: Tensor,
    bias: Tensor,
    present: Tensor | None,
) -> Tensor:
    return ops.reference.lowrank_fusion(inputs, factors, rank_weight, bias, present=present)


def _variants(device: str) -> dict[str, Call]:
    def ours(
        inputs: list[Tensor], factors: list[Tensor], rank_weight: Tensor, bias: Tensor, present: Tensor | None
    ) -> Tensor:
        return ops.lowrank_fusion(inputs, factors, rank_weight, bias, present=present)

    def published(
        inputs: list[Tensor], factors: list[Tensor], rank_weight: Tensor, bias: Tensor, present: Tensor | None
    ) -> Tensor:
        ones = inputs[0].new_ones(len(inputs[0]), 1)
        made = [torch.matmul(torch.cat([x, ones], 1), f) for x, f in zip(inputs, factors, strict=True)]
        product = functools.reduce(torch.mul, _seen(made, present))  # [R, B, O]
        return torch.matmul(rank_weight[None], product.permute(1, 0, 2)).squeeze(1) + bias

    def gemm(
        inputs: list[Tensor], factors: list[Tensor], rank_weight: Tensor, bias: Tensor, present: Tensor | None
    ) -> Tensor:
        made = []
        for x, factor in zip(inputs, factors, strict=True):
            flat = factor.transpose(0, 1).flatten(1)  # [D + 1, R O]
            made.append(torch.addmm(flat[-1], x, flat[:-1]).unflatten(1, (len(factor), -1)).transpose(0, 1))
        product = functools.reduce(torch.mul, _seen(made, present))
        return torch.einsum("r,rbo->bo", rank_weight, product) + bias

    return with_backends("lowrank_fusion", device, ours) | {
        "published": published,
        "compiled": torch.compile(published, dynamic=False),
        "gemm": gemm,
    }


def _seen(factors: list[Tensor], present: Tensor | None) -> list[Tensor]:
    """What is absent counts as 1; its inputs are finite here and need not be kept out of the products."""
    if present is None:
        return factors
    return [torch.where(present[:, i, None], factor, 1.0) for i, factor in enumerate(factors)]
