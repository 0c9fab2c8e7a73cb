"""``contrastive_loss`` against what people write today: the whole matrix, then cross-entropy both ways.

The peers: that in eager mode, and the same compiled; for the sigmoid loss, log-sigmoid of the whole matrix.
Half precision's loss is made in float32 there, as autocast makes it.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work, forward_backward, peak_bytes
from mmfast.bench.tune import with_backends

PAIRS, WEIGHED = 16384, 32768  # that are timed, and whose peak memory is taken
FEATURES = 512
SCALES = {
    "softmax": (50.0, 0.0),
    "sigmoid": (10.0, -10.0),
}  # and biases: CLIP's half way, SigLIP's at its start


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured for this op, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    made = []
    for kind, dtype, backward in itertools.product(SCALES, (torch.float32, torch.bfloat16), (False, True)):
        if kind == "sigmoid" and not backward:
            continue
        variants, reference = _variants(kind, device), functools.partial(_whole, kind)
        if backward:
            variants = {name: forward_backward(call) for name, call in variants.items()}
        weighed = kind == "softmax" and backward
        made.append(
            Work(
                name=f"{kind} forward{' + backward' if backward else ''}",
                variants=variants,
                inputs=functools.partial(_inputs, kind, PAIRS, backward, dtype, device),
                reference=forward_backward(reference) if backward else reference,
                dtype=dtype,
                device=device,
                flops=2.0 * PAIRS**2 * FEATURES * (3 if backward else 1),
                required=dict.fromkeys(("eager", "compiled"), 1 / 1.3 if backward else 1.0),
                sets=1,
                rounds=(3, 101),
                weigh=functools.partial(peak_bytes, held, str(dtype), device, device=device)
                if weighed
                else None,
            )
        )
    return made


def held(dtype: str, device: str, variant: str) -> Callable[[], object]:
    """In a fresh process: makes the inputs of a softmax, returns a call of ``variant`` with its backward."""
    args = _inputs("softmax", WEIGHED, True, getattr(torch, dtype.removeprefix("torch.")), device, 0)
    call = forward_backward(_variants("softmax", device)[variant])
    return lambda: call(*args)


def test_contrastive_loss(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds; a kernel of ours holds a fiftieth of what a peer holds beside the gradients."""
    rounds(benchmark)
    kernel = variant.startswith("mmfast") and variant != "mmfast reference"  # that one holds the whole matrix
    if kernel and variant in measured.peak_bytes:
        gradients = 2 * WEIGHED * FEATURES * getattr(torch, measured.dtype).itemsize
        peers = [held for name, held in measured.peak_bytes.items() if not name.startswith("mmfast")]
        ours = measured.peak_bytes[variant] - gradients
        assert all(peer - gradients > 50 * ours for peer in peers)


def _inputs(
    kind: str, pairs: int, backward: bool, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, ...]:
    """Pairs that resemble one another a little more than others."""
    generator = torch.Generator().manual_seed(seed)
    a, b, shared = torch.randn(3, pairs, FEATURES, generator=generator)
    sides = [F.normalize(x + shared / 3, dim=-1).to(device, dtype) for x in (a, b)]
    scalars = [torch.tensor(value, device=device, dtype=dtype) for value in SCALES[kind]]
    args = [t.requires_grad_(backward) for t in (*sides, *scalars[: 1 if kind == "softmax" else 2])]
    return (torch.tensor(1 / pairs, device=device), *args) if backward else tuple(args)


def _whole(kind: str, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * a @ b.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    if kind == "softmax":
        target = torch.arange(len(a), device=a.device)
        both = [F.cross_entropy(z, target, reduction="sum") for z in (logits, logits.T)]
        return (both[0] + both[1]) / 2
    labels = 2 * torch.eye(len(a), dtype=logits.dtype, device=a.device) - 1
    return -F.logsigmoid(labels * logits).sum()


def _variants(kind: str, device: str) -> dict[str, Call]:
    def ours(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.contrastive_loss(a, b, scale, bias, kind=kind)[0]

    eager = functools.partial(_whole, kind)
    return with_backends("contrastive_loss", device, ours) | {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
    }
