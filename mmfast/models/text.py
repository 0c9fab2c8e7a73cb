"""The text encoder."""

import torch
from torch import Tensor, nn

from mmfast.models.transformer import Transformer
from mmfast.nn.masking import valid


class TextEncoder(nn.Module):
    """Token ids [B, T] -> (sequence [B, T, dim], lengths [B])."""

    def __init__(self, vocab_size: int, tokens: int, dim: int, layers: int, heads: int) -> None:
        """``tokens``: the longest text there can be."""
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.transformer = Transformer(tokens, dim, layers, heads)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """``lengths``: valid tokens of each row, 0 where there is no text; ids beyond are not looked at."""
        x = torch.where(valid(lengths, x.shape[1]), x, 0)  # [B, T]
        return self.transformer(self.embedding(x), lengths), lengths
