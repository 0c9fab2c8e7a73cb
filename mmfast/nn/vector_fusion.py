"""Fusions of one vector per modality: a weighted mean, gates, and the tensor product at low rank."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmfast.nn._checks import require, require_broadcast, require_flags, require_inputs, require_known
from mmfast.nn.concat_linear import ConcatLinear
from mmfast.ops import lowrank_fusion, weighted_fusion
from mmfast.ops.reference import ACTIVATIONS


class WeightedFusion(nn.Module):
    """``activation(sum over i of softmax(logits)_i * Linear_i(x_i))``, the softmax over what is there.

    A mean of the projected modalities with one learned weight for each (Baltrušaitis et al. 2019, "Multimodal
    Machine Learning: A Survey and Taxonomy", section 6); all weigh alike at first.

    Args:
        in_features: ``D_i`` of each modality.
        out_features: ``O``.
        bias: of the projections.
        activation: ``none``, ``relu``, ``gelu`` or ``silu``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``in_features`` is empty, or ``activation`` is unknown.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the parameters; see the class."""
        super().__init__()
        _require_modalities(self, in_features)
        self.in_features = tuple(in_features)
        require_known(self, "activation", activation, ("none", *ACTIVATIONS))
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project = nn.ModuleList(ConcatLinear([d], out_features, bias, **made) for d in in_features)
        self.logits = nn.Parameter(torch.empty(len(in_features), **made))
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All modalities weigh alike."""
        nn.init.zeros_(self.logits)

    def forward(self, inputs: Sequence[Tensor], *, present: Tensor | None = None) -> Tensor:
        """Inputs ``[..., D_i]``, present bool ``[B, n]`` -> ``[..., O]``; ``activation(0)`` without any."""
        projected = _project(self, inputs, present)
        out = weighted_fusion(projected, self.logits, present=present)
        return out if self.activation == "none" else ACTIVATIONS[self.activation](out)


class GatedFusion(nn.Module):
    """``sum over i of sigmoid(Gate_i(x_1, ..., x_n)) * tanh(Linear_i(x_i))`` over what is there.

    The gated multimodal unit (Arevalo et al. 2017, "Gated Multimodal Units for Information Fusion", figure
    2a): all modalities decide for each feature how much of each of them it lets through. An absent one counts
    as zeros in the gates.

    Args:
        in_features: ``D_i`` of each modality.
        out_features: ``O``.
        bias: of the projections and the gates.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``in_features`` is empty.
    """

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the parameters; see the class."""
        super().__init__()
        _require_modalities(self, in_features)
        self.in_features = tuple(in_features)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.project = nn.ModuleList(ConcatLinear([d], out_features, bias, **made) for d in in_features)
        self.gates = ConcatLinear(in_features, len(in_features) * out_features, bias, **made)

    def forward(self, inputs: Sequence[Tensor], *, present: Tensor | None = None) -> Tensor:
        """Inputs ``[..., D_i]``, present bool ``[B, n]`` -> ``[..., O]``; 0 without any."""
        projected = torch.stack(torch.broadcast_tensors(*_project(self, inputs, present)), -2)
        gates = self.gates(inputs, present=present).unflatten(-1, (len(inputs), -1))  # [..., n, O]
        gated = gates.sigmoid() * projected.tanh()
        if present is not None:
            seen = present.view(-1, *[1] * (gated.dim() - 3), len(inputs), 1)
            gated = torch.where(seen, gated, 0.0)
        return gated.sum(-2)


class LowRankFusion(nn.Module):
    """The outer product of all ``[x_i, 1]`` under a linear layer whose weight has rank ``R``.

    Every feature of one modality meets every feature of each other, in n products of
    ``(D_i + 1) R O`` multiplications; see ``mmfast.ops.lowrank_fusion`` (Liu et al. 2018, "Efficient Low-rank
    Multimodal Fusion with Modality-Specific Factors"). An absent modality's factor counts as 1.

    Args:
        in_features: ``D_i`` of each modality.
        out_features: ``O``.
        rank: ``R``.
        bias: add a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``in_features`` is empty, or ``rank`` is not positive.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        rank: int = 4,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the parameters; see the class."""
        super().__init__()
        _require_modalities(self, in_features)
        self.in_features = tuple(in_features)
        if rank < 1:
            raise ValueError(f"LowRankFusion: rank is {rank}, wanted at least 1")

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.factors = nn.ParameterList(parameter(rank, d + 1, out_features) for d in in_features)
        self.rank_weight = parameter(rank)
        self.register_parameter("bias", parameter(out_features) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each factor's product is 1 and a random part, the output of about the variance of the inputs.

        So a new layer adds up what each modality gives and what they give together. With random rows for the
        1 too it would begin with the product of all modalities alone, which learns less in the same time.
        """
        variance = 2 ** (1 / len(self.factors)) - 1  # that of the product is 1 then
        for factor in self.factors:
            nn.init.normal_(factor, std=(variance / max(1, factor.shape[1] - 1)) ** 0.5)
            nn.init.ones_(factor[:, -1])
        nn.init.normal_(self.rank_weight, std=len(self.rank_weight) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inputs: Sequence[Tensor], *, present: Tensor | None = None) -> Tensor:
        """Inputs ``[B, D_i]``, present bool ``[B, n]`` -> ``[B, O]``."""
        require_inputs(self, inputs, self.in_features)
        return lowrank_fusion(inputs, list(self.factors), self.rank_weight, self.bias, present=present)

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        rank, _, out_features = self.factors[0].shape
        return f"in_features={self.in_features}, out_features={out_features}, rank={rank}"


def _require_modalities(layer: nn.Module, in_features: Sequence[int]) -> None:
    if not in_features:
        raise ValueError(f"{type(layer).__name__}: in_features is empty, wanted at least one modality")


def _project(
    fusion: "WeightedFusion | GatedFusion", inputs: Sequence[Tensor], present: Tensor | None
) -> list[Tensor]:
    """Each modality through its own layer, where it is there; else the layer's bias."""
    layers = fusion.project
    require_inputs(fusion, inputs, fusion.in_features, cast(ConcatLinear, layers[0]).weight)
    lead = require_broadcast(fusion, inputs)
    if present is None:
        return [layer([x]) for layer, x in zip(layers, inputs, strict=True)]
    require(fusion, bool(lead), "present", present, "None, since the inputs have no leading dimension")
    require_flags(fusion, "present", present, (lead[0], len(inputs)))
    projected = []
    for i, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
        x, there = x if x.dim() > 1 else x[None], present[:, i]
        if x.dim() <= len(lead) or x.shape[:1] != lead[:1]:  # all samples share it: one that has it is enough
            there = there.any().expand(len(x))
        projected.append(layer([x], present=there[:, None]))
    return projected
