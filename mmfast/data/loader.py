"""Batches made ahead of time: reading and decoding in a thread each, handed over through bounded queues.

A batch is a dict with fixed keys: each modality's name, ``lengths`` int64 [B, M], ``present`` bool [B, M],
``label`` int64 [B] and ``id`` int64 [B]. What is absent is zeros with length 0.
"""

import contextlib
import hashlib
import itertools
import json
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mmfast.data.assemble import Assembler, Batch, Fault, Memory, Reader, View, choose_device
from mmfast.data.modality import Audio, DataConfig, Image, Text
from mmfast.data.plan import InOrder, Plan
from mmfast.data.shards import Dataset
from mmfast.data.text import open_tokenizer
from mmfast.data.threads import work_alone
from mmfast.errors import UserError


class _End:
    """Put on a queue after its last item, with what ended it, if anything did."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Stage:
    """Runs an iterator in a thread, ``depth`` items ahead of whoever iterates over the stage."""

    def __init__(self, items: Iterator[Any], depth: int, name: str) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        while not isinstance(item := self._queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    def stop(self) -> None:
        """End the thread, whatever it waits for, and tell whoever iterates that this is the end."""
        self._stopped.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(0.01)
        self._drain()
        self._queue.put(_End())

    def _drain(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def _run(self, items: Iterator[Any]) -> None:
        work_alone()
        end = _End()
        try:
            for item in items:
                self._queue.put(item)
                if self._stopped.is_set():
                    break
        except BaseException as error:
            end = _End(error)
        self._queue.put(end)


class Loader:
    """Batches, made ahead of time. Iterate over it; close it (or use ``with``) when leaving early.

    In training it is endless; in evaluation it is one pass. Each ``iter()`` starts afresh at ``start_step``.

    Attributes:
        step: the step of the next batch.
        steps_per_epoch: steps after which every sample was seen once.
        ledger: (split, key, modality, reason) -> how often that made a modality absent in a batch handed out.
        time_waiting: seconds spent waiting for a batch, in all.
    """

    def __init__(
        self,
        view: View,
        config: DataConfig,
        tokenizer: Path | None,
        memory: Memory,
        start_step: int,
        end_step: int | None,
    ) -> None:
        """Use ``Data.loader``."""
        self.view = view
        self.step = self._start_step = start_step
        self.steps_per_epoch = view.plan.steps_per_epoch
        self.ledger: Counter[tuple[str, str, str, str]] = Counter()
        self.time_waiting = 0.0
        self.device = choose_device(config)
        self._make = (config, tokenizer, memory, end_step)
        self._batches: Iterator[tuple[Batch, list[Fault]]] | None = None
        self._close: Callable[[], Any] = lambda: None

    def __iter__(self) -> "Loader":
        """Start from ``start_step``."""
        self.close()
        self.step = self._start_step
        return self

    def __next__(self) -> Batch:
        """The next batch; what went wrong in a thread is raised here."""
        if self._batches is None:
            self._start()
        assert self._batches is not None
        begin = time.perf_counter()
        try:
            batch, faults = next(self._batches)
        except StopIteration:
            self.close()
            raise
        except UserError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise RuntimeError(f"loading step {self.step} of {self.view.split!r} failed: {error}") from error
        self.time_waiting += time.perf_counter() - begin
        self.step += 1
        for sample, modality, reason in faults:
            self.ledger[self.view.split, self.view.index.key(sample), modality, reason] += 1
        return batch

    def close(self) -> None:
        """End the threads and drop what was made ahead; the loader can be iterated again."""
        self._batches = None
        self._close()

    def __enter__(self) -> "Loader":
        """The loader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _start(self) -> None:
        config, tokenizer, memory, end_step = self._make
        reader = Reader(self.view, memory)
        assembler = Assembler(self.view, config, tokenizer, self.device, memory)
        steps = itertools.count(self.step) if end_step is None else range(self.step, end_step)
        read = _Stage(map(reader.read, steps), config.prefetch, "mmfast-read")
        made = _Stage(map(assembler.assemble, read), config.prefetch, "mmfast-decode")
        self._batches = iter(made)
        # a finalizer: also when the loader is forgotten, and before the interpreter goes
        self._close = weakref.finalize(self, _stop, read, made, assembler)


