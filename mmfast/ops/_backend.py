"""Which backend runs an op: the one that is forced, or the one that the committed table names.

An op has one schema and one *overload per backend*, ``torch.ops.mmfast.<op>.<backend>``, so that two kernels
for one device never compete for one dispatch key. ``reference`` has no overload: it is plain PyTorch.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmfast import _native

NATIVE = ("cpu", "triton", "cuda")
BACKENDS = (*NATIVE, "reference")
READY = "ready"
Answer = TypeVar("Answer")

LIB = torch.library.Library("mmfast", "FRAGMENT")  # module level: dropping it drops the ops
TABLE: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("table.json").read_text())

PLAIN = _native.cpu and _native.isa() == "plain"  # without vector instructions

_forced: str | None = None
_launches: Counter[str] = Counter()


def define(op: str, name: str, schema: str, fake: Callable[..., Any]) -> dict[str, Any]:
    """Defines ``mmfast::<name>`` once per backend and returns the overloads by backend.

    C++ implements ``<name>.cpu`` (and ``<name>.cuda``) under those names, in either load order.
    ``<name>.triton`` is the function ``<name>`` of ``mmfast.kernels.<op>``, and ``<name>.cuda`` that of
    ``mmfast.kernels.<op>_cuda`` where Python launches the CUDA kernels. Both are imported when first called.
    """
    for backend in NATIVE:
        LIB.define(f"{name}.{backend}{schema}")
        torch.library.register_fake(f"mmfast::{name}.{backend}", fake, lib=LIB)
    # Triton kernels are registered for CPU tensors too: its interpreter runs on them.
    for backend, module, keys in (("triton", op, ("CUDA", "CPU")), ("cuda", f"{op}_cuda", ("CUDA",))):
        if importlib.util.find_spec(f"mmfast.kernels.{module}"):
            for key in keys:
                LIB.impl(f"{name}.{backend}", _launcher(f"mmfast.kernels.{module}", name, backend), key)
    return {backend: getattr(getattr(torch.ops.mmfast, name), backend) for backend in NATIVE}


def _launcher(module: str, name: str, backend: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        _launches[f"{name}.{backend}"] += 1
        return getattr(importlib.import_module(module), name)(*args)

    return launch


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast wants them: floating ones but float64 in its dtype, where it is on."""
    tensors = (first, *others)
    device = "cpu" if first.is_cpu else first.device.type  # reading .type takes as long as a small op
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Tensor | None:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(dtype)

    return tuple(cast(t) for t in tensors)


