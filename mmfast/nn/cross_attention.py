"""Attention of one stream over several others, as layers on ``mmfast.ops.cross_attention``."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.nn._checks import (
    require,
    require_dtype,
    require_flags,
    require_keys,
    require_lengths,
    require_names,
    require_streams,
)
from mmfast.nn.concat_linear import ConcatLinear, take
from mmfast.nn.masking import valid
from mmfast.ops import cross_attention
from mmfast.ops.reference import AttentionStats

Streams = Mapping[str, Tensor]
LATENTS = "latents"  # the resampler's own stream among its sources


class CrossModalAttention(nn.Module):
    """``residual + tanh(gate) * project(attention(queries of x, keys and values of every source))``.

    One softmax over the keys of all sources: they compete for each query's attention, and nothing is
    concatenated. What a source's length, mask or presence hides is not projected either: it costs nothing,
    forward or backward, and may hold anything.

    Args:
        embed_dim: ``E``, of the queries and of the output.
        num_heads: ``H``; ``E`` is a multiple of it.
        source_dims: name -> ``E_i`` of each source.
        num_kv_heads: heads of keys and values, a divisor of ``H`` (Ainslie et al. 2023); ``H`` when None.
        bias: of all projections.
        norm: a LayerNorm of the queries before their projection.
        norm_sources: a LayerNorm of each source before its projection.
        qk_norm: RMS norm of each head's queries and keys, with a learned scale (Dehghani et al. 2023).
        source_bias: learn a bias for each head and source, added to all of the source's logits; 0 at first.
        gate: None, ``"scalar"`` or ``"channel"``: see ``ConcatLinear``. Closed at first.
        causal: the names of the sources of which query l sees only keys s <= l + S_i - L.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``source_dims`` is empty, heads do not divide, or ``causal`` or ``gate`` is unknown.
    """

    source_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        source_dims: Mapping[str, int],
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        norm: bool = False,
        norm_sources: bool = False,
        qk_norm: bool = False,
        source_bias: bool = False,
        gate: str | None = None,
        causal: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the parameters; see the class."""
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if not source_dims:
            raise ValueError("CrossModalAttention: source_dims is empty, wanted at least one source")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"CrossModalAttention: num_heads is {num_heads}, wanted a divisor of {embed_dim}"
            )
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(
                f"CrossModalAttention: num_kv_heads is {kv_heads}, wanted a divisor of {num_heads}"
            )
        require_names(self, "causal", causal, source_dims)
        require_keys(self, "source_dims", source_dims)
        self.heads, self.kv_heads, self.head_dim = num_heads, kv_heads, embed_dim // num_heads
        self.causal = [name in causal for name in source_dims]
        self.widths = tuple(source_dims.values())
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = 2 * kv_heads * self.head_dim  # keys, then values
        self.query = ConcatLinear([embed_dim], embed_dim, bias, norm=norm, **made)
        self.sources = nn.ModuleDict(
            {n: ConcatLinear([d], inner, bias, norm=norm_sources, **made) for n, d in source_dims.items()}
        )
        self.project = ConcatLinear([embed_dim], embed_dim, bias, gate=gate, **made)
        self.query_norm = nn.RMSNorm(self.head_dim, **made) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(self.head_dim, **made) if qk_norm else nn.Identity()
        biases = torch.empty(num_heads, len(source_dims), **made) if source_bias else None
        self.register_parameter("source_bias", None if biases is None else nn.Parameter(biases))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No source is preferred."""
        if self.source_bias is not None:
            nn.init.zeros_(self.source_bias)

    @classmethod
    def from_multihead(
        cls, attention: nn.MultiheadAttention, source: str = "source"
    ) -> "CrossModalAttention":
        """The layer of one source that gives ``attention``'s outputs, with copies of its weights.

        Called as ``layer(query, {source: memory}, lengths={source: …})`` it is ``attention(query, memory,
        memory, key_padding_mask=…)`` with ``batch_first``; a query that sees nothing gets the output
        projection's bias instead of nan.

        Raises:
            ValueError: ``attention`` drops out weights, adds keys of its own (``add_bias_kv``,
                ``add_zero_attn``), or has keys and values of different widths.
        """
        if attention.dropout or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(
                "from_multihead: wanted an attention without dropout, add_bias_kv and add_zero_attn, got "
                f"dropout {attention.dropout}, add_bias_kv {attention.bias_k is not None}, "
                f"add_zero_attn {attention.add_zero_attn}"
            )
        if attention.kdim != attention.vdim:
            raise ValueError(
                f"from_multihead: wanted kdim and vdim alike, got {attention.kdim} and {attention.vdim}"
            )
        width, out = attention.embed_dim, attention.out_proj
        packed = attention.in_proj_weight
        layer = cls(
            width,
            attention.num_heads,
            {source: attention.kdim},
            bias=attention.in_proj_bias is not None,
            device=out.weight.device,
            dtype=out.weight.dtype,
        )
        if packed is None:  # a width of its own for keys and values
            query = attention.q_proj_weight
            with torch.enable_grad():  # whether it is frozen has to show
                key_value = torch.cat([attention.k_proj_weight, attention.v_proj_weight])
        else:
            query, key_value = packed[:width], packed[width:]
        projection = layer.sources[source]
        assert isinstance(projection, ConcatLinear)
        take(layer.query.weight, query)
        take(projection.weight, key_value)
        take(layer.project.weight, out.weight)
        if attention.in_proj_bias is not None:
            take(layer.query.bias, attention.in_proj_bias[:width])
            take(projection.bias, attention.in_proj_bias[width:])
            take(layer.project.bias, out.bias)
        return layer.train(attention.training)

    def forward(
        self,
        x: Tensor,
        sources: Streams,
        *,
        lengths: Streams | None = None,
        masks: Streams | None = None,
        present: Tensor | None = None,
        residual: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionStats]:
        """Queries from ``x`` look at all sources.

        Args:
            x: ``[B, L, E]``.
            sources: name -> ``[B, S_i, E_i]``, every source of the layer: what is missing is given with any
                content, and with ``present`` False.
            lengths: name -> integers ``[B]``, how many of the source's first steps there are; sources without
                an entry are whole.
            masks: name -> bool ``[B, S_i]``, True for the steps that are there.
            present: bool ``[B, n]``, or ``[B, L, n]`` where each query sees some sources only; columns in the
                order of ``source_dims``.
            residual: ``[B, L, E]`` to be added.
            return_stats: also return ``AttentionStats``; see ``mmfast.ops.cross_attention``.

        Returns:
            ``[B, L, E]``.

        Raises:
            TypeError: an argument is not of the kind above.
            ValueError: a source is not there or unknown, a shape or dtype does not fit, or see
                ``mmfast.ops.cross_attention``.
        """
        lengths, masks = {} if lengths is None else lengths, {} if masks is None else masks
        require_streams(self, sources, self.sources, lengths=lengths, masks=masks)
        width, weight = self.heads * self.head_dim, self.query.weight
        fits = isinstance(x, Tensor) and x.dim() == 3 and x.shape[2] == width
        require(self, fits, "x", x.shape if isinstance(x, Tensor) else x, f"[B, L, {width}]")
        require_dtype(self, "x", x, weight)
        batch, n = len(x), len(self.sources)
        require_flags(self, "present", present, (batch, n), (batch, x.shape[1], n))
        query = self.query_norm(self.query([x]).unflatten(-1, (self.heads, self.head_dim)))  # [B, L, H, D]
        pairs = []
        for i, (name, project) in enumerate(self.sources.items()):
            source, length, mask = sources[name], lengths.get(name), masks.get(name)
            fits = source.dim() == 3 and source.shape[0] == batch and source.shape[2] == self.widths[i]
            require(self, fits, f"{name} in sources", source.shape, "[{}, S, {}]", batch, self.widths[i])
            require_dtype(self, f"{name} in sources", source, weight)
            require_lengths(self, f"{name} in lengths", length, batch)
            require_flags(self, f"{name} in masks", mask, (batch, source.shape[1]))
            there = _there(source, length, mask, None if present is None else present[..., i])
            if there is None:
                projected = project([source])
            else:  # token by token: what is not there costs no product
                flat = project([source.flatten(0, 1)], present=there.reshape(-1, 1))
                projected = flat.unflatten(0, source.shape[:2])
            heads = projected.unflatten(-1, (2, self.kv_heads, self.head_dim))  # [B, S, 2, Hkv, D]
            key, value = heads.unbind(2)
            pairs.append((self.key_norm(key).transpose(1, 2), value.transpose(1, 2)))
        options: dict[str, Any] = {"return_stats": return_stats}
        result: Any = cross_attention(
            query.transpose(1, 2),
            pairs,
            lengths=[lengths.get(name) for name in self.sources],
            masks=[masks.get(name) for name in self.sources],
            present=present,
            causal=self.causal,
            source_bias=self.source_bias,
            **options,
        )
        attended, stats = result if return_stats else (result, cast(Any, None))
        out: Tensor = self.project([attended.transpose(1, 2).flatten(2)], residual=residual)
        return (out, stats) if return_stats else out


class CrossModalBlock(nn.Module):
    """``x + tanh(gate) * attention(norm(x), sources)``, then ``x + tanh(gate) * MLP(norm(x))``.

    The gated cross-attention block of Flamingo (Alayrac et al. 2022): with its gates, which are closed at
    first, it begins as the identity and can be put into a trained model. Norms, biases, activation, gates and
    residuals run inside the projections.

    Args:
        embed_dim: ``E``.
        num_heads: ``H``.
        source_dims: name -> ``E_i`` of each source.
        mlp_ratio: width of the MLP in multiples of ``E``.
        activation: of the MLP; see ``ConcatLinear``.
        gate: of both parts; None for none.
        device: of the parameters.
        dtype: of the parameters.
        **options: see ``CrossModalAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        source_dims: Mapping[str, int],
        *,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        gate: str | None = "scalar",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Creates the parts; see the class."""
        super().__init__()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden = round(mlp_ratio * embed_dim)
        self.attention = CrossModalAttention(
            embed_dim, num_heads, source_dims, norm=True, gate=gate, **made, **options
        )
        self.up = ConcatLinear([embed_dim], hidden, activation=activation, norm=True, **made)
        self.down = ConcatLinear([hidden], embed_dim, gate=gate, **made)

    def forward(
        self,
        x: Tensor,
        sources: Streams,
        *,
        lengths: Streams | None = None,
        masks: Streams | None = None,
        present: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, AttentionStats]:
        """``x`` ``[B, L, E]`` -> ``[B, L, E]``; the other arguments are those of ``CrossModalAttention``."""
        result = self.attention(
            x,
            sources,
            lengths=lengths,
            masks=masks,
            present=present,
            residual=x,
            return_stats=return_stats,
        )
        x, stats = result if return_stats else (result, cast(Any, None))
        out: Tensor = self.down([self.up([x])], residual=x)
        return (out, stats) if return_stats else out


class PerceiverResampler(nn.Module):
    """Streams of any length and number -> a fixed number of latents (Jaegle et al. 2021).

    In each block learned latents look at all streams and at themselves, in one softmax, as in Flamingo's
    resampler (Alayrac et al. 2022). There the media's projection serves the latents too; here each stream has
    its own, so widths may differ. A sample without any stream is still answered: its latents see themselves.

    Args:
        embed_dim: ``E``, of the latents.
        num_heads: ``H``.
        source_dims: name -> ``E_i`` of each stream; ``latents`` is not a name for one.
        num_latents: ``N``.
        depth: how many blocks.
        device: of the parameters.
        dtype: of the parameters.
        **options: see ``CrossModalBlock``.

    Raises:
        ValueError: a stream is called ``latents``, or see ``CrossModalAttention``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        source_dims: Mapping[str, int],
        *,
        num_latents: int = 64,
        depth: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Creates the parts; see the class."""
        super().__init__()
        if LATENTS in source_dims:
            raise ValueError(f"PerceiverResampler: source_dims has {LATENTS!r}, which names its own stream")
        self.streams = tuple(source_dims)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.empty(num_latents, embed_dim, **made))
        self.reset_parameters()
        together = {**source_dims, LATENTS: embed_dim}
        self.blocks = nn.ModuleList(
            CrossModalBlock(embed_dim, num_heads, together, gate=None, norm_sources=True, **made, **options)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, **made)

    def reset_parameters(self) -> None:
        """The latents, small and random."""
        nn.init.normal_(self.latents, std=0.02)

    def forward(
        self,
        sources: Streams,
        *,
        lengths: Streams | None = None,
        masks: Streams | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """``{name: [B, S_i, E_i]}`` -> ``[B, N, E]``; ``present``: ``[B, n]``.

        The other arguments are those of ``CrossModalAttention``.
        """
        lengths, masks = {} if lengths is None else lengths, {} if masks is None else masks
        require_streams(self, sources, self.streams, lengths=lengths, masks=masks)
        first = next(iter(sources.values()))
        require_flags(self, "present", present, (len(first), len(self.streams)))
        if present is not None:
            present = torch.cat([present, present.new_ones(len(present), 1)], 1)
        latents = self.latents.expand(len(first), -1, -1)
        for block in self.blocks:
            latents = block(
                latents, {**sources, LATENTS: latents}, lengths=lengths, masks=masks, present=present
            )
        out: Tensor = self.norm(latents)
        return out


def _there(
    source: Tensor, length: Tensor | None, mask: Tensor | None, present: Tensor | None
) -> Tensor | None:
    """Which steps of a source any query may see: bool [B, S], or None for all."""
    there = mask
    if length is not None:
        inside = valid(length, source.shape[1])
        there = inside if there is None else there & inside
    if present is not None:
        present = (present if present.dim() == 1 else present.any(1))[:, None].expand(-1, source.shape[1])
        there = present if there is None else there & present
    return there
