"""Checkpoints that hold a whole job and are never half there.

``<out>/checkpoints/step-00000040/`` holds the shards of all ranks (``torch.distributed.checkpoint``: model
and optimizer, loadable at any world size) and ``run.json`` (step, configuration, data fingerprint, seeds,
validation). All of it is written under another name, synced to the disk and renamed: a folder called
``step-…`` is complete.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from tqdm import tqdm

from mmfast.errors import UserError

T = TypeVar("T")


def folder(out: str | Path) -> Path:
    """The folder that holds the checkpoints of the run in ``out``."""
    return Path(out) / "checkpoints"


def steps(out: str | Path) -> dict[int, Path]:
    """All complete checkpoints of a run by step, the oldest first."""
    found = {int(path.name[5:]): path for path in folder(out).glob("step-*") if path.name[5:].isdigit()}
    return dict(sorted(found.items()))


def facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself (``run.json``)."""
    try:
        about = json.loads((path / "run.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is not a checkpoint: it has no run.json") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path / 'run.json'} is damaged: {error}") from None
    kinds: dict[str, Any] = {"step": int, "job": dict, "validation": (dict, type(None))}
    if not isinstance(about, dict) or not all(isinstance(about.get(k), kind) for k, kind in kinds.items()):
        raise UserError(f"{path / 'run.json'} is damaged: wanted {', '.join(kinds)}, got {brief(about)}")
    return about


def find(out: str | Path, which: str, metric: str = "accuracy") -> Path:
    """Resolve "latest", "best" (by ``metric`` on validation) or the path of a checkpoint or of a run."""
    if which not in ("latest", "best"):
        path = Path(which)
        if not path.exists():
            raise UserError(f"there is no checkpoint {which}; wanted latest, best or a folder")
        return find(path, "latest") if folder(path).is_dir() else path
    found = steps(out)
    if not found:
        raise UserError(f"{folder(out)} holds no checkpoint")
    return (best(found, metric) if which == "best" else None) or list(found.values())[-1]


def best(found: dict[int, Path], metric: str) -> Path | None:
    """The checkpoint whose validation was best, the earlier of equals; losses are better when lower."""
    sign = -1.0 if metric.endswith("loss") else 1.0
    ranked = []
    for step, path in found.items():
        try:
            value = (facts(path)["validation"] or {}).get(metric)
        except UserError as error:  # no reason to refuse the others
            tell(f"{error}; it is passed over")
        else:
            ranked += [(sign * value, -step)] if value is not None else []
    return found[-max(ranked)[1]] if ranked else None


@cache
def tell(line: str) -> None:
    """Print a line, once."""
    tqdm.write(f"mmfast: {line}", sys.stderr)


def better(metric: str, metrics: dict[str, float], than: dict[str, float] | None) -> bool:
    """Say whether one validation beats another (or none) in ``metric``."""
    if metric not in metrics:
        raise UserError(f"trainer.best is '{metric}'; validation has {', '.join(metrics)}")
    sign = -1.0 if metric.endswith("loss") else 1.0
    return than is None or sign * metrics[metric] > sign * than[metric]


def beginning(out: str | Path, resume: str | None, overwrite: bool) -> Path | None:
    """Find the checkpoint a run starts from, or None for a new run; newer ones are only for ``overwrite``."""
    found = steps(out)
    # "latest" where there is none yet is a new run: a job that is restarted is given the same command again
    path = find(out, resume) if resume is not None and (found or resume != "latest") else None
    begin = facts(path)["step"] if path else 0
    if any(step > begin for step in found) and not overwrite:
        raise UserError(
            f"{out} already holds checkpoints up to step {max(found)}: --resume goes on from there, "
            "--trainer.overwrite true drops them, --trainer.out names another folder"
        )
    return path


def drop(out: str | Path, after: int) -> None:
    """Drop the checkpoints of the steps that a run takes again."""
    for step, path in steps(out).items():
        if step > after:
            remove(path)


