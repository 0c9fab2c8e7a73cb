"""Text -> token ids, by the tokenizer file that lies beside the shards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmfast.errors import UserError


class TextEncoder:
    """A ``tokenizers`` file and a length: texts -> ids [n, max_tokens] (0 = pad) and lengths [n]."""

    def __init__(self, path: str | Path, max_tokens: int) -> None:
        """Open the file at ``path``; ``UserError`` where it is missing or broken."""
        self._tokenizer = open_tokenizer(path)
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.no_padding()
        self.max_tokens = max_tokens

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids int64 [n, max_tokens] and lengths int64 [n]."""
        ids = np.zeros((len(texts), self.max_tokens), np.int64)
        lengths = np.zeros(len(texts), np.int64)
        for row, text in enumerate(
            texts
        ):  # one by one: a batch would start a thread pool, which forks dislike
            tokens = self._tokenizer.encode(text).ids
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return torch.from_numpy(ids), torch.from_numpy(lengths)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at ``path``; ``UserError`` where it is missing or broken."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; text needs the tokenizer that `mmfast prepare` writes")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer file ({error})") from error
