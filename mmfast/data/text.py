"""Text -> token ids, by the tokenizer file that lies beside the shards."""

from collections.abc import Sequence
from pathlib import Path

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
        ids = torch.zeros(len(texts), self.max_tokens, dtype=torch.int64)
        lengths = torch.zeros(len(texts), dtype=torch.int64)
        for row, encoding in enumerate(self._tokenizer.encode_batch_fast(list(texts))):
            tokens = encoding.ids
            ids[row, : len(tokens)] = torch.tensor(tokens)
            lengths[row] = len(tokens)
        return ids, lengths


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at ``path``; ``UserError`` where it is missing or broken."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; text needs the tokenizer that `mmfast prepare` writes")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer file ({error})") from error
