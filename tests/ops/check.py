"""The one measure that every op is held to, and the ways to run an op under it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mmfast import _native
from mmfast.ops import available

ROOT = Path(__file__).parents[2]
ISAS = ("plain", "avx2", "avx512", "avx512bf16", "amx")


def backends(op):
    """The backends of ``op`` that can run on CPU tensors here; Triton by its interpreter."""
    return [name for name, state in available(op, "cpu").items() if state == "ready"]


def dtypes(backend):
    """What a backend is tested in on the CPU. The interpreter's bfloat16 ``tl.dot`` is wrong, its float64 not ours."""
    narrow = [torch.float32, torch.float16]
    return narrow if backend == "triton" else [*narrow, torch.bfloat16, torch.float64]


def isas():
    """The instruction sets that this processor and this build have; none without the native library."""
    if not _native.cpu:
        return []
    found, before = [], _native.isa()
    for name in ISAS:
        try:
            found.append(_native.isa(name))
        except ValueError:
            pass
    _native.isa(before)
    return found


@contextlib.contextmanager
def _put_back(before, put, other):
    try:
        yield put(other)
    finally:
        put(before)


def instruction_set(name):
    """Runs the CPU kernels in one."""
    return _put_back(_native.isa(), _native.isa, name)


def threads(count):
    return _put_back(torch.get_num_threads(), torch.set_num_threads, count)


def at_thread_counts(function):
    """What ``function`` gives with 1, 2, and twice with 3 threads."""
    results = []
    for count in (1, 2, 3, 3):
        with threads(count):
            results.append(function())
    return results


def compiled(function, backend="aot_eager"):
    """``function`` as one graph with dynamic shapes."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def cast(arguments, dtype):
    """Floating tensors anywhere in ``arguments`` in ``dtype``, as fresh leaves with the strides that they had."""

    def leaf(t):
        if not (isinstance(t, torch.Tensor) and t.is_floating_point()):
            return t
        new = torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device)
        if all(t.stride()[d] for d in range(t.dim()) if t.shape[d] > 1):
            new.copy_(t.detach())
        else:  # expanded: many elements share memory
            once = t.detach()[tuple(slice(None) if step else slice(1) for step in t.stride())]
            new = once.to(dtype, copy=True).expand(t.shape)
        return new.requires_grad_(t.requires_grad)

    return pytree.tree_map(leaf, arguments)


def run(function, arguments, seed=0):
    """The output and the gradient of every argument that asks for one, by name."""
    out = function(**arguments)
    results = {"out": out.detach()}
    leaves = [(pytree.keystr(path), t) for path, t in pytree.tree_flatten_with_path(arguments)[0]]
    leaves = [(name, t) for name, t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    if leaves:
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        grads = torch.autograd.grad(out, [t for _, t in leaves], grad.to(out))
        results |= {f"gradient of {name}": g for (name, _), g in zip(leaves, grads, strict=True)}
    return results


def same_bits(one, other):
    """Whether two tensors, or all that two containers hold, agree in every bit: 0 and -0 do not."""

    def raw(t):
        return t.detach().contiguous().reshape(-1).view(torch.uint8)

    (ours, layout), (theirs, its) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return layout == its and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(raw(a), raw(b))
        for a, b in zip(ours, theirs, strict=True)
    )


class Sizes(TorchDispatchMode):
    """Remembers the bytes of everything that is made meanwhile."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.sizes += [t.untyped_storage().nbytes() for t in pytree.tree_leaves(made) if torch.is_tensor(t)]
        return made


def worst(t):
    return t.abs().max().item() if t.numel() else 0.0


def assert_promised(actual, meant, own_error, name="", largest=None):
    """Error against float64 <= 2 x the reference's own in the same dtype + 8 eps x the largest magnitude."""
    assert actual.shape == meant.shape, f"{name}: {actual.shape}, wanted {meant.shape}"
    error = worst(actual.double() - meant)
    bound = 2 * own_error + 8 * torch.finfo(actual.dtype).eps * (worst(meant) if largest is None else largest)
    assert error <= bound, f"{name}: error {error:.3g}, promised {bound:.3g}"


def check(op, reference, arguments, dtype, upstreams=1, runs=None):
    """Runs ``op`` and ``reference`` on the same numbers and compares outputs and gradients as promised.

    What the reference itself loses in float64 cannot be seen in float64: it is taken from float32, in the
    proportion of the two eps. It is the most of what it loses under several random upstream gradients, and under
    several draws of the arguments' values where ``arguments`` is a list of them: where few numbers are summed or
    compared it may be next to nothing under one of them, by luck. ``op`` runs under the first few of them where
    running it takes long.
    """
    seen = torch.float32 if dtype == torch.float64 else dtype
    draws = [cast(values, seen) for values in (arguments if isinstance(arguments, list) else [arguments])]
    cases = [(values, seed) for values in draws for seed in range(upstreams)]
    results = [
        (
            run(op, cast(values, dtype), seed) if case < (runs or len(cases)) else None,
            run(reference, cast(values, torch.float64), seed),
            run(reference, cast(values, seen), seed),
        )
        for case, (values, seed) in enumerate(cases)
    ]
    for name in results[0][0]:
        own = max(worst(same[name].double() - meant[name]) for _, meant, same in results)
        largest = max(worst(meant[name]) for _, meant, _ in results)
        for actual, meant, _ in results[:runs]:
            assert actual[name].dtype == dtype, f"{name}: {actual[name].dtype}, wanted {dtype}"
            lost = own * torch.finfo(dtype).eps / torch.finfo(seen).eps
            assert_promised(actual[name], meant[name], lost, name, largest)


def python(code, **environment):
    """Runs code in a fresh process and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