def remove(path: Path) -> None:
    """Drop a checkpoint; a process that dies in the middle leaves no half of it under its name."""
    gone = path.with_name(f".writing-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    shutil.rmtree(path.rename(gone))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Name every tensor of the job. The tensors are the live ones: loading fills them in place."""
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = {
            name: moments(optimizer, p) for name, p in model.named_parameters() if p.requires_grad
        }
    return state


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one parameter, made as AdamW makes it where no step was taken yet."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state


def save(
    out: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    *,
    keep: int,
    metric: str,
) -> Path:
    """Write the checkpoint of ``step`` and drop all but the last ``keep`` and the best. For every rank."""
    home = folder(out)
    final, partial = home / f"step-{step:08d}", home / f".writing-{step:08d}"

    def prepare() -> None:
        for left in home.glob(".writing-*"):  # of a process that died while writing or dropping
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        with open(partial / "run.json", "w") as file:
            json.dump({"step": step, **about}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def publish() -> None:
        sync(partial)
        if final.exists():
            remove(final)
        partial.rename(final)
        sync(home)
        found = steps(out)
        kept = set(list(found.values())[-keep:]) | {best(found, metric)}
        for path in found.values():
            if path not in kept:
                remove(path)

    try:
        on_first_rank(prepare)
        writer = FileSystemWriter(partial, sync_files=True, overwrite=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            save_shards(state_of(model, optimizer), storage_writer=writer)
        on_first_rank(publish)
    except (CheckpointException, OSError, RuntimeError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        left = list(steps(out).values())[-1:]
        kept = f"{left[0]} is whole" if left else "there is none before it"
        room = shutil.disk_usage(out).free >> 20
        why = f"{reason(error)} ({room} MiB are free)"
        raise UserError(f"cannot write the checkpoint {final}: {why}; {kept}") from error
    return final


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Fill model and optimizer in place from a checkpoint; returns its facts. For every rank."""
    about = facts(path)
    try:
        reader = FileSystemReader(path)
        for name, wanted in extents(reader).items():
            if (got := (path / name).stat().st_size) < wanted:
                raise OSError(f"{name} has {got} bytes, wanted {wanted}")
        load_shards(state_of(model, optimizer), storage_reader=reader)
    except (CheckpointException, OSError, RuntimeError, KeyError, ValueError) as error:
        line = reason(error)
        # torch's reader advises to trust a file that it cannot read
        line = "a file is damaged" if "weights_only" in line else line
        raise UserError(f"cannot read the checkpoint {path}: {line}") from error
    return about


def extents(reader: FileSystemReader) -> dict[str, int]:
    """How far into each file the index reaches: a file cut short could load without an error."""
    ends: dict[str, int] = {}
    try:
        places = reader.read_metadata().storage_data.values()
    except Exception as error:  # a damaged pickle may raise anything
        raise OSError(f".metadata is damaged: {type(error).__name__}: {error}") from error
    for item in places:
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    return ends


def refuse_mismatch(path: Path, then: dict[str, Any], now: dict[str, Any], to: str = "resume from") -> None:
    """Raise a ``UserError`` if the job of the checkpoint is not the job at hand; names all that differs."""
    different = [
        f"{key} was {brief(then[key]) if key in then else 'not recorded'}, now {brief(value)}"
        for key, value in now.items()
        if key not in then or then[key] != value
    ]
    if different:
        raise UserError(f"cannot {to} {path}: {'; '.join(different)}")


def brief(value: Any) -> str:
    """A value as it is written, cut where it is long: there may be thousands of classes."""
    words = repr(value)
    return words if len(words) <= 100 else f"{words[:99]}…"


def reason(error: BaseException) -> str:
    """One line that says what went wrong, taken from the rank where it did."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
        if isinstance(error, KeyboardInterrupt):
            raise error
    line = " ".join(str(error).split()) or type(error).__name__
    # torch's zip writer loses what the system said of a disk that is full
    return "a file could not be written to its end" if "inline_container" in line else line


def on_first_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; every rank waits for it and gets its value, or its error."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except Exception as error:  # whatever it is: the others wait
            told[1] = error
            if not isinstance(error, OSError | UserError):  # it may not travel
                told[1] = RuntimeError(f"{type(error).__name__}: {error}")
                told[1].__cause__ = error
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def sync(path: Path) -> None:
    """Make the names in a folder last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
