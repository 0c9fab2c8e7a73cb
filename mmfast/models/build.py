"""From a configuration to a model."""

from collections.abc import Mapping
from typing import Protocol, cast

from torch import nn

from mmfast.data.modality import Modality
from mmfast.errors import UserError
from mmfast.models.article import ArticleModel
from mmfast.models.config import ArticleConfig, ModelConfig
from mmfast.models.model import FusionModel
from mmfast.nn._checks import may_name_a_module


class DataLike(Protocol):
    """What a model has to know of its data; ``mmfast.data.Data`` is one."""

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """Name -> description, in the order of a batch's ``lengths`` and ``present``."""

    @property
    def num_classes(self) -> int:
        """How many categories there are."""

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer gives."""


def build_model(config: ModelConfig | ArticleConfig, data: DataLike) -> FusionModel | ArticleModel:
    """Makes the model that ``config`` describes, with fresh weights that depend on torch's seed only.

    Raises:
        UserError: an encoder for a modality that the data does not have, or for tensors of another kind;
            data without classes.
    """
    if not data.num_classes:
        raise UserError("data.path: the dataset has 0 classes; wanted 1 or more")
    modalities = data.modalities
    for name in modalities:
        if not may_name_a_module(name):
            raise UserError(
                f"data.modalities: got the name {name!r}, wanted one without dots that torch's ModuleDict "
                "does not use itself"
            )
    if isinstance(config, ArticleConfig):
        return ArticleModel(modalities, data.vocab_size, data.num_classes, config.dim)
    for name in config.encoders:
        if name not in modalities:
            raise UserError(f"model.encoders.{name}: no such modality; the data has {', '.join(modalities)}")
    encoders = {name: e.build(modalities[name], data.vocab_size) for name, e in config.encoders.items()}
    fusion = config.fusion.build({name: cast(int, encoder.dim) for name, encoder in encoders.items()})
    return FusionModel(
        encoders,
        fusion,
        {"label": nn.Linear(cast(int, fusion.dim), data.num_classes)},
        modalities=list(modalities),
        dropout=config.dropout,
        modality_dropout=config.modality_dropout,
    )
