"""A step's samples, read and checked, then decoded into a batch: two stages that know nothing of threads."""

import importlib.util
import threading
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmfast.data.augment import centre_boxes, random_boxes, random_flips, salt
from mmfast.data.decode import (
    AudioFile,
    Decoder,
    ImageFile,
    TorchAudio,
    TorchImages,
    UndecodableError,
    check_audio,
    check_image,
    check_text,
    decode_rows,
)
from mmfast.data.modality import Audio, DataConfig, Image, Modality, Text
from mmfast.data.plan import InOrder, Ints, Plan
from mmfast.data.shards import ShardIndex
from mmfast.data.text import TextEncoder
from mmfast.errors import UserError

Batch = dict[str, Tensor]
Fault = tuple[int, str, str]  # sample, modality, reason
Key = tuple[str, str, int]  # split, modality, sample


@dataclass(frozen=True)
class View:
    """Which rows of which split a loader makes, and how they are looked at."""

    split: str
    index: ShardIndex
    plan: Plan | InOrder
    modalities: dict[str, Modality]
    kept: tuple[str, ...]
    seed: int
    augment: bool
    rank: int
    world_size: int


class Memory:
    """What needs no second decoding, shared by a ``Data``'s loaders: sounds, up to a limit, and bad files.

    A sound's log-mel is the same in every epoch, and decoding it is the dearest part of a batch.
    """

    def __init__(self, megabytes: int) -> None:
        """Nothing is dropped to make room: a sound that finds none is decoded each time."""
        self.bad: dict[Key, str] = {}
        self.sounds: dict[Key, Tensor] = {}
        self._free = megabytes << 20
        self._lock = threading.Lock()

    def keep(self, key: Key, log_mel: Tensor) -> None:
        """Keep a copy of ``log_mel`` [n_mels, valid frames] if it still fits."""
        size = log_mel.numel() * log_mel.element_size()
        with self._lock:
            if key in self.sounds or size > self._free:
                return
            self._free -= size
            self.sounds[key] = log_mel.clone()


@dataclass
class _Part:
    """What one modality of one batch has: rows with their files (or texts), and rows decoded before."""

    rows: list[int] = field(default_factory=list)
    files: list[Any] = field(default_factory=list)
    remembered: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Work:
    """A batch between reading and decoding."""

    ids: Ints
    parts: dict[str, _Part]
    faults: list[Fault]


class Reader:
    """Reads a step's bytes, checks them, and draws each image's box."""

    def __init__(self, view: View, memory: Memory) -> None:
        """``memory`` is asked first."""
        self._view, self._memory = view, memory
        self._salt = {name: salt(name) for name in view.kept}

    def read(self, step: int) -> Work:
        """This rank's rows of ``step``."""
        view = self._view
        mine = slice(view.rank, None, view.world_size)
        ids, epochs = view.plan.samples(step)[mine], view.plan.epochs(step)[mine]
        work = Work(ids, {}, [])
        for name in view.kept:
            work.parts[name] = self._read(name, ids, epochs, work.faults)
        return work

    def _read(self, name: str, ids: Ints, epochs: Ints, faults: list[Fault]) -> _Part:
        view, part, checked = self._view, _Part(), []
        modality = view.modalities[name]
        for row, sample in enumerate(ids.tolist()):
            key = (view.split, name, sample)
            if sample < 0:
                continue
            if (log_mel := self._memory.sounds.get(key)) is not None:
                part.remembered[row] = log_mel
                continue
            try:
                if reason := self._memory.bad.get(key):
                    raise UndecodableError(reason)
                data = view.index.read(sample, modality.component)
                if data is None:
                    continue
                checked.append(_check(modality, data))
            except UndecodableError as error:
                faults.append((sample, name, str(error)))
                continue
            part.rows.append(row)
            part.files.append(data)
        if isinstance(modality, Text):
            part.files = checked
        elif isinstance(modality, Audio):
            part.files = [AudioFile(data) for data in part.files]
        elif part.rows:
            part.files = self._boxed(name, part, np.array(checked, np.int64), ids, epochs)
        return part

    def _boxed(self, name: str, part: _Part, sizes: Ints, ids: Ints, epochs: Ints) -> list[ImageFile]:
        image = cast(Image, self._view.modalities[name])
        if self._view.augment:
            key = (self._view.seed, epochs[part.rows], ids[part.rows], self._salt[name])
            boxes = random_boxes(sizes, image.crop_scale, *key)
            flips = random_flips(*key) & image.flip
        else:
            boxes, flips = centre_boxes(sizes), np.zeros(len(sizes), np.bool_)
        views = zip(part.files, boxes.tolist(), flips.tolist(), strict=True)
        return [ImageFile(data, tuple(box), flip) for data, box, flip in views]


