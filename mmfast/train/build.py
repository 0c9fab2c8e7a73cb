"""From a configuration to the objects it describes."""

import torch
from torch import nn

from mmfast.data import Data
from mmfast.models import build_model
from mmfast.train.config import Config


def build(config: Config) -> tuple[nn.Module, Data]:
    """Make the model, with initial weights that follow from ``trainer.seed``, and the data of a job."""
    chosen = config.selected()
    data = Data(chosen.data)
    torch.manual_seed(chosen.trainer.seed)
    return build_model(chosen.model, data), data
