"""Ten words by many synthetic voices: the clips that ship with mmfast, and how they were made.

``python -m mmfast.data.prepare.speech FOLDER`` makes them again with eSpeak NG (Debian: ``espeak-ng``).
"""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from mmfast.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000
CLIPS = Path(__file__).parents[1] / "clips"
ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
SHIPPED = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Marco Mario Michael Mike "
    "adam anika antonio aunty belinda benjamin boris caleb david ed edward f1 f2 f3 f4 f5 grandma "
    "grandpa iven john kaukovalta linda m1 m2 m3 m4 m5 m6 m7 pablo paul steph"
).split()
MORE = (
    "Gene2 Nguyen RicishayMax Storm Tweaky announcer edward2 gustave iven2 iven3 iven4 klatt klatt2 "
    "klatt3 klatt4 klatt5 klatt6 m8 marcelo max michel miguel norbert pedro quincy rob robert sandro "
    "shelby steph2 steph3 travis victor zac"
).split()

Wave = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Voice:
    """One speaker: a voice variant with an accent, a pitch (0 to 99) and a speed (words a minute)."""

    variant: str
    accent: str
    pitch: int
    speed: int


def voices(more: bool = False) -> list[Voice]:
    """The voices that ship, and with ``more`` those that eSpeak NG has beside them."""
    names = SHIPPED + MORE if more else SHIPPED
    return [
        Voice(n, ACCENTS[i % len(ACCENTS)], 30 + 7 * i % 41, 130 + 11 * i % 46) for i, n in enumerate(names)
    ]


def synthesise(voice: Voice, word: str) -> Wave:
    """Speak a word with eSpeak NG: mono, ``RATE``, silence cut off, peak 0.8, in 8-bit steps."""
    import torch
    from torchaudio.functional import resample

    if shutil.which("espeak-ng") is None:
        raise UserError(
            "espeak-ng is not installed (apt-get install espeak-ng); without it only shipped clips can be had"
        )
    name = ["-v", f"{voice.accent}+{voice.variant}", "-p", str(voice.pitch), "-s", str(voice.speed)]
    done = subprocess.run(["espeak-ng", *name, "--stdout", word], capture_output=True)
    if done.returncode or not done.stdout:
        raise UserError(
            f"espeak-ng cannot speak as {voice.accent}+{voice.variant}: {done.stderr.decode().strip()}"
        )
    wave, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    wave = resample(torch.from_numpy(wave), rate, RATE).numpy()
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1] * (0.8 / np.abs(wave).max())
    quantised: Wave = (np.round(wave * 128) / 128).astype(np.float32)
    return quantised


def load_clips() -> dict[str, list[Wave]]:
    """The clips that ship, as voice variant -> one wave per word; lossless, so the same on every machine."""
    about = json.loads((CLIPS / "digits.json").read_bytes())
    wave, _ = soundfile.read(CLIPS / "digits.flac", dtype="float32")
    clips: dict[str, list[Wave]] = {}
    start = 0
    for voice in about["voices"]:
        clips[voice["variant"]] = []
        for length in voice["lengths"]:
            clips[voice["variant"]].append(wave[start : start + length])
            start += length
    return clips


def make_clips() -> dict[str, list[Wave]]:
    """The same with eSpeak NG, and more voices."""
    return {voice.variant: [synthesise(voice, word) for word in WORDS] for voice in voices(more=True)}


def write_clips(folder: Path) -> None:
    """Write ``digits.flac`` (all clips, end to end) and ``digits.json`` (voices, clip lengths)."""
    listed, waves = [], []
    for voice in voices():
        spoken = [synthesise(voice, word) for word in WORDS]
        listed.append({**asdict(voice), "lengths": [len(wave) for wave in spoken]})
        waves += spoken
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True).stdout.split("  ")[0]
    about = {
        "what": "synthetic speech: no person was recorded",
        "made_with": f"{version}; python -m mmfast.data.prepare.speech",
        "rate": RATE,
        "words": WORDS,
    }
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "digits.flac", np.concatenate(waves), RATE, subtype="PCM_16")
    rows = ",\n  ".join(json.dumps(row) for row in listed)
    text = json.dumps(about, indent=1)[:-2] + f',\n "voices": [\n  {rows}\n ]\n}}\n'
    (folder / "digits.json").write_text(text)


if __name__ == "__main__":
    write_clips(Path(sys.argv[1]))
