"""Small models and batches for the tests of ``mmfast.models``."""

from dataclasses import dataclass, field, replace

import torch

from mmfast.data.modality import Audio, Image, Modality, Text
from mmfast.models import (
    ArticleConfig,
    Attention,
    AudioTransformer,
    Concat,
    ImageResNet,
    ModelConfig,
    TextTransformer,
    build_model,
)


@dataclass
class Data:
    modalities: dict[str, Modality] = field(
        default_factory=lambda: {
            "image": Image(size=16),
            "text": Text(max_tokens=6),
            "audio": Audio(n_mels=8, max_seconds=0.2),  # 21 frames
        }
    )
    vocab_size: int = 11
    num_classes: int = 4


CONFIG = ModelConfig(
    encoders={
        "image": ImageResNet(width=8, depths=(1, 1), groups=4, stem="small"),
        "text": TextTransformer(dim=12, layers=1, heads=2),
        "audio": AudioTransformer(dim=8, layers=1, heads=2),
    },
    fusion=Concat(dim=16),
    dropout=0.0,
)
ATTENTION = replace(CONFIG, fusion=Attention(dim=16, heads=2, queries=3, layers=2))
CONFIGS = {"fusion": CONFIG, "attention": ATTENTION, "article": ArticleConfig(dim=16)}


def make(config=CONFIG, data=None, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return build_model(config, data or Data()).to(dtype)


def make_batch(rows=5, seed=0, dtype=torch.float32, data=None):
    """Row 1 has no image, row 2 no text, row 3 no audio, row 4 nothing; lengths differ."""
    data = data or Data()
    g = torch.Generator().manual_seed(seed)
    present = torch.ones(rows, 3, dtype=torch.bool)
    for row in range(1, rows):
        present[row, list(range(3)) if row == 4 else (row - 1) % 3] = False
    (tokens,), (n_mels, frames), size = (data.modalities[m].shape for m in ("text", "audio", "image"))
    lengths = torch.stack(
        [
            torch.ones(rows, dtype=torch.int64),
            torch.randint(1, tokens, (rows,), generator=g),
            torch.randint(2, frames - 2, (rows,), generator=g),
        ],
        dim=1,
    )
    image = torch.randn(rows, *size, generator=g, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return {
        "image": image,
        "text": torch.randint(1, data.vocab_size, (rows, tokens), generator=g),
        "audio": 4 * torch.randn(rows, n_mels, frames, generator=g, dtype=dtype) - 6,
        "lengths": lengths * present,
        "present": present,
        "label": torch.randint(data.num_classes, (rows,), generator=g),
        "id": torch.arange(rows),
    }


def poison(batch, seed=1):
    """The same batch with nan, infinity or other ids wherever nobody may look."""
    g = torch.Generator().manual_seed(seed)
    lengths = batch["lengths"]
    text, audio, image = batch["text"].clone(), batch["audio"].clone(), batch["image"].clone()
    padding = torch.arange(text.shape[1]) >= lengths[:, 1, None]
    text[padding] = torch.randint(-5, 10**6, text.shape, generator=g)[padding]
    padding = (torch.arange(audio.shape[2]) >= lengths[:, 2, None])[:, None].expand_as(audio)
    audio[padding] = torch.where(torch.rand(audio.shape, generator=g) < 0.5, torch.nan, torch.inf).to(audio)[
        padding
    ]
    image[~batch["present"][:, 0]] = torch.nan
    return {**batch, "text": text, "audio": audio, "image": image}


def gradients(model, batch):
    """Logits and every parameter's gradient of one fixed loss."""
    model.zero_grad()
    logits = model(batch)["label"]
    weights = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype)
    (logits.sin() * weights).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}
