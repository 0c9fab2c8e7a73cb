"""``weighted_fusion`` with weights for each row, against what people write: softmax, stack, multiply, sum.

The peers: that in eager mode, the same compiled, and the sum written term by term.
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

SOURCES = 3
SHAPES = {"vectors": (256, 512), "sequences": (32, 196, 768)}  # of each source


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured for this op, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = []
    for dtype, shape, absent, backward in itertools.product(
        (torch.float32, torch.bfloat16), SHAPES, (0.0, 0.5), (False, True)
    ):
        variants = _variants(device)
        made.append(
            Work(
                name=f"{shape}{' half absent' if absent else ''} forward{' + backward' if backward else ''}",
                variants={n: forward_backward(c) for n, c in variants.items()} if backward else variants,
                inputs=functools.partial(_inputs, shape, absent, backward, dtype, device),
                reference=forward_backward(_reference) if backward else _reference,
                dtype=dtype,
                device=device,
            )
        )
    return made


def test_weighted_fusion(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds."""
    rounds(benchmark)


def _inputs(
    shape: str, absent: float, backward: bool, dtype: torch.dtype, device: str, seed: int
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, grad: bool = backward) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)

    sizes = SHAPES[shape]
    present = present_mix(seed, sizes[0], SOURCES, absent).to(device) if absent else None
    args = [random(*sizes) for _ in range(SOURCES)], random(*sizes[:-1], SOURCES), present
    return (random(*sizes, grad=False), *args) if backward else args


def _reference(inputs: Sequence[Tensor], logits: Tensor, present: Tensor | None) -> Tensor:
    return ops.reference.weighted_fusion(inputs, logits, present=present)


def _variants(device: str) -> dict[str, Call]:
    def ours(inputs: list[Tensor], logits: Tensor, present: Tensor | None) -> Tensor:
        return ops.weighted_fusion(inputs, logits, present=present)

    def stacked(inputs: list[Tensor], logits: Tensor, present: Tensor | None) -> Tensor:
        x = torch.stack(inputs, -2)  # [..., n, D]
        if present is None:
            weights = logits.softmax(-1)
        else:
            seen = present.view(-1, *[1] * (x.dim() - 3), SOURCES)
            x = torch.where(seen[..., None], x, 0.0)
            weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        return (weights[..., None] * x).sum(-2)

    return with_backends("weighted_fusion", device, ours) | {
        "stacked": stacked,
        "compiled": torch.compile(stacked, dynamic=False),
        "terms": _reference,
    }
