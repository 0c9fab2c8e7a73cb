"""``mmfast prepare index DIR``: webdataset tars that are there already, used where they are."""

import argparse
import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmfast.data.prepare.writer import SPLITS, Log, train_tokenizer
from mmfast.data.shards import COMPONENTS, Dataset, ShardIndex, writing
from mmfast.data.tars import index_tars
from mmfast.errors import UserError

TOKENIZER_TEXTS = 200_000  # more would not change a vocabulary of a few thousand pieces


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmfast prepare index``."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="holds train/*.tar, validation/*.tar, test/*.tar"
    )
    parser.add_argument("--force", action="store_true", help="index again, even where an index is there")
    parser.add_argument("--licence", default="your own", help="a note for dataset.json")


def prepare(args: argparse.Namespace) -> Path:
    """What the command does."""
    return prepare_index(args.folder, licence=args.licence, force=args.force)


def prepare_index(folder: Path | str, *, licence: str = "your own", force: bool = False) -> Path:
    """Write an index per split, ``tokenizer.json`` and ``dataset.json`` beside the tars; returns the folder.

    The tars are read and never written. Labels are the numbers in ``.cls``, or ``"label"`` in ``.json``: a
    number, or a name, from which the classes are made.
    """
    folder = Path(folder)
    splits = [split for split in SPLITS if (folder / split).is_dir()]
    if (folder / "dataset.json").is_file() and not force:
        try:
            known = Dataset.open(folder).splits
            for index in known.values():
                index.verify_times()
            if new := set(splits) - known.keys():
                raise UserError(f"{folder / min(new)}: came after the index was made")
        except UserError as error:
            raise UserError(f"{error}; --force indexes it again") from None
        print(f"{folder}: already prepared", file=sys.stderr)
        return folder
    if not splits:
        raise UserError(f"{folder}: none of the folders {', '.join(SPLITS)} is here; one is wanted at least")
    indices, log = {}, Log()
    for split in splits:
        print(f"{folder / split}: reading the headers", file=sys.stderr)
        indices[split] = index_tars(folder / split, tell=log)
    classes = _label(indices)
    for index in indices.values():
        index.save()
    if "train" in indices and indices["train"].present("text").any():
        train = indices["train"]
        with_text = map(int, islice(np.flatnonzero(train.present("text")), TOKENIZER_TEXTS))
        texts = ((train.read(i, "text") or b"").decode("utf-8", "replace") for i in with_text)
        with writing(folder / "tokenizer.json"):
            train_tokenizer(texts).save(str(folder / "tokenizer.json"))
    described = {
        "version": 1,
        "name": folder.absolute().name,
        "classes": classes,
        "modalities": [c for c in COMPONENTS if any(index.present(c).any() for index in indices.values())],
        "splits": {split: len(index) for split, index in indices.items()},
        "licence": licence,
    }
    partial = folder / ".dataset.json.partial"
    with writing(folder / "dataset.json"):
        partial.write_text(json.dumps(described, ensure_ascii=False, indent=1) + "\n", "utf-8")
        partial.rename(folder / "dataset.json")  # last: without it the folder is no dataset
    log.close()
    said = ", ".join(f"{len(index)} {split}" for split, index in indices.items())
    without = sum(int((index.labels < 0).sum()) for index in indices.values())
    print(f"{folder}: {said}; {len(classes)} classes, {without} x no label", file=sys.stderr)
    return folder


def _label(indices: dict[str, ShardIndex]) -> list[str]:
    """Fill in the labels that are names; returns the classes, numbers as their own names."""
    names: dict[tuple[str, int], str] = {}
    for split, index in indices.items():
        todo = np.flatnonzero(index.present("json") & (index.labels < 0))
        for sample in tqdm(map(int, todo), f"{split} labels", len(todo), disable=None):
            notes = json.loads(index.read(sample, "json") or b"null")
            if isinstance(notes, dict) and isinstance(notes.get("label"), str):
                names[split, sample] = notes["label"]
    numbers = max(int(index.labels.max()) for index in indices.values()) + 1
    if names and numbers:
        split, sample = next(iter(names))
        where = indices[split].shard(sample)
        raise UserError(
            f"{where}: label {names[split, sample]!r} is a name, others are numbers; wanted one kind"
        )
    classes = sorted(set(names.values()))
    number = {name: i for i, name in enumerate(classes)}
    for (split, sample), name in names.items():
        indices[split].labels[sample] = number[name]
    return classes or [str(i) for i in range(numbers)]
