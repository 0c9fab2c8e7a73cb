"""What a training job is told: one frozen dataclass for the job, one each for its data, model and trainer."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmfast.data import DataConfig
from mmfast.errors import UserError
from mmfast.models import ArticleConfig, ModelConfig


@dataclass(frozen=True)
class TrainerConfig:
    """How to train.

    Args:
        out: folder of the run: checkpoints, metrics.jsonl, TensorBoard events
        max_steps: optimizer steps of the whole job, the length of the learning-rate schedule
        batch_size: samples of one step over all processes and all parts of an accumulated step
        accumulate: parts a process cuts its share of the batch into, one backward each
        lr: learning rate at the end of the warm-up
        final_lr: learning rate at the last step, as a share of ``lr``
        warmup: steps of linear warm-up
        weight_decay: AdamW's, on weights; norms and biases have none
        betas: AdamW's
        clip: largest norm of the gradient; 0 does not clip
        precision: auto (bf16 where the hardware has it), bf16, fp32 or fp64
        compile: compile each encoder, the fusion and each head in place
        device: auto, cpu or cuda
        seed: of the initial weights and of dropout
        only: train with these modalities alone; the others are not read and their encoders not built
        validate_every: steps between validations; 0 never validates
        checkpoint_every: steps between checkpoints; 0 writes the best and the last
        keep: checkpoints kept besides the best
        best: the metric of validation that names the best checkpoint
        log_every: steps between two writes of the log
        resume: "latest", or the folder of a checkpoint, or nothing
        overwrite: begin anew in a folder that already holds checkpoints
        stop_after: end after this many steps of the schedule, with a checkpoint
    """

    out: str = "runs/run"
    max_steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    final_lr: float = 0.01
    warmup: int = 20
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    only: list[str] | None = None
    validate_every: int = 100
    checkpoint_every: int = 200
    keep: int = 2
    best: str = "accuracy"
    log_every: int = 10
    resume: str | None = None
    overwrite: bool = False
    stop_after: int | None = None

    def __post_init__(self) -> None:
        """Refuse values no job can mean."""
        for name in ("max_steps", "batch_size", "accumulate", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} is {getattr(self, name)}; wanted 1 or more")
        if self.stop_after is not None and self.stop_after < 1:
            raise UserError(f"trainer.stop_after is {self.stop_after}; wanted 1 or more, or nothing")
        for name in ("lr", "warmup", "weight_decay", "clip", "validate_every", "checkpoint_every", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"trainer.{name} is {getattr(self, name)}; wanted 0 or more")
        if self.seed >= 2**63:
            raise UserError(f"trainer.seed is {self.seed}; wanted less than 2^63")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"trainer.betas is {list(self.betas)}; wanted two numbers from 0 to below 1")
        if not 0 <= self.final_lr <= 1:
            raise UserError(f"trainer.final_lr is {self.final_lr}; wanted a share of lr, from 0 to 1")
        if self.precision == "fp16":
            raise UserError(
                "trainer.precision fp16 needs a loss scaler, which mmfast does not have yet; use bf16 or fp32"
            )
        if self.precision not in ("auto", "bf16", "fp32", "fp64"):
            raise UserError(f"trainer.precision is '{self.precision}'; wanted auto, bf16, fp32 or fp64")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"trainer.device is '{self.device}'; wanted auto, cpu or cuda")


@dataclass(frozen=True)
class Config:
    """A whole job: what the YAML file holds."""

    data: DataConfig
    model: ModelConfig | ArticleConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def selected(self) -> "Config":
        """This job with only the modalities that ``trainer.only`` names: read, built and trained alone."""
        only = self.trainer.only
        if only is None:
            return self
        check_names("trainer.only", only, self.data.modalities)
        data = dataclasses.replace(
            self.data, modalities={name: m for name, m in self.data.modalities.items() if name in only}
        )
        model = self.model
        if isinstance(model, ModelConfig):
            encoders = {name: e for name, e in model.encoders.items() if name in only}
            model = dataclasses.replace(model, encoders=encoders)
        return dataclasses.replace(self, data=data, model=model)


def check_names(what: str, got: Sequence[str], known: Any) -> None:
    """Raise a ``UserError`` for a name in ``got`` that is not one of ``known``."""
    if not got:
        raise UserError(f"{what} is empty; wanted some of {', '.join(known)}")
    for name in got:
        if name not in known:
            raise UserError(f"{what} has '{name}'; wanted some of {', '.join(known)}")


def as_dict(value: Any) -> Any:
    """Turn a configuration into JSON values that can be compared; a dataclass keeps its name as ``class``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(key): as_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_dict(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` becomes ``{"a": ["b"], "a.b": 1}``: names have an order, fields have none."""
    if not isinstance(value, dict):
        return {prefix: value}
    fields = not prefix or isinstance(value.get("class"), str)
    return ({} if fields else {prefix: list(value)}) | {
        k: v
        for key, item in value.items()
        for k, v in flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }


def identity(config: Config, data: Any = None, *more: str) -> dict[str, Any]:
    """What gives weights their meaning, as flat values: model, modalities, classes, tokenizer.

    An order is part of it: a matrix over several encoders has the same shape in any. ``more`` keys, and what
    acts in training only, give a training's steps theirs.
    """
    names, only = ("model.", "data.modalities", *more), () if more else (".crop_scale", ".flip")
    flat = flatten(as_dict(config)).items()
    same = {key: value for key, value in flat if key.startswith(names) and not key.endswith(only)}
    if data is not None:
        same["data classes"] = list(getattr(data, "classes", ()))
        if path := getattr(data, "tokenizer", None):
            same["data tokenizer"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return same