def _stop(read: _Stage, made: _Stage, assembler: Assembler) -> None:
    read.stop()
    made.stop()
    assembler.close()


class Data:
    """A prepared dataset seen through a ``DataConfig``: what a model must know, and loaders.

    Attributes:
        dataset: the opened ``Dataset``.
        modalities: name -> ``Modality``, in the order of ``lengths`` and ``present``.
        classes: names of the labels.
        num_classes: their number.
        vocab_size: token ids of the text modalities (0 where there is none).
        fingerprint: changes when the data, the modalities, the seed or augmentation do. The decoder is not
            in it: another one gives the same views, up to its rounding.
    """

    def __init__(self, config: DataConfig) -> None:
        """Open the dataset; ``UserError`` where something that the configuration names is not there."""
        self.config = config
        self.dataset = Dataset.open(config.path)
        self.modalities = dict(config.modalities)
        self.classes = list(self.dataset.classes)
        self.num_classes = len(self.classes)
        for name, modality in self.modalities.items():
            if not isinstance(modality, (Image, Text, Audio)):
                raise UserError(
                    f"data.modalities.{name}: got {type(modality).__name__}, which has no decoder"
                )
            if modality.component not in self.dataset.modalities:
                raise UserError(
                    f"data.modalities.{name}: component {modality.component!r} is not in {config.path}; "
                    f"there are: {', '.join(self.dataset.modalities)}"
                )
        choose_device(config)
        self._memory = Memory(config.memory_mb)
        self.vocab_size = 0
        self.tokenizer: Path | None = None
        tokens = b""
        if any(isinstance(modality, Text) for modality in self.modalities.values()):
            path = self.tokenizer = self.dataset.tokenizer_path or self.dataset.path / "tokenizer.json"
            self.vocab_size = open_tokenizer(path).get_vocab_size()
            tokens = path.read_bytes()
        facts = [
            {split: index.fingerprint for split, index in sorted(self.dataset.splits.items())},
            {name: repr(modality) for name, modality in self.modalities.items()},
            [config.seed, config.augment, self.classes, hashlib.sha256(tokens).hexdigest()],
        ]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        train: bool,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        only: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Loader:
        """Batches of one split for one rank.

        Args:
            split: name of the split.
            batch_size: samples of a step over all ranks; rank r gets rows r, r + world_size, …
            train: True: endless, shuffled, augmented. False: one pass in order, filled up with rows of
                id -1 so that every rank runs the same number of steps.
            rank: this process.
            world_size: number of processes.
            start_step: the step to begin with; nothing before it is read.
            only: modalities to keep; the others are reported absent.
            seed: of order and augmentation instead of the configuration's.
        """
        index = self.dataset.split(split)
        if world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"rank: got {rank} of {world_size}, wanted 0 to world_size - 1")
        if world_size > len(index):
            raise UserError(f"{split!r} has {len(index)} samples, fewer than the {world_size} ranks")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size: got {batch_size}, wanted a multiple of the {world_size} ranks")
        if start_step < 0:
            raise UserError(f"start_step: got {start_step}, wanted 0 or more")
        if unknown := set(only or ()) - self.modalities.keys():
            raise UserError(
                f"only: no modality {sorted(unknown)[0]!r}; there are: {', '.join(self.modalities)}"
            )
        seed = self.config.seed if seed is None else seed
        plan = Plan(len(index), batch_size, seed) if train else InOrder(len(index), batch_size)
        kept = tuple(name for name in self.modalities if only is None or name in only)
        augment = train and self.config.augment
        view = View(split, index, plan, self.modalities, kept, seed, augment, rank, world_size)
        end_step = None if train else plan.steps_per_epoch
        return Loader(view, self.config, self.tokenizer, self._memory, start_step, end_step)
