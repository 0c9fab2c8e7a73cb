"""Tiny shards for the loader's tests: noise-free pictures, tones and words, with holes and, on demand, faults."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from tokenizers import Tokenizer, models, pre_tokenizers

from mmfast.data import Audio, Data, DataConfig, Image, ShardWriter, Text

soundfile = pytest.importorskip("soundfile")  # a machine with a GPU and a torch of its own may lack it
MODALITIES = {
    "image": Image(size=24),
    "text": Text(max_tokens=5),
    "audio": Audio(n_mels=16, max_seconds=0.5),
}
WORDS = "a red green blue small big round thing on the table".split()


def picture(number: int, kind: str = "jpg", size: tuple[int, int] | None = None) -> bytes:
    rng = np.random.default_rng(number)
    width, height = size or (30 + number % 40, 70 - number % 30)
    coarse = PilImage.fromarray(rng.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), PilImage.Resampling.BICUBIC).save(
        buffer, "JPEG" if kind == "jpg" else "PNG", quality=90
    )
    return buffer.getvalue()


def sound(number: int, kind: str = "wav", rate: int = 16000, seconds: float | None = None) -> bytes:
    rng = np.random.default_rng(number)
    n = round((0.2 + 0.04 * (number % 12) if seconds is None else seconds) * rate)
    time = np.arange(n) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * (number % 20)) * time) + 0.05 * rng.standard_normal(n)
    buffer = io.BytesIO()
    format, subtype = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "ogg": ("OGG", "VORBIS")}.get(
        kind, ("OGG", "OPUS")
    )
    soundfile.write(buffer, wave.clip(-1, 1), rate, format=format, subtype=subtype)
    return buffer.getvalue()


def sentence(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return " ".join(rng.choice(WORDS, 1 + number % 8)).encode()


def parts(number: int) -> dict[str, bytes]:
    """A whole sample; every kind of file occurs."""
    image, audio = ("jpg", "png")[number % 2], ("wav", "flac", "ogg")[number % 3]
    return {image: picture(number, image), "txt": sentence(number), audio: sound(number, audio)}


def write_dataset(path: Path, splits: dict[str, list[dict[str, bytes]]]) -> Path:
    path.mkdir()
    for split, samples in splits.items():
        with ShardWriter(path / split, shard_bytes=20_000) as writer:
            for number, sample in enumerate(samples):
                writer.write(f"{split}-{number:03d}", sample, label=number % 3)
    about = {
        "version": 1,
        "name": "tiny",
        "classes": ["a", "b", "c"],
        "modalities": ["image", "text", "audio"],
        "splits": {split: len(samples) for split, samples in splits.items()},
        "licence": "",
    }
    (path / "dataset.json").write_text(json.dumps(about))
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def holes(samples: list[dict[str, bytes]]) -> list[dict[str, bytes]]:
    """The same samples, some without a picture, a sentence or a sound, one with nothing but a sound."""
    kept = []
    for number, sample in enumerate(samples):
        gone = {5: ("jpg", "png"), 7: ("txt",), 9: ("wav", "flac", "ogg"), 11: ("jpg", "png", "txt")}.get(
            number % 13, ()
        )
        kept.append({name: data for name, data in sample.items() if name not in gone})
    return kept


def open_data(path: Path, **settings) -> Data:
    return Data(
        DataConfig(
            path=str(path), **{"modalities": MODALITIES, "decoder": "dali", "device": "cpu", **settings}
        )
    )