def distinct(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The tensors. For Dynamo, one that comes twice (an input that is the residual too) is a view the second
    time: it traces no ``autograd.Function`` that is given the same tensor twice.
    """
    if not torch.compiler.is_compiling():
        return tensors
    out: list[Tensor | None] = []
    for t in tensors:
        again = t is not None and any(t is seen for seen in out)
        out.append(t.view_as(t) if again and t is not None else t)
    return out


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a second derivative an error.

    PyTorch's decorator does so only where an incoming gradient asks for one: that of ``op(x).sum()`` does
    not, and what the backward owes to ``x`` would be lost. Here the error lies on the way to everything that
    the gradients depend on: what is saved, and what ``ctx.unsaved`` has besides.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # AOTAutograd has its own error
            return backward(ctx, *grads)
        once = _ReadOnce(ctx)
        with torch.no_grad():
            given = backward(once, *grads)
        read = (*once.saved_tensors, *getattr(ctx, "unsaved", ()), *grads)
        sources = [t for t in read if t is not None and t.requires_grad]
        many = len(given) + len(sources)
        refuse: Any = torch._C._functions.DelayedError(b"mmfast's ops are differentiable once", many)
        outs = [None if g is None else g.detach().requires_grad_() for g in given]
        return tuple(refuse(*outs, *sources))[: len(given)]

    return run


class _ReadOnce:
    """A context whose saved tensors are unpacked once: a checkpoint makes them anew, and only then."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces every op in the process onto one backend: ``cpu``, ``triton``, ``cuda`` or ``reference``.

    Raises:
        ValueError: for an unknown name; the op raises it where the backend cannot run. There is no fallback.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, wanted one of {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def choose(op: str, device: torch.device) -> str:
    """The backend that runs ``op`` on ``device``: the reference under torch.func and forward-mode AD.

    Raises:
        ValueError: the forced backend cannot run there; the message says why.
    """
    transformed = _transformed()
    if _forced is None:
        return "reference" if transformed else _automatic(op, device)
    _require(op, device.type, _forced)
    if transformed and _forced != "reference":
        raise ValueError(f"backend {_forced!r} cannot run {op} under torch.func or forward-mode AD")
    return _forced


# What Dynamo captures inside such a transform is captured while it is on.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _transformed() -> bool:
    """Whether tensors may be more than the numbers that a kernel reads: tangents would be lost."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def available(op: str, device_type: str) -> dict[str, str]:
    """Each backend of ``op`` for tensors on ``device_type``: ``"ready"``, or why it is not."""
    return {name: _state(op, device_type, name) for name in BACKENDS}


def measured(op: str, device: torch.device) -> dict[str, Any]:
    """What the committed table holds for ``op`` on ``device``; empty where nobody has measured it.

    Nobody has measured the CPU kernels without vector instructions, which is what processors other than x86
    get.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and PLAIN):
        return {}
    key = "cpu" if device.type == "cpu" else name_of(device)
    return TABLE.get(op, {}).get(key, {})


def by_device(ask: Callable[[torch.device], Answer]) -> Callable[[torch.device], Answer]:
    """Remembers what ``ask`` says of each GPU: PyTorch takes microseconds to say it anew.

    Not of "cuda" without a number, which is another one as soon as another one is current.
    """
    remembered = functools.cache(ask)
    return lambda device: ask(device) if device.index is None else remembered(device)


@by_device
def name_of(device: torch.device) -> str:
    """The name of a GPU, as the table has it."""
    return torch.cuda.get_device_name(device)


def native_calls(name: str) -> int:
    """How often a kernel was entered in this process, ``name`` being ``"<op>.<backend>"``."""
    return _launches[name] + _native.calls(name)


# A graph is compiled for one backend, and the table does not change while a process runs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _automatic(op: str, device: torch.device) -> str:
    return _from_table(op, device)


@functools.cache
def _from_table(op: str, device: torch.device) -> str:
    name: str = measured(op, device).get("backend", "reference")
    return name if _state(op, device.type, name) == READY else "reference"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _require(op: str, device_type: str, name: str) -> None:
    state = _state(op, device_type, name)
    if state != READY:
        raise ValueError(f"backend {name!r} cannot run {op} on {device_type} tensors: {state}")


def _state(op: str, device_type: str, name: str) -> str:
    if name == "reference":
        return READY
    if name == "triton":
        return _triton_state(op, device_type)
    if name != device_type:
        return f"it is for {name} tensors"
    library = f"mmfast_{name}"
    if library in _native.missing:
        return _native.missing[library]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"mmfast::{op}.{name}", name.upper()):
        return "no kernel yet"
    if name == "cpu":
        return READY
    if not torch.cuda.is_available():
        return "compiled, not run: no GPU here"
    major, minor = torch.cuda.get_device_capability()
    return READY if major >= 8 else f"needs compute capability 8.0: this GPU has {major}.{minor}"


def _triton_state(op: str, device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec(f"mmfast.kernels.{op}") is None:
        return "no kernel yet"
    if device_type == "cpu":
        return READY if os.environ.get("TRITON_INTERPRET") == "1" else "needs a GPU, or TRITON_INTERPRET=1"
    return READY if torch.cuda.is_available() else "compiled, not run: no GPU here"
