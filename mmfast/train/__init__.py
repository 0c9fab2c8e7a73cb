"""Training: ``Trainer(config).fit(model, data)``, from one process to many nodes."""

from mmfast.train.arguments import load_config
from mmfast.train.build import build
from mmfast.train.config import Config, TrainerConfig
from mmfast.train.parallel import World, parallelize, start
from mmfast.train.results import FitResult, Predictions
from mmfast.train.signals import Interrupted
from mmfast.train.task import Task, category
from mmfast.train.trainer import Trainer

__all__ = [
    "Config",
    "FitResult",
    "Interrupted",
    "Predictions",
    "Task",
    "Trainer",
    "TrainerConfig",
    "World",
    "build",
    "category",
    "load_config",
    "parallelize",
    "start",
]
