"""What a run says: a progress bar, TensorBoard, and metrics.jsonl with every step in full precision."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from mmfast.errors import UserError


class Log:
    """Writes of one process: rank 0 has one, the others have a silent one.

    ``metrics.jsonl`` holds one object a line: ``{"kind": "train", "step": 41, "loss": …}``, floats as
    ``repr`` has them. A resumed run drops the lines of steps that it takes again.
    """

    def __init__(self, out: str | Path, first: int, last: int, *, active: bool, quiet: bool = False) -> None:
        """Open the log of a run that takes the steps ``first + 1`` to ``last``."""
        self.active = active
        if not active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(out) / "metrics.jsonl"
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines(self.path, first)
            self.file = open(self.path, "a")
        self.board = SummaryWriter(str(out), purge_step=first + 1)
        # without a terminal there is a line per validation and no bar
        self.bar = tqdm(
            initial=first, total=last, unit="step", disable=True if quiet else None, dynamic_ncols=True
        )
        self.quiet = quiet

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Record the values of one step or of one evaluation."""
        if not self.active:
            return
        with naming(self.path):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, values: dict[str, Any]) -> None:
        """Bring the bar and the file to ``step``."""
        self.flush()
        if self.active:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update(step - self.bar.n)

    def flush(self) -> None:
        """Bring the file to the last line written."""
        if self.active:
            with naming(self.path):
                self.file.flush()

    def say(self, line: str) -> None:
        """Print a line beside the bar."""
        if self.active and not self.quiet:
            self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Put everything on the disk."""
        if self.active:
            self.bar.close()
            with naming(self.path), closing(self.file):
                self.board.close()

    def __enter__(self) -> "Log":
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; what went wrong first is what the user must hear of."""
        with suppress(OSError, UserError) if error else nullcontext():
            self.close()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in what the system says of it: a full disk, a folder that cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of ``path`` after ``last_step``; the file is whole at any moment."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a line cut short by a crash
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Pace:
    """Samples a second and the share of time spent waiting for data, over laps of several steps."""

    def __init__(self, batch_size: int) -> None:
        """No laps yet."""
        self.batch_size = batch_size
        self.laps: list[tuple[int, float, float]] = []  # steps, seconds, of them waiting for data

    def lap(self, steps: int, seconds: float, waited: float) -> tuple[float, float]:
        """Add a lap; returns its samples a second and its share of waiting."""
        self.laps.append((steps, seconds, waited))
        return self._rates(self.laps[-1:])

    def overall(self) -> tuple[float, float]:
        """Give the same over all laps but the first, which holds compilation and cold caches."""
        return self._rates(self.laps[1:] or self.laps)

    def _rates(self, laps: list[tuple[int, float, float]]) -> tuple[float, float]:
        steps, seconds, waited = (sum(column) for column in zip(*laps, strict=True))
        return self.batch_size * steps / seconds, waited / seconds
