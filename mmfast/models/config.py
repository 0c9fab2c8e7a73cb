"""What a model is made of: frozen dataclasses that the YAML holds as ``{class_path: …, init_args: {…}}``.

A new encoder or fusion is a new subclass with a ``build`` of its own; nothing else has to know it. The bases
are plain classes without fields, which is what makes jsonargparse offer their subclasses by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from mmfast.data.modality import Modality
from mmfast.errors import UserError
from mmfast.models.audio import AudioEncoder
from mmfast.models.fusion import AttentionFusion, PooledFusion, SequenceFusion
from mmfast.models.image import ImageEncoder
from mmfast.models.text import TextEncoder
from mmfast.nn import (
    BottleneckFusion,
    ConcatLinear,
    GatedFusion,
    LowRankFusion,
    PairwiseFusion,
    WeightedFusion,
)

ACTIVATIONS = ("relu", "gelu", "silu", "none")


class EncoderConfig(ABC):
    """Describes an encoder: a module with ``dim`` and ``forward(x, lengths) -> (sequence, lengths)``."""

    @abstractmethod
    def build(self, modality: Modality, vocab_size: int) -> nn.Module:
        """Makes the encoder for tensors of ``modality``."""


class FusionConfig(ABC):
    """Describes a fusion: a module with ``dim`` and ``forward(features, present) -> [B, dim]``.

    It may also return how much of it each modality got, [B, n], after the fused vector.
    """

    dim: int

    @abstractmethod
    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """Makes the fusion of sequences of these widths, in this order."""


@dataclass(frozen=True, kw_only=True)
class ImageResNet(EncoderConfig):
    """A residual network with group norm; the defaults are ResNet-18 (He et al. 2015): 11 M parameters.

    Attributes:
        width: channels of the first stage; each further stage has twice as many and half the resolution.
        depths: basic blocks of each stage.
        groups: of the group norm; must divide ``width``.
        stem: "large" is 7 x 7 with stride 2 and a max pool (a quarter of the resolution), "small" is 3 x 3
            with stride 1, for images of about 32 x 32.
    """

    width: int = 64
    depths: tuple[int, ...] = (2, 2, 2, 2)
    groups: int = 32
    stem: str = "large"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, width=self.width, groups=self.groups, depths=min(self.depths, default=0))
        if self.width % self.groups:
            raise UserError(f"ImageResNet.groups: got {self.groups}, wanted a divisor of width {self.width}")
        if self.stem not in ("large", "small"):
            raise UserError(f"ImageResNet.stem: got {self.stem!r}, wanted 'large' or 'small'")

    def build(self, modality: Modality, vocab_size: int) -> nn.Module:
        """The encoder of ``[B, channels, H, W]``."""
        channels, _, _ = _shape(self, modality, rank=3, wanted="images")
        return ImageEncoder(channels, self.width, self.depths, groups=self.groups, stem=self.stem)


@dataclass(frozen=True, kw_only=True)
class TextTransformer(EncoderConfig):
    """A pre-norm Transformer over token embeddings with learned positions."""

    dim: int = 192
    layers: int = 2
    heads: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _check_transformer(self, self.dim, self.layers, self.heads)

    def build(self, modality: Modality, vocab_size: int) -> nn.Module:
        """The encoder of token ids ``[B, T]``."""
        (tokens,) = _shape(self, modality, rank=1, wanted="token ids")
        return TextEncoder(vocab_size, tokens, self.dim, self.layers, self.heads)


@dataclass(frozen=True, kw_only=True)
class AudioTransformer(EncoderConfig):
    """Two strided convolutions over log-mel frames, then a pre-norm Transformer (as Whisper's encoder)."""

    dim: int = 192
    layers: int = 2
    heads: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _check_transformer(self, self.dim, self.layers, self.heads)

    def build(self, modality: Modality, vocab_size: int) -> nn.Module:
        """The encoder of ``[B, n_mels, frames]``."""
        n_mels, frames = _shape(self, modality, rank=2, wanted="log-mel features")
        return AudioEncoder(n_mels, frames, self.dim, self.layers, self.heads)


@dataclass(frozen=True, kw_only=True)
class Concat(FusionConfig):
    """Masked mean of each modality, then one ``mmfast.nn.ConcatLinear`` over all of them.

    Attributes:
        dim: width of the fused vector.
        activation: "relu", "gelu", "silu" or "none".
    """

    dim: int = 256
    activation: str = "gelu"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, dim=self.dim)
        _check_activation(self, self.activation)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        return PooledFusion(ConcatLinear(list(dims.values()), self.dim, activation=self.activation), self.dim)


@dataclass(frozen=True, kw_only=True)
class Attention(FusionConfig):
    """Learned queries look at every step of every modality in one softmax: ``mmfast.nn.CrossModalBlock``.

    Attributes:
        dim: width of the queries and of the fused vector.
        heads: of the attention; must divide ``dim``.
        queries: how many there are; the fused vector is their mean.
        layers: how many blocks they go through.
    """

    dim: int = 256
    heads: int = 4
    queries: int = 8
    layers: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, queries=self.queries)
        _check_transformer(self, self.dim, self.layers, self.heads)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        return AttentionFusion(dims, self.dim, self.heads, self.queries, self.layers)


