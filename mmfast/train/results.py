"""What a trainer gives back."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class FitResult:
    """How a training ended: steps of the schedule taken, the last step's loss, and the speed.

    ``samples_per_s`` counts samples of all ranks and leaves out the first ``log_every`` steps of this call,
    validation, checkpoints and ``on_step``; ``waiting`` is the share of that time spent waiting for data.
    ``step_seconds`` has every step of this call, waiting included (on a GPU: the host's time).
    """

    steps: int
    loss: float
    samples_per_s: float
    waiting: float
    step_seconds: list[float]
    metrics: dict[str, float]  # of the last validation
    checkpoint: Path


@dataclass(frozen=True)
class Predictions:
    """The model's answers for a split, in its order."""

    id: Tensor  # int64 [N]
    probability: Tensor  # float32 [N, C]
    present: Tensor  # bool [N, M]


@dataclass(frozen=True)
class Step:
    """One finished step: its number, its seconds, and on the device the losses and gradient norm."""

    number: int
    seconds: float
    waited: float  # of the seconds, those waiting for data
    values: Tensor  # [tasks + 1], the losses this rank's share of the global mean
