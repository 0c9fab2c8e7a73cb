"""Lengths as masks. What lies beyond a length is selected away: 0 * nan would be nan."""

import torch
from torch import Tensor


def valid(lengths: Tensor, size: int) -> Tensor:
    """Bool [B, size]: True for the first ``lengths[b]`` steps."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def masked_mean(sequence: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, D] -> [B, D]: the mean of the first ``lengths[b]`` steps, 0 where there is none."""
    kept = torch.where(valid(lengths, sequence.shape[1])[..., None], sequence, 0.0)
    wide = torch.promote_types(sequence.dtype, torch.float32)
    return (kept.sum(dim=1, dtype=wide) / lengths.clamp(min=1)[:, None].to(wide)).to(sequence.dtype)