def _check(modality: Modality, data: bytes) -> Any:
    """The image's height and width, or the text; ``UndecodableError`` where the bytes are not whole."""
    if isinstance(modality, Image):
        return check_image(data)
    if isinstance(modality, Audio):
        return check_audio(data)
    return check_text(data)


class Assembler:
    """Decodes a step's files into its batch."""

    def __init__(
        self, view: View, config: DataConfig, tokenizer: Any, device: torch.device, memory: Memory
    ) -> None:
        """Decoders are made here, and started by their first files."""
        self._view, self._device, self._memory = view, device, memory
        self._decoders: dict[str, Decoder] = {}
        self._encoders: dict[str, TextEncoder] = {}
        for name in view.kept:
            modality = view.modalities[name]
            if isinstance(modality, Text):
                self._encoders[name] = TextEncoder(tokenizer, modality.max_tokens)
            else:
                batch = view.plan.batch_size // view.world_size
                self._decoders[name] = _make_decoder(modality, config, device, batch)

    def assemble(self, work: Work) -> tuple[Batch, list[Fault]]:
        """The batch, and what went wrong in it."""
        view, size = self._view, len(work.ids)
        batch: Batch = {}
        lengths = torch.zeros(len(view.modalities), size, dtype=torch.int64)  # [M, B]
        for (name, modality), steps in zip(view.modalities.items(), lengths, strict=True):
            batch[name] = modality.empty(size, "cpu" if isinstance(modality, Text) else self._device)
            if name in work.parts:
                bad = self._fill(name, work, batch[name], steps)
                work.faults += [(int(work.ids[row]), name, reason) for row, reason in bad.items()]
        labels = np.where(work.ids >= 0, view.index.labels[work.ids], -1)
        batch["lengths"] = lengths.T.contiguous()
        batch["present"] = batch["lengths"] > 0
        batch["label"] = torch.from_numpy(labels.astype(np.int64))
        batch["id"] = torch.from_numpy(work.ids.copy())
        return batch, work.faults

    def close(self) -> None:
        """Let go of the decoders' threads."""
        for decoder in self._decoders.values():
            decoder.close()

    def _fill(self, name: str, work: Work, values: Tensor, steps: Tensor) -> dict[int, str]:
        """Write the modality's rows into ``values`` [B, *shape] and ``steps`` [B]; returns the bad rows."""
        part, bad = work.parts[name], dict[int, str]()
        for row, log_mel in part.remembered.items():
            steps[row] = log_mel.shape[1]
            values[row, :, : log_mel.shape[1]] = log_mel
        if not part.rows:
            return bad
        rows = torch.tensor(part.rows)
        if name in self._encoders:
            values[rows], steps[rows] = self._encoders[name](part.files)
            return {row: "no tokens" for row in part.rows if not steps[row]}
        bad = decode_rows(self._decoders[name], part.files, rows, values, steps)
        keys = {row: (self._view.split, name, int(work.ids[row])) for row in part.rows}
        for row, reason in bad.items():
            self._memory.bad[keys[row]] = reason
        if isinstance(self._view.modalities[name], Audio) and self._device.type == "cpu":
            for row in keys.keys() - bad.keys():
                self._memory.keep(keys[row], values[row, :, : int(steps[row])])
        return bad


def _make_decoder(modality: Modality, config: DataConfig, device: torch.device, batch: int) -> Decoder:
    image = isinstance(modality, Image)
    if choose_decoder(config) == "torch":
        plain: Any = TorchImages if image else TorchAudio
        return cast(Decoder, plain(modality, config.threads))
    from mmfast.data.dali import DaliAudio, DaliImages

    dali: Any = DaliImages if image else DaliAudio
    return cast(Decoder, dali(modality, batch, device, config.threads))


def choose_decoder(config: DataConfig) -> str:
    """ "dali" or "torch"; ``UserError`` where the configuration asks for a DALI that is not there."""
    there = (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    )
    if config.decoder == "dali" and not there:
        raise UserError("data.decoder: got 'dali', which is not installed; wanted 'torch' or 'auto'")
    return "dali" if there and config.decoder != "torch" else "torch"


def choose_device(config: DataConfig) -> torch.device:
    """Where decoded batches are born."""
    usable = choose_decoder(config) == "dali" and torch.cuda.is_available()
    if config.device == "gpu" and not usable:
        why = "no CUDA device is there" if not torch.cuda.is_available() else "only DALI decodes on the GPU"
        raise UserError(f"data.device: got 'gpu', but {why}; wanted 'cpu' or 'auto'")
    if config.device == "cpu" or not usable:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
