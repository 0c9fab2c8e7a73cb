"""Samples on disk: plain ustar tars with a columnar index beside them.

``DIR/dataset.json`` describes the dataset; ``DIR/{split}/000000.tar`` … hold the samples under webdataset's
naming (``{key}.jpg``, ``{key}.txt``, ``{key}.ogg``, ``{key}.json``), and ``DIR/{split}/index.npz`` says where
each one lies, so that any sample is one ``pread`` away and nothing is ever unpacked.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mmfast.errors import UserError

COMPONENTS = {"image": ("jpg", "jpeg", "png"), "text": ("txt",), "audio": ("ogg", "flac", "wav")}
COLUMNS = {**COMPONENTS, "json": ("json",)}  # what the index locates: the components and each sample's notes
COMPONENT_OF = {extension: name for name, extensions in COLUMNS.items() for extension in extensions}
_KEPT_OPEN = 256  # file descriptors per index; the usual limit of a process is 1024

Int64 = npt.NDArray[np.int64]


class Staging:
    """A folder that appears whole or not at all: filled beside its place under another name, then renamed.

    What a killed process left behind is removed by the next one; two at once are told apart by a lock.
    """

    def __init__(self, folder: Path | str, replace: bool = False) -> None:
        """Start filling ``self.path``; with ``replace``, ``commit`` takes the place of an older folder."""
        self.folder, self.replace = Path(folder).absolute(), replace
        if self.folder.exists() and not replace:
            raise UserError(f"{self.folder}: already there; give another folder or remove it")
        self.path = self.folder.with_name(f".{self.folder.name}.partial")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UserError(f"{self.folder}: another process is writing it") from None
        for stale in self.path.iterdir():
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()

    def commit(self) -> None:
        """Give the folder its name."""
        with writing(self.folder):
            os.fsync(self._lock)
            old = self.folder.with_name(f".{self.folder.name}.old")
            if self.folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.folder.rename(old)
            self.path.rename(self.folder)
            sync(self.folder.parent)
        self._unlock()
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1


class ShardWriter:
    """Writes one split: ``with ShardWriter(folder) as writer: writer.write(key, {"jpg": …}, label)``.

    The folder appears when the block ends well; an error, a full disk or Ctrl-C leaves nothing.
    Equal calls give equal bytes.
    """

    def __init__(self, folder: Path | str, shard_bytes: int = 256 << 20) -> None:
        """A new tar is begun once one holds ``shard_bytes``."""
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._staging = Staging(folder)
        self._seen: set[str] = set()
        self._keys: list[bytes] = []
        self._rows: list[
            tuple[int, int, list[int], list[int], list[int]]
        ] = []  # label, shard, offset, size, extension
        self._shards: list[Path] = []
        self._content = hashlib.sha256()
        self._file: io.BufferedWriter | None = None
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, parts: dict[str, bytes], label: int = -1) -> None:
        """Add a sample: ``parts`` maps a file extension (``COMPONENTS``, or ``json``) to the file's bytes."""
        _check_key(key)
        if key in self._seen:
            raise UserError(
                f"{self.folder}: key {key!r} was written twice; every sample needs a key of its own"
            )
        place: dict[str, tuple[int, int, int]] = {}  # column -> offset, size, extension
        columns = list(COLUMNS)
        for extension, data in parts.items():
            column = COMPONENT_OF.get(extension)
            if column is None:
                raise UserError(
                    f"sample {key!r}: unknown extension {extension!r}; known: {', '.join(COMPONENT_OF)}"
                )
            if column in place:
                raise UserError(f"sample {key!r}: more than one {column}: {', '.join(parts)}")
            place[column] = (
                self._append(f"{key}.{extension}", data),
                len(data),
                COLUMNS[column].index(extension),
            )
        absent = (-1, -1, -1)
        offset, size, code = (
            list(column) for column in zip(*(place.get(c, absent) for c in columns), strict=True)
        )
        self._seen.add(key)
        self._keys.append(key.encode())
        self._rows.append(
            (label, len(self._shards) - 1 if parts else max(len(self._shards) - 1, 0), offset, size, code)
        )
        if self._file is not None and self._file.tell() >= self.shard_bytes:
            self._finish_shard()

    def close(self) -> "ShardIndex":
        """Finish: the index is written, everything is flushed to the disk, and the folder gets its name."""
        try:
            self._finish_shard()
            labels, shard, offset, size, extension = (
                zip(*self._rows, strict=True) if self._rows else ([], [], [], [], [])
            )
            n, columns = len(self._keys), len(COLUMNS)
            index = ShardIndex(
                self._staging.path,
                {
                    "key": np.array(self._keys, dtype=bytes),
                    "label": np.array(labels, dtype=np.int64),
                    "shard": np.array(shard, dtype=np.int32),
                    "offset": np.array(offset, dtype=np.int64).reshape(n, columns),
                    "size": np.array(size, dtype=np.int64).reshape(n, columns),
                    "extension": np.array(extension, dtype=np.int8).reshape(n, columns),
                    "shard_name": np.array([path.name.encode() for path in self._shards], dtype=bytes),
                    "shard_bytes": np.array([path.stat().st_size for path in self._shards], dtype=np.int64),
                    "content": np.array([self._content.hexdigest().encode()], dtype=bytes),
                },
            )
            index.save()
            self._staging.commit()
        except BaseException:
            self.abandon()
            raise
        return ShardIndex(self.folder, index.columns)

    def __enter__(self) -> "ShardWriter":
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close, or leave nothing."""
        if error is None:
            self.close()
        else:
            self.abandon()

    def _append(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)  # mtime 0, uid 0: equal input gives equal bytes
        info.size = len(data)
        try:
            info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except (ValueError, UnicodeError) as error:
            raise UserError(f"sample {name!r}: not a possible ustar name: {error}") from None
        if self._tar is None:
            self._shards.append(self._staging.path / f"{len(self._shards):06d}.tar")
            with writing(self._shards[-1]):
                self._file = open(self._shards[-1], "wb")
                self._tar = tarfile.open(
                    fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8"
                )
        assert self._file is not None
        offset = self._file.tell() + tarfile.BLOCKSIZE  # a ustar header is one block
        with writing(self._shards[-1]):
            self._tar.addfile(info, io.BytesIO(data))
        self._content.update(f"{name}\0{len(data)}\0".encode() + data)
        return offset

    def _finish_shard(self) -> None:
        if self._tar is not None and self._file is not None:
            with writing(self._shards[-1]):
                self._tar.close()  # the end marker; leaves the file open
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
        self._file = self._tar = None

    def abandon(self) -> None:
        """Give up: leave nothing behind."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._tar = None
        self._staging.discard()


