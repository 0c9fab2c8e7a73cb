"""``mmfast prepare csv FILE``: a user's own files, listed in a table."""

import argparse
import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from mmfast.data.prepare.folder import (
    COMPONENT_OF,
    NOTICE,
    add_own_arguments,
    parse_fractions,
    read_parts,
    stamp_of,
)
from mmfast.data.prepare.writer import SPLITS, DatasetWriter, Description, Log, is_finished, split_by_hash
from mmfast.data.shards import COMPONENTS
from mmfast.errors import UserError

COLUMNS = (*COMPONENTS, "label")


@dataclass(frozen=True)
class Row:
    """One line of the table, checked."""

    line: int
    files: dict[str, Path]  # extension -> file
    text: str | None  # inline
    label: str | None
    group: str
    split: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``mmfast prepare csv``."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="columns image, text, audio, label: those there are"
    )
    add_own_arguments(parser)
    parser.add_argument("--split-column", help="column that says train, validation or test")
    parser.add_argument(
        "--group-column", help="rows equal here share a split (default: rows that share a file)"
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out instead of stopping")


def prepare(args: argparse.Namespace) -> Path:
    """What the command does."""
    return prepare_csv(
        args.file,
        args.out,
        split=args.split,
        split_column=args.split_column,
        group_column=args.group_column,
        fractions=parse_fractions(args.fractions),
        skip_bad=args.skip_bad,
        licence=args.licence,
        seed=args.seed,
        force=args.force,
    )


def prepare_csv(
    file: Path | str,
    out: Path | str,
    *,
    split: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    skip_bad: bool = False,
    licence: str = "your own",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write the dataset and return its folder. Images and audio are stored as they are.

    Paths are relative to the table; an empty cell is an absent component; ``text`` is the text itself, or the
    path of a ``.txt`` file. Rows are split by ``split``, by ``split_column``, or by hash of their group:
    ``group_column``, or where that is empty the files they share, so that one image with five captions stays
    on one side.

    Raises UserError that names file and line of the first bad row; ``skip_bad`` counts them instead.
    """
    file, out = Path(file), Path(out)
    log = Log()
    rows = list(_rows(file, split_column, group_column, skip_bad, log))
    arguments = {
        "file": str(file.absolute()),
        "split": split,
        "split_column": split_column,
        "group_column": group_column,
        "fractions": list(fractions),
        "skip_bad": skip_bad,
        "licence": licence,
        "seed": seed,
        "files": stamp_of([file, *(path for row in rows for path in row.files.values())]),
    }
    if is_finished(out, arguments, force):
        return out
    shared = _groups(rows, file.parent)
    classes = sorted({row.label for row in rows if row.label is not None})
    about = Description(file.stem, classes, licence, NOTICE, arguments)
    with DatasetWriter(out, about, force) as writer:
        for row in tqdm(rows, file.name, disable=None):
            parts = read_parts(row.files, log)
            if row.text is not None:
                parts["txt"] = row.text.encode()
            where = split or row.split or split_by_hash(row.group or shared[row.line], seed, fractions)
            if parts:
                writer.write(where, f"line{row.line:08d}", parts, row.label)
            else:
                log("row of which nothing is left", f"{file}:{row.line}: nothing is left of it")
    log.close()
    return out


def _rows(
    file: Path, split_column: str | None, group_column: str | None, skip_bad: bool, log: Log
) -> Iterator[Row]:
    """The table's rows, each checked as a whole."""
    try:
        data = file.read_bytes()
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = header
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}") from None
    except csv.Error as error:
        raise UserError(f"{file}:1: {error}") from None
    if not set(header) & set(COMPONENTS):
        raise UserError(
            f"{file}: got columns {', '.join(header) or 'none'}; wanted some of {', '.join(COLUMNS)}"
        )
    for option, column in (("--split-column", split_column), ("--group-column", group_column)):
        if column is not None and column not in header:
            raise UserError(f"{file}: {option} {column!r} is no column; there are: {', '.join(header)}")
    used = {*COLUMNS, split_column, group_column}
    if twice := [name for name in header if name in used and header.count(name) > 1]:
        raise UserError(f"{file}: column {twice[0]!r} is there twice")
    for name in header:
        if name not in used:
            log("column not used", f"{file}: column {name!r} is not used")
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{file}:{reader.reader.line_num}: {error}") from None
        if cells is None:
            return
        try:
            yield _check(cells, reader.line_num, file.parent, split_column, group_column)
        except UserError as error:
            if not skip_bad:
                raise UserError(
                    f"{file}:{reader.line_num}: {error} (--skip-bad leaves such rows out)"
                ) from None
            log("bad row, left out", f"{file}:{reader.line_num}: {error}")


def _check(
    cells: dict[str, str], line: int, folder: Path, split_column: str | None, group_column: str | None
) -> Row:
    if None in cells or None in cells.values():
        raise UserError("another number of cells than the header has")
    files, text = {}, None
    for component in COMPONENTS:
        cell = cells.get(component, "").strip()
        if component == "text" and cell and not (cell.lower().endswith(".txt") and "\n" not in cell):
            text = cells[component]
        elif cell:
            path = folder / cell
            extension = path.suffix[1:].lower()
            if COMPONENT_OF.get(extension) != component:
                wanted = ", ".join(COMPONENTS[component])
                raise UserError(f"{component} {cell!r}: got extension {path.suffix!r}, wanted {wanted}")
            if not os.path.isfile(path):  # unlike Path's, False also for a name that the system refuses
                raise UserError(f"{component} {cell!r}: no such file")
            files[extension] = path
    if not files and text is None:
        raise UserError("no component at all")
    split = cells[split_column].strip() if split_column else None
    if split is not None and split not in SPLITS:
        raise UserError(f"{split_column}: got {split!r}, wanted {', '.join(SPLITS)}")
    group = cells[group_column].strip() if group_column else ""
    return Row(line, files, text, cells.get("label", "").strip() or None, group, split)


def _groups(rows: Sequence[Row], folder: Path) -> dict[int, str]:
    """A group per line: rows that share a file, directly or through others; else the row's own text."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    names = [[os.path.relpath(p, folder) for p in row.files.values()] or [row.text or ""] for row in rows]
    for first, *others in names:
        for other in others:
            a, b = sorted((root(first), root(other)))
            parent[b] = a
    return {row.line: root(mine[0]) for row, mine in zip(rows, names, strict=True)}
