"""Fusions: sequences of several modalities and who is present -> one vector per sample.

A fusion's ``forward(features, present)`` gets the encoders' ``{name: (sequence [B, T, D], lengths [B])}`` in
the order it was built for and ``present`` bool [B, n] in the same order. What is absent must not reach its
output.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from mmfast.nn.masking import masked_mean
from mmfast.nn import ConcatLinear

Features = dict[str, tuple[Tensor, Tensor]]


class ConcatFusion(nn.Module):
    """Masked mean of each modality, then ``activation(cat(means) @ weight.T + bias)`` without the ``cat``."""

    def __init__(self, dims: Mapping[str, int], dim: int, activation: str) -> None:
        """``dims``: width of each modality's sequence; ``dim``: of the fused vector."""
        super().__init__()
        self.dim = dim
        self.project = ConcatLinear(list(dims.values()), dim, activation=activation)

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """``{name: ([B, T, D], [B])}``, bool [B, n] -> [B, dim]; with nothing present the bias alone."""
        means = [masked_mean(sequence, lengths) for sequence, lengths in features.values()]
        return self.project(means, present=present)
