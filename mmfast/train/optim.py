"""The optimizer, and a schedule that is a pure function of the step: resuming needs no state of it."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmfast.train.config import TrainerConfig


def learning_rate(config: TrainerConfig, step: int) -> float:
    """The rate of ``step`` (the first is 0): linear warm-up, then a cosine to ``final_lr`` of ``lr``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = min(1.0, (step - config.warmup) / max(1, config.max_steps - config.warmup))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) on ``model``; what has fewer than two dimensions does not decay."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def clip(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their common norm is at most ``largest`` (0: never); return that norm [].

    Each rank adds up the squares of its own shards and one collective those of the ranks. Nothing waits for
    a GPU.
    """
    grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
    # on a CPU a float32 norm of millions of elements is off by 3e-5; of pieces, added up in float64, by 2e-7
    pieces = grads if grads[0].is_cuda else [c for grad in grads for c in grad.flatten().split(65536)]
    squares = torch.stack(torch._foreach_norm(pieces)).double().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    # a CPU reads the norm for nothing and is spared a pass over the gradients
    if largest and (norm.is_cuda or norm > largest):
        torch._foreach_mul_(grads, (largest / (norm + 1e-6)).clamp(max=1.0).to(grads[0].dtype))
    return norm


def local(tensor: Tensor) -> Tensor:
    """Give this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
