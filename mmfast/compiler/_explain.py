"""``mmfast.explain``: what the compiler finds in a model, and what that changes."""

import copy
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


@dataclass(frozen=True)
class Explanation:
    """What was found, and the medians of the seconds that a call takes with Inductor alone and with mmfast."""

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
            f"  {'replaced' if f.replaced else 'left':8}  {f.op:15}  {f.where}: {f.why}" for f in self.findings
        ]
        speed = f"{self.before / self.after:.2f} times as fast"
        lines.append(
            f"{self.measured}: {self.before * 1e3:.3g} ms with Inductor alone, {self.after * 1e3:.3g} ms with mmfast, {speed}"
        )
        return "\n".join(lines)


def explain(model: Callable[..., Any], *inputs: Any, **named: Any) -> Explanation:
    """Compiles ``model`` with Inductor alone and with mmfast, runs both in turn, prints and returns the difference.

    Where gradients are on and an output has one, what is run is the forward and the backward pass from the sum
    of all outputs; otherwise the forward pass. The model is a copy: no gradient, no buffer and no random state of
    the user's changes.

    Args:
        model: a module or a function of tensors, in the mode (``train``, autocast, grad) that is to be explained.
        inputs: what it is called with.
        named: the same, by name.
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
    wanted = [t for t in (*weights, *tree_leaves((inputs, named))) if isinstance(t, Tensor) and t.requires_grad]

    def step(call: Callable[..., Any]) -> bool:
        outputs = [t for t in tree_leaves(call(*inputs, **named)) if isinstance(t, Tensor) and t.requires_grad]
        if outputs and wanted:
            torch.autograd.grad(sum(t.float().sum() for t in outputs), wanted, allow_unused=True)  # type: ignore[arg-type]
        return bool(outputs and wanted)

    # The same code object is compiled twice: each time from nothing, or it would be found compiled already.
    with torch.random.fork_rng():
        calls = []
        for backend in ("inductor", recorded):
            torch._dynamo.reset()
            calls.append(torch.compile(model, backend=backend))
            backward = step(calls[-1])
        taken = _in_turn([lambda call=call: step(call) for call in calls])
    before, after = map(median, taken)
    measured = "forward + backward" if backward else "forward"
    explanation = Explanation(tuple(findings), before, after, measured, graphs)
    print(explanation)
    return explanation


def _in_turn(calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call in each round."""
    raise NotImplementedError
