"""Processes, devices and sharding: one path from a single process to many nodes."""

import atexit
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mmfast.errors import UserError


@dataclass(frozen=True)
class World:
    """Where this process stands among all that train together."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh


def start(device: str = "auto") -> World:
    """Join the group that torchrun prepared, or make a group of this one process.

    A group that is already there is used. ``device`` is auto (the GPU where there is one), cpu or cuda.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if not torch.cuda.is_available():
            raise UserError("trainer.device is cuda, and this torch sees no CUDA device; wanted auto or cpu")
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this node has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # torchrun's environment
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    if kind == "cpu":
        _keep_freed_memory()
    rank, size = dist.get_rank(), dist.get_world_size()
    here = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    return World(rank, size, here, init_device_mesh(kind, (size,)))


def _keep_freed_memory() -> None:
    """Let the C library keep what one step frees for the next.

    By default glibc gives large activations back to the kernel, which zeroes their pages again when the next
    step asks for them: 6 to 8 % of a step on the CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in other C libraries
    if mallopt is not None:
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward and backward pass for a ``trainer.precision``."""
    if precision != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[precision]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def parallelize(model: nn.Module, world: World, precision: str = "auto", compile: bool = False) -> nn.Module:
    """Shard ``model`` in place over ``world`` with FSDP2, its parts first and the whole last.

    Parameters, gradients and optimizer state are kept in float32 (float64 for ``fp64``), forward and backward
    run in the compute dtype, gradients are added up in float32. They are *summed* over ranks: the loss is
    already divided by the global count, which is exact where ranks hold different numbers of valid samples.
    Every rank must run every part in every step; mmfast's models do.
    """
    if isinstance(model, FSDPModule):
        return model
    dtype = compute_dtype(precision, world.device)
    model.to(device=world.device, dtype=torch.float64 if precision == "fp64" else torch.float32)
    if world.size > 1:  # every rank begins with rank 0's weights, however it made its own
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    if compile:
        for part in parts(model):
            part.compile()
    half = dtype is torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None, reduce_dtype=torch.float32 if half else None
    )
    root = MixedPrecisionPolicy(
        policy.param_dtype, policy.reduce_dtype, output_dtype=torch.float32 if half else None
    )
    for part in parts(model):
        fully_shard(part, mesh=world.mesh, mp_policy=policy, reshard_after_forward=world.size > 1)
    fully_shard(model, mesh=world.mesh, mp_policy=root, reshard_after_forward=False)
    if world.size > 1:  # alone, the mean over one rank is the sum, and costs a pass less
        for module in sharded(model):
            module.set_gradient_divide_factor(1.0)
            # gloo has no pre-multiplied sum
            module.set_force_sum_reduction_for_comms(world.device.type == "cpu")
    return model


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """The units of sharding: each encoder, the fusion, each head; of any other model its children."""
    for child in model.children():
        group = child.children() if isinstance(child, (nn.ModuleDict, nn.ModuleList)) else (child,)
        yield from (part for part in group if next(part.parameters(), None) is not None)


def sharded(model: nn.Module) -> Iterator[FSDPModule]:
    """Every module of ``model`` that ``parallelize`` sharded."""
    return (module for module in model.modules() if isinstance(module, FSDPModule))
