"""What a modality is: a frozen description of how bytes become a tensor. The YAML holds exactly these."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Modality:
    """How one component of a sample (a member of its shard) becomes one tensor of a batch.

    A model sees the modality under the name it has in ``DataConfig.modalities``, so two modalities may read
    the same component, and two cameras are two ``Image``s with a component each.
    """

    component: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's tensor; the same for every sample, so that batches have static shapes."""
        raise NotImplementedError(f"{type(self).__name__} has no shape")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return torch.float32

    def empty(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Zeros [batch, *shape]: what a row holds where the modality is absent."""
        return torch.zeros(batch, *self.shape, dtype=self.dtype, device=device)


def _positive(modality: Modality, *names: str) -> None:
    for name in names:
        if not 0 < getattr(modality, name) < math.inf:  # nan too
            raise UserError(
                f"{type(modality).__name__}.{name}: got {getattr(modality, name)}, wanted more than 0, finite"
            )


@dataclass(frozen=True, kw_only=True)
class Image(Modality):
    """A JPEG or PNG -> float32 [3, size, size], channels_last in memory, ``(pixel / 255 - mean) / std``.

    In training a random box is cut out as torchvision's ``RandomResizedCrop(scale=crop_scale)`` does and,
    with ``flip``, mirrored half of the time; in evaluation the largest centred square is taken.
    Orientation tags (EXIF) are obeyed; an alpha channel is dropped.
    """

    component: str = "image"
    size: int = 112
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_scale: tuple[float, float] = (0.35, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, "size")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"Image.crop_scale: got {self.crop_scale}, wanted 0 < low <= high <= 1")
        if not all(0 < value < math.inf for value in self.std):
            raise UserError(f"Image.std: got {self.std}, wanted three numbers above 0")
        if not all(map(math.isfinite, self.mean)):
            raise UserError(f"Image.mean: got {self.mean}, wanted three numbers")

    @property
    def shape(self) -> tuple[int, ...]:
        """[3, size, size]."""
        return (3, self.size, self.size)

    def empty(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Zeros [batch, 3, size, size] in channels_last memory."""
        return torch.zeros(batch, self.size, self.size, 3, device=device).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Text(Modality):
    """UTF-8 text -> int64 [max_tokens] by the dataset's tokenizer, cut at ``max_tokens``, 0 = pad."""

    component: str = "text"
    max_tokens: int = 32

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, "max_tokens")

    @property
    def shape(self) -> tuple[int, ...]:
        """[max_tokens]."""
        return (self.max_tokens,)

    @property
    def dtype(self) -> torch.dtype:
        """Token ids."""
        return torch.int64


@dataclass(frozen=True, kw_only=True)
class Audio(Modality):
    """A wav, flac or ogg (vorbis, opus) -> float32 [n_mels, frames], the log of a mel power spectrogram.

    Mixed to mono, resampled to ``sample_rate``, cut at ``max_seconds``, then ``log(mel + floor)`` where mel
    is torchaudio's ``MelSpectrogram(sample_rate, n_fft, hop_length=hop, n_mels=n_mels)`` of it
    (HTK mels, power 2, Hann window, centred frames, reflected ends); 0 beyond the sound's own frames.
    """

    component: str = "audio"
    sample_rate: int = 16000
    n_fft: int = 400
    hop: int = 160
    n_mels: int = 64
    max_seconds: float = 4.0
    floor: float = 1e-6

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, "sample_rate", "n_fft", "hop", "n_mels", "max_seconds", "floor")
        if self.max_samples <= self.n_fft // 2:
            raise UserError(f"Audio.max_seconds: got {self.max_seconds}, wanted more than half a window")

    @property
    def max_samples(self) -> int:
        """Samples of sound kept."""
        return round(self.max_seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Frames of the padded spectrogram."""
        return self.max_samples // self.hop + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """[n_mels, frames]."""
        return (self.n_mels, self.frames)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which dataset, which modalities under which names, and how they are decoded.

    Attributes:
        path: folder made by ``mmfast prepare`` (it holds ``dataset.json``).
        modalities: name -> description; the order is that of ``lengths`` and ``present`` in a batch.
        seed: of the order and of the augmentation.
        augment: False takes the evaluation's view of each sample in training too.
        decoder: "dali", "torch" (torchcodec, soundfile, torchaudio) or "auto": DALI where it imports.
        device: "cpu", "gpu" (DALI decodes on the current CUDA device and batches are born there) or "auto".
        threads: decoding threads of each process.
        prefetch: finished batches kept ready.
        memory_mb: decoded sounds kept for the next epoch, in MB for each process; 0 keeps none.
    """

    path: str
    modalities: dict[str, Modality]
    seed: int = 0
    augment: bool = True
    decoder: str = "auto"
    device: str = "auto"
    threads: int = 2
    prefetch: int = 2
    memory_mb: int = 256

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        reserved = {"lengths", "present", "label", "id"}
        if not self.modalities:
            raise UserError("data.modalities: got none, wanted at least one")
        if taken := reserved & self.modalities.keys():
            raise UserError(
                f"data.modalities: {sorted(taken)[0]!r} is a key of every batch; wanted another name"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"data.seed: got {self.seed}, wanted a number of 64 bits")
        for name, wanted in (("decoder", ("auto", "dali", "torch")), ("device", ("auto", "cpu", "gpu"))):
            if getattr(self, name) not in wanted:
                raise UserError(
                    f"data.{name}: got {getattr(self, name)!r}, wanted one of {', '.join(wanted)}"
                )
        for name in ("threads", "prefetch"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name}: got {getattr(self, name)}, wanted at least 1")
        if self.memory_mb < 0:
            raise UserError(f"data.memory_mb: got {self.memory_mb}, wanted 0 or more")
