"""Token ids drawn evenly, for targets whose tokens are not text."""

import hashlib
from typing import Any

import torch

from nndecomp.tokens.batch import TokenBatch


class RandomTokens:
    """Endless; a batch depends on the seed and its number alone. Every position is real, none is a BOS."""

    def __init__(self, n_vocab: int, seq_len: int, seed: int | str) -> None:
        self.n_vocab, self.seq_len, self.seed, self.n_batches = n_vocab, seq_len, seed, 0

    def next_batch(self, batch_seqs: int) -> TokenBatch:
        digest = hashlib.blake2b(repr((self.seed, self.n_batches)).encode(), digest_size=8).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
        self.n_batches += 1
        tokens = torch.randint(self.n_vocab, (batch_seqs, self.seq_len), generator=draw)
        real = torch.ones_like(tokens, dtype=torch.bool)
        return TokenBatch(tokens, real, ~real)

    def state_dict(self) -> dict[str, Any]:
        return {"n_batches": self.n_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_batches = state["n_batches"]
