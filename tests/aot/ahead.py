"""Compiles what the launchers launch, for a GPU that is not there, and reports what came out.

The launchers run as they are, on tensors of the CPU; ``JITFunction.run`` is asked to stop after compiling and
Triton is told which GPU to compile for. So arguments are specialised exactly as on a device: alignment, strides
of 1, arguments that are None. Outputs hold whatever their memory held.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may ask for


class Compiled(NamedTuple):
    """One kernel as compiled for one GPU."""

    kernel: str
    case: str
    capability: int
    kind: str
    registers: int
    spilled: int  # bytes of local memory and stack
    shared: int
    instructions: frozenset  # of wgmma, mma, tcgen05
    described: bool  # are tiles read through tensor descriptors, by the TMA
    rounded: bool  # to TF32
    lines: int  # of PTX


def compile_for(capability: int, kind: str) -> list[Compiled]:
    """Every Triton kernel for one GPU generation; kind is half, tf32 or ieee.

    Once with the untuned block sizes and once with each device's of that generation in the committed table.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    class Driver:
        def get_current_device(self):
            return capability

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Driver())
    refuse_what_triton_3_6_cannot()
    from mmfast.kernels import _launch
    from mmfast.ops._backend import TABLE

    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    compiled, case, run = {}, "", JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in compiled:
            compiled[kernel.hash] = report(kernel, case, capability, kind)
        return kernel

    JITFunction.run = compile_only
    _launch.capability = lambda device: capability
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    for op, cases in (
        ("concat_linear", concat_linear_cases),
        ("contrastive_loss", contrastive_loss_cases),
        ("cross_attention", cross_attention_cases),
        ("lowrank_fusion", lowrank_fusion_cases),
        ("weighted_fusion", weighted_fusion_cases),
    ):
        entries = TABLE[op].values()
        tuned = [e for e in entries if e.get("capability") == capability and "triton" in e]
        for entry in [{}, *tuned]:
            _launch.measured = lambda op, device, entry=entry: entry
            for name, launch in cases(dtype):
                case = name
                launch()
    return list(compiled.values())


def refuse_what_triton_3_6_cannot():
    """It comes with PyTorch 2.11, and stumbles where later ones do not.

    Inside a kernel it makes a tuple anew to give it to a Python function or to compare it (``len(sources)``,
    ``source is None``), and finds no type for a None in it, as for a NamedTuple's. Nor may a function return None.
    """
    import triton
    from triton.compiler.code_generator import CodeGenerator
    from triton.language import core

    if triton.__version__.startswith("3.6."):
        return
    make, leave = core.tuple.__init__, CodeGenerator.visit_Return

    def make_tuple(self, values, type=None):
        make(self, values, type)
        assert all(value is not None for value in self.values), "a tuple with None, used as a whole"

    def leave_function(self, node):
        leave(self, node)
        returned = self.return_vals[-1]
        assert not isinstance(returned, core.constexpr) or returned.value is not None, "None is returned"

    core.tuple.__init__, CodeGenerator.visit_Return = make_tuple, leave_function


def concat_linear_cases(dtype):
    """Calls that between them reach every kernel with all that it can be asked for."""
    import torch

    from mmfast.kernels.concat_linear import concat_linear, concat_linear_backward

    def launch(shapes, width, activation, present, norm):
        inputs = [torch.empty(*shape, dtype=dtype) for shape in shapes]
        lead = torch.broadcast_shapes(*(shape[:-1] for shape in shapes))
        depth = sum(shape[-1] for shape in shapes)
        height = 2 * width if activation == "swiglu" else width
        weight, bias = torch.empty(height, depth, dtype=dtype), torch.empty(height, dtype=dtype)
        seen = torch.ones(lead[0], len(shapes), dtype=torch.bool) if present else None
        eps, scale, shift = (1e-5, *torch.empty(2, depth, dtype=dtype)) if norm else (None,) * 3
        gate = None if activation == "none" else torch.empty(width, dtype=dtype)
        residual = torch.empty(*lead, width, dtype=dtype)
        out, preact, *moments = concat_linear(
            inputs, weight, bias, seen, eps, scale, shift, activation, residual, gate, True
        )
        needs = [True] * len(inputs) + [True, True, norm, norm, gate is not None]
        mean, rstd = moments or (None, None)
        concat_linear_backward(
            out, inputs, weight, seen, eps, scale, shift, activation, gate, preact, mean, rstd, needs
        )

    mixed = [(32, 196, 768), (32, 1, 512), (32, 1, 128)]
    yield "dense", lambda: launch([(32, 196, 768), (32, 196, 512)], 768, "gelu", False, False)
    yield "pooled swiglu present", lambda: launch(mixed, 768, "swiglu", True, False)
    yield "norm gelu present", lambda: launch([(32, 196, 768), (32, 196, 128)], 768, "gelu", True, True)
    yield "pooled norm swiglu present", lambda: launch(mixed, 768, "swiglu", True, True)
    yield "few rows", lambda: launch([(32, 768), (32, 512)], 768, "none", True, False)
    words = [(32, 196, 300), (32, 196, 35)]  # rows that do not lie in vectors, nor in what a descriptor takes
    yield "unaligned", lambda: launch(words, 77, "none", False, False)
    yield "unaligned swiglu present", lambda: launch(words, 77, "swiglu", True, False)
    yield "unaligned norm gelu present", lambda: launch(words, 77, "gelu", True, True)
    some = [(32, 196, 300), (32, 1, 35)]
    yield "unaligned pooled norm swiglu present", lambda: launch(some, 77, "swiglu", True, True)
    # a descriptor takes these, but Triton does not see the vectors in them
    yield "unaligned described", lambda: launch([(32, 196, 776), (32, 196, 512)], 1000, "gelu", False, False)


