"""A training step of an attention-fusion model on ragged streams: the trainer's, and what people write.

``FusionModel`` with ``AttentionFusion``: a projection of each stream, latents that look at all of them, their
mean, a category. The stock form has the same weights, data and AdamW in eager PyTorch and float32: it norms
and projects every padded step, concatenates keys, values and masks, and calls scaled_dot_product_attention.
It also runs compiled, under bfloat16 autocast, and both, and ours in float32 and uncompiled: so the table
tells what the ops gain from what bfloat16 and the compiler do.

The features are synthetic and in memory: the step is measured here, loading elsewhere.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from mmfast import ops
from mmfast.bench.measure import Call, Result, Work, multiplies
from mmfast.data import DataConfig, Image
from mmfast.models import FusionModel, ImageResNet, ModelConfig
from mmfast.models.fusion import AttentionFusion, Features
from mmfast.nn import ConcatLinear, CrossModalAttention, CrossModalBlock
from mmfast.nn.masking import valid
from mmfast.train import Config, Trainer, TrainerConfig
from mmfast.train.optim import adamw, local
from mmfast.train.parallel import compute_dtype

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A model and its batches, of which half of all steps are absent."""

    # name, most steps, features: an image's patches, frames of sound, what a sensor gave
    streams: tuple[tuple[str, int, int], ...] = (
        ("image", 577, 768),
        ("audio", 1500, 512),
        ("sensor", 256, 64),
    )
    batch: int = 8
    dim: int = 768
    heads: int = 12
    queries: int = 77
    layers: int = 2
    classes: int = 100


JOB = Job()
# At a rate of 0 a step does all of its work and leaves the weights as they are, so that each can be checked.
OPTIONS = TrainerConfig(lr=0.0)


def works(device: str | None = None) -> list[Work]:
    """Everything that is measured here, on a GPU where there is one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    auto = compute_dtype("auto", torch.device(device))
    variants = {
        "mmfast": functools.partial(ours, JOB, device),
        "mmfast eager": functools.partial(ours, JOB, device, compiled=False),
        "mmfast float32": functools.partial(ours, JOB, device, precision="fp32"),
        "stock": functools.partial(stock, JOB, device),
        "stock compiled": functools.partial(stock, JOB, device, compiled=True),
    }
    computed_in = dict.fromkeys(("mmfast", "mmfast eager"), auto)
    if multiplies(torch.bfloat16, device):
        half = {
            "stock bfloat16": functools.partial(stock, JOB, device, half=True),
            "stock compiled bfloat16": functools.partial(stock, JOB, device, compiled=True, half=True),
        }
        variants |= half
        computed_in |= dict.fromkeys(half, torch.bfloat16)
    return [
        Work(
            name="attention fusion, half absent: training step",
            variants={name: _at_first_call(make) for name, make in variants.items()},
            inputs=functools.partial(inputs, JOB, device),
            reference=functools.partial(reference, JOB),
            device=device,
            required={"stock": 3.0},  # the goal of docs/ops/cross_attention.md
            sets=1,  # a minute to check
            computed_in=computed_in,
            samples=JOB.batch,
        )
    ]


def test_training_step(
    measured: Result, variant: str, rounds: Callable[[BenchmarkFixture], None], benchmark: BenchmarkFixture
) -> None:
    """Every variant's rounds."""
    rounds(benchmark)


class Projection(nn.Module):
    """An encoder: what is there of a stream, projected."""

    def __init__(self, features: int, dim: int) -> None:
        """To the model's width."""
        super().__init__()
        self.dim = dim
        self.project = ConcatLinear([features], dim)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, features], [B] -> [B, T, dim], [B]."""
        there = valid(lengths, x.shape[1]).reshape(-1, 1)
        return self.project([x.flatten(0, 1)], present=there).unflatten(0, x.shape[:2]), lengths


class StockProjection(Projection):
    """The same weights, all steps."""

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As above."""
        return linear(self.project, x), lengths


