"""``mmfast prepare digits``: a benchmark in which fusion pays.

A digit is seen (scikit-learn's 8 x 8 handwritten digits), heard (synthetic speech) and read (its word),
and each of the three is unreliable: pixels and speech are noisy, the word is often that of another digit.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

from mmfast.data.prepare.speech import RATE, WORDS, Wave, load_clips, make_clips
from mmfast.data.prepare.writer import (
    SPLITS,
    DatasetWriter,
    Description,
    add_common_arguments,
    is_finished,
    unit,
)
from mmfast.errors import UserError

PIXEL_NOISE = 6.0  # standard deviation, on the data's scale of 0 to 16
WORD_NOISE = 0.4  # share of samples whose word is drawn at random
SCALE = 4  # 8 x 8 becomes 32 x 32
T = TypeVar("T")
NOTICE = """Images: scikit-learn's load_digits, the test set of the UCI "Optical Recognition of Handwritten
Digits" (E. Alpaydin, C. Kaynak; CC BY 4.0), enlarged, with noise added.
Speech: SYNTHETIC, made with eSpeak NG; no person was recorded; white noise was added.
Text: the digit's word, replaced by a random one in 40 % of the samples.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmfast prepare digits``."""
    add_common_arguments(parser, "data/digits")
    parser.add_argument("--samples", default="6000,900,900", help="train,validation,test (6000,900,900)")
    parser.add_argument("--snr", type=float, default=0.0, help="speech over noise in dB (default: 0)")
    parser.add_argument(
        "--more-voices", action="store_true", help="82 voices, spoken by espeak-ng (installed)"
    )


def prepare(args: argparse.Namespace) -> Path:
    """What the command does."""
    try:
        samples = [int(number) for number in args.samples.split(",")]
    except ValueError:
        raise UserError(
            f"--samples: got {args.samples!r}, wanted three numbers such as 6000,900,900"
        ) from None
    chosen = {"snr": args.snr, "more_voices": args.more_voices, "seed": args.seed, "force": args.force}
    return prepare_digits(args.out, samples=samples, **chosen)


def prepare_digits(
    out: Path | str = "data/digits",
    *,
    samples: Sequence[int] = (6000, 900, 900),
    snr: float = 0.0,
    more_voices: bool = False,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write the dataset and return its folder; the same arguments give the same bytes on every machine.

    ``samples``: how many for train, validation and test. Images and voices are disjoint between the splits
    (70/15/15); ``snr``: speech over noise in dB. Within a
    split an image is used again with other clips, other noise and another word.
    """
    out = Path(out)
    if len(samples) != 3 or min(samples) < 1:
        raise UserError(f"samples: got {list(samples)}, wanted three numbers of 1 or more")
    arguments = {"samples": list(samples), "snr": snr, "more_voices": more_voices, "seed": seed}
    if is_finished(out, arguments, force):
        return out
    about = Description("digits", WORDS, "CC BY 4.0; synthetic speech", NOTICE, arguments)
    with DatasetWriter(out, about, force) as writer:
        digits = load_digits()
        clips = make_clips() if more_voices else load_clips()
        image_splits = _thirds(list(range(len(digits.target))), seed, "image")
        voice_splits = _thirds(sorted(clips), seed, "voice")
        total = sum(samples)
        print(f"digits: {len(digits.target)} images, {len(clips)} synthetic voices", file=sys.stderr)
        with tqdm(total=total, desc="digits", disable=None) as bar:
            for number, split in enumerate(SPLITS):
                images, speakers = image_splits[number], voice_splits[number]
                for i in range(samples[number]):
                    rng = np.random.Generator(np.random.PCG64([seed, number, i]))
                    image = images[i % len(images)]
                    digit = int(digits.target[image])
                    voice = speakers[rng.integers(len(speakers))]
                    word = int(rng.integers(10)) if rng.random() < WORD_NOISE else digit
                    parts = {
                        "png": noisy_image(digits.images[image], rng),
                        "txt": WORDS[word].encode(),
                        "flac": noisy_speech(clips[voice][digit], snr, rng),
                    }
                    writer.write(split, f"{split}{i:06d}", parts, WORDS[digit], image=image, voice=voice)
                    bar.update()
    return out


def noisy_image(pixels: npt.NDArray[np.float64], rng: np.random.Generator) -> bytes:
    """8 x 8 values of 0 to 16, noise on each of them, as a grey PNG of 32 x 32."""
    noisy = np.clip(pixels + rng.normal(0, PIXEL_NOISE, pixels.shape), 0, 16)
    grey = np.round(noisy * (255 / 16)).astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)  # [32, 32]
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


def noisy_speech(wave: Wave, snr: float, rng: np.random.Generator) -> bytes:
    """The wave with white noise ``snr`` dB below it, as FLAC, root mean square 0.15."""
    power = np.sqrt(np.mean(np.square(wave, dtype=np.float64)))
    amplitude = 10 ** (-snr / 20)  # of the noise, the speech's being 1
    noisy = wave / power + rng.normal(0, amplitude, len(wave))
    loudness = 0.15 / np.hypot(1, amplitude)
    samples = np.clip(np.round(noisy * loudness * 256), -256, 255)  # 9-bit steps, and FLAC stores no more
    buffer = io.BytesIO()
    soundfile.write(buffer, (samples * 128).astype(np.int16), RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _thirds(items: list[T], seed: int, what: str) -> list[list[T]]:
    """70/15/15, in an order drawn by hash."""
    order = sorted(items, key=lambda item: unit(seed, what, item))
    first, second = round(len(order) * 0.70), round(len(order) * 0.85)
    return [order[:first], order[first:second], order[second:]]