@dataclass(frozen=True, kw_only=True)
class Weighted(FusionConfig):
    """Masked mean of each modality, then a weighted mean of these: ``mmfast.nn.WeightedFusion``.

    Attributes:
        dim: width of the fused vector.
        activation: "relu", "gelu", "silu" or "none".
    """

    dim: int = 256
    activation: str = "gelu"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, dim=self.dim)
        _check_activation(self, self.activation)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        return PooledFusion(
            WeightedFusion(list(dims.values()), self.dim, activation=self.activation), self.dim
        )


@dataclass(frozen=True, kw_only=True)
class Gated(FusionConfig):
    """Masked mean of each modality, then gates that all of them set: ``mmfast.nn.GatedFusion``.

    Attributes:
        dim: width of the fused vector.
    """

    dim: int = 256

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, dim=self.dim)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        return PooledFusion(GatedFusion(list(dims.values()), self.dim), self.dim)


@dataclass(frozen=True, kw_only=True)
class LowRank(FusionConfig):
    """Masked mean of each modality, then their tensor product: ``mmfast.nn.LowRankFusion``.

    Attributes:
        dim: width of the fused vector.
        rank: of the weight that the product is multiplied with.
    """

    dim: int = 256
    rank: int = 4

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, dim=self.dim, rank=self.rank)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        return PooledFusion(LowRankFusion(list(dims.values()), self.dim, self.rank), self.dim)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(FusionConfig):
    """A Transformer for each modality, all of which share a few tokens: ``mmfast.nn.BottleneckFusion``.

    Attributes:
        dim: width of the tokens and of the fused vector.
        heads: of the attention; must divide ``dim``.
        bottlenecks: how many tokens are shared.
        layers: how many layers each modality goes through.
    """

    dim: int = 256
    heads: int = 4
    bottlenecks: int = 4
    layers: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _positive(self, bottlenecks=self.bottlenecks)
        _check_transformer(self, self.dim, self.layers, self.heads)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        layer = BottleneckFusion(
            self.dim, self.heads, dims, num_bottlenecks=self.bottlenecks, depth=self.layers
        )
        return SequenceFusion(layer, self.dim)


@dataclass(frozen=True, kw_only=True)
class Pairwise(FusionConfig):
    """Every ordered pair of modalities interacts by attention: ``mmfast.nn.PairwiseFusion``.

    Attributes:
        dim: width of the attention and of the fused vector.
        heads: of the attention; must divide ``dim``.
        activation: "relu", "gelu", "silu" or "none", of the layer that combines the pairs.
    """

    dim: int = 256
    heads: int = 4
    activation: str = "gelu"

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        _check_transformer(self, self.dim, 1, self.heads)
        _check_activation(self, self.activation)

    def build(self, dims: Mapping[str, int]) -> nn.Module:
        """The fusion of sequences of these widths."""
        return SequenceFusion(
            PairwiseFusion(self.dim, self.heads, dims, activation=self.activation), self.dim
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A ``FusionModel``: encoders by modality name, a fusion, one category head.

    Attributes:
        encoders: modality name -> encoder. Modalities of the data that have none here are not used.
        fusion: how the encoders' sequences become one vector.
        dropout: on the fused vector.
        modality_dropout: chance that a present modality counts as absent for one training step, so that the
            model learns to answer from subsets. The last one of a sample is never dropped.
    """

    encoders: dict[str, EncoderConfig]
    fusion: FusionConfig = field(default_factory=Concat)
    dropout: float = 0.1
    modality_dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not self.encoders:
            raise UserError("model.encoders: got none, wanted at least one")
        _check_chance("model.dropout", self.dropout)
        _check_chance("model.modality_dropout", self.modality_dropout)


@dataclass(frozen=True, kw_only=True)
class ArticleConfig:
    """The article's model, ``ArticleModel``: one encoder of its kind for each modality of the data."""

    dim: int = 256


def _positive(config: object, **values: int) -> None:
    for name, value in values.items():
        if value <= 0:
            raise UserError(f"{type(config).__name__}.{name}: got {value}, wanted more than 0")


def _check_activation(config: object, activation: str) -> None:
    if activation not in ACTIVATIONS:
        name = type(config).__name__
        raise UserError(f"{name}.activation: got {activation!r}, wanted relu, gelu, silu or none")


def _check_transformer(config: object, dim: int, layers: int, heads: int) -> None:
    _positive(config, dim=dim, layers=layers, heads=heads)
    if dim % heads:
        raise UserError(f"{type(config).__name__}.heads: got {heads}, wanted a divisor of dim {dim}")


def _check_chance(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"{name}: got {value}, wanted 0 <= {name.split('.')[-1]} < 1")


def _shape(config: object, modality: Modality, rank: int, wanted: str) -> tuple[int, ...]:
    if len(modality.shape) != rank:
        got = f"{type(modality).__name__} of shape {list(modality.shape)}"
        raise UserError(f"{type(config).__name__} encodes {wanted}, got a modality {got}")
    return modality.shape