class StockFusion(AttentionFusion):
    """The weights of ``AttentionFusion``, as people write it."""

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """``{name: ([B, T, D], [B])}``, bool [B, n] -> [B, dim]."""
        streams = {name: stream for name, (stream, _) in features.items()}
        seen = torch.cat([valid(lengths, x.shape[1]) for x, lengths in features.values()], 1)[:, None, None]
        x = self.queries.expand(len(present), -1, -1)
        for block in self.blocks:
            assert isinstance(block, CrossModalBlock)
            x = x + attend(block.attention, x, streams, seen)
            x = x + linear(block.down, F.gelu(linear(block.up, x)))
        fused: Tensor = self.norm(x).mean(1)
        return fused


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm and Linear, the weights those of a ``ConcatLinear``."""
    assert isinstance(layer, ConcatLinear)
    if layer.norm_eps is not None:
        x = F.layer_norm(x, x.shape[-1:], layer.norm_weight, layer.norm_bias, layer.norm_eps)
    return F.linear(x, layer.weight, layer.bias)


def attend(layer: CrossModalAttention, x: Tensor, streams: dict[str, Tensor], seen: Tensor) -> Tensor:
    """``seen``: bool [B, 1, 1, S], S all steps of all streams."""
    query = layer.query_norm(linear(layer.query, x).unflatten(-1, (layer.heads, -1)))  # [B, L, H, D]
    pairs = [linear(layer.sources[name], stream) for name, stream in streams.items()]
    key, value = torch.cat(pairs, 1).unflatten(-1, (2, layer.heads, -1)).unbind(2)  # [B, S, H, D]
    query, key, value = (t.transpose(1, 2) for t in (query, layer.key_norm(key), value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return linear(layer.project, attended.transpose(1, 2).flatten(2))


def build(
    job: Job, projection: type[Projection] = Projection, fusion: type[AttentionFusion] = AttentionFusion
) -> FusionModel:
    """The model, the same weights whatever it is made of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FusionModel(
            {name: projection(features, job.dim) for name, _, features in job.streams},
            fusion({name: job.dim for name, *_ in job.streams}, job.dim, job.heads, job.queries, job.layers),
            {"label": nn.Linear(job.dim, job.classes)},
        )


def ours(job: Job, device: str, *, precision: str = "auto", compiled: bool = True) -> Call:
    """The trainer's step: gives the loss and the gradients that the optimizer was given."""
    options = dataclasses.replace(OPTIONS, precision=precision, compile=compiled, device=device)
    # The trainer reads neither: model and batches are given to it.
    data, model_config = (
        DataConfig(path="", modalities={"image": Image()}),
        ModelConfig(encoders={"image": ImageResNet()}),
    )
    trainer = Trainer(Config(data, model_config, options), quiet=True)
    model = trainer.parallelize(build(job))
    optimizer = adamw(model, options)
    batches: deque[Batch] = deque()
    steps = trainer.steps(model, optimizer, iter(batches.popleft, None))
    grads: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: grads.extend(local(p.grad) for p in model.parameters() if p.grad is not None)
    )

    def step(batch: Batch) -> list[Tensor]:
        grads.clear()
        batches.append(batch)
        loss, _ = next(steps).values
        return [loss, *grads]

    return step


def stock(
    job: Job,
    device: str,
    *,
    half: bool = False,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """The step that people write; gives what ``ours`` gives."""
    model = build(job, StockProjection, StockFusion).to(device, dtype)
    optimizer = adamw(model, OPTIONS)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(batch: Batch) -> list[Tensor]:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(forward(batch)["label"], batch["label"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip)
        optimizer.step()
        return [loss.double(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return step


def reference(job: Job, batch: Batch) -> list[Tensor]:
    """Loss and gradients by the ops' definitions, in the dtype of the features; float32 or wider."""
    dtype = batch[job.streams[0][0]].dtype
    model = build(job).to(batch["label"].device, dtype)
    with ops.backend("reference"):
        logits = model(batch)["label"]
    wide = torch.promote_types(dtype, torch.float32)
    loss = F.cross_entropy(logits.to(wide), batch["label"])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), OPTIONS.clip)
    return [loss.double(), *(p.grad.to(wide) for p in model.parameters() if p.grad is not None)]


def inputs(job: Job, device: str, seed: int) -> tuple[Batch]:
    """A seeded batch: of each stream a quarter of the samples has nothing, a quarter has all."""
    generator = torch.Generator().manual_seed(seed)
    quarter = job.batch // 4
    order = torch.randperm(job.batch, generator=generator)
    batch: dict[str, Any] = {}
    lengths = []
    for i, (name, steps, features) in enumerate(job.streams):
        some = torch.randint(1, steps, (quarter,), generator=generator)
        pairs = torch.cat([some.new_zeros(quarter), some.new_full((quarter,), steps), some, steps - some])
        length = torch.empty_like(pairs)
        length[order.roll(i * quarter)] = pairs  # no sample lacks two streams
        there = valid(length, steps)[..., None]
        batch[name] = torch.randn(job.batch, steps, features, generator=generator) * there
        lengths.append(length)
    batch["lengths"] = torch.stack(lengths, 1)
    batch["present"] = batch["lengths"] > 0
    batch["label"] = torch.randint(job.classes, (job.batch,), generator=generator)
    return ({name: t.to(device) for name, t in batch.items()},)


def _at_first_call(make: Callable[[], Call]) -> Call:
    """A variant whose model is made when it is needed: ``works`` is also asked what there is."""
    made = functools.cache(make)
    return lambda batch: made()(batch)
