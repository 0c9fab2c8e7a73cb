"""The training loop that people write today, as a competent user writes it: the peer of ours.

The same model and the same shards; eager PyTorch in float32, the fusion by ``torch.cat`` and a linear layer,
batches by a ``DataLoader`` with persistent workers, PIL and torchvision's transforms, soundfile and
torchaudio, padded to the longest of the batch. It reads from our shards, which is no slower than a file per
sample.
"""

import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import soundfile
import torch
import torch.nn.functional as F
from PIL import Image as PilImage
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from torchaudio.functional import resample
from torchaudio.transforms import MelSpectrogram
from torchvision.transforms import v2

from mmfast import ops
from mmfast.data import Audio, DataConfig, Dataset, Image, Modality, Text
from mmfast.data.text import open_tokenizer
from mmfast.train import TrainerConfig
from mmfast.train.optim import adamw, learning_rate

Sample = dict[str, Any]
FOREVER = 2**40  # samples: an endless loader has no pause between epochs


class StockLoop:
    """Trains ``model`` a few steps at a time, so that it can take turns with another loop."""

    def __init__(
        self,
        config: DataConfig,
        model: nn.Module,
        trainer: TrainerConfig,
        *,
        workers: int = 2,
        prefetch: int = 2,
    ) -> None:
        """``model`` is a ``FusionModel`` of its own; batch size, optimizer and schedule are ``trainer``'s."""
        self.model = model.train()
        self.batch_size = trainer.batch_size
        self.losses: list[float] = []
        self.seconds = 0.0
        self._trainer = trainer
        self._optimizer = adamw(model, trainer)
        self._made = multiprocessing.Value("q", 0)
        self._ahead = workers * prefetch
        dataset = StockDataset(config, self._made)
        self._loader = DataLoader(
            dataset,
            trainer.batch_size,
            sampler=RandomSampler(dataset, num_samples=FOREVER),
            collate_fn=dataset.collate,
            num_workers=workers,
            prefetch_factor=prefetch,
            persistent_workers=True,
        )
        self._batches: Iterator[dict[str, Tensor]] | None = None

    def steps(self, count: int) -> float:
        """Takes ``count`` steps and returns samples/s.

        The clock starts with full queues and stops when they are full again: what the workers prepare for
        these steps is counted, and they are idle while another loop has its turn.
        """
        if self._batches is None:
            with mock.patch.dict(
                os.environ, TOKENIZERS_PARALLELISM="false"
            ):  # else each fork prints a warning
                self._batches = iter(self._loader)
        self._settle()
        begin = time.perf_counter()
        done = len(self.losses)
        losses = [self._step(next(self._batches), done + i) for i in range(count)]
        self._settle(len(losses))
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.losses += torch.stack(losses).tolist() if losses else []
        return count * self.batch_size / seconds

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None
        del self._loader

    @torch.no_grad()
    def accuracy(self, batches: Iterable[dict[str, Tensor]]) -> float:
        """Share of the batches' labels that the model gets right."""
        self.model.eval()
        right = count = 0
        for batch in batches:
            with ops.backend("reference"):
                guess = self.model(batch)["label"].argmax(-1)
            labelled = batch["label"] >= 0
            right += int((guess == batch["label"])[labelled].sum())
            count += int(labelled.sum())
        self.model.train()
        return right / count

    def _step(self, batch: dict[str, Tensor], number: int) -> Tensor:
        with ops.backend("reference"):  # eager torch.cat, F.linear
            logits = self.model(batch)["label"]
        loss = F.cross_entropy(logits, batch["label"], ignore_index=-1)
        self._optimizer.zero_grad()
        loss.backward()
        if self._trainer.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._trainer.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._trainer, number)
        self._optimizer.step()
        return loss.detach()

    def _settle(self, new: int = 0) -> None:
        while self._made.value < len(self.losses) + new + self._ahead:
            time.sleep(1e-3)


class StockDataset(TorchDataset[Sample]):
    """The train split: name -> tensor [steps, ...] of one sample, and no such key where it is absent."""

    def __init__(self, config: DataConfig, made: Any) -> None:
        """``made``: a shared counter of the batches that were decoded."""
        dataset = Dataset.open(config.path)
        self._index = dataset.split("train")
        self._modalities = config.modalities
        self._made = made
        self._decode = {name: _decoder(m, dataset) for name, m in config.modalities.items()}

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self._index)

    def __getitem__(self, number: int) -> Sample:
        """Decodes and augments one sample."""
        sample: Sample = {"label": int(self._index.labels[number]), "id": number}
        for name, modality in self._modalities.items():
            data = self._index.read(number, modality.component)
            if data is not None:
                sample[name] = self._decode[name](data)
        return sample

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample]:
        """A batch's samples; a failure counts too, it is reported when the batch is asked for."""
        try:
            return [self[number] for number in numbers]
        finally:
            with self._made.get_lock():
                self._made.value += 1

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Pads each modality to its longest sample; the keys and shapes are those of ``mmfast.data``."""
        batch: dict[str, Tensor] = {}
        lengths = []
        for name, modality in self._modalities.items():
            empty = _steps_first(modality, modality.empty(1)[0])[:0]
            parts = [sample.get(name, empty) for sample in samples]
            lengths.append(torch.tensor([len(part) for part in parts]))
            padded = pad_sequence([*parts, empty.new_zeros(1, *empty.shape[1:])], batch_first=True)[:-1]
            batch[name] = padded[:, 0] if isinstance(modality, Image) else padded
            if isinstance(modality, Audio):
                batch[name] = padded.transpose(1, 2)  # [B, n_mels, F]
        batch["lengths"] = torch.stack(lengths, 1)
        batch["present"] = batch["lengths"] > 0
        for key in ("label", "id"):
            batch[key] = torch.tensor([sample[key] for sample in samples])
        return batch


def _steps_first(modality: Modality, x: Tensor) -> Tensor:
    """An image is one step, [1, 3, H, W]; a sound is frames, [F, n_mels]; text is tokens, [T]."""
    return x[None] if isinstance(modality, Image) else x.T if isinstance(modality, Audio) else x


def _decoder(modality: Modality, dataset: Dataset) -> Callable[[bytes], Tensor]:
    if isinstance(modality, Image):
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(modality.size, scale=modality.crop_scale),
                v2.RandomHorizontalFlip(0.5 if modality.flip else 0.0),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(modality.mean, modality.std),
            ]
        )
        return lambda data: transform(PilImage.open(io.BytesIO(data)).convert("RGB"))[None]
    if isinstance(modality, Text):
        tokenizer = open_tokenizer(dataset.tokenizer_path or dataset.path / "tokenizer.json")
        tokenizer.enable_truncation(modality.max_tokens)
        return lambda data: torch.tensor(tokenizer.encode(data.decode()).ids, dtype=torch.int64)
    assert isinstance(modality, Audio)
    mel = MelSpectrogram(
        modality.sample_rate, modality.n_fft, hop_length=modality.hop, n_mels=modality.n_mels
    )

    def decode(data: bytes) -> Tensor:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)  # [N, channels]
        wave = resample(torch.from_numpy(samples.mean(1)), rate, modality.sample_rate)
        return torch.log(mel(wave[: modality.max_samples]) + modality.floor).T  # [F, n_mels]

    return decode
