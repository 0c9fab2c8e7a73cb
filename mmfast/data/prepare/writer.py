"""What every source shares: the dataset's folder, its tokenizer, the split by hash, what is told."""

import argparse
import dataclasses
import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmfast.data.shards import COMPONENTS, Dataset, ShardWriter, Staging, writing
from mmfast.errors import UserError

SPLITS = ("train", "validation", "test")


def add_common_arguments(parser: argparse.ArgumentParser, out: str | None) -> None:
    """``--out``, ``--force`` and ``--seed``: the same for every source."""
    wanted: dict[str, Any] = {"required": True} if out is None else {"default": out}
    parser.add_argument(
        "--out", type=Path, help=f"folder to write (default: {out})" if out else "folder", **wanted
    )
    parser.add_argument("--force", action="store_true", help="make it again, even where it is there already")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides the split, and noise where there is some"
    )


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on ``parts`` alone."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_hash(group: str, seed: int, fractions: Sequence[float]) -> str:
    """The split of a group; adding or removing other samples never moves it."""
    place, edge = unit(seed, group), 0.0
    for split, fraction in zip(SPLITS, fractions, strict=True):
        edge += fraction
        if place < edge:
            return split
    return max(zip(fractions, SPLITS, strict=True))[1]  # the fractions add up to a hair less than 1


class Log:
    """Tells what was left out: the first few one by one, the rest as a count at the end."""

    def __init__(self, shown: int = 10) -> None:
        """``shown`` lines of each kind are printed as they come."""
        self.shown, self.counts = shown, Counter[str]()

    def __call__(self, kind: str, line: str) -> None:
        """Count one of a kind (``text not UTF-8``) and perhaps print its line."""
        self.counts[kind] += 1
        if self.counts[kind] <= self.shown:
            print(line, file=sys.stderr)

    def close(self) -> None:
        """Print the totals."""
        for kind, count in self.counts.items():
            print(f"in all: {count} x {kind}", file=sys.stderr)


@dataclasses.dataclass
class Description:
    """What a dataset is, and the arguments that made it; a source may fill it in until the end."""

    name: str
    classes: Sequence[str]
    licence: str
    notice: str
    arguments: Mapping[str, Any]


def is_finished(out: Path, arguments: Mapping[str, Any], force: bool) -> bool:
    """Whether ``out`` already holds what these arguments make; UserError where it holds something else."""
    if not out.exists():
        return False
    if not (out / "dataset.json").is_file():
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
            return False
        raise UserError(f"{out}: is there and is no prepared dataset; it is not touched, give another --out")
    try:
        made_with = dict(json.loads((out / "dataset.json").read_bytes())["arguments"].items())
    except (ValueError, KeyError, TypeError, AttributeError):  # perhaps tars that were only indexed
        raise UserError(
            f"{out}: dataset.json does not say what it was made with; it is not touched, give another --out"
        ) from None
    if force:
        return False
    if made_with != _plain(arguments):
        changed = sorted(
            k for k in {**made_with, **arguments} if made_with.get(k) != _plain(arguments).get(k)
        )
        what = ", ".join(f"{k} was {made_with.get(k)!r}, is now {arguments.get(k)!r}" for k in changed)
        raise UserError(f"{out}: made with other arguments ({what}); --force makes it again")
    try:
        Dataset.open(out)
    except UserError as error:
        raise UserError(f"{error}; --force makes it again") from None
    print(f"{out}: already prepared", file=sys.stderr)
    return True


class DatasetWriter:
    """Writes a whole dataset (splits, tokenizer, ``dataset.json``, NOTICE), or, if something fails, nothing.

    ``with DatasetWriter(out, description) as writer: writer.write(split, key, parts, label)``
    """

    def __init__(self, out: Path, about: Description, force: bool = False) -> None:
        """``out`` appears when the block ends well; with ``force`` it replaces an older dataset."""
        self.out, self.about = out, about
        self._staging = Staging(out, replace=force)
        self._writers: dict[str, ShardWriter] = {}
        self._texts: list[str] = []  # of the train split, for the tokenizer
        self._components: Counter[str] = Counter()

    @property
    def scratch(self) -> Path:
        """A folder for what is needed on the way; gone afterwards, however it ends."""
        path = self._staging.path / "scratch"
        path.mkdir(exist_ok=True)
        return path

    def write(
        self, split: str, key: str, parts: Mapping[str, bytes], label: str | None = None, **notes: Any
    ) -> None:
        """Add a sample; its label, if any, is the name of a class. ``notes`` go into its ``.json``."""
        if split not in self._writers:
            self._writers[split] = ShardWriter(self._staging.path / split)
        named = {"label": label} if label is not None else {}
        about = json.dumps(named | notes, ensure_ascii=False, sort_keys=True).encode()
        number = self.about.classes.index(label) if label is not None else -1
        self._writers[split].write(key, {**parts, "json": about}, number)
        self._components.update(
            c for c, extensions in COMPONENTS.items() if any(e in parts for e in extensions)
        )
        if split == "train" and "txt" in parts:
            self._texts.append(parts["txt"].decode())

    def close(self) -> Path:
        """Finish and give the folder its name."""
        if not self._writers:
            raise UserError(f"{self.out}: no samples at all, so nothing was written")
        path = self._staging.path
        shutil.rmtree(path / "scratch", ignore_errors=True)
        sizes = {split: len(self._writers.pop(split).close()) for split in SPLITS if split in self._writers}
        if self._texts:
            with writing(path / "tokenizer.json"):
                train_tokenizer(self._texts).save(str(path / "tokenizer.json"))
        described = {
            "version": 1,
            "name": self.about.name,
            "classes": list(self.about.classes),
            "modalities": [component for component in COMPONENTS if self._components[component]],
            "splits": sizes,
            "licence": self.about.licence,
            "arguments": _plain(self.about.arguments),
        }
        with writing(path):
            (path / "NOTICE").write_text(self.about.notice, encoding="utf-8")
            (path / "dataset.json").write_text(
                json.dumps(described, ensure_ascii=False, indent=1) + "\n", "utf-8"
            )
        self._staging.commit()
        missing = [split for split in SPLITS if split not in sizes]
        said = ", ".join(f"{size} {split}" for split, size in sizes.items())
        print(
            f"{self.out}: {said}" + (f"; no sample fell into: {', '.join(missing)}" if missing else ""),
            file=sys.stderr,
        )
        return self.out

    def __enter__(self) -> "DatasetWriter":
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, or leave nothing behind and say so."""
        try:
            if error is None:
                self.close()
        except BaseException as failed:
            error = failed
            raise
        finally:
            if error is not None:
                for writer in self._writers.values():
                    writer.abandon()
                self._staging.discard()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{self.out}: interrupted, nothing was written") from None


def train_tokenizer(texts: Iterable[str], vocabulary: int = 4096) -> Tokenizer:
    """Lower-cased byte-pair pieces of NFC text; ids 0 and 1 are ``[PAD]`` and ``[UNK]``. Deterministic."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # A word begins with a marked space. (With an end-of-word suffix the trainer would number its pieces in
    # the order of a hash map, another one in every run.)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["[PAD]", "[UNK]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(arguments), default=str))
    return plain
