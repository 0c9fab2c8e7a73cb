"""``mmfast.explain``: what the compiler finds in a model, and what that changes."""

import contextlib
import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mmfast.compiler import Finding, mmfast, rewrite_or_leave

SECONDS = 2.0  # that both together are run for
ROUNDS = (5, 50)
ALONE = "inductor"  # what mmfast is compared with
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
    sum of all outputs; otherwise the forward pass. A module and the tensors that it is called with are copied
    first: they stay as they are, and so does the random state. A module that cannot be copied, as one of
    ``fully_shard``, is run itself: its gradients and buffers are put back, what else it changes is not.

    What is found is told of the graphs that run in the first call. Where torch.distributed is on, all ranks
    must call this, and all run equally often.

    Args:
        model: a module or a function of tensors, in the mode (``train``, grad) that is to be explained.
        inputs: what it is called with.
        named: the same, by name.

    Returns:
        What was printed.
    """
    ran: dict[Callable[..., Any], list[Finding]] = {}

    def recorded(module: torch.fx.GraphModule, example_inputs: Sequence[Tensor]) -> Any:
        findings = rewrite_or_leave(module)
        compiled = mmfast(module, example_inputs)  # in what is rewritten nothing more is found

        def run(*args: Any) -> Any:
            ran.setdefault(run, findings)  # Dynamo may compile what never runs, and again what changes
            return compiled(*args)

        return run

    # Where torch can, not in the way of what the user compiles of the same code.
    alone: dict[str, Any] = {"isolate_recompiles": True} if ISOLATES else {}
    with torch.random.fork_rng(), _borrowed(model) as ours:
        calls = [
            functools.partial(
                _step, torch.compile(ours, backend=backend, **alone), _weights(ours), ours is model
            )
            for backend in (ALONE, recorded)
        ]
        backward = all([call(*_copies((inputs, named))) for call in calls])  # compiled here
        first = list(ran.values())
        before, after = _in_turn(calls, lambda: _copies((inputs, named)))
    measured = "forward + backward" if backward else "forward"
    findings = tuple(finding for graph in first for finding in graph)
    explanation = Explanation(findings, before, after, measured, len(first))
    print(explanation)
    return explanation


def _weights(model: Callable[..., Any]) -> list[nn.Parameter]:
    return list(model.parameters()) if isinstance(model, nn.Module) else []


def _step(
    call: Callable[..., Any],
    weights: list[nn.Parameter],
    itself: bool,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
) -> bool:
    """Runs forward and, where there is one, backward; says whether there was one."""
    given = [t for t in tree_leaves((inputs, named)) if isinstance(t, Tensor) and t.requires_grad]
    wanted = [*given, *(p for p in weights if p.requires_grad)]
    outputs = [t for t in tree_leaves(call(*inputs, **named)) if isinstance(t, Tensor) and t.requires_grad]
    if not outputs or not wanted:
        return False
    total = torch.stack([t.float().sum() for t in outputs]).sum()
    if weights and itself:  # of sharded ones, only a whole backward pass makes gradients
        total.backward()
        for p in weights:
            p.grad = None
    else:
        torch.autograd.grad(total, wanted, allow_unused=True)
    return True


@contextlib.contextmanager
def _borrowed(model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A copy of a module without gradients; where there can be none, itself, and then it is put back."""
    if not isinstance(model, nn.Module):
        yield model
        return
    try:
        ours = copy.deepcopy(model)
    except Exception:  # fully_shard forbids it; process groups, files and tensors with a history have no copy
        ours = model
    _reshard(ours)
    weights = _weights(ours)
    gradients = [p.grad for p in weights]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in (ours.modules() if ours is model else ())
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    for p in weights:
        p.grad = None
    try:
        yield ours
    finally:
        _reshard(ours)
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer.copy_(content)


def _reshard(model: nn.Module) -> None:
    """Lets go of the whole weights that ``fully_shard`` has gathered."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _copies(tree: Any) -> Any:
    """``tree`` with a copy for each tensor: a leaf of the same strides, the same one where it comes again."""
    own: dict[int, Tensor] = {}

    def copied(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if id(t) not in own:
            plain = type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
            new = _strided(t) if plain else copy.deepcopy(t.detach())
            if plain:
                new.__dict__.update(t.__dict__)  # torch._dynamo.mark_dynamic
            own[id(t)] = new.requires_grad_(t.requires_grad)
        return own[id(t)]

    with torch.no_grad():
        return tree_map(copied, tree)


def _strided(t: Tensor) -> Tensor:
    """Copied without what lies between its elements: it may be a part of a whole data set."""
    once = t.detach()[tuple(slice(0, 1) if step == 0 else slice(None) for step in t.stride())]
    new = torch.empty_strided(once.shape, once.stride(), dtype=t.dtype, device=t.device)
    new.copy_(once)
    return new if new.shape == t.shape else new.expand(t.shape)


def _in_turn(calls: Sequence[Callable[..., object]], prepare: Callable[[], tuple[Any, ...]]) -> list[float]:
    """The median of the seconds of each call with what was prepared, one of each in every round."""
    taken: list[list[float]] = [[] for _ in calls]
    fewest, most = ROUNDS
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        most = fewest  # each rank has a clock of its own
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < fewest or (len(taken[0]) < most and time.perf_counter() < end):
        for call, seconds in zip(calls, taken, strict=True):
            given = prepare()
            _wait()
            begin = time.perf_counter()
            call(*given)
            _wait()
            seconds.append(time.perf_counter() - begin)
    return list(map(median, taken))


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
