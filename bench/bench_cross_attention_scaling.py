"""``cross_attention`` against itself: its time follows the keys that are seen, however they are laid out.

As many keys in several sources as in one; and keys of which a part is absent, beside what is left of them
alone.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work
from mmfast.bench.tune import under
from mmfast.ops._backend import READY


@dataclass(frozen=True)
class Layout:
    """The seen keys, and how they are given: in ``sources`` sources, after which ``absent`` keys are hidden.

    ``absent`` is a share of the keys given, by ``lengths``, or by ``present`` with all of some streams.
    """

    sources: int = 1
    absent: float = 0.0
    by: str = ""
    keys: int = 2560  # given
    batch: int = 8
    heads: int = 12
    queries: int = 77
    depth: int = 64

    @property
    def seen(self) -> int:
        """Keys that are left in each sample."""
        return round(self.keys * (1 - self.absent))


LAYOUTS = {
    "4 sources": Layout(sources=4),
    "16 sources": Layout(sources=16),
    "half absent by length": Layout(absent=0.5, by="lengths"),
    "90 % absent by length": Layout(absent=0.9, by="lengths"),
    "half of 10 streams": Layout(sources=10, absent=0.5, by="present"),
    "one of 10 streams": Layout(sources=10, absent=0.9, by="present"),
}


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured here, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ours: Call = ops.cross_attention
    if device == "cuda" and ops.available("cross_attention", device)["triton"] == READY:
        ours = under("triton", ours)  # chosen or not: the reference has nothing to show here
    made = []
    for dtype, (name, layout), backward in itertools.product(
        (torch.float32, torch.bfloat16), LAYOUTS.items(), (False, True)
    ):
        made.append(
            Work(
                name=f"{name}: forward{' + backward' if backward else ''}",
                variants={
                    "as given": functools.partial(_given, ours, layout, backward),
                    "alone": functools.partial(_alone, ours, backward),
                },
                inputs=functools.partial(_inputs, layout, backward, dtype, device),
                reference=functools.partial(_alone, ops.reference.cross_attention, backward),
                dtype=dtype,
                device=device,
                flops=4.0 * layout.batch * layout.heads * layout.queries * layout.seen * layout.depth
                * (3.5 if backward else 1),
                required={"alone": 1 / 1.15 if layout.absent else 1 / 1.1},
            )
        )  # fmt: skip
    return made


def test_cross_attention_scaling(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds."""
    rounds(benchmark)


def _inputs(layout: Layout, backward: bool, dtype: torch.dtype, device: str, seed: int) -> tuple[Any, ...]:
    """The output's gradient, the query, the sources as given, and what is seen of them as one source."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(rows: int) -> Tensor:
        x = torch.randn(layout.batch, layout.heads, rows, layout.depth, generator=generator, device=device)
        return x.to(dtype)

    query, grad, key, value = map(random, (layout.queries, layout.queries, layout.keys, layout.keys))
    # copies: a gradient of their own, as any stream's has
    given = [tuple(part.clone() for part in pair) for pair in zip(
        key.chunk(layout.sources, 2), value.chunk(layout.sources, 2), strict=True
    )]  # fmt: skip
    alone = tuple(t[:, :, : layout.seen].clone() for t in (key, value))
    for t in (query, *alone, *itertools.chain(*given)):
        t.requires_grad_(backward)
    return grad, query, given, alone


def _given(
    op: Call, layout: Layout, backward: bool, grad: Tensor, query: Tensor, given: Any, alone: Any
) -> Any:
    hides: dict[str, Any] = {}
    if layout.by == "lengths":
        hides["lengths"] = [torch.full((layout.batch,), layout.seen, device=query.device)]
    if layout.by == "present":
        there = (
            torch.arange(layout.sources, device=query.device) < layout.seen * layout.sources // layout.keys
        )
        hides["present"] = there.expand(layout.batch, -1)
    return _run(op, backward, grad, query, given, hides)


def _alone(op: Call, backward: bool, grad: Tensor, query: Tensor, given: Any, alone: Any) -> Any:
    return _run(op, backward, grad, query, [alone], {})


def _run(op: Call, backward: bool, grad: Tensor, query: Tensor, sources: Any, hides: Any) -> Any:
    out = op(query, sources, **hides)
    if not backward:
        return out
    gradients = torch.autograd.grad(out, [query, *itertools.chain(*sources)], grad)
    return out, gradients[0]  # those of keys and values are made too, but lie as the sources do
