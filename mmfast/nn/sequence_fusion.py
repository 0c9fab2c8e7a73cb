"""Fusions of one sequence per modality into a vector: through bottleneck tokens, and pair by pair."""

from collections.abc import Mapping
from itertools import permutations
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.nn._checks import (
    require,
    require_dtype,
    require_flags,
    require_keys,
    require_lengths,
    require_streams,
)
from mmfast.nn.concat_linear import ConcatLinear
from mmfast.nn.cross_attention import CrossModalAttention, CrossModalBlock, Streams
from mmfast.nn.masking import masked_mean, valid
from mmfast.ops import weighted_fusion

TOKENS = "tokens"  # the one source of an attention here


class BottleneckFusion(nn.Module):
    """Modalities in Transformers of their own that exchange through a few shared tokens (MBT).

    Nagrani et al. 2021, "Attention Bottlenecks for Multimodal Fusion", equations 8 and 9. In each layer every
    modality's tokens and the bottleneck tokens attend to themselves and to each other,

        ``[bottlenecks_i, tokens_i] = Block_i([bottlenecks, tokens_i])``

    and the bottlenecks go on as the mean of ``bottlenecks_i`` over the modalities that are there. The fused
    vector is the mean over these of the mean of their tokens.

    Args:
        embed_dim: ``E``, of tokens, bottlenecks and the fused vector.
        num_heads: ``H``; ``E`` is a multiple of it.
        source_dims: name -> ``E_i`` of each modality's sequence, which is projected to ``E`` first.
        num_bottlenecks: how many tokens are shared; the paper has 4.
        depth: how many layers.
        device: of the parameters.
        dtype: of the parameters.
        **options: see ``CrossModalBlock``.

    Raises:
        ValueError: ``source_dims`` is empty, or see ``CrossModalAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        source_dims: Mapping[str, int],
        *,
        num_bottlenecks: int = 4,
        depth: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Creates the parts; see the class."""
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project = _projections(self, source_dims, embed_dim, made)
        self.bottlenecks = nn.Parameter(torch.empty(num_bottlenecks, embed_dim, **made))
        self.reset_parameters()
        options = {"gate": None, "norm_sources": True, **made, **options}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: CrossModalBlock(embed_dim, num_heads, {TOKENS: embed_dim}, **options)
                 for name in source_dims}
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(embed_dim, **made)

    def reset_parameters(self) -> None:
        """The bottlenecks, small and random."""
        nn.init.normal_(self.bottlenecks, std=0.02)

    def forward(
        self, sources: Streams, *, lengths: Streams | None = None, present: Tensor | None = None
    ) -> Tensor:
        """``{name: [B, S_i, E_i]}`` -> ``[B, E]``; 0 for a sample without any modality.

        ``lengths``: name -> integers ``[B]``, how many of its first steps there are, all of them without an
        entry; ``present``: bool ``[B, n]``, columns in the order of ``source_dims``.
        """
        tokens, steps = _tokens(self, self.project, sources, lengths, present)
        shared = self.bottlenecks.expand(len(next(iter(tokens.values()))), -1, -1)  # [B, N, E]
        count = shared.shape[1]
        for layer in self.layers:
            updated = []
            for name, block in cast(nn.ModuleDict, layer).items():
                x = torch.cat([shared, tokens[name]], 1)  # [B, N + S_i, E]
                x = block(x, {TOKENS: x}, lengths={TOKENS: count + steps[name]})
                own, tokens[name] = x.split([count, x.shape[1] - count], 1)
                updated.append(own)
            shared = _mean(updated, present)
        pooled = [masked_mean(self.norm(x), steps[name]) for name, x in tokens.items()]
        return _mean(pooled, present)


