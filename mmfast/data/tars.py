"""The index of tars that others made, by webdataset's rules: only headers and labels are read."""

import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mmfast.data.shards import COLUMNS, COMPONENT_OF, COMPONENTS, ShardIndex
from mmfast.errors import UserError

_MOST_CLASSES = 1_000_000  # each number up to the largest label gets a name
_UNKNOWN = "file of an unknown kind"

Tell = Callable[[str, str], object]  # a kind of thing left out, and the line that names one


def index_tars(
    folder: Path | str, classes: Sequence[str] = (), tell: Tell = lambda kind, line: None
) -> ShardIndex:
    """Index tars that others made, by webdataset's rules; ``save()`` keeps the result.

    A sample is a run of files with the same folder and the same name up to the first dot. Its label is
    the number in ``.cls``, or ``"label"`` in ``.json``: a number, or the name of one of ``classes``.
    What is left out is given to ``tell``.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: an empty split: no *.tar here")
    keys, rows, seen = [], [], set()
    for shard, path in enumerate(paths):
        for key, members in _samples(path, tell).items():
            seen |= set(members)
            parts = [next((e for e in extensions if e in members), None) for extensions in COLUMNS.values()]
            for extension in sorted(members.keys() - {*parts, "cls"}):
                kind = "second file of a component" if extension in COMPONENT_OF else _UNKNOWN
                tell(kind, f"{path}: {key}.{extension}: {kind}; left out")
            if not any(parts[: len(COMPONENTS)]):
                tell("sample of which nothing is left", f"{path}: {key}: nothing is left of it")
                continue
            place = [members[e] if e else (-1, -1) for e in parts]
            code = [known.index(e) if e else -1 for e, known in zip(parts, COLUMNS.values(), strict=True)]
            keys.append(key.encode())
            rows.append((_label(path, key, members, classes, tell), shard, place, code))
    if not rows:
        raise UserError(
            f"{folder}: no sample has a known component; extensions seen: {', '.join(sorted(seen))}"
        )
    label, shards, places, codes = zip(*rows, strict=True)
    place_array = np.array(places, dtype=np.int64)  # [N, C, 2]
    return ShardIndex(
        folder,
        {
            "key": np.array(keys, dtype=bytes),
            "label": np.array(label, dtype=np.int64),
            "shard": np.array(shards, dtype=np.int32),
            "offset": np.ascontiguousarray(place_array[..., 0]),
            "size": np.ascontiguousarray(place_array[..., 1]),
            "extension": np.array(codes, dtype=np.int8),
            "shard_name": np.array([path.name.encode() for path in paths], dtype=bytes),
            "shard_bytes": np.array([path.stat().st_size for path in paths], dtype=np.int64),
            "shard_time": np.array([path.stat().st_mtime_ns for path in paths], dtype=np.int64),
            "content": np.array([b""], dtype="S64"),  # contents were not read: the time stands for them
        },
    )


def _samples(path: Path, tell: Tell) -> dict[str, dict[str, tuple[int, int]]]:
    """The runs of members that share a key: key -> extension -> (offset, size)."""
    total = path.stat().st_size
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    last = None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                member.name.encode()
                if member.isdir() or not stem:
                    continue  # webdataset passes over hidden files too
                plain = member.isfile() and not member.issparse()
                if not plain or not dot:
                    kind = _UNKNOWN if plain else "link, device or sparse file"
                    tell(kind, f"{path}: {member.name}: {kind}; left out")
                    continue
                if member.offset_data + member.size > total:
                    raise UserError(
                        f"{path}: cut short at offset {member.offset_data}: got "
                        f"{total - member.offset_data} bytes of {member.name}, wanted {member.size}"
                    )
                key, extension = folder + slash + stem, extension.lower()
                if key != last and key in samples:
                    raise UserError(f"{path}: {member.name} stands apart from the other files of its sample")
                last, members = key, samples.setdefault(key, {})
                if extension in members:
                    raise UserError(f"{path}: {member.name} is there twice in one sample")
                members[extension] = (member.offset_data, member.size)
            file.seek(tar.offset)  # tarfile takes a header that it cannot read for the end
            end = file.read(1 << 20)
            if len(end) < tarfile.BLOCKSIZE or any(end):
                raise UserError(
                    f"{path}: cut short or damaged at offset {tar.offset}: wanted a file's header, or zeros "
                    "to the end"
                )
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a whole, uncompressed tar ({total} bytes): {error}") from None
    except UnicodeEncodeError as error:
        raise UserError(f"{path}: {error.object!r}: a name that is not UTF-8") from None
    return samples


def _label(
    path: Path, key: str, members: dict[str, tuple[int, int]], classes: Sequence[str], tell: Tell
) -> int:
    for extension in ("cls", "json"):
        if extension not in members:
            continue
        offset, size = members[extension]
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        try:
            notes = json.loads(data)
            label = notes.get("label") if isinstance(notes, dict) else notes
        except ValueError as error:
            raise UserError(f"{path}: {key}.{extension}: not readable: {error}") from None
        if isinstance(label, int) or (isinstance(label, float) and label.is_integer()):
            if not -1 <= label < _MOST_CLASSES:
                raise UserError(
                    f"{path}: {key}.{extension}: label {label}, "
                    f"wanted 0 to {_MOST_CLASSES - 1}, or -1 for none"
                )
            return int(label)
        if isinstance(label, str) and label in classes:
            return list(classes).index(label)
        if label is not None and not (isinstance(label, str) and extension == "json"):
            kind = "label that is neither a whole number nor a name"
            tell(kind, f"{path}: {key}.{extension}: {kind}; left without label")
    return -1
