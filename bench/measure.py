"""The one measuring core: every speed that mmfast states was taken here.

A ``Work`` is a piece of work together with everyone who can do it, ours first. ``measure`` holds each output
against the reference in float64, and only then times all variants in turn, round after round, in one process.
Noise hits all variants of a round alike: what is quoted are the ratios within the rounds.
"""

import gc
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

Call = Callable[..., Any]

PEER = 8.0  # how much more a peer may round than we may: torch.compile sums a float32 column in one chain
SHORTEST = 2e-3  # seconds: a sample shorter than this holds several calls


class WrongOutputError(AssertionError):
    """A variant does not compute what it is measured for, so it gets no figure."""


@dataclass(frozen=True)
class Work:
    """One piece of work: what a user holds, what it means, and the variants that do it (ours first)."""

    name: str
    variants: Mapping[str, Call]
    inputs: Callable[[int], tuple[Any, ...]]  # seed -> arguments of every variant and of the reference
    reference: Call  # run in float64, and once more in the inputs' dtype for the size of its rounding
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    flops: float = 0.0  # of the work that is visible, multiply and add counted as two
    required: Mapping[str, float] = field(default_factory=dict)  # peer -> the ratio that is the goal
    sets: int = 3  # different inputs, taken in rotation
    rounds: tuple[int, int] = (15, 101)  # that are taken, at least and at most
    computed_in: Mapping[str, torch.dtype] = field(default_factory=dict)  # variant -> if not in ``dtype``
    samples: int = 0  # in one call, where samples/s are wanted
    weigh: Callable[[str], int] | None = None  # variant -> its ``peak_bytes``

    def __str__(self) -> str:
        """Its name and dtype."""
        return f"{self.name} {_name(self.dtype)}"


class Spread(NamedTuple):
    """The median and the two quartiles around it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarises; a single value is its own spread."""
        low, median, high = (
            statistics.quantiles(values, n=4, method="inclusive") if values[1:] else [values[0]] * 3
        )
        return cls(low, median, high)


@dataclass(frozen=True)
class Result:
    """What ``measure`` found: the seconds of one call of each variant in each round, ours first."""

    work: str
    dtype: str
    device: str
    seconds: dict[str, list[float]]
    flops: float = 0.0
    required: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # variant -> why it has no figure

    @property
    def ours(self) -> str:
        """The first variant's name."""
        return next(iter(self.seconds))

    def time(self, variant: str) -> Spread:
        """Seconds of one call."""
        return Spread.of(self.seconds[variant])

    def ratio(self, peer: str) -> Spread:
        """The peer's time over ours, round by round: above 1, ours is faster."""
        return Spread.of([p / o for p, o in zip(self.seconds[peer], self.seconds[self.ours], strict=True)])


def check(
    name: str, got: Any, exact: Any, plain: Any, slack: float = 1.0, dtype: torch.dtype | None = None
) -> None:
    """Raises ``WrongOutputError`` beyond the project's one tolerance.

    It is twice (times ``slack``) the error of plain PyTorch in the same dtype, plus 8 eps of the largest
    magnitude. ``dtype`` is what was computed in, where the outputs are wider.
    """
    leaves = ([leaf.detach() for leaf in tree_leaves(tree)] for tree in (got, exact, plain))
    for i, (g, e, p) in enumerate(zip(*leaves, strict=True)):
        if g.shape != p.shape or g.dtype != p.dtype:
            wanted = f"wanted {p.dtype} {list(p.shape)}"
            raise WrongOutputError(f"{name}: output {i} is {g.dtype} {list(g.shape)}, {wanted}")
        if g.numel():
            error, rounding = float((g - e).abs().max()), float((p - e).abs().max())
            allowed = 2 * slack * rounding + 8 * torch.finfo(dtype or g.dtype).eps * float(e.abs().max())
            if not error <= allowed:  # a NaN is not
                raise WrongOutputError(f"{name}: output {i} is off by {error:.3g}, allowed are {allowed:.3g}")


