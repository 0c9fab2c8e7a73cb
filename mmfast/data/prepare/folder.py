"""``mmfast prepare folder DIR``: a user's own files, where files that share a name are one sample."""

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from mmfast.data.prepare.writer import (
    SPLITS,
    DatasetWriter,
    Description,
    Log,
    add_common_arguments,
    is_finished,
    split_by_hash,
)
from mmfast.data.shards import COMPONENTS
from mmfast.errors import UserError

COMPONENT_OF = {extension: name for name, extensions in COMPONENTS.items() for extension in extensions}
FOLDERS = {split: split for split in SPLITS} | {"val": "validation", "valid": "validation"}
NOTICE = "Made from files of your own; their licences hold.\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmfast prepare folder``."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="DIR/[split/]class/name.jpg, .txt, .ogg …, or flat"
    )
    add_own_arguments(parser)


def add_own_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``folder`` and ``csv`` have in common."""
    add_common_arguments(parser, None)
    parser.add_argument("--split", choices=SPLITS, help="put everything into this split")
    parser.add_argument("--fractions", default="0.8,0.1,0.1", help="train,validation,test (0.8,0.1,0.1)")
    parser.add_argument("--licence", default="your own", help="a note for dataset.json")


def prepare(args: argparse.Namespace) -> Path:
    """What the command does."""
    chosen = {"split": args.split, "licence": args.licence, "seed": args.seed, "force": args.force}
    return prepare_folder(args.folder, args.out, fractions=parse_fractions(args.fractions), **chosen)


def parse_fractions(text: str) -> list[float]:
    """``0.8,0.1,0.1`` as numbers that add up to 1."""
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = []
    if len(fractions) != 3 or not (min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6):  # nan too
        raise UserError(
            f"--fractions: got {text!r}, wanted three numbers that add up to 1, such as 0.8,0.1,0.1"
        )
    return fractions


def prepare_folder(
    folder: Path | str,
    out: Path | str,
    *,
    split: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    licence: str = "your own",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write the dataset and return its folder. Images and audio are stored as they are.

    Files of one folder that share their name up to the last dot are one sample, whichever of image, text and
    audio there are. The first folder is the class; where the first folders are called train, validation (or
    val) and test, they are the splits and the class comes after; a file outside them is then refused. Without
    those, the split is drawn by hash of the name, so that it does not change when files are added. Links are
    followed. What cannot be used is named and counted.
    """
    folder, out = Path(folder), Path(out)
    samples, log = _find(folder, out)
    arguments = {
        "folder": str(folder.absolute()),
        "split": split,
        "fractions": list(fractions),
        "licence": licence,
        "seed": seed,
        "files": stamp_of(path for parts in samples.values() for path in parts.values()),
    }
    if is_finished(out, arguments, force):
        return out
    split_folders = split is None and _has_split_folders(samples)
    placed = []  # name, split, class
    for name in samples:
        rest = name.split("/")
        where = FOLDERS[rest.pop(0)] if split_folders else split or split_by_hash(name, seed, fractions)
        placed.append((name, where, rest[0] if len(rest) > 1 else None))
    classes = sorted({label for _, _, label in placed if label is not None})
    about = Description(folder.name, classes, licence, NOTICE, arguments)
    with DatasetWriter(out, about, force) as writer:
        keys: dict[str, str] = {}
        for name, where, label in tqdm(placed, folder.name, disable=None):
            key = name.replace(".", "_")  # webdataset ends a key at the first dot
            if keys.setdefault(key, name) != name:
                raise UserError(f"{folder}: {keys[key]!r} and {name!r} give the same key {key!r}; rename one")
            parts = {path.suffix[1:].lower(): path for path in samples[name].values()}
            read = read_parts(parts, log)
            if read:
                writer.write(where, key, read, label)
            else:
                log("sample of which nothing is left", f"{folder}: {name}: nothing is left of it")
    log.close()
    return out


def _find(folder: Path, out: Path) -> tuple[dict[str, dict[str, Path]], Log]:
    """Samples as name -> component -> file, in the order of their names."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    log = Log()
    samples: dict[str, dict[str, Path]] = {}
    for path in _files(folder, out, log):
        inside = path.relative_to(folder)
        component = COMPONENT_OF.get(path.suffix[1:].lower())
        if component is None:
            log("file of an unknown kind", f"{path}: unknown extension {path.suffix!r}; known: {known()}")
            continue
        parts = samples.setdefault(inside.with_suffix("").as_posix(), {})
        if component in parts:
            raise UserError(f"{path}: a second {component} of one sample, beside {parts[component].name}")
        parts[component] = path
    if not samples:
        raise UserError(f"{folder}: no file that can be used; known extensions: {known()}")
    return samples, log


def _files(folder: Path, out: Path, log: Log, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files in and below ``folder``, through links; hidden ones and ``out`` are passed over."""
    above = (*above, folder.resolve())
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
    for path in paths:
        if path.name.startswith(".") or path.absolute() == out.absolute():
            continue
        if path.is_dir() and path.resolve() in above:
            log("link to a folder that holds it", f"{path}: a link to a folder that holds it; left out")
        elif path.is_dir():
            yield from _files(path, out, log, above)
        elif path.is_file():
            yield path
        else:
            kind = "link to nothing" if path.is_symlink() else "device or pipe"
            log(kind, f"{path}: {kind}; left out")


def _has_split_folders(samples: dict[str, dict[str, Path]]) -> bool:
    """Whether the first folders are splits; UserError where some are and some are not.

    One such name among others is a class: bus, car, train.
    """
    first = {name: name.split("/")[0] if "/" in name else "" for name in samples}
    folders = set(first.values()) - {""}
    splits = folders & FOLDERS.keys()
    if not splits or (len(splits) == 1 and folders != splits):
        return False
    for name, begin in first.items():
        if begin not in splits:
            path = next(iter(samples[name].values()))
            raise UserError(f"{path}: outside the split folders that are there ({', '.join(sorted(splits))})")
    return True


def known() -> str:
    """The extensions that can be stored."""
    return ", ".join(COMPONENT_OF)


def read_parts(parts: dict[str, Path], log: Log) -> dict[str, bytes]:
    """Read a sample's files; text that is not UTF-8 is left out and said."""
    read = {}
    for extension, path in parts.items():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if extension == "txt":
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                log("text not UTF-8", f"{path}: not UTF-8 at byte {error.start}; left without text")
                continue
        read[extension] = data
    return read


def stamp_of(paths: Iterable[Path]) -> str:
    """Changes when a file is added, removed or written to."""
    digest = hashlib.sha256()
    for path in paths:
        about = path.stat()
        try:
            digest.update(f"{path}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(path)!r}: a name that is not UTF-8; rename it") from None
    return digest.hexdigest()