def contrastive_loss_cases(dtype):
    """Both losses, with and without presence, for features that fill whole blocks and that do not."""
    import torch

    from mmfast.kernels.contrastive_loss import contrastive_loss, contrastive_loss_backward

    def launch(kind, features, present):
        a, b = torch.empty(2, 500, features, dtype=dtype)
        scale, bias = torch.empty(2)
        args = a, b, scale, bias, kind, torch.ones(500, dtype=torch.bool) if present else None
        loss, *lse = contrastive_loss(*args)
        contrastive_loss_backward(loss, *args, *(lse or [None]), [True] * 4)

    for kind in ("softmax", "sigmoid"):
        yield f"{kind}", lambda kind=kind: launch(kind, 512, False)
        yield f"{kind} present", lambda kind=kind: launch(kind, 500, True)


def cross_attention_cases(dtype):
    """Each class of depths once with all that a kernel can be asked for, and once with next to nothing; the most
    common one also with what fills a batch of documents, with its keys split, and with as many sources as may be.
    """
    import torch

    from mmfast.kernels import _attention
    from mmfast.kernels.cross_attention import cross_attention, cross_attention_backward

    def launch(
        depth, sources, *, lengths=False, masks=False, present=0, causal=False, bias=False, stats=False,
        split=False,
    ):  # fmt: skip
        _attention.programs_wanted = lambda device, num_warps: 1000 if split else 1
        batch, heads, queries, size = 2, 8, 192, 320
        query = torch.empty(batch, queries, heads, depth, dtype=dtype).transpose(1, 2)
        keys, values = (
            [torch.empty(batch, size, 2, depth, dtype=dtype).transpose(1, 2) for _ in range(sources)]
            for _ in range(2)
        )
        visible = (
            [torch.ones(batch, dtype=torch.int64) if lengths else None] * sources,
            [torch.ones(batch, size, dtype=torch.bool) if masks else None] * sources,
            torch.ones(batch, *([queries] if present == 3 else []), sources, dtype=torch.bool)
            if present
            else None,
            [causal] * sources,
            torch.empty(batch, heads, sources) if bias else None,
            None,
        )
        out, lse, normalizers, *_ = cross_attention(query, keys, values, *visible, stats)
        needs = [True] * (1 + 2 * sources) + [bias]
        grad_lse = torch.empty_like(lse) if stats else None
        cross_attention_backward(out, grad_lse, query, keys, values, *visible, out, lse, normalizers, needs)

    everything = {"lengths": True, "masks": True, "present": 3, "causal": True, "bias": True, "stats": True}
    for depth in (64, 128, 256):
        yield f"depth {depth}, one source", lambda depth=depth: launch(depth, 1)
        yield f"depth {depth}, everything", lambda depth=depth: launch(depth, 4, **everything)
        yield f"depth {depth}, everything, three sources", lambda depth=depth: launch(depth, 3, **everything)
    yield "depth 128, lengths and presence", lambda: launch(128, 4, lengths=True, present=2, bias=True)
    yield "depth 64, everything, sixteen sources", lambda: launch(64, 16, **everything)
    yield "depth 64, one source, split", lambda: launch(64, 1, split=True)
    yield "depth 128, everything, split", lambda: launch(128, 4, **everything, split=True)


def lowrank_fusion_cases(dtype):
    """Three modalities, with all that can be asked for and with next to nothing."""
    import torch

    from mmfast.kernels.lowrank_fusion import lowrank_fusion, lowrank_fusion_backward

    def launch(present, save):
        inputs = [torch.empty(256, depth, dtype=dtype) for depth in (768, 512, 128)]
        factors = [torch.empty(4, x.shape[1] + 1, 128, dtype=dtype) for x in inputs]
        rank_weight, bias = torch.empty(4, dtype=dtype), torch.empty(128, dtype=dtype)
        seen = torch.ones(256, 3, dtype=torch.bool) if present else None
        out, *kept = lowrank_fusion(inputs, factors, rank_weight, bias, seen, save)
        if save:
            lowrank_fusion_backward(out, inputs, factors, rank_weight, seen, *kept, [True] * 8)

    yield "low rank, present", lambda: launch(True, True)
    yield "low rank, forward", lambda: launch(False, False)


def weighted_fusion_cases(dtype):
    """A source for each row beside a broadcast one, with weights for each row and absence."""
    import torch

    from mmfast.kernels.weighted_fusion import weighted_fusion, weighted_fusion_backward

    def launch():
        inputs = [torch.empty(32, steps, 768, dtype=dtype) for steps in (196, 196, 1)]
        logits, seen = torch.empty(32, 1, 3, dtype=dtype), torch.ones(32, 3, dtype=torch.bool)
        out = weighted_fusion(inputs, logits, seen)
        weighted_fusion_backward(out, inputs, logits, seen, [True] * 4)

    yield "weighted", launch


def report(kernel, case: str, capability: int, kind: str) -> Compiled:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    [path] = [path for name, path in kernel.metadata_group.items() if name.endswith(".cubin")]
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    found = {name for name in ("wgmma", "tcgen05") if f"{name}.mma" in ptx}
    found |= {"mma"} if re.search(r"^\s*mma\.sync", ptx, re.MULTILINE) else set()
    spilled = used["STACK"] + used["LOCAL"]
    return Compiled(
        kernel.name, case, capability, kind, used["REG"], spilled, kernel.metadata.shared, frozenset(found),
        "cp.async.bulk.tensor" in ptx, "cvt.rna.tf32" in ptx, ptx.count("\n"),
    )  # fmt: skip
