"""``mmfast.explain``: what the compiler finds in a model, and what that changes."""

import copy
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmfast.compiler import Finding, mmfast, rewrite

SECONDS = 2.0  # that both together are run for
ROUNDS = (5, 50)
ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters


@dataclass(frozen=True)
class Explanation:
    """What was found, and the median seconds of a call with Inductor alone and with mmfast."""

    findings: tuple[Finding, ...]
    before: float
    after: float
    measured: str  # what was run
    graphs: int

    def __str__(self) -> str:
        """A line for each finding and one for the times."""
        done = sum(finding.replaced for finding in self.findings)
        graphs = f"{self.graphs} graph{'s' * (self.graphs != 1)}"
        lines = [f"{len(self.findings)} found in {graphs}, {done} replaced"]
        lines += [
            f"  {'replaced' if f.replaced else 'left':8}  {f.op:15}  {f.where}: {f.why}"
            for f in self.findings
        ]
        before, after = (f"{seconds * 1e3:.3g} ms" for seconds in (self.before, self.after))
        speed = f"{self.before / self.after:.2f} times as fast"
        lines.append(f"{self.measured}: {before} with Inductor alone, {after} with mmfast, {speed}")
        return "\n".join(lines)


def explain(model: Callable[..., Any], *inputs: Any, **named: Any) -> Explanation:
    """Compiles ``model`` with Inductor alone and with mmfast, runs both in turn, prints what differs.

    Where gradients are on and an output has one, what is run is the forward and the backward pass from the
    sum of all outputs; otherwise the forward pass. A module is copied first: its gradients and buffers stay
    as they are, and so does the random state.

    Args:
        model: a module or a function of tensors, in the mode (``train``, grad) that is to be explained.
        inputs: what it is called with.
        named: the same, by name.

    Returns:
        What was printed.
    """
    model = copy.deepcopy(model) if isinstance(model, nn.Module) else model
    findings: list[Finding] = []
    graphs = 0

    def recorded(module: torch.fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        findings.extend(rewrite(module))
        return mmfast(module, example_inputs)  # in what is rewritten nothing more is found

    weights = list(model.parameters()) if isinstance(model, nn.Module) else []
    wanted = [
        t for t in (*weights, *tree_leaves((inputs, named))) if isinstance(t, Tensor) and t.requires_grad
    ]

    def step(call: Callable[..., Any]) -> bool:
        outputs = [
            t for t in tree_leaves(call(*inputs, **named)) if isinstance(t, Tensor) and t.requires_grad
        ]
        if outputs and wanted:
            total = torch.stack([t.float().sum() for t in outputs]).sum()
            torch.autograd.grad(total, wanted, allow_unused=True)
        return bool(outputs and wanted)

    # Where torch can, not in the way of what the user compiles of the same code.
    alone: dict[str, Any] = {"isolate_recompiles": True} if ISOLATES else {}
    calls = [torch.compile(model, backend=backend, **alone) for backend in ("inductor", recorded)]
    with torch.random.fork_rng():
        backward = all([step(call) for call in calls])  # compiled here
        before, after = _in_turn([functools.partial(step, call) for call in calls])
    measured = "forward + backward" if backward else "forward"
    explanation = Explanation(tuple(findings), before, after, measured, graphs)
    print(explanation)
    return explanation


def _in_turn(calls: Sequence[Callable[[], object]]) -> list[float]:
    """The median of the seconds of each call, one of each in every round."""
    taken: list[list[float]] = [[] for _ in calls]
    fewest, most = ROUNDS
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < fewest or (len(taken[0]) < most and time.perf_counter() < end):
        for call, seconds in zip(calls, taken, strict=True):
            begin = time.perf_counter()
            call()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - begin)
    return list(map(median, taken))
