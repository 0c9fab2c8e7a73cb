"""Runs under torchrun in two processes: a training step of a sharded model compiled with mmfast. Writes rank 0's results."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmfast.ops import native_calls


class LateFusion(nn.Module):
    """Large enough that the fusion is replaced."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(24, 64), nn.Linear(24, 192)
        self.fuse, self.head = nn.Linear(256, 96), nn.Linear(96, 3)

    def forward(self, patches, sentence):  # [B, T, 24], [B, 24]
        pooled = self.text(sentence).unsqueeze(1).expand(-1, patches.shape[1], -1)
        return self.head(F.gelu(self.fuse(torch.cat([self.image(patches), pooled], -1))).mean(1))


def made():
    """The model, and the batch of both ranks."""
    torch.manual_seed(0)
    return LateFusion(), (torch.randn(16, 196, 24), torch.randn(16, 24))


def loss(out):
    return out.square().mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, inputs = made()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    call = torch.compile(model, backend="mmfast")
    out = call(*(t.chunk(size)[rank] for t in inputs))
    loss(out).backward()
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    outs = [torch.empty_like(out) for _ in range(size)]
    torch.distributed.all_gather(outs, out.detach())
    found["out"] = torch.cat(outs)
    calls = torch.tensor(native_calls("concat_linear.cpu"))
    torch.distributed.all_reduce(calls, torch.distributed.ReduceOp.MIN)
    if rank == 0:
        torch.save({"results": found, "native calls": calls.item()}, sys.argv[1])
    torch.distributed.destroy_process_group()