class PairwiseFusion(nn.Module):
    """Every ordered pair of modalities interacts; what comes of all pairs is one vector.

    ``G(h_i, h_j) = h_i + attention(queries of h_i, keys and values of h_j)`` is the crossmodal attention of
    Tsai et al. 2019, "Multimodal Transformer for Unaligned Multimodal Language Sequences", section 3.1, with
    weights of its own for each of the n (n - 1) pairs; the means of all ``G(h_i, h_j)`` over the steps of i
    go through one ``ConcatLinear``. Where j is absent, ``G(h_i, h_j)`` is what h_i says alone; where i is,
    the pair counts as zeros. A single modality is paired with itself.

    Args:
        embed_dim: ``E``, of the sequences once projected, and of the fused vector.
        num_heads: ``H``; ``E`` is a multiple of it.
        source_dims: name -> ``E_i`` of each modality's sequence.
        activation: of the last layer; see ``ConcatLinear``.
        device: of the parameters.
        dtype: of the parameters.
        **options: see ``CrossModalAttention``.

    Raises:
        ValueError: ``source_dims`` is empty, or see ``CrossModalAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        source_dims: Mapping[str, int],
        *,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Creates the parts; see the class."""
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project = _projections(self, source_dims, embed_dim, made)
        self.pairs = list(permutations(range(len(source_dims)), 2)) or [(0, 0)]
        options = {"norm": True, "norm_sources": True, **made, **options}
        self.interact = nn.ModuleList(
            CrossModalAttention(embed_dim, num_heads, {TOKENS: embed_dim}, **options) for _ in self.pairs
        )
        self.combine = ConcatLinear([embed_dim] * len(self.pairs), embed_dim, activation=activation, **made)

    def forward(
        self, sources: Streams, *, lengths: Streams | None = None, present: Tensor | None = None
    ) -> Tensor:
        """``{name: [B, S_i, E_i]}`` -> ``[B, E]``; the last layer's bias for a sample without any modality.

        ``lengths`` and ``present`` are those of ``BottleneckFusion``.
        """
        tokens, steps = _tokens(self, self.project, sources, lengths, present)
        h, there = list(tokens.values()), list(steps.values())
        pooled = []
        for (i, j), interact in zip(self.pairs, self.interact, strict=True):
            met = interact(h[i], {TOKENS: h[j]}, lengths={TOKENS: there[j]}, residual=h[i])  # [B, S_i, E]
            pooled.append(masked_mean(met, there[i]))
        if present is not None:
            present = torch.stack([present[:, i] for i, _ in self.pairs], 1)
        return self.combine(pooled, present=present)


def _projections(
    layer: nn.Module, source_dims: Mapping[str, int], embed_dim: int, made: dict[str, Any]
) -> nn.ModuleDict:
    if not source_dims:
        raise ValueError(f"{type(layer).__name__}: source_dims is empty, wanted at least one modality")
    require_keys(layer, "source_dims", source_dims)
    return nn.ModuleDict({name: ConcatLinear([d], embed_dim, **made) for name, d in source_dims.items()})


def _tokens(
    layer: nn.Module,
    project: nn.ModuleDict,
    sources: Streams,
    lengths: Streams | None,
    present: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every sequence at one width [B, S_i, E], and how many of its steps are there [B]: 0 where it is absent.

    What is not there is neither multiplied nor read: its tokens are the projection's bias.
    """
    lengths = {} if lengths is None else lengths
    require_streams(layer, sources, project, lengths=lengths)
    first = next(iter(sources.values()))
    require_flags(layer, "present", present, (len(first), len(project)))
    tokens, steps = {}, {}
    for i, (name, projection) in enumerate(project.items()):
        x, length, weight = sources[name], lengths.get(name), cast(ConcatLinear, projection).weight
        width = weight.shape[1]
        fits = x.dim() == 3 and len(x) == len(first) and x.shape[2] == width
        require(layer, fits, f"{name} in sources", x.shape, "[{}, S, {}]", len(first), width)
        require_dtype(layer, f"{name} in sources", x, weight)
        require_lengths(layer, f"{name} in lengths", length, len(x))
        if length is None:
            length = torch.full((len(x),), x.shape[1], dtype=torch.int64, device=x.device)
        length = length.clamp(0, x.shape[1])
        steps[name] = length if present is None else torch.where(present[:, i], length, 0)
        there = valid(steps[name], x.shape[1])  # [B, S_i]
        tokens[name] = projection([x.flatten(0, 1)], present=there.reshape(-1, 1)).unflatten(0, x.shape[:2])
    return tokens, steps


def _mean(vectors: list[Tensor], present: Tensor | None) -> Tensor:
    """The mean over the modalities that are there, 0 where none is."""
    return weighted_fusion(vectors, vectors[0].new_zeros(len(vectors)), present=present)
