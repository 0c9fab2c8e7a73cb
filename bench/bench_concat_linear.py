"""``concat_linear`` against what people write today: cat, then linear, then the activation.

The peers: that in eager mode, the same compiled, and the form of someone who splits the weight by hand,
projects each source on its own and broadcasts the pooled ones afterwards.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work, forward_backward, peak_bytes, present_mix, spare_kink
from mmfast.bench.tune import with_backends

OUT = 768
MIXES = {
    "pooled": (
        (32, 196, 768),
        (32, 1, 512),
        (32, 1, 128),
    ),  # an image's patches and two vectors for each sample
    "dense": ((32, 196, 768), (32, 196, 512), (32, 196, 128)),
    "late": ((32, 768), (32, 512), (32, 128)),  # a vector of each modality for each sample
    "tiny": ((1, 64), (1, 64), (1, 64)),  # little to compute: what is left is the time to get there
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
WEIGHED = [(mix, "relu", 0.0, torch.float32) for mix in ("pooled", "dense")]  # peak memory is taken too
REQUIRED = {  # the goals of docs/ops/concat_linear.md, by mix and by whether the backward is in it
    ("pooled", False): {"eager": 1.9, "compiled": 1.9, "split": 1.0},
    ("pooled", True): {"eager": 1.7, "compiled": 1.7, "split": 1.0},
    ("dense", False): {"eager": 1.0, "compiled": 1.0},
    ("dense", True): {"eager": 1.0, "compiled": 1.0},
}


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured for this op, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = []
    for dtype, (mix, activation, absent), backward in itertools.product(
        (torch.float32, torch.bfloat16),
        (("pooled", "relu", 0.0), ("pooled", "gelu", 0.0), ("dense", "relu", 0.0),
         ("pooled", "relu", 0.5), ("dense", "relu", 0.5), ("late", "relu", 0.0),
         ("tiny", "relu", 0.0)),
        (False, True),
    ):  # fmt: skip
        name = (
            f"{mix}{' half absent' if absent else ''} {activation} forward{' + backward' if backward else ''}"
        )
        variants, reference = _variants(activation, device), functools.partial(_reference, activation)
        if backward:
            variants = {name: forward_backward(call) for name, call in variants.items()}
        weighed = (mix, activation, absent, dtype) in WEIGHED
        made.append(
            Work(
                name=name,
                variants=variants,
                inputs=functools.partial(_inputs, mix, absent, backward, dtype, device),
                reference=forward_backward(reference) if backward else reference,
                dtype=dtype,
                device=device,
                flops=sum(math.prod(s) * OUT * 2.0 for s in MIXES[mix])
                * (1 - absent)
                * (3 if backward else 1),
                required={} if absent else REQUIRED.get((mix, backward), {}),
                weigh=functools.partial(peak_bytes, held, name, device=device) if weighed else None,
            )
        )
    return made


def held(name: str, variant: str) -> Callable[[], object]:
    """In a fresh process: makes the inputs of the float32 work ``name`` and returns a call of ``variant``."""
    work = next(w for w in works() if w.name == name and w.dtype == torch.float32)
    args = work.inputs(0)
    return lambda: work.variants[variant](*args)


def test_concat_linear(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds; and what our kernels hold beside the output has no room for a concatenation."""
    rounds(benchmark)
    kernel = variant == measured.ours != "mmfast reference"
    if kernel and variant in measured.peak_bytes and "backward" not in measured.work:
        rows = 32 * 196 * torch.float32.itemsize
        width = sum(shape[-1] for shape in MIXES[measured.work.split()[0]])
        assert measured.peak_bytes[variant] < rows * OUT + rows * width / 2


def _inputs(
    mix: str, absent: float, backward: bool, dtype: torch.dtype, device: str, seed: int
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0, grad: bool = backward) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale
        return x.to(device, dtype).requires_grad_(grad)

    shapes = MIXES[mix]
    depth = sum(shape[-1] for shape in shapes)
    present = present_mix(seed, shapes[0][0], len(shapes), absent).to(device) if absent else None
    args = [random(*s) for s in shapes], random(OUT, depth, scale=depth**-0.5), random(OUT), present
    if not backward:
        return args
    preact = _reference("none", *args)
    return spare_kink(random(*preact.shape, grad=False), preact), *args


def _reference(
    activation: str, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor, present: Tensor | None
) -> Tensor:
    return ops.reference.concat_linear(inputs, weight, bias, present=present, activation=activation)


def _variants(activation: str, device: str) -> dict[str, Call]:
    activate = ACTIVATIONS[activation]

    def ours(inputs: list[Tensor], weight: Tensor, bias: Tensor, present: Tensor | None) -> Tensor:
        return ops.concat_linear(inputs, weight, bias, present=present, activation=activation)

    def eager(inputs: list[Tensor], weight: Tensor, bias: Tensor, present: Tensor | None) -> Tensor:
        inputs = [x.expand(*inputs[0].shape[:-1], -1) for x in _seen(inputs, present)]
        return activate(F.linear(torch.cat(inputs, -1), weight, bias))

    def split(inputs: list[Tensor], weight: Tensor, bias: Tensor, present: Tensor | None) -> Tensor:
        parts = weight.split([x.shape[-1] for x in inputs], dim=1)
        biases = [*[None] * (len(inputs) - 1), bias]  # on a pooled source it costs nothing
        first, *others = map(F.linear, _seen(inputs, present), parts, biases)
        return activate(first + functools.reduce(operator.add, others))

    return with_backends("concat_linear", device, ours) | {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "split": split,
    }


def _seen(inputs: list[Tensor], present: Tensor | None) -> list[Tensor]:
    if present is None:
        return inputs
    return [torch.where(present[:, i, None, None], x, 0.0) for i, x in enumerate(inputs)]
