"""A job small enough to run hundreds of times: two modalities in memory, a model of a few thousand weights."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from mmfast.data import DataConfig, Image, Plan, Text
from mmfast.errors import UserError
from mmfast.train import Config, TrainerConfig

SIZES = {"train": 37, "validation": 13, "test": 11}
CLASSES = 5


@dataclass(frozen=True)
class ToyModelConfig:
    width: int = 24
    dropout: float = 0.0


@dataclass
class ToyData:
    """Data with ``loader`` and ``fingerprint``; every third sample lacks its image, every fifth its text."""

    seed: int = 0
    augment: bool = True
    sizes: dict = field(default_factory=lambda: dict(SIZES))
    classes: tuple = tuple(map(str, range(CLASSES)))

    @property
    def fingerprint(self):
        return hashlib.sha256(repr((self.seed, self.sizes)).encode()).hexdigest()[:16]

    def loader(self, split, *, batch_size, rank=0, world_size=1, train, start_step=0, only=None):
        size = self.sizes[split]
        if size < world_size:
            raise UserError(
                f"the {split} split has {size} samples for {world_size} ranks; wanted a sample for each"
            )
        return ToyLoader(self, split, batch_size, rank, world_size, train, start_step, only)


class ToyLoader:
    def __init__(self, data, split, batch_size, rank, world_size, train, start_step, only):
        self.data, self.split, self.only, self.train, self.start = data, split, only, train, start_step
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.ledger = Counter()
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def __iter__(self):
        size = self.data.sizes[self.split]
        if self.train:
            plan = Plan(size, self.batch_size, self.data.seed)
            step = self.start
            while True:
                yield self.batch(plan.samples(step)[self.rank :: self.world_size].tolist(), step)
                step += 1
        else:
            for begin in range(0, size, self.batch_size):
                ids = [i if i < size else -1 for i in range(begin, begin + self.batch_size)]
                yield self.batch(ids[self.rank :: self.world_size], 0)

    def batch(self, ids, step):
        rows = [self.row(i, step) for i in ids]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        batch["image"] = batch["image"].contiguous(memory_format=torch.channels_last)
        return batch

    def row(self, i, step):
        if i < 0:
            image, text, label = torch.zeros(3, 8, 8), torch.zeros(6, dtype=torch.int64), -1
            there = [False, False]
        else:
            salt = {"train": 0, "validation": 1, "test": 2}[self.split]
            g = torch.Generator().manual_seed(1000 * salt + i)
            label = int(torch.randint(CLASSES, (), generator=g))
            noise = step if self.train and self.data.augment else 0
            image = torch.randn(3, 8, 8, generator=g) * 0.5
            image += torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(noise * 997 + i)) * 0.1
            image[label % 3] += label - 2
            text = torch.randint(1, 20, (6,), generator=g)
            text[0] = 1 + label
            there = [i % 3 != 0, i % 5 != 0]
            if self.only is not None:
                there = [
                    here and name in self.only for here, name in zip(there, ("image", "text"), strict=True)
                ]
            image, text = image * there[0], text * there[1]
        return {
            "image": image,
            "text": text,
            "lengths": torch.tensor([1, 6]) * torch.tensor(there),
            "present": torch.tensor(there),
            "label": torch.tensor(label),
            "id": torch.tensor(i),
        }


class ToyImage(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


class ToyText(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(32, width)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.ones(1))  # smaller than a world of two

    def forward(self, ids):
        return self.norm(self.table(ids)).mean(1) * self.scale


class ToyModel(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        config = config or ToyModelConfig()
        width = config.width
        self.encoders = nn.ModuleDict({"image": ToyImage(width), "text": ToyText(width)})
        self.fusion = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(config.dropout))
        self.heads = nn.ModuleDict({"label": nn.Linear(width, CLASSES)})

    def forward(self, batch):
        parts = [encoder(batch[name]) for name, encoder in self.encoders.items()]
        shown = batch["present"].unsqueeze(-1).unbind(1)
        parts = [
            torch.where(here, part, torch.zeros_like(part)) for here, part in zip(shown, parts, strict=True)
        ]
        fused = self.fusion(torch.cat(parts, -1))
        return {name: head(fused) for name, head in self.heads.items()}


def toy_config(out, *, dropout=0.0, **options):
    defaults = {
        "batch_size": 8, "max_steps": 20, "warmup": 4, "precision": "fp32", "device": "cpu", "log_every": 5,
        "validate_every": 0, "checkpoint_every": 0, "lr": 1e-2,
    }  # fmt: skip
    data = DataConfig(path="toy", modalities={"image": Image(size=8), "text": Text(max_tokens=6)})
    return Config(data, ToyModelConfig(dropout=dropout), TrainerConfig(out=str(out), **(defaults | options)))


def toy_model(config):
    torch.manual_seed(config.trainer.seed)
    return ToyModel(config.model)
