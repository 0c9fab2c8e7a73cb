"""Layers made of ``mmfast.ops``."""

from mmfast.nn.concat_linear import ConcatLinear
from mmfast.nn.cross_attention import CrossModalAttention, CrossModalBlock, PerceiverResampler

__all__ = ["ConcatLinear", "CrossModalAttention", "CrossModalBlock", "PerceiverResampler"]
