"""A linear layer over several sources, in the place of ``Linear(torch.cat(sources, -1))``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmfast.nn._checks import require_inputs, require_known
from mmfast.ops import concat_linear
from mmfast.ops.concat_linear import ACTIVATIONS

GATES = (None, "scalar", "channel")


class ConcatLinear(nn.Module):
    """``residual + tanh(gate) * activation(Linear(norm(cat(inputs))))`` without the ``cat``.

    The state dict is that of ``nn.Linear(sum(in_features), out_features)``, initialised alike, so weights
    move between the two. A norm adds ``norm_weight`` and ``norm_bias``, a gate adds ``gate``.

    Args:
        in_features: ``D_i`` of each source, in the order in which they would be concatenated.
        out_features: ``O``.
        bias: add a bias.
        activation: ``none``, ``relu``, ``gelu``, ``silu`` or ``swiglu``; swiglu's weight has ``2 O`` rows.
        norm: a LayerNorm over the concatenation first.
        norm_eps: its epsilon.
        gate: ``"scalar"`` or ``"channel"`` multiplies by ``tanh`` of a learned ``[1]`` or ``[O]``. It starts
            at 0, so that with a residual the layer starts as the identity (Alayrac et al. 2022, Flamingo).
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``in_features`` is empty, or ``activation`` or ``gate`` is unknown.
    """

    bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(
        self,
        in_features: Sequence[int],
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "none",
        norm: bool = False,
        norm_eps: float = 1e-5,
        gate: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Creates the parameters; see the class."""
        super().__init__()
        if not in_features:
            raise ValueError("ConcatLinear: in_features is empty, wanted at least one source")
        require_known(self, "activation", activation, ACTIVATIONS)
        if gate not in GATES:
            raise ValueError(f"ConcatLinear: gate is {gate!r}, wanted None, 'scalar' or 'channel'")
        self.in_features = tuple(in_features)
        self.out_features = out_features
        self.activation = activation
        self.norm_eps = norm_eps if norm else None
        depth, width = sum(in_features), out_features * (2 if activation == "swiglu" else 1)

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if wanted else None

        self.weight = nn.Parameter(torch.empty(width, depth, device=device, dtype=dtype))
        self.register_parameter("bias", parameter(bias, width))
        self.register_parameter("norm_weight", parameter(norm, depth))
        self.register_parameter("norm_bias", parameter(norm, depth))
        self.register_parameter("gate", parameter(gate is not None, 1 if gate == "scalar" else out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight and bias as ``nn.Linear`` draws them, the norm at the identity, the gate closed."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight.shape[1]) if self.weight.shape[1] else 0
            nn.init.uniform_(self.bias, -bound, bound)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    @classmethod
    def from_linear(cls, linear: nn.Linear, in_features: Sequence[int]) -> "ConcatLinear":
        """The layer that gives ``linear(torch.cat(inputs, -1))``, with copies of its weights.

        Args:
            linear: takes the concatenation.
            in_features: ``D_i`` of each of its parts.

        Raises:
            ValueError: the parts do not add up to what ``linear`` takes.
        """
        if sum(in_features) != linear.in_features:
            parts = " + ".join(map(str, in_features))
            raise ValueError(f"from_linear: in_features is {parts}, wanted a sum of {linear.in_features}")
        with torch.enable_grad():  # a parametrised weight is computed: whether it is frozen has to show
            weight, bias = linear.weight, linear.bias
        layer = cls(
            in_features, linear.out_features, bias is not None, device=weight.device, dtype=weight.dtype
        )
        take(layer.weight, weight)
        if bias is not None:
            take(layer.bias, bias)
        return layer.train(linear.training)

    def forward(
        self, inputs: Sequence[Tensor], *, present: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Inputs ``[..., D_i]``, present bool ``[B, n]``, residual ``[..., O]`` -> ``[..., O]``."""
        require_inputs(self, inputs, self.in_features)
        return concat_linear(
            inputs,
            self.weight,
            self.bias,
            present=present,
            norm_eps=self.norm_eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            activation=self.activation,
            residual=residual,
            gate=self.gate,
        )

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows."""
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        ]
        if self.activation != "none":
            parts.append(f"activation={self.activation}")
        if self.norm_eps is not None:
            parts.append(f"norm_eps={self.norm_eps}")
        if self.gate is not None:
            parts.append("gate=" + ("scalar" if self.gate.numel() == 1 else "channel"))
        return ", ".join(parts)


def take(parameter: Tensor | None, source: Tensor) -> None:
    """Copies what another layer has learnt, frozen where it is."""
    assert parameter is not None
    with torch.no_grad():
        parameter.copy_(source)
    parameter.requires_grad_(source.requires_grad)
