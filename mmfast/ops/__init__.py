"""Ops: one public function each, the same on every backend."""

from mmfast.ops import reference
from mmfast.ops._backend import available, backend, native_calls
from mmfast.ops.concat_linear import concat_linear
from mmfast.ops.contrastive_loss import contrastive_loss
from mmfast.ops.cross_attention import cross_attention
from mmfast.ops.group_norm import group_norm
from mmfast.ops.lowrank_fusion import lowrank_fusion
from mmfast.ops.reference import AttentionStats
from mmfast.ops.weighted_fusion import weighted_fusion

__all__ = [
    "AttentionStats",
    "available",
    "backend",
    "concat_linear",
    "contrastive_loss",
    "cross_attention",
    "group_norm",
    "lowrank_fusion",
    "native_calls",
    "reference",
    "weighted_fusion",
]