def measure(
    work: Work, *, seconds: float = 10.0, rounds: tuple[int, int] | None = None, strict: bool = True
) -> Result:
    """Checks every variant on every set of inputs, then times all of them in turn for about ``seconds``.

    Each round takes one sample of every variant, in a random order, on the same inputs; their number stays
    within ``rounds``, by default the work's own. Raises ``WrongOutputError`` before any time is taken; unless
    ``strict``, a variant after the first that is wrong or raises is left out and stands in ``failed``; so
    does, with its times, one that fails when it is weighed.
    """
    variants, failed = dict(work.variants), dict[str, str]()
    ours = next(iter(variants))
    sets = [work.inputs(seed) for seed in range(work.sets)]
    for args in sets:  # this also compiles and warms up
        dtypes = {name: work.computed_in.get(name, work.dtype) for name in work.variants}
        exact = work.reference(*_in_dtype(torch.float64, args))
        plain = {dtype: work.reference(*_in_dtype(dtype, args)) for dtype in set(dtypes.values())}
        for name, call in list(variants.items()):
            slack, dtype = 1.0 if name == ours or name.startswith("mmfast") else PEER, dtypes[name]
            try:
                check(f"{work}: {name}", call(*args), exact, plain[dtype], slack, dtype)
            except Exception as error:
                if strict or name == ours:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                del variants[name]

    def sample(variant: str, first: int, calls: int) -> float:
        turn = [sets[(first + i) % len(sets)] for i in range(calls)]
        return _elapsed(variants[variant], turn, work.device) / calls

    pilot = {v: min(sample(v, 0, len(sets)) for _ in range(2)) for v in variants}
    calls = math.ceil(SHORTEST / min(pilot.values()))
    least, most = rounds or work.rounds
    count = min(max(int(seconds / (calls * sum(pilot.values()))), least), most)
    taken: dict[str, list[float]] = {v: [] for v in variants}
    shuffle = random.Random(0)
    for number in range(count):
        for variant in shuffle.sample(list(taken), len(taken)):
            taken[variant].append(float(f"{sample(variant, number, calls):.5g}"))
    peaks = dict[str, int]()
    if work.weigh:
        for variant in variants:
            try:
                peaks[variant] = work.weigh(variant)
            except RuntimeError as error:  # what needs more memory than there is still has its times
                if strict or variant == ours:
                    raise
                failed[variant] = str(error)
    return Result(
        work.name,
        _name(work.dtype),
        work.device,
        taken,
        work.flops,
        dict(work.required),
        peaks,
        work.samples,
        failed,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _in_dtype(dtype: torch.dtype, args: Any) -> Any:
    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != dtype:
            return leaf.detach().to(dtype).requires_grad_(leaf.requires_grad)
        return leaf

    return tree_map(cast, args)


def _elapsed(call: Call, turn: Iterable[tuple[Any, ...]], device: str) -> float:
    """Seconds for one call on each of the arguments: by events on a GPU, by the clock on a CPU."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for args in turn:
                call(*args)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = time.perf_counter()
        for args in turn:
            call(*args)
        return time.perf_counter() - begin
    finally:
        if collecting:
            gc.enable()


def forward_backward(call: Call) -> Call:
    """``call`` with its backward: takes the output's gradient first, gives the output and all gradients.

    What wants a gradient is looked for once for each set of inputs: a user knows it.
    """
    wanted = WeakTensorKeyDictionary()  # by the output's gradient

    def run(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
        out = call(*args)
        leaves = wanted.get(grad)
        if leaves is None:
            leaves = wanted[grad] = [t for t in tree_leaves(args) if _wants_grad(t)]
        return out, *torch.autograd.grad(out, leaves, grad)

    return run


def spare_kink(grad: Tensor, preact: Tensor) -> Tensor:
    """``grad``, 0 near the kink of relu(preact), where a rounding decides whether a gradient passes."""
    return grad.masked_fill(preact.detach().abs() < 0.05, 0.0)


def _wants_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def present_mix(seed: int, rows: int, sources: int, absent: float = 0.5) -> Tensor:
    """Presence, bool [rows, sources]: each source is missing in a share of the rows, at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(rows, generator=generator) for _ in range(sources)], 1)
    return order >= round(absent * rows)


def length_mix(seed: int, rows: int, longest: int) -> Tensor:
    """Lengths, int64 [rows], spread evenly over [1, longest] and at least one of them the longest."""
    lengths = torch.randint(1, longest + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    lengths[:1] = longest
    return lengths


def multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether PyTorch's products of ``dtype`` are a peer's, not a loop over numbers.

    On a CPU without AVX-512 those of bfloat16 are: they take a hundred times float32's, and nobody uses them.
    """
    return dtype != torch.bfloat16 or device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def ceilings(device: str) -> dict[str, float]:
    """What this machine does at best: GEMM FLOP/s at 2048³ by dtype, copy bytes/s (read and written)."""

    def best(call: Call, *args: Tensor) -> float:
        _elapsed(call, [args] * 3, device)
        return min(_elapsed(call, [args] * 5, device) / 5 for _ in range(5))

    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        if not multiplies(dtype, device):
            continue
        a, b = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
        found[f"gemm_{_name(dtype)}"] = 2 * 2048**3 / best(torch.mm, a, b)
    source = torch.ones(2**26 if device == "cpu" else 2**30, device=device)  # beyond every cache
    target = torch.empty_like(source)
    found["copy"] = 2 * source.nbytes / best(target.copy_, source)
    return found


def peak_bytes(build: Callable[..., Callable[[], object]], *args: Any, device: str = "cpu") -> int:
    """The most memory that a call holds at a time above what was there before it, its output included.

    A fresh process runs ``build(*args)`` (a function of a module, arguments that JSON can carry), which makes
    the inputs and returns the call. It is run once to warm up and once to be weighed. On a GPU PyTorch counts
    what it hands out, so this process serves as well.
    """
    if device == "cuda":
        return _weigh(build(*args), device)
    # What is freed leaves the process: a fixed threshold makes glibc map every tensor on its own.
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MMFAST_IDLE_MIB": "0"}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **freed}
    order = json.dumps([build.__module__, build.__qualname__, args])
    code = f"from {__name__} import _weigh_ordered; _weigh_ordered({order!r})"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        how = f"failed in a fresh process (exit status {done.returncode})"
        raise RuntimeError(f"{build.__qualname__}{args} {how}:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _weigh_ordered(order: str) -> None:
    module, name, args = json.loads(order)
    print(_weigh(getattr(import_module(module), name)(*args), "cpu"))


def _weigh(call: Callable[[], object], device: str) -> int:
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is there now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
