"""Layers made of ``mmfast.ops``."""

from mmfast.nn.concat_linear import ConcatLinear
from mmfast.nn.cross_attention import CrossModalAttention, CrossModalBlock, PerceiverResampler
from mmfast.nn.sequence_fusion import BottleneckFusion, PairwiseFusion
from mmfast.nn.vector_fusion import GatedFusion, LowRankFusion, WeightedFusion

__all__ = [
    "BottleneckFusion",
    "ConcatLinear",
    "CrossModalAttention",
    "CrossModalBlock",
    "GatedFusion",
    "LowRankFusion",
    "PairwiseFusion",
    "PerceiverResampler",
    "WeightedFusion",
]
