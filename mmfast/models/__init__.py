"""Models: encoders, a fusion and heads, made from a configuration."""

from mmfast.models.article import ArticleModel
from mmfast.models.build import build_model
from mmfast.models.config import (
    ArticleConfig,
    Attention,
    AudioTransformer,
    Concat,
    EncoderConfig,
    FusionConfig,
    ImageResNet,
    ModelConfig,
    TextTransformer,
)
from mmfast.models.model import FusionModel

__all__ = [
    "ArticleConfig",
    "ArticleModel",
    "Attention",
    "AudioTransformer",
    "Concat",
    "EncoderConfig",
    "FusionConfig",
    "FusionModel",
    "ImageResNet",
    "ModelConfig",
    "TextTransformer",
    "build_model",
]
