"""Encoded bytes: what is checked before any decoder sees them, and decoding without DALI.

The checks find what decoders pass over in silence: a JPEG, an Ogg or a WAV that was cut short decodes to
something in all of them.
"""

import functools
import io
import math
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor

from mmfast.data.modality import Audio, Image
from mmfast.data.threads import work_alone

Floats = NDArray[np.float32]
MAX_PIXELS = 1 << 28  # a damaged header must not ask for all memory
MAX_RATE = 768_000  # nor for a filter of gigabytes
MAX_SAMPLE = 1e6  # full scale is 1; the power of much more is no float32
_BLOCK = 1 << 20  # samples decoded at a time
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class UndecodableError(Exception):
    """These bytes are not what they should be; the message says why, in a few words."""


@dataclass(frozen=True)
class ImageFile:
    """An encoded image and the view of it that is wanted."""

    data: bytes
    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool


@dataclass(frozen=True)
class AudioFile:
    """An encoded sound."""

    data: bytes


class Decoder(Protocol):
    """Decodes files of one modality; any of them failing fails the call with ``UndecodableError``.

    The values may be a view that the next call overwrites; the steps are the valid steps of each, int64 [n].
    """

    known_good: ImageFile | AudioFile

    def __call__(self, files: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Values [n, *shape] and steps [n]."""

    def close(self) -> None:
        """Let go of threads and memory."""


def check_image(data: bytes) -> tuple[int, int]:
    """Height and width of a whole JPEG or PNG, upright; ``UndecodableError`` for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        height, width = _check_jpeg(data)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        height, width = _check_png(data)
    else:
        raise UndecodableError("neither JPEG nor PNG")
    if height * width > MAX_PIXELS:
        raise UndecodableError(f"{width} x {height} pixels, more than {MAX_PIXELS}")
    return height, width


def _check_jpeg(data: bytes) -> tuple[int, int]:
    position, size, turned = 2, None, False
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            raise UndecodableError("broken JPEG header")
        marker = data[position + 1]
        if (
            marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD7
        ):  # fill byte, or a marker without a body
            position += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position + 4 : position + 2 + length]
        if marker == 0xDA:  # start of scan; inside it an end marker cannot occur by chance
            if size is None or min(size) == 0:
                raise UndecodableError("broken JPEG header")
            if data.rfind(b"\xff\xd9", position) < 0:
                raise UndecodableError("JPEG cut short: no end marker")
            return (size[1], size[0]) if turned else size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            size = (int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"))
        if marker == 0xE1 and body[:6] == b"Exif\0\0":
            turned = _turned(body)
        position += 2 + length
    raise UndecodableError("JPEG cut short: no image data")


def _check_png(data: bytes) -> tuple[int, int]:
    if data.rfind(PNG_END) < 0:
        raise UndecodableError("PNG cut short: no end marker")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[12:16] != b"IHDR" or min(width, height) == 0:
        raise UndecodableError("broken PNG header")
    exif = data.find(b"eXIf", 33, data.find(b"IDAT"))
    if exif >= 0:
        length = int.from_bytes(data[exif - 4 : exif], "big")
        if _turned(b"Exif\0\0" + data[exif + 4 : exif + 4 + length]):
            return width, height
    return height, width


def _turned(exif: bytes) -> bool:
    """Whether the orientation tag swaps height and width.

    Read as the decoders read it: 16 bits where the value stands, whatever type and count the tag claims.
    """
    order = ">" if exif[6:8] == b"MM" else "<"
    try:
        (start,) = struct.unpack_from(order + "I", exif, 10)
        (count,) = struct.unpack_from(order + "H", exif, 6 + start)
        for entry in range(8 + start, 8 + start + 12 * count, 12):
            tag, value = struct.unpack_from(order + "H6xH", exif, entry)
            if tag == 0x0112:
                return 5 <= value <= 8
    except struct.error:
        pass  # decoders ignore a broken tag too
    return False


def check_audio(data: bytes) -> None:
    """``UndecodableError`` unless these are the bytes of a whole wav, flac or ogg."""
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        if len(data) < last + 27 or len(data) < last + 27 + data[last + 26]:
            raise UndecodableError("Ogg cut short: inside a page header")
        table = data[last + 27 : last + 27 + data[last + 26]]
        if len(data) < last + 27 + len(table) + sum(table):
            raise UndecodableError("Ogg cut short: inside a page")
        if not data[last + 5] & 4:
            raise UndecodableError("Ogg cut short: no end-of-stream page")
    elif data[:4] in (b"RIFF", b"RIFX") and data[8:12] == b"WAVE":
        order, position = ("<I" if data[:4] == b"RIFF" else ">I"), 12
        while position + 8 <= len(data):
            (length,) = struct.unpack_from(order, data, position + 4)
            if data[position : position + 4] == b"data":
                if length < 0xFFFFFF00 and position + 8 + length > len(data):  # the largest mean "streamed"
                    raise UndecodableError("WAV cut short")
                return
            position += 8 + length + length % 2
        raise UndecodableError("WAV cut short: no samples")
    elif data[:4] == b"fLaC":  # a decoder itself misses the samples that a cut flac lacks
        samples = int.from_bytes(data[21:26], "big") & 0xFFFFFFFFF
        if not samples:
            raise UndecodableError("FLAC that does not say how long it is")
        if samples > len(data) * 6554:  # a frame has 10 bytes or more for at most 65535 samples
            raise UndecodableError(f"FLAC cut short: {len(data)} bytes for {samples} samples")
    else:
        raise UndecodableError("neither WAV, FLAC nor Ogg")


def check_text(data: bytes) -> str:
    """The text; ``UndecodableError`` where it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UndecodableError(f"not UTF-8: byte {data[error.start]:#04x} at {error.start}") from None


def sample_image() -> ImageFile:
    """A tiny PNG that is known to be good."""
    buffer = io.BytesIO()
    PilImage.new("RGB", (8, 8)).save(buffer, "PNG")
    return ImageFile(buffer.getvalue(), (0, 0, 8, 8), False)


def sample_audio() -> AudioFile:
    """A short WAV that is known to be good."""
    samples = bytes(2 * 1600)
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, 16000,
                         32000, 2, 16, b"data", len(samples))  # fmt: skip
    return AudioFile(header + samples)


class TorchImages:
    """Images by torchcodec and torch's own resampling, on a few threads."""

    known_good = sample_image()

    def __init__(self, modality: Image, threads: int) -> None:
        """``modality`` gives size, mean and std."""
        self._size = modality.size
        self._scale = 1 / (255 * torch.tensor(modality.std)).view(3, 1, 1)
        self._shift = -(torch.tensor(modality.mean) / torch.tensor(modality.std)).view(3, 1, 1)
        self._pool = ThreadPoolExecutor(threads, "mmfast-image", work_alone)

    def __call__(self, files: Sequence[ImageFile]) -> tuple[Tensor, Tensor]:
        """Images [n, 3, size, size] and ones [n]."""
        pixels = torch.stack(list(self._pool.map(self._decode, files)))  # uint8 [n, 3, S, S]
        values = torch.addcmul(self._shift, pixels.contiguous(memory_format=torch.channels_last), self._scale)
        return values, torch.ones(len(files), dtype=torch.int64)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, file: ImageFile) -> Tensor:
        top, left, height, width = file.box
        whole = decode_pixels(file.data)  # uint8 [3, H, W]
        if whole.shape[1] < top + height or whole.shape[2] < left + width:
            raise UndecodableError(f"{whole.shape[2]} x {whole.shape[1]} pixels, other than its header says")
        part = whole[None, :, top : top + height, left : left + width]
        small = torch.nn.functional.interpolate(
            part, (self._size, self._size), mode="bilinear", antialias=True, align_corners=False
        )[0]
        return small.flip(-1) if file.flip else small


