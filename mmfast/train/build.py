"""From a configuration to the objects it describes."""

from collections.abc import Sequence

import torch
from torch import nn

from mmfast.data import Data
from mmfast.models import build_model
from mmfast.train.config import Config


def build(config: Config, classes: Sequence[str] = ()) -> tuple[nn.Module, Data]:
    """Make the model, with initial weights that follow from ``trainer.seed``, and the data of a job.

    ``classes`` name the answers where the data has no labels of its own.
    """
    chosen = config.selected()
    data = Data(chosen.data)
    data.classes = data.classes or list(classes)
    data.num_classes = len(data.classes)
    torch.manual_seed(chosen.trainer.seed)
    return build_model(chosen.model, data), data
