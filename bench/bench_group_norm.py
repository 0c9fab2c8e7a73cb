"""``group_norm`` in a channels_last network against what people write today: norm, sum, ReLU.

The peers: that in eager mode, straight on channels_last memory; by way of contiguous copies, which is faster;
and that compiled.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work, forward_backward, spare_kink
from mmfast.ops._backend import choose

SHAPES = ((32, 64, 28, 28), (32, 256, 7, 7))  # our image encoder's first and third stage
GROUPS = 32


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured for this op. It has kernels for the CPU only."""
    device = device or "cpu"
    made = []
    for dtype, shape, backward in itertools.product((torch.float32, torch.bfloat16), SHAPES, (False, True)):
        variants = _variants(device)
        made.append(
            Work(
                name=f"{'x'.join(map(str, shape))} relu residual forward{' + backward' if backward else ''}",
                variants={n: forward_backward(c) for n, c in variants.items()} if backward else variants,
                inputs=functools.partial(_inputs, shape, backward, dtype, device),
                reference=forward_backward(_reference) if backward else _reference,
                dtype=dtype,
                device=device,
            )
        )
    return made


def test_group_norm(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds."""
    rounds(benchmark)


def _inputs(
    shape: tuple[int, ...], backward: bool, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, grad: bool = backward) -> Tensor:
        x = torch.randn(shape, generator=generator).to(device, dtype)
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x.requires_grad_(grad)

    args = random(*shape), random(shape[1]), random(shape[1]), random(*shape)
    if not backward:
        return args
    return spare_kink(random(*shape, grad=False), _reference(*args, activation="none")), *args


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, activation: str = "relu"
) -> Tensor:
    return ops.reference.group_norm(input, GROUPS, weight, bias, activation=activation, residual=residual)


def _variants(device: str) -> dict[str, Call]:
    def ours(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return ops.group_norm(input, GROUPS, weight, bias, activation="relu", residual=residual)

    def eager(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.relu(F.group_norm(input, GROUPS, weight, bias) + residual)

    def copied(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        x = F.group_norm(input.contiguous(), GROUPS, weight, bias)
        return F.relu(x.contiguous(memory_format=torch.channels_last) + residual)

    chosen = choose("group_norm", torch.device(device))
    return {
        f"mmfast {chosen}": ours,
        "eager": eager,
        "copied": copied,
        "compiled": torch.compile(copied, dynamic=False),
    }
