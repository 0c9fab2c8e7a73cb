"""Fusions: sequences of several modalities and who is present -> one vector per sample.

A fusion's ``forward(features, present)`` gets the encoders' ``{name: (sequence [B, T, D], lengths [B])}`` in
the order it was built for and ``present`` bool [B, n] in the same order. What is absent must not reach its
output. Outside of training, a fusion by attention also returns how much of it each modality got, [B, n].
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.nn import CrossModalBlock
from mmfast.nn.masking import masked_mean

Features = dict[str, tuple[Tensor, Tensor]]


class PooledFusion(nn.Module):
    """Masked mean of each modality, then a layer over these vectors, such as ``mmfast.nn.ConcatLinear``."""

    def __init__(self, project: nn.Module, dim: int) -> None:
        """``project``: its ``forward(means, present=present)`` makes the fused vector, of width ``dim``."""
        super().__init__()
        self.dim = dim
        self.project = project

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """``{name: ([B, T, D], [B])}``, bool [B, n] -> [B, dim]."""
        means = [masked_mean(sequence, lengths) for sequence, lengths in features.values()]
        fused: Tensor = self.project(means, present=present)
        return fused


class SequenceFusion(nn.Module):
    """A layer over whole sequences that gives a vector, such as ``mmfast.nn.BottleneckFusion``."""

    def __init__(self, layer: nn.Module, dim: int) -> None:
        """``layer``: its ``forward(sequences, lengths=…, present=…)`` makes the vector, of width ``dim``."""
        super().__init__()
        self.dim = dim
        self.layer = layer

    def forward(self, features: Features, present: Tensor) -> Tensor:
        """``{name: ([B, T, D], [B])}``, bool [B, n] -> [B, dim]."""
        sequences = {name: sequence for name, (sequence, _) in features.items()}
        lengths = {name: length for name, (_, length) in features.items()}
        fused: Tensor = self.layer(sequences, lengths=lengths, present=present)
        return fused


class AttentionFusion(nn.Module):
    """Learned queries look at the steps of all modalities in one softmax; their mean is the fused vector."""

    def __init__(self, dims: Mapping[str, int], dim: int, heads: int, queries: int, layers: int) -> None:
        """``dims``: width of each modality's sequence; ``dim``: of the queries and of the fused vector."""
        super().__init__()
        self.dim = dim
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(queries, dim), std=0.02))
        self.blocks = nn.ModuleList(
            CrossModalBlock(dim, heads, dims, gate=None, norm_sources=True, qk_norm=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Features, present: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``{name: ([B, T, D], [B])}``, bool [B, n] -> [B, dim], in ``eval`` also the shares [B, n].

        Shares are means over queries, heads and layers; they add up to 1, or to 0 where nothing is present.
        Training does without: attention is faster where it need not tell its sources apart.
        """
        sequences = {name: sequence for name, (sequence, _) in features.items()}
        lengths = {name: length for name, (_, length) in features.items()}
        options: dict[str, Any] = {"lengths": lengths, "present": present}
        x = self.queries.expand(len(present), -1, -1)  # [B, queries, dim]
        shares = []
        for block in self.blocks:
            if self.training:
                x = block(x, sequences, **options)
            else:
                x, stats = block(x, sequences, return_stats=True, **options)
                shares.append(stats.mass.mean(dim=(1, 2)))
        fused = self.norm(x).mean(dim=1)
        return (fused, torch.stack(shares).mean(dim=0)) if shares else fused
