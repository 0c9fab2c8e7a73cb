"""The model of the article on efficient training of large multimodal models, as a baseline."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.data.modality import Modality
from mmfast.errors import UserError
from mmfast.nn.masking import masked_mean, valid


class ArticleModel(nn.Module):
    """CNN for images, embedding for text, Conv1d for audio, then cat -> Linear -> ReLU -> Linear.

    Plain PyTorch throughout, the concatenation included: this is what the fused layers are compared with.
    What the article shows does not run on real data as it stands; the repairs are:

    - *adaptive pooling* after the convolutions, since the flattened size was fixed for one image size;
    - a *mean over the valid tokens* and over the *valid frames*: the text encoder gave a vector per token and
      the audio encoder one per frame, which cannot be concatenated with one vector per image;
    - what is absent counts as *zeros*, the article knowing complete samples only;
    - the answer is *logits*: with a ReLU after the last layer, cross-entropy would see no negative one.
    """

    def __init__(
        self, modalities: Mapping[str, Modality], vocab_size: int, num_classes: int, dim: int
    ) -> None:
        """One encoder per modality, by the rank of its tensor: images 3, log-mel features 2, token ids 1."""
        super().__init__()
        self.encoders = nn.ModuleDict(
            {name: _encoder(name, modality.shape, vocab_size, dim) for name, modality in modalities.items()}
        )
        self.fusion = nn.Linear(dim * len(modalities), dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of ``mmfast.data`` -> ``{"label": logits [B, C]}``."""
        vectors = []
        for i, (name, encoder) in enumerate(self.encoders.items()):
            present = batch["present"][:, i]
            vector = encoder(batch[name], torch.where(present, batch["lengths"][:, i], 0))  # [B, dim]
            vectors.append(torch.where(present[:, None], vector, 0.0))
        fused = F.relu(self.fusion(torch.cat(vectors, dim=1)))
        return {"label": self.head(fused)}


class ArticleImage(nn.Module):
    """Two convolutions with max pooling, an adaptive mean, a linear layer."""

    def __init__(self, channels: int, dim: int) -> None:
        """``channels`` of the image."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.project = nn.Linear(64 * 4 * 4, dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, dim]."""
        x = torch.where(lengths[:, None, None, None] > 0, x, 0.0)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.project(F.adaptive_avg_pool2d(x, 4).flatten(1)))


class ArticleText(nn.Module):
    """An embedding, the mean over tokens, a linear layer."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        """``vocab_size`` rows in the embedding."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] -> [B, dim]."""
        x = self.embedding(torch.where(valid(lengths, x.shape[1]), x, 0))  # [B, T, dim]
        return F.relu(self.project(masked_mean(x, lengths)))


class ArticleAudio(nn.Module):
    """Two Conv1d, the mean over frames, a linear layer."""

    def __init__(self, n_mels: int, dim: int) -> None:
        """``n_mels`` rows in the log-mel features."""
        super().__init__()
        self.conv1 = nn.Conv1d(n_mels, 64, 3, padding=1)
        self.conv2 = nn.Conv1d(64, 128, 3, padding=1)
        self.project = nn.Linear(128, dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[B, n_mels, F] -> [B, dim]."""
        seen = valid(lengths, x.shape[2])[:, None]  # [B, 1, F]
        x = torch.where(seen, F.relu(self.conv1(torch.where(seen, x, 0.0))), 0.0)
        x = F.relu(self.conv2(x))  # [B, 128, F]
        return F.relu(self.project(masked_mean(x.transpose(1, 2), lengths)))


def _encoder(name: str, shape: tuple[int, ...], vocab_size: int, dim: int) -> nn.Module:
    if len(shape) == 3:
        return ArticleImage(shape[0], dim)
    if len(shape) == 2:
        return ArticleAudio(shape[0], dim)
    if len(shape) == 1:
        return ArticleText(vocab_size, dim)
    raise UserError(f"modality {name!r}: the article's model has no encoder for shape {list(shape)}")
