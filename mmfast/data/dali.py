"""Decoding by NVIDIA DALI, on the CPU or, with JPEGs by nvJPEG and spectrograms by CUDA, on the GPU.

Imported only when it is chosen. We read the bytes and draw the boxes; DALI is given both and returns tensors.
"""

# mypy: disable-error-code="attr-defined,arg-type"
# (DALI's stubs know neither its own types nor `device_id=None`)

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.math import log
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from mmfast.data.decode import AudioFile, ImageFile, UndecodableError, sample_audio, sample_image, trim
from mmfast.data.modality import Audio, Image


class _Pipeline:
    """A DALI pipeline, run once per call. One that has failed is of no use: the next call builds anew."""

    def __init__(self, build: Callable[[], Any], device: torch.device) -> None:
        self._build, self.device = build, device
        self._pipeline: Any = None

    def run(self, **inputs: Any) -> tuple[Any, ...]:
        """The pipeline's outputs; they are DALI's memory until the next call."""
        if self._pipeline is None:
            self._pipeline = self._build()
            self._pipeline.build()
        try:
            for name, arrays in inputs.items():
                self._pipeline.feed_input(name, list(arrays))
            return self._pipeline.run()
        except RuntimeError as error:
            self.close()
            raise UndecodableError(f"does not decode: {_reason(str(error))}") from error

    def tensor(self, output: Any) -> Tensor:
        """A dense output as a tensor: on the CPU DALI's memory itself, on the GPU a copy."""
        dense = output.as_tensor()
        if self.device.type == "cpu":
            return torch.from_numpy(np.asarray(dense))
        values = torch.empty(dense.shape(), device=self.device)
        feed_ndarray(dense, values, cuda_stream=torch.cuda.current_stream(self.device))
        return values

    def close(self) -> None:
        """Drop the pipeline with its threads and buffers."""
        self._pipeline = None


def _reason(message: str) -> str:
    """The line of DALI's report that says what happened."""
    said = message.partition("encountered:")[2].strip() or message
    return said.splitlines()[0].strip()


def _files(files: Sequence[ImageFile] | Sequence[AudioFile]) -> list[np.ndarray]:
    return [np.frombuffer(file.data, np.uint8) for file in files]


class DaliImages:
    """JPEG and PNG -> crop while decoding -> resize -> flip and normalise."""

    known_good = sample_image()

    def __init__(self, modality: Image, batch: int, device: torch.device, threads: int) -> None:
        """``batch`` is the most files a call may have."""
        gpu = device.type == "cuda"

        @pipeline_def(
            batch_size=batch,
            num_threads=threads,
            device_id=device.index if gpu else None,
            prefetch_queue_depth=1,  # the loader's own threads read ahead
        )
        def pipeline() -> Any:
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            part = fn.decoders.image_slice(
                file,
                corner,
                extent,
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
                device="mixed" if gpu else "cpu",
            )
            small = fn.resize(
                part, size=(modality.size, modality.size), interp_type=types.INTERP_LINEAR, antialias=True
            )
            return fn.crop_mirror_normalize(
                small,
                mirror=flip,
                mean=[255 * value for value in modality.mean],
                std=[255 * value for value in modality.std],
                output_layout="HWC",
            )

        self._pipeline = _Pipeline(pipeline, device)

    def __call__(self, files: Sequence[ImageFile]) -> tuple[Tensor, Tensor]:
        """Images [n, 3, size, size], channels_last, and ones [n]."""
        boxes = np.array([file.box for file in files], np.int32)
        (images,) = self._pipeline.run(
            file=_files(files),
            corner=boxes[:, :2],
            extent=boxes[:, 2:],
            flip=np.array([file.flip for file in files], np.int32),
        )
        return self._pipeline.tensor(images).permute(0, 3, 1, 2), torch.ones(len(files), dtype=torch.int64)

    def close(self) -> None:
        """Let go of DALI's threads."""
        self._pipeline.close()


class DaliAudio:
    """wav, flac, ogg -> mono -> the modality's rate -> log-mel.

    DALI decodes and makes the spectrograms; in between we resample, because DALI's resampling has no
    low-pass: taken down from 48 to 16 kHz, everything between 8 and 24 kHz is folded into what remains.
    """

    known_good = sample_audio()

    def __init__(self, modality: Audio, batch: int, device: torch.device, threads: int) -> None:
        """``batch`` is the most files a call may have."""
        gpu = device.type == "cuda"
        settings: dict[str, Any] = {"batch_size": batch, "num_threads": threads, "prefetch_queue_depth": 1}
        on_cpu, on_device = (
            {**settings, "device_id": None},
            {**settings, "device_id": device.index if gpu else None},
        )

        @pipeline_def(**on_cpu)
        def decode() -> Any:
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1)
            wave, rate = fn.decoders.audio(file, downmix=True, dtype=types.FLOAT)
            return wave, rate

        @pipeline_def(**on_device)
        def spectrum() -> Any:
            wave = fn.external_source(name="wave", dtype=types.FLOAT, ndim=1)
            power = fn.spectrogram(
                wave.gpu() if gpu else wave,
                nfft=modality.n_fft,
                window_length=modality.n_fft,
                window_step=modality.hop,
                window_fn=torch.hann_window(modality.n_fft).tolist(),
            )
            mel = fn.mel_filter_bank(
                power,
                sample_rate=modality.sample_rate,
                nfilter=modality.n_mels,
                freq_high=modality.sample_rate / 2,
                mel_formula="htk",
                normalize=False,
            )
            return fn.pad(log(mel + modality.floor), axes=[1], shape=[modality.frames])

        self._modality = modality
        self._decode = _Pipeline(decode, torch.device("cpu"))
        self._spectrum = _Pipeline(spectrum, device)

    def __call__(self, files: Sequence[AudioFile]) -> tuple[Tensor, Tensor]:
        """Log-mels [n, n_mels, frames] and valid frames [n]."""
        decoded, rates = self._decode.run(file=_files(files))
        waves = [trim(np.asarray(decoded[i]), int(rates.at(i)), self._modality) for i in range(len(files))]
        (spectra,) = self._spectrum.run(wave=waves)
        steps = torch.tensor([len(wave) // self._modality.hop + 1 for wave in waves])
        return self._spectrum.tensor(spectra), steps

    def close(self) -> None:
        """Let go of DALI's threads."""
        self._decode.close()
        self._spectrum.close()
