"""``FusionModel``: encoders, a fusion, heads."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusionModel(nn.Module):
    """Encodes each modality, fuses them into one vector, answers with one tensor of logits per head.

    Every encoder runs on every row of every batch, so that all ranks issue the same collectives; absent rows
    have length 0, which each encoder reads as zeros, and ``present`` selects them away in the fusion. Nothing
    depends on what absent or padded elements hold.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        fusion: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        modalities: Sequence[str] | None = None,
        dropout: float = 0.0,
        modality_dropout: float = 0.0,
    ) -> None:
        """Puts the parts together.

        Args:
            encoders: name -> module with ``forward(x, lengths) -> (sequence [B, T, D], lengths [B])``.
            fusion: module with ``forward(features, present) -> [B, dim]``, or with each modality's share
                [B, n] after it.
            heads: name -> module [B, dim] -> [B, C].
            modalities: the columns of a batch's ``lengths`` and ``present``; the encoders' order when None.
            dropout: on the fused vector.
            modality_dropout: see ``ModelConfig``.
        """
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion
        self.heads = nn.ModuleDict(heads)
        self.dropout = dropout
        self.modality_dropout = modality_dropout
        columns = list(encoders if modalities is None else modalities)
        self.columns = [columns.index(name) for name in encoders]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of ``mmfast.data`` -> ``{head: logits [B, C]}``.

        Where the fusion tells the modalities' shares, ``share/{modality}`` [B] stand beside the heads.
        """
        present = torch.stack([batch["present"][:, i] for i in self.columns], dim=1)  # [B, n]
        if self.training and self.modality_dropout > 0:
            present = drop_modalities(present, self.modality_dropout)
        features = {}
        for i, (name, encoder) in enumerate(self.encoders.items()):
            lengths = torch.where(present[:, i], batch["lengths"][:, self.columns[i]], 0)
            features[name] = encoder(batch[name], lengths)
        fused, *shares = fused if isinstance(fused := self.fusion(features, present), tuple) else (fused,)
        fused = F.dropout(fused, self.dropout, self.training)
        output = {name: head(fused) for name, head in self.heads.items()}
        for share in shares:
            output |= {f"share/{name}": share[:, i] for i, name in enumerate(self.encoders)}
        return output


def drop_modalities(present: Tensor, chance: float) -> Tensor:
    """bool [B, n]: each True turned off with ``chance``, but never all of a row's."""
    noise = torch.rand(present.shape, device=present.device).masked_fill(~present, -1.0)
    # The luckiest of a row stays: its own noise is the threshold where everything would go.
    return present & (noise >= noise.amax(dim=1, keepdim=True).clamp(max=chance))
