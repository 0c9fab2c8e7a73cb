"""What a job will be, before it runs: ``mmfast check`` tries one of everything, ``mmfast plan`` counts."""

import math
import time

import torch
from torch import nn

from mmfast.train.build import build
from mmfast.train.config import Config
from mmfast.train.optim import adamw
from mmfast.train.parallel import compute_dtype
from mmfast.train.trainer import Trainer


def check(config: Config) -> int:
    """Decode one batch, take one step, print what a job would use; nothing is written."""
    trainer = Trainer(config)
    options, world = config.trainer, trainer.world
    model, data = build(config)
    trainer.refuse(data)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in data.dataset.splits.items())
    lines = [("data", f"{config.data.path}: {sizes}; {len(data.classes)} classes")]
    trainer.parallelize(model)
    optimizer = adamw(model, options)
    with trainer.loader(data, "train") as loader:
        begun = time.perf_counter()
        batch = next(iter(loader))
        seconds = time.perf_counter() - begun
        for column, name in enumerate(data.modalities):
            x, there = batch[name], int(batch["present"][:, column].sum())
            about = f"{list(x.shape)} {str(x.dtype)[6:]}, present in {there} of {len(x)} rows"
            lines.append((name, f"{about}, longest {int(batch['lengths'][:, column].max())}"))
        lines.append(("first batch", f"{seconds:.2f} s"))
    with trainer.loader(data, "train") as loader:
        step = next(iter(trainer.steps(model, optimizer, loader)))
    loss, norm = step.values[:-1].sum().item(), step.values[-1].item()
    dtype = str(compute_dtype(options.precision, world.device))[6:]
    lines += [
        ("model", f"{type(model).__name__}, {count(model):,} parameters"),
        ("processes", f"{world.size} on {world.device.type}, {torch.get_num_threads()} threads each"),
        ("precision", f"forward and backward {dtype}, compile {'on' if options.compile else 'off'}"),
        ("first step", f"{step.seconds:.2f} s, loss {loss:.4f} (chance {math.log(len(data.classes)):.4f})"),
        ("gradient", f"norm {norm:.4f}"),
    ]
    return show(lines, world.rank)


def plan(config: Config) -> int:
    """Print parameters by part, memory per process and length of the job; nothing is decoded."""
    trainer = Trainer(config)
    options, world = config.trainer, trainer.world
    model, data = build(config)
    samples = len(data.dataset.split("train"))
    epochs = options.max_steps * options.batch_size / samples
    lines = [("data", f"{samples} samples to train on, {samples / options.batch_size:.1f} steps an epoch")]
    lines.append(("job", f"{options.max_steps} steps of {options.batch_size} samples = {epochs:.1f} epochs"))
    for name, part in model.named_children():
        inner = part.named_children() if isinstance(part, nn.ModuleDict) else [("", part)]
        lines += [(f"{name}.{key}".rstrip("."), f"{count(module):,} parameters") for key, module in inner]
    wide = 8 if options.precision == "fp64" else 4
    half = 2 if compute_dtype(options.precision, world.device) is torch.bfloat16 else wide
    for size in sorted({1, 2, 4, 8, world.size}):
        # sharded: weights, gradients and AdamW's two moments; whole: the gathered weights and their gradients
        held = count(model) * 4 * wide / size + count(model) * 2 * half
        about = f"{held / 2**20:,.0f} MiB each, and activations of {options.batch_size / size:g} samples"
        lines.append((f"{size} process{'es' * (size > 1)}", about))
    return show(lines, world.rank)


def count(module: nn.Module) -> int:
    """Give the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def show(lines: list[tuple[str, str]], rank: int) -> int:
    """Print a two-column table, once."""
    if rank == 0:
        width = max(len(name) for name, _ in lines)
        for name, words in lines:
            print(f"{name:{width}}  {words}")
    return 0