def decode_pixels(data: bytes) -> Tensor:
    """Upright RGB pixels, uint8 [3, H, W]."""
    from torchcodec.decoders import decode_image  # type: ignore[attr-defined]

    try:
        return decode_image(data, mode="RGB")
    except RuntimeError as error:
        raise UndecodableError(f"does not decode: {str(error).splitlines()[0]}") from error


def resample(wave: Floats, rate: int, wanted: int) -> Floats:
    """``torchaudio.functional.resample(wave, rate, wanted)``, [n] -> [ceil(n * wanted / rate)], float32.

    The same filter (a sinc under a squared cosine, 6 zero crossings, rolled off at 0.99), run on the calling
    thread and without its zeros: torchaudio's convolution multiplies by 12 of them for each coefficient from
    44.1 to 16 kHz, and torch's thread pool would compete with the training step's.
    """
    from scipy.signal import upfirdn

    if rate == wanted:
        return wave
    common = math.gcd(rate, wanted)
    down, up = rate // common, wanted // common
    taps, reach = _taps(down, up)
    size = -(-len(wave) * up // down)
    first = -(-reach // down)  # the filter's middle must fall on a multiple of `down`
    padded = np.concatenate([np.zeros(first * down - reach, np.float32), taps])
    return upfirdn(padded, wave, up, down)[first : first + size]


@functools.lru_cache(16)
def _taps(down: int, up: int) -> tuple[Floats, int]:
    """The filter at the rate that both rates divide, and how far it reaches to either side."""
    crossings, rolloff = 6, 0.99
    cutoff = rolloff * min(down, up)
    reach = math.ceil(crossings * down * up / cutoff)
    time = np.clip(np.arange(-reach, reach + 1) * (cutoff / (down * up)), -crossings, crossings)
    taps = np.sinc(time) * np.cos(time * (np.pi / crossings / 2)) ** 2 * (cutoff / down)
    return taps.astype(np.float32), reach


def trim(wave: Floats, rate: int, modality: Audio) -> Floats:
    """A decoded mono wave [n] at the modality's rate and length; ``UndecodableError`` where it has none."""
    if not len(wave):
        raise UndecodableError("no samples")
    if not 0 < rate <= MAX_RATE:
        raise UndecodableError(f"{rate} Hz, wanted 1 to {MAX_RATE}")
    beyond = modality.sample_rate // 20  # more than the filter reaches: the cut leaves no trace
    kept = math.ceil((modality.max_samples + beyond) * rate / modality.sample_rate)
    if not (np.abs(wave[:kept]) <= MAX_SAMPLE).all():
        raise UndecodableError(f"samples that are no numbers, or beyond {MAX_SAMPLE:.0e}")
    wave = resample(wave[:kept], rate, modality.sample_rate)[: modality.max_samples]
    least = modality.n_fft // 2 + 1  # what the reflection at the ends needs
    return np.pad(wave, (0, max(0, least - len(wave))))


class TorchAudio:
    """Sounds by soundfile and torchaudio, on a few threads."""

    known_good = sample_audio()

    def __init__(self, modality: Audio, threads: int) -> None:
        """``modality`` gives the rate, the spectrogram's numbers and the length kept."""
        from torchaudio.transforms import MelSpectrogram

        self._modality = modality
        self._mel = MelSpectrogram(
            modality.sample_rate, modality.n_fft, hop_length=modality.hop, n_mels=modality.n_mels
        )
        self._pool = ThreadPoolExecutor(threads, "mmfast-audio", work_alone)

    def __call__(self, files: Sequence[AudioFile]) -> tuple[Tensor, Tensor]:
        """Log-mels [n, n_mels, frames] and valid frames [n]."""
        values = self._modality.empty(len(files))
        steps = torch.zeros(len(files), dtype=torch.int64)
        for row, log_mel in enumerate(self._pool.map(self._decode, files)):
            values[row, :, : log_mel.shape[1]] = log_mel
            steps[row] = log_mel.shape[1]
        return values, steps

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, file: AudioFile) -> Tensor:
        wave = trim(*decode_wave(file.data), self._modality)
        return torch.log(self._mel(torch.from_numpy(wave)) + self._modality.floor)


def decode_wave(data: bytes) -> tuple[Floats, int]:
    """Samples mixed to mono, float32 [n], and their rate."""
    import soundfile

    blocks = []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, wanted = file.samplerate, file.frames
            # in blocks: a header may promise any number of samples, or, in a FLAC that was streamed, none
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):  # [n, channels]
                blocks.append(block.mean(axis=1))
    except RuntimeError as error:
        raise UndecodableError(f"does not decode: {error}") from error
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(samples) < wanted:
        raise UndecodableError(f"does not decode: {len(samples)} of {wanted} samples")
    return samples, rate


def decode_rows(
    decoder: Decoder,
    files: Sequence[ImageFile | AudioFile],
    rows: Tensor,
    values: Tensor,
    steps: Tensor,
) -> dict[int, str]:
    """Decode into ``rows`` of ``values`` [B, *shape] and ``steps`` [B]; returns row -> reason for the bad.

    One bad file fails a whole call, so a call that fails is split in two until the bad files stand alone;
    what the others decode to does not depend on their company. Where even the decoder's ``known_good``
    file fails, not the file is broken but the decoder: that error is raised.
    """
    try:
        decoded, valid = decoder(files)
    except UndecodableError as error:
        if len(files) == 1:
            decoder([decoder.known_good])
            return {int(rows[0]): str(error)}
        half = len(files) // 2
        return {
            **decode_rows(decoder, files[:half], rows[:half], values, steps),
            **decode_rows(decoder, files[half:], rows[half:], values, steps),
        }
    _memory_order(values).index_copy_(0, rows.to(values.device), _memory_order(decoded))
    steps.index_copy_(0, rows, valid)
    return {}


def _memory_order(x: Tensor) -> Tensor:
    """Images as [n, H, W, C], the order they have in memory: a row is then one copy."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x
