"""``mmfast prepare stamps``: drawings and photos, their captions, and the captions spoken.

Debian's ``tuxpaint-stamps-default`` holds about 800 stamps for children to paint with. A stamp is a picture
with a written caption and, for most, the caption read aloud in up to a dozen languages; its folder is its
category.
"""

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from mmfast.data.prepare.writer import (
    SPLITS,
    DatasetWriter,
    Description,
    Log,
    add_common_arguments,
    is_finished,
    unit,
)
from mmfast.errors import UserError

PACKAGE = "tuxpaint-stamps-default"
ROOT = "usr/share/tuxpaint/stamps"
FRACTIONS = (0.70, 0.15, 0.15)
FEW = 20  # a category needs this many pictures to be a class by default
MAX_SIDE = 512  # the largest pictures are 2,300 pixels wide
NOTICE = f"""These shards are made from the Debian package {PACKAGE}
(Tux Paint Stamps, https://www.tuxpaint.org): pictures composited on white and saved as JPEG, captions and
recordings unchanged. They stay under that package's licence, the GNU General Public License, version 2.
Do not pass them on without its terms. What the package itself says:

"""


@dataclass(frozen=True)
class Stamp:
    """One stamp: where its files are."""

    name: str  # path without extension, such as animals/birds/blackbird
    category: str
    captions: dict[str, str]  # language -> text
    image: Path | None  # None: drawn as SVG only
    speech: dict[str, Path] = field(default_factory=dict)  # language -> recording


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmfast prepare stamps``."""
    add_common_arguments(parser, "data/stamps")
    parser.add_argument("--deb", type=Path, help=f"a {PACKAGE}_*.deb at hand (default: apt-get download)")
    parser.add_argument(
        "--languages", default="fr", help="spoken: a list such as fr,es or 'all' (default: fr)"
    )
    parser.add_argument("--captions", choices=["en", "spoken"], default="en", help="language of the text")
    parser.add_argument("--all-classes", action="store_true", help=f"also categories under {FEW} pictures")
    parser.add_argument("--complete", action="store_true", help="drop samples that miss a modality")


def prepare(args: argparse.Namespace) -> Path:
    """What the command does."""
    return prepare_stamps(
        args.out,
        deb=args.deb,
        languages=args.languages.split(","),
        captions=args.captions,
        all_classes=args.all_classes,
        complete=args.complete,
        seed=args.seed,
        force=args.force,
    )


def prepare_stamps(
    out: Path | str = "data/stamps",
    *,
    deb: Path | str | None = None,
    languages: Sequence[str] = ("fr",),
    captions: str = "en",
    all_classes: bool = False,
    complete: bool = False,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write the dataset and return its folder.

    One sample is a stamp's picture, its caption, and the caption spoken in one of ``languages`` (``["all"]``:
    every one there is), so a stamp gives several samples where several languages are wanted. A stamp without
    speech in them gives one sample without audio; one that is drawn as SVG only has no image; ``complete``
    drops both.
    Stamps that share a recording, a picture or a caption are always in the same split.

    Raises UserError where the package cannot be had; the line says what was tried.
    """
    out = Path(out)
    arguments = {
        "languages": sorted(languages),
        "captions": captions,
        "all_classes": all_classes,
        "complete": complete,
        "seed": seed,
    }
    if is_finished(out, arguments, force):
        return out
    about = Description("stamps", [], "GPL-2", NOTICE, arguments)
    with DatasetWriter(out, about, force) as writer:
        package = unpack(Path(deb) if deb else download(writer.scratch), writer.scratch / "package")
        stamps = find_stamps(package / ROOT)
        count = Counter(stamp.category for stamp in stamps if stamp.image)
        about.classes = sorted(c for c, n in count.items() if all_classes or n >= FEW)
        stamps = [stamp for stamp in stamps if stamp.category in about.classes]
        spoken = sorted({language for stamp in stamps for language in stamp.speech})
        unknown = set(languages) - set(spoken) - {"all"}
        if unknown:
            raise UserError(
                f"--languages: no speech in {', '.join(sorted(unknown))}; there are: {', '.join(spoken)}"
            )
        wanted = spoken if "all" in languages else [language for language in spoken if language in languages]
        copyright_file = package / "usr/share/doc" / PACKAGE / "copyright"
        if copyright_file.is_file():
            about.notice += copyright_file.read_text(encoding="utf-8")
        groups = group_stamps(stamps)
        splits = split_groups(stamps, groups, seed)
        _write(writer, stamps, groups, splits, wanted, captions, complete)
    return out