class _OpenShard:
    """A file descriptor that is closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class ShardIndex:
    """Where every sample of a split lies. Threads, forked and spawned processes may share one."""

    def __init__(self, folder: Path | str, columns: dict[str, npt.NDArray[Any]]) -> None:
        """Use ``open`` or ``build``."""
        self.folder, self.columns = Path(folder), columns
        self.labels: Int64 = columns["label"]  # [N], -1 = none
        self._column = {name: i for i, name in enumerate(COLUMNS)}
        self._files: dict[int, _OpenShard] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "ShardIndex":
        """Open a split; raises UserError where the tars are not those, by name and size, of its index."""
        folder = Path(folder)
        path = folder / "index.npz"
        if not path.is_file():
            what = "index.npz is missing" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: not a split of a dataset: {what}")
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            index = cls(folder, columns)
            _ = (
                columns["shard_bytes"],
                columns["shard_name"],
                columns["key"],
                columns["extension"],
                columns["shard"],
            )
            _ = columns["offset"], columns["size"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: not a readable index: {error}") from None
        if len(index) == 0:
            raise UserError(f"{folder}: an empty split: 0 samples, wanted 1 or more")
        for shard, wanted in enumerate(columns["shard_bytes"]):
            index._verify_size(shard, int(wanted))
        named = {name.decode() for name in columns["shard_name"].tolist()}
        if more := {path.name for path in folder.glob("*.tar")} - named:
            raise UserError(f"{folder / min(more)}: came after the index was made, which does not name it")
        return index

    def save(self) -> None:
        """Write ``index.npz`` beside the tars, atomically."""
        path = self.folder / "index.npz"
        partial = path.with_name(".index.npz.partial")
        with writing(path):
            with open(partial, "wb") as file:
                np.savez(file, allow_pickle=False, **self.columns)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            sync(self.folder)

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.columns["key"])

    @property
    def keys(self) -> list[str]:
        """Every sample's key, in order."""
        return [key.decode() for key in self.columns["key"]]

    def key(self, sample: int) -> str:
        """The key of one sample."""
        return bytes(self.columns["key"][sample]).decode()

    def shard(self, sample: int) -> str:
        """The path of the tar that holds a sample, for messages."""
        return str(self.folder / self._shard_name(self.columns["shard"][sample]))

    def has(self, sample: int, component: str) -> bool:
        """Whether the sample has this component."""
        return bool(self.columns["size"][sample, self._column[component]] >= 0)

    def present(self, component: str) -> npt.NDArray[np.bool_]:
        """Which samples have this component: bool [N]."""
        present: npt.NDArray[np.bool_] = self.columns["size"][:, self._column[component]] >= 0
        return present

    def extension(self, sample: int, component: str) -> str | None:
        """How the component is stored, such as ``jpg``; None where it is absent."""
        code = self.columns["extension"][sample, self._column[component]]
        return None if code < 0 else COLUMNS[component][code]

    def extensions(self, sample: int) -> tuple[str, ...]:
        """The extensions that the sample has, in the order of ``COMPONENTS``."""
        found = (self.extension(sample, component) for component in COMPONENTS)
        return tuple(extension for extension in found if extension is not None)

    def read(self, sample: int, component: str) -> bytes | None:
        """The bytes of one component (or ``json``), None where absent; UserError if the file ends early."""
        column = self._column[component]
        size = int(self.columns["size"][sample, column])
        if size < 0:
            return None
        offset = int(self.columns["offset"][sample, column])
        shard = self._open_shard(int(self.columns["shard"][sample]))
        data = os.pread(shard.fd, size, offset)
        while len(data) < size:  # one pread gives at most 2 GiB
            more = os.pread(shard.fd, size - len(data), offset + len(data))
            if not more:
                raise UserError(
                    f"{shard.path}: cut short at offset {offset}: got {len(data)} bytes of the {component} "
                    f"of {self.key(sample)!r}, wanted {size}"
                )
            data += more
        return data

    def verify_times(self) -> None:
        """Raise UserError where a tar that others made was written to since it was indexed."""
        for shard, wanted in enumerate(self.columns.get("shard_time", ())):
            path = self.folder / self._shard_name(shard)
            if path.stat().st_mtime_ns != wanted:
                raise UserError(f"{path}: changed after it was indexed: its time is another")

    @property
    def fingerprint(self) -> str:
        """sha256 of the index; where we wrote the shards, it covers every byte of every sample."""
        digest = hashlib.sha256()
        for name in sorted(self.columns):
            column = np.ascontiguousarray(self.columns[name])
            digest.update(f"{name}{column.shape}{column.dtype.str}".encode() + column.tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Descriptors stay in the process that opened them."""
        return {**self.__dict__, "_files": {}}

    def _shard_name(self, shard: int) -> str:
        return bytes(self.columns["shard_name"][shard]).decode()

    def _verify_size(self, shard: int, wanted: int) -> None:
        path = self.folder / self._shard_name(shard)
        try:
            got = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; the index names it") from None
        if got < wanted:
            end = np.where(self.columns["size"] >= 0, self.columns["offset"] + self.columns["size"], 0).max(
                axis=1
            )
            lost = np.flatnonzero((self.columns["shard"] == shard) & (end > got))
            first = f"; first sample lost: {self.key(int(lost[0]))!r}" if len(lost) else ""
            raise UserError(f"{path}: cut short: got {got} bytes, wanted {wanted}{first}")
        if got > wanted:
            raise UserError(f"{path}: changed after it was indexed: got {got} bytes, wanted {wanted}")

    def _open_shard(self, shard: int) -> _OpenShard:
        # No lock, so that a fork cannot copy a held one: a race opens a shard twice and drops one.
        file = self._files.get(shard)
        if file is None:
            path = self.folder / self._shard_name(shard)
            try:
                file = self._files.setdefault(shard, _OpenShard(path))
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            for other in list(self._files)[:-_KEPT_OPEN]:
                self._files.pop(other, None)
        return file


@dataclass(frozen=True)
class Dataset:
    """A prepared folder: what ``dataset.json`` says, and an index per split."""

    path: Path
    name: str
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    splits: dict[str, ShardIndex]
    tokenizer_path: Path | None
    licence: str

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Open a prepared folder; every fault is a UserError that names the file."""
        path = Path(path)
        file = path / "dataset.json"
        if not file.is_file():
            what = "dataset.json is missing" if path.is_dir() else "no such folder"
            raise UserError(f"{path}: not a prepared dataset: {what} (make one with `mmfast prepare`)")
        try:
            about = json.loads(file.read_bytes())
            version, splits = about["version"], about["splits"]
            for name, kind in (("splits", dict), ("classes", list), ("modalities", list)):
                if not isinstance(about.get(name, kind()), kind):
                    raise TypeError(f"{name}: got {about[name]!r}, wanted a {kind.__name__}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: not a dataset's description: {type(error).__name__}: {error}") from None
        if version != 1:
            raise UserError(f"{file}: version {version!r}, wanted 1")
        tokenizer = path / "tokenizer.json"
        opened = {split: ShardIndex.open(path / split) for split in splits}
        for split, index in opened.items():
            if len(index) != splits[split]:
                raise UserError(
                    f"{path / split}: got {len(index)} samples, wanted {splits[split]} as {file} says"
                )
        return cls(
            path=path,
            name=str(about.get("name", path.name)),
            classes=tuple(about.get("classes", ())),
            modalities=tuple(about.get("modalities", COMPONENTS)),
            splits=opened,
            tokenizer_path=tokenizer if tokenizer.is_file() else None,
            licence=str(about.get("licence", "")),
        )

    def split(self, name: str) -> ShardIndex:
        """One split's index; UserError where the dataset has no such split."""
        if name not in self.splits:
            raise UserError(
                f"{self.path}: no split {name!r} (or it is empty); there are: {', '.join(self.splits)}"
            )
        return self.splits[name]


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn what the system refuses (a full disk, no permission) into one line that names the file."""
    try:
        yield
    except OSError as error:
        final = Path(*(part[1:-8] if part.endswith(".partial") else part for part in Path(path).parts))
        raise UserError(f"{final}: cannot be written: {error.strerror or error}; nothing was kept") from error


def sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_key(key: str) -> None:
    name = key.rpartition("/")[2]
    control = any(unicodedata.category(letter) in ("Cc", "Cs") for letter in key)
    if not name or "." in name or key.startswith("/") or ".." in key.split("/") or control:
        raise UserError(
            f"key {key!r}: wanted a relative path whose last part is not empty and has no dot, "
            "without control characters"
        )
