"""The training loop: one path from a single process to many nodes, and from Python or the command line."""

import hashlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mmfast.errors import UserError
from mmfast.train import checkpoint
from mmfast.train.config import Config, as_dict, flatten, identity
from mmfast.train.log import Log, Pace
from mmfast.train.optim import adamw, clip, learning_rate
from mmfast.train.parallel import parallelize, sharded, start
from mmfast.train.results import FitResult, Predictions, Step
from mmfast.train.signals import Interrupted, StopRequest
from mmfast.train.task import Task, category

Batch = dict[str, Tensor]


class Trainer:
    """Trains and evaluates a model as a ``Config`` says.

    ``fit`` shards the model in place (``mmfast.train.parallelize``); the same object is then passed to
    ``validate``, ``test`` and ``predict``. ``data`` has the ``loader`` and ``fingerprint`` of ``Data``.
    """

    def __init__(self, config: Config, tasks: Sequence[Task] = (category(),), *, quiet: bool = False) -> None:
        """Join the process group, or make one of this process alone. ``quiet`` prints only of damage."""
        self.config = config.selected()
        self.tasks = tuple(tasks)
        self.quiet = quiet
        self.world = start(config.trainer.device)
        parts = self.world.size * config.trainer.accumulate
        if config.trainer.batch_size % parts:
            raise UserError(
                f"trainer.batch_size is {config.trainer.batch_size}; wanted a multiple of {parts} "
                f"({self.world.size} processes x trainer.accumulate {config.trainer.accumulate})"
            )

    def parallelize(self, model: nn.Module) -> nn.Module:
        """Shard ``model`` in place as this trainer will use it; a second call does nothing."""
        options = self.config.trainer
        return parallelize(model, self.world, options.precision, options.compile)

    def find(self, which: str = "best") -> Path:
        """Where a checkpoint lies: "best", "latest" or a path."""
        options = self.config.trainer
        return checkpoint.on_first_rank(lambda: checkpoint.find(options.out, which, options.best))

    def load(self, model: nn.Module, which: str = "best", data: Any = None) -> nn.Module:
        """Fill ``model`` with a checkpoint's weights; ``data`` must have the classes and tokens it learnt."""
        path = self.find(which)
        self.parallelize(model)
        checkpoint.refuse_mismatch(path, checkpoint.facts(path)["job"], identity(self.config, data), "use")
        checkpoint.load(path, model)
        return model

    def fit(self, model: nn.Module, data: Any, *, on_step: Callable[[int], None] | None = None) -> FitResult:
        """Train ``model``; returns after ``max_steps`` or ``stop_after``, with a checkpoint written.

        ``on_step`` is called with the number of each finished step; its time does not count as training.
        SIGINT and SIGTERM end it after the step at hand: the checkpoint is written, ``Interrupted`` raised.
        """
        options = self.config.trainer
        last = min(options.max_steps, options.stop_after or options.max_steps)
        self.refuse(data)
        model = self.parallelize(model)
        optimizer = adamw(model, options)
        first, best = self._begin(model, optimizer, data)
        if first >= last:
            raise UserError(
                f"step {first} of {last} is reached already: trainer.max_steps leaves nothing to do"
            )
        checkpoint.on_first_rank(lambda: checkpoint.drop(options.out, after=first))
        pending: list[Step] = []
        step_seconds: list[float] = []
        last_metrics: dict[str, float] = {}
        pace = Pace(options.batch_size)
        with (
            StopRequest() as stop,
            Log(options.out, first, last, active=self.world.rank == 0, quiet=self.quiet) as log,
            self.loader(data, "train", start_step=first) as loader,
        ):
            for step in self.steps(model, optimizer, loader, first):
                pending.append(step)
                step_seconds.append(step.seconds)
                number = step.number
                if on_step is not None:
                    on_step(number)
                logging = number % options.log_every == 0
                # on a GPU the ranks agree to stop only where the host waits for the device anyway
                waits = logging or self.world.device.type == "cpu"
                stopping = number != last and waits and self._anyone(stop.signum)
                ending = number == last or stopping
                validating = _due(options.validate_every, number, number == last) and not stopping
                saving = ending or _due(options.checkpoint_every, number)
                if not (logging or validating or saving):
                    continue
                loss = self._flush(pending, log, pace)
                metrics = self._evaluate(model, data, "validation", None) if validating else None
                if metrics is not None:
                    last_metrics = metrics
                    log.write("validation", number, metrics)
                    log.say(f"step {number}: validation " + _words(metrics))
                    if checkpoint.better(options.best, metrics, best):
                        best, saving = metrics, True
                if saving:
                    log.flush()  # a process killed later still has the lines of its last checkpoint
                    path = self._save(model, optimizer, data, number, metrics)
                if ending:
                    break
            self._tell_substitutes(loader)
            if stopping:
                line = f"stopped after step {number}; --resume goes on from {path}"
                raise Interrupted(line, stop.signum or signal.SIGINT)
        return FitResult(number, loss, *pace.overall(), step_seconds, last_metrics, path)

    def refuse(self, data: Any) -> None:
        """Raise a ``UserError`` for what ``fit`` would only find after many steps, or never: no labels."""
        options = self.config.trainer
        for split in ["train", "validation"][: 1 + (options.validate_every > 0)]:
            with self.loader(data, split):
                pass  # it can be made
            for task in self.tasks if hasattr(getattr(data, "dataset", None), "split") else ():
                labels = torch.from_numpy(data.dataset.split(split).labels).to(self.world.device)
                with suppress(KeyError):  # a task that counts by something else than labels
                    if not task.count({"label": labels}):
                        raise UserError(f"no sample of the {split} split has a '{task.head}' to learn from")
        if options.validate_every and not options.best.startswith("share/"):
            checkpoint.better(options.best, dict.fromkeys(self._names(), 0.0), None)

    def _names(self) -> list[str]:
        """The metrics of a validation that every model has."""
        prefix = "" if len(self.tasks) == 1 else "{}/"
        own = [prefix.format(t.head) + name for t in self.tasks for name in (*t.scores, "loss", "count")]
        return list(dict.fromkeys([*own, "loss"]))

    def steps(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, first: int = 0
    ) -> Iterator[Step]:
        """Train on the batches of ``loader``, one step each, without end; nothing is logged or saved."""
        batches = iter(loader)
        number = first
        while True:
            model.train()  # a validation may have come between
            begun = time.perf_counter()
            batch = self._on_device(next(batches))
            waited = time.perf_counter() - begun
            values = self._step(model, optimizer, batch, number)
            number += 1
            yield Step(number, time.perf_counter() - begun, waited, values)

    def _step(self, model: Any, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> Tensor:
        """Take one optimizer step; returns [each task's loss (this rank's share), norm of the gradient]."""
        options = self.config.trainer
        # all randomness of a step follows from its number, so resuming needs no generator's state
        torch.manual_seed(_seed(options.seed, step, self.world.rank))
        counts = torch.stack([task.count(batch) for task in self.tasks])
        dist.all_reduce(counts)  # known before any backward, and never read by the host
        counts.clamp_(min=1)
        weights = [task.weight for task in self.tasks]
        losses = torch.zeros(len(self.tasks), device=self.world.device, dtype=torch.float64)
        for i in range(options.accumulate):
            part = {name: t.chunk(options.accumulate)[i] for name, t in batch.items()}
            model.set_requires_gradient_sync(i == options.accumulate - 1)
            output = model(part)
            lost = [
                task.loss(output[task.head], part) / n
                for task, n in zip(self.tasks, counts.unbind(), strict=True)
            ]
            torch.stack([w * loss for w, loss in zip(weights, lost, strict=True)]).sum().backward()
            losses += torch.stack(lost).detach()
        norm = clip(model, options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        optimizer.step()
        optimizer.zero_grad()
        return torch.cat([losses, norm[None]])

    def validate(self, model: nn.Module, data: Any, only: Sequence[str] | None = None) -> dict[str, float]:
        """Metrics over the whole validation split; ``only`` reports the other modalities absent."""
        return self._evaluate(self.parallelize(model), data, "validation", only)

    def test(self, model: nn.Module, data: Any, only: Sequence[str] | None = None) -> dict[str, float]:
        """Metrics over the whole test split; ``only`` reports the other modalities absent."""
        return self._evaluate(self.parallelize(model), data, "test", only)

    @torch.no_grad()
    def _evaluate(
        self, model: nn.Module, data: Any, split: str, only: Sequence[str] | None
    ) -> dict[str, float]:
        # per task its count and the sums of its loss and scores, added up over batches, then over ranks
        sums = [
            torch.zeros(2 + len(t.scores), dtype=torch.float64, device=self.world.device) for t in self.tasks
        ]
        shares: dict[str, Tensor] = {}  # of the attention that each modality got, where the model tells
        for batch, output in self._outputs(model, data, split, only):
            real = batch["id"] >= 0
            for name, share in output.items():
                if name.startswith("share/"):
                    pair = torch.stack([share[real].double().sum(), real.sum().double()])
                    shares[name] = shares[name] + pair if name in shares else pair
            for task, total in zip(self.tasks, sums, strict=True):
                y = output[task.head]
                terms = (
                    task.count(batch),
                    task.loss(y, batch),
                    *(score(y, batch) for score in task.scores.values()),
                )
                total += torch.stack([term.double() for term in terms])
        dist.all_reduce(flat := torch.cat([*sums, *shares.values()]))
        metrics: dict[str, float] = {}
        whole, values = 0.0, iter(flat.tolist())
        for task in self.tasks:
            prefix = "" if len(self.tasks) == 1 else f"{task.head}/"
            count = next(values)
            if count == 0:
                raise UserError(f"no sample of the {split} split has a '{task.head}' to score")
            loss = next(values) / count
            metrics |= {f"{prefix}{name}": next(values) / count for name in task.scores}
            metrics |= {f"{prefix}loss": loss, f"{prefix}count": count}
            whole += task.weight * loss
        metrics |= {name: next(values) / max(next(values), 1) for name in shares}
        return metrics | {"loss": whole}

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        data: Any,
        split: str = "test",
        only: Sequence[str] | None = None,
        head: str = "label",
    ) -> Predictions:
        """Class probabilities of every sample of a split, on every rank."""
        rows = []
        for batch, output in self._outputs(self.parallelize(model), data, split, only):
            real = batch["id"] >= 0
            probability = output[head].float().softmax(-1)
            rows.append([t[real].cpu() for t in (batch["id"], probability, batch["present"])])
        mine = [torch.cat(column) for column in zip(*rows, strict=True)]
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine)
        ids, probability, present = (torch.cat(column) for column in zip(*everyone, strict=True))
        order = ids.argsort()
        return Predictions(ids[order], probability[order], present[order])

    def _outputs(
        self, model: nn.Module, data: Any, split: str, only: Sequence[str] | None
    ) -> Iterator[tuple[Batch, Batch]]:
        model.eval()
        with self.loader(data, split, only=only) as loader:
            for batch in loader:
                batch = self._on_device(batch)
                yield batch, model(batch)
            self._tell_substitutes(loader)
        for module in sharded(model):
            module.reshard()  # the gathered weights must not outlive a checkpoint that is loaded next

    def loader(self, data: Any, split: str, **options: Any) -> Any:
        """Make this rank's batches of a split, as ``fit`` and ``validate`` use them."""
        return data.loader(
            split,
            batch_size=self.config.trainer.batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            train=split == "train",
            **options,
        )

    def _on_device(self, batch: Batch) -> Batch:
        wide = self.config.trainer.precision == "fp64"
        batch = {name: t.to(self.world.device, non_blocking=True) for name, t in batch.items()}
        return {name: t.double() if wide and t.is_floating_point() else t for name, t in batch.items()}

    def _anyone(self, signum: int) -> bool:
        asked = torch.tensor(signum, device=self.world.device)
        dist.all_reduce(asked)
        return bool(asked)

    def _flush(self, pending: list[Step], log: Log, pace: Pace) -> float:
        """Fetch the values of the steps since the last flush in one go and log them; return the last loss."""
        begun = time.perf_counter()
        options = self.config.trainer
        values = torch.stack([step.values for step in pending])  # [steps, tasks + 1]
        losses = values[:, :-1].contiguous()
        dist.all_reduce(losses)
        rows = torch.cat([losses, values[:, -1:]], 1).tolist()
        # on a GPU the steps were only asked for until here, where the host waits for them
        seconds = sum(step.seconds for step in pending) + time.perf_counter() - begun
        rate, waiting = pace.lap(len(pending), seconds, sum(step.waited for step in pending))
        for step, (*terms, norm) in zip(pending, rows, strict=True):
            loss = sum(task.weight * term for task, term in zip(self.tasks, terms, strict=True))
            for what, value in (("loss", loss), ("gradient's norm", norm)):
                if not math.isfinite(value):
                    advice = "a lower trainer.lr or trainer.clip may help"
                    raise UserError(f"the {what} of step {step.number} is {value}; {advice}")
            parts = (
                {f"loss/{t.head}": v for t, v in zip(self.tasks, terms, strict=True)}
                if len(terms) > 1
                else {}
            )
            about = {"lr": learning_rate(options, step.number - 1), "grad_norm": norm}
            speed = {"samples_per_s": rate, "waiting": waiting}
            log.write("train", step.number, {"loss": loss, **parts, **about, **speed})
        shown = {"loss": f"{loss:.3f}", "samples/s": f"{rate:.1f}", "waiting": f"{waiting:.0%}"}
        log.progress(pending[-1].number, shown)
        pending.clear()
        return loss

    def _begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any
    ) -> tuple[int, dict[str, float] | None]:
        """Load the checkpoint to resume from, if any; return the steps taken and the best validation."""
        options = self.config.trainer
        path = checkpoint.on_first_rank(
            lambda: checkpoint.beginning(options.out, options.resume, options.overwrite)
        )
        if path is None:
            return 0, None
        then = checkpoint.facts(path)
        checkpoint.refuse_mismatch(path, then["job"], self._identity(data))
        checkpoint.load(path, model, optimizer)
        before = {step: at for step, at in checkpoint.steps(options.out).items() if step <= then["step"]}
        best = checkpoint.on_first_rank(lambda: checkpoint.best(before, options.best))
        return then["step"], checkpoint.facts(best)["validation"] if best else None

    def _identity(self, data: Any) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        more = ("data.seed", "data.augment", "trainer.seed", "trainer.batch_size")
        return identity(self.config, data, *more) | {"data fingerprint": data.fingerprint[:16]}

    def _save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Any, step: int, metrics: Any
    ) -> Path:
        options = self.config.trainer
        job = flatten(as_dict(self.config)) | self._identity(data)
        about = {"job": job, "validation": metrics, "world_size": self.world.size}
        return checkpoint.save(
            options.out, step, model, optimizer, about, keep=options.keep, metric=options.best
        )

    def _tell_substitutes(self, loader: Any) -> None:
        """Nothing is skipped silently: say how many components could not be read and counted as absent."""
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, sorted(loader.ledger))
        lines = sorted({line for ledger in everyone for line in ledger})
        if lines and self.world.rank == 0 and not self.quiet:
            split, key, modality, why = lines[0]
            first = f"the first: {modality} of {key} in {split}: {why}"
            tqdm.write(
                f"{len(lines)} components could not be read and counted as absent; {first}", sys.stderr
            )


def _due(every: int, number: int, last: bool = False) -> bool:
    return every > 0 and (number % every == 0 or last)


def _seed(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _words(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