def _write(
    writer: DatasetWriter,
    stamps: Sequence[Stamp],
    groups: Sequence[int],
    splits: Sequence[str],
    languages: Sequence[str],
    captions: str,
    complete: bool,
) -> None:
    """Encode on every core, write in order."""
    log = Log()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = pool.map(lambda stamp: encode(stamp.image), stamps)
        total = len(stamps)
        rows = tqdm(zip(stamps, groups, splits, images, strict=True), "stamps", total, disable=None)
        for stamp, group, split, image in rows:
            if isinstance(image, str):
                log("picture that does not decode", f"{stamp.image}: {image}; left without image")
                image = None
            spoken = [language for language in languages if language in stamp.speech]
            for language in spoken or (None,):
                caption = stamp.captions["en"]
                if captions == "spoken" and language is not None:
                    caption = stamp.captions.get(language, caption)
                parts = {"txt": caption.encode()}
                if image is not None:
                    parts["jpg"] = image
                if language is not None:
                    recording = stamp.speech[language]
                    parts[recording.suffix[1:]] = recording.read_bytes()
                if complete and len(parts) < 3:
                    continue
                key = f"{stamp.name}-{language or 'silent'}"
                writer.write(
                    split, key, parts, stamp.category, stamp=stamp.name, group=group, language=language
                )
    log.close()


