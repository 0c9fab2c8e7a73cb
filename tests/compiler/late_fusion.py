"""A model in which the compiler finds a layer over a concatenation and an attention, and its inputs."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class LateFusion(nn.Module):
    """Patches, a pooled sentence beside each of them, a norm; then attention over two streams."""

    def __init__(self, width=64, rematerialise=False):
        super().__init__()
        self.image, self.text = nn.Linear(24, width), nn.Linear(12, width // 2)
        self.norm = nn.LayerNorm(width + width // 2)
        self.fuse = nn.Linear(width + width // 2, width)
        self.head = nn.Linear(width, 3)
        self.rematerialise = rematerialise

    def fused(self, x, pooled):
        pooled = pooled.unsqueeze(1).expand(-1, x.shape[1], -1)
        return F.gelu(self.fuse(self.norm(torch.cat([x, pooled], -1))))

    def forward(self, patches, sentence, seen):
        x, pooled = self.image(patches), self.text(sentence)
        x = (
            checkpoint(self.fused, x, pooled, use_reentrant=False)
            if self.rematerialise
            else self.fused(x, pooled)
        )
        one, other = x.unflatten(-1, (4, -1)).transpose(1, 2).chunk(2, 2)  # [B, 4, S / 2, D] each
        keys = torch.cat([one, other], 2)
        out = F.scaled_dot_product_attention(one, keys, torch.cat([other, one], 2), seen[:, None, None])
        return self.head(out.transpose(1, 2).flatten(2).mean(1))


def model(**options):
    torch.manual_seed(0)
    return LateFusion(**options)


def batch(size=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    patches, sentence = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((size, 20, 24), (size, 12))
    )
    seen = torch.rand(size, 20, generator=generator) > 0.3
    seen[:, 0] = True
    return patches, sentence, seen
