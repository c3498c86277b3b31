"""What a batch of text is to the rest of the package."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One sequence before it is a tensor: token ids, and whether the first of them is a BOS."""

    ids: list[int]
    bos: bool


@dataclass(frozen=True)
class TokenBatch:
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]  # real tokens: not padding, which stands right of the text
    is_bos: Bool[Tensor, "batch pos"]  # BOS positions put there by tokenisation

    @staticmethod
    def of(rows: Sequence[Row], seq_len: int, pad: int) -> "TokenBatch":
        """Rows of at most `seq_len` ids, right-padded with `pad`."""
        tokens = torch.tensor([row.ids + [pad] * (seq_len - len(row.ids)) for row in rows], dtype=torch.int64)
        position = torch.arange(seq_len)
        mask = position < torch.tensor([len(row.ids) for row in rows], dtype=torch.int64)[:, None]
        is_bos = (position == 0) & torch.tensor([row.bos for row in rows], dtype=torch.bool)[:, None]
        return TokenBatch(tokens.reshape(len(rows), seq_len), mask, is_bos)

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(self.tokens.to(device), self.mask.to(device), self.is_bos.to(device))

    def split(self, batch_seqs: int) -> Iterator["TokenBatch"]:
        """The same rows in order, at most `batch_seqs` at a time."""
        for start in range(0, len(self), batch_seqs):
            part = slice(start, start + batch_seqs)
            yield TokenBatch(self.tokens[part], self.mask[part], self.is_bos[part])