def download(folder: Path) -> Path:
    """Fetch the package with apt, without root; UserError in one line says what was tried."""
    if shutil.which("apt-get") is None:
        raise UserError(
            f"stamps: {PACKAGE} cannot be had: this system has no apt-get; give the package with --deb"
        )
    quick = ["-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=2"]
    print(f"downloading Debian's {PACKAGE} (161 MB)", file=sys.stderr)
    said = _run(["apt-get", *quick, "download", PACKAGE], folder)
    if said:  # often there are no package lists, as in a fresh container: fetch them into a folder of our own
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder / 'cache'}"]
        (folder / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
        again = _run(["apt-get", *quick, *own, "update"], folder) or _run(
            ["apt-get", *quick, *own, "download", PACKAGE], folder
        )
        if again:
            raise UserError(
                f"stamps: {PACKAGE} cannot be had: `apt-get download` said: {said}; "
                f"with fresh package lists: {again}; give the package with --deb"
            )
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if not found:
        raise UserError(f"stamps: `apt-get download {PACKAGE}` left no file; give the package with --deb")
    return found[-1]


def _run(command: list[str], folder: Path) -> str:
    """Run, with a bar that follows the folder's size; returns the last complaint, or nothing."""
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    finished = threading.Event()

    def follow() -> None:
        with tqdm(desc=command[-2], unit="B", unit_scale=True, disable=None) as bar:
            while not finished.wait(0.5):
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                bar.update(size - bar.n)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        complaint = process.communicate()[1]
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        finished.set()
        follower.join()
    if process.returncode == 0:
        return ""
    lines = [line for line in complaint.splitlines() if line.startswith("E:")] or complaint.splitlines()
    return (lines or [f"exit status {process.returncode}"])[-1].strip()


def unpack(deb: Path, folder: Path) -> Path:
    """Unpack a Debian package into ``folder``."""
    if not deb.is_file():
        raise UserError(f"{deb}: no such file")
    if shutil.which("dpkg-deb") is None:
        raise UserError("stamps: this system has no dpkg-deb to unpack the package with")
    done = subprocess.run(
        ["dpkg-deb", "-x", str(deb), str(folder)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = (done.stderr.splitlines() or ["?"])[0]
        raise UserError(f"{deb}: cannot be unpacked: {said}")
    if not (folder / ROOT).is_dir():
        raise UserError(f"{deb}: holds no {ROOT}; wanted the package {PACKAGE}")
    return folder


def find_stamps(root: Path) -> list[Stamp]:
    """Every stamp with a caption, in the order of their names."""
    found = []
    for text in sorted(root.rglob("*.txt")):
        base = text.with_suffix("")
        image, drawing = base.with_suffix(".png"), base.with_suffix(".svg")
        name = base.relative_to(root).as_posix()
        captions = dict(_captions(text))
        if not captions.get("en") or not (image.is_file() or drawing.is_file()):
            continue
        speech: dict[str, Path] = {}
        for recording in sorted(base.parent.glob(f"{base.name}_desc*")):
            language, _, extension = recording.name[len(f"{base.name}_desc") :].partition(".")
            if extension in ("ogg", "wav") and (not language or language[0] == "_"):
                speech.setdefault(language[1:] or "en", recording)
        found.append(Stamp(name, name.split("/")[0], captions, image if image.is_file() else None, speech))
    if not found:
        raise UserError(f"{root}: no stamps here")
    return found


def _captions(path: Path) -> Iterator[tuple[str, str]]:
    """The first line is English; the others are ``fr.utf8=…``."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        language, mark, text = line.partition(".utf8=")
        if number == 0:
            yield "en", line.strip()
        elif mark:
            yield language, text.strip()


def encode(path: Path | None) -> bytes | str | None:
    """A picture composited on white as JPEG; a message where it does not decode."""
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as error:
        return str(error)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    buffer = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def traces(stamp: Stamp) -> Iterable[str]:
    """What would leak if it stood in two splits: recordings, the picture, captions in each language."""
    for path in (*stamp.speech.values(), *([stamp.image] if stamp.image else [])):
        yield "file " + hashlib.sha256(path.read_bytes()).hexdigest()
    for language in {"en", *stamp.speech}:
        caption = "".join(c for c in stamp.captions.get(language, "").lower() if c.isalnum())
        if caption:
            yield f"caption {language} {caption}"


def group_stamps(stamps: Sequence[Stamp]) -> list[int]:
    """A group number per stamp: stamps that share a trace, directly or through others, share the number."""
    parent = list(range(len(stamps)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, stamp in enumerate(stamps):
        for trace in traces(stamp):
            a, b = sorted((root(i), root(first.setdefault(trace, i))))
            parent[b] = a
    return [root(i) for i in range(len(stamps))]


def split_groups(stamps: Sequence[Stamp], groups: Sequence[int], seed: int) -> list[str]:
    """A split per stamp: whole groups, 70/15/15 within every class as far as groups allow.

    The largest groups go first, in an order drawn by hash, each to the split that misses its classes most.
    """
    classes = sorted({stamp.category for stamp in stamps})
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    total = np.zeros(len(classes))
    content = {}
    for group, inside in members.items():
        content[group] = np.bincount(
            [classes.index(stamps[i].category) for i in inside], minlength=len(classes)
        )
        total += content[group]
    wanted = np.outer(FRACTIONS, total)  # [splits, classes]
    have = np.zeros_like(wanted)
    chosen: dict[int, str] = {}
    order = sorted(members, key=lambda g: (-len(members[g]), unit(seed, stamps[members[g][0]].name)))
    for group in order:
        missing = (wanted - have) / np.maximum(wanted, 1e-9)  # share of its wish that a split still lacks
        split = int(np.argmax(missing @ content[group]))
        have[split] += content[group]
        chosen[group] = SPLITS[split]
    return [chosen[group] for group in groups]
