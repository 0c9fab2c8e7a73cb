"""The audio encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.models.transformer import Transformer
from mmfast.nn.masking import valid


class AudioEncoder(nn.Module):
    """Log-mel features [B, n_mels, F] -> (sequence [B, ceil(F / 4), dim], lengths [B])."""

    def __init__(self, n_mels: int, frames: int, dim: int, layers: int, heads: int) -> None:
        """``frames``: the longest sound there can be."""
        super().__init__()
        self.dim = dim
        self.conv1 = nn.Conv1d(n_mels, dim, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.transformer = Transformer(_halved(_halved(frames)), dim, layers, heads)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """``lengths``: valid frames of each row, 0 where there is no sound."""
        x = _standardise(x, lengths)
        for conv in (self.conv1, self.conv2):
            x, lengths = F.gelu(conv(x)), _halved(lengths)
            # A bias makes something of nothing: zeroed, no answer depends on how much padding there is.
            x = torch.where(valid(lengths, x.shape[2])[:, None], x, 0.0)  # [B, dim, F / 2], [B, dim, F / 4]
        return self.transformer(x.transpose(1, 2), lengths), lengths


def _standardise(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over each row's valid part: loudness is the microphone's, not the speaker's."""
    seen = valid(lengths, x.shape[2])[:, None]  # [B, 1, F]
    count = (lengths.clamp(min=1) * x.shape[1]).to(x.dtype)[:, None, None]
    mean = torch.where(seen, x, 0.0).sum(dim=(1, 2), keepdim=True) / count
    x = torch.where(seen, x - mean, 0.0)
    return x * torch.rsqrt((x * x).sum(dim=(1, 2), keepdim=True) / count + 1e-5)


def _halved(length):  # type: ignore[no-untyped-def]  # of an int or a Tensor
    return (length + 1) // 2
