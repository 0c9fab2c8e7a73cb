"""Models: encoders, a fusion and heads, made from a configuration."""

from mmfast.models.article import ArticleModel
from mmfast.models.build import build_model
from mmfast.models.config import (
    ArticleConfig,
    Attention,
    AudioTransformer,
    Bottleneck,
    Concat,
    EncoderConfig,
    FusionConfig,
    Gated,
    ImageResNet,
    LowRank,
    ModelConfig,
    Pairwise,
    TextTransformer,
    Weighted,
)
from mmfast.models.model import FusionModel

__all__ = [
    "ArticleConfig",
    "ArticleModel",
    "Attention",
    "AudioTransformer",
    "Bottleneck",
    "Concat",
    "EncoderConfig",
    "FusionConfig",
    "FusionModel",
    "Gated",
    "ImageResNet",
    "LowRank",
    "ModelConfig",
    "Pairwise",
    "TextTransformer",
    "Weighted",
    "build_model",
]
