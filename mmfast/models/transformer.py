"""The Transformer that the text and audio encoders share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.nn.masking import valid


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Attention of [B, H, T, D] over the keys that ``visible``, bool [B, 1, 1, T], shows; one at least."""
    if not query.is_cpu:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    # At a hundred steps PyTorch's fused CPU kernel takes 4 times as long as this in bf16, forward
    # and backward, and as long in fp32.
    query, key, value, heads = *(x.flatten(0, 1) for x in (query, key, value)), query.shape[1]  # [B H, T, D]
    hidden = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -math.inf)
    bias = hidden.expand(-1, heads, 1, -1).reshape(-1, 1, key.shape[1])  # [B H, 1, T]
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5)
    return (scores.softmax(dim=-1) @ value).unflatten(0, (-1, heads))


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and MLP (Xiong et al. 2020): [B, T, D] -> [B, T, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        """``dim`` must be a multiple of ``heads``; the MLP is four times as wide."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """``visible``: bool [B, 1, 1, T], the keys that are seen; at least one in every row."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attention(query, key, value, visible)  # [B, H, T, D / H]
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Learned positions, layers and a final norm over a padded sequence."""

    def __init__(self, steps: int, dim: int, layers: int, heads: int) -> None:
        """``steps``: the longest sequence there can be."""
        super().__init__()
        self.positions = nn.Parameter(nn.init.normal_(nn.Embedding(steps, dim).weight.detach(), std=0.02))
        self.layers = nn.ModuleList(TransformerLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; the padding of ``x`` must be finite, and is seen by no valid step."""
        steps = x.shape[1]
        x = x + self.positions[:steps]
        # An empty row sees its first step: a softmax over nothing is nan, and nobody reads that row.
        visible = valid(lengths.clamp(min=1), steps)[:, None, None]  # [B, 1, 1, T]
        for layer in self.layers:
            x = layer(x, visible)
        return self.norm(x)
