"""A model and a text whose activations one can read by eye: each row holds the id of its token."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nndecomp.activations.harvest import Harvester
from nndecomp.config.schema import ActivationsConfig, ActivationsKind
from nndecomp.targets.base import Target, TargetShape
from nndecomp.tokens.batch import TokenBatch
from nndecomp.types import Point, Site

D_MODEL = 4
READ, WRITE = Site(0, Point.mlp_in), Site(1, Point.mlp_out)


class Vocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


class TokenIds(Target):
    """At layer l, every coordinate holds the token's id plus l / 4: rows say where they come from."""

    name = "token-ids"
    shape = TargetShape(
        n_layers=3,
        d_model=D_MODEL,
        d_mlp=8,
        n_heads=1,
        d_head=4,
        n_vocab=2**24,
        n_ctx=64,
        points=frozenset({Point.mlp_in, Point.mlp_out}),
        gated=False,
    )
    tokenizer = Vocabulary()
    device = torch.device("cpu")

    def __init__(self, shift: float = 0.0) -> None:
        self.shift = shift  # other weights

    def record(self, tokens: Tensor, sites: Sequence[Site]) -> dict[Site, Tensor]:
        return {site: (tokens + site.layer / 4 + self.shift)[..., None].repeat(1, 1, D_MODEL).float() for site in sites}

    def patch(self, replacements: Mapping[Site, Callable]) -> AbstractContextManager[None]:
        raise NotImplementedError

    def logits(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def mlp_out_of(self, layer: int, hidden: Tensor) -> Tensor:
        raise NotImplementedError


class Counting:
    """Sequences of consecutive ids, each id once; sequence i is padded by i % 3 when `padded`; a BOS first if asked."""

    def __init__(self, seq_len: int = 8, *, padded: bool = False, bos: bool = False) -> None:
        self.seq_len, self.padded, self.bos, self.n_read = seq_len, padded, bos, 0

    def next_batch(self, batch_seqs: int) -> TokenBatch:
        first = self.n_read
        self.n_read += batch_seqs
        tokens = torch.arange(first * self.seq_len, self.n_read * self.seq_len).view(batch_seqs, -1)
        length = self.seq_len - torch.arange(first, self.n_read) % 3 * self.padded
        position = torch.arange(self.seq_len).expand_as(tokens)
        return TokenBatch(tokens, position < length[:, None], (position == 0) & self.bos)

    def state_dict(self) -> dict[str, Any]:
        return {"n_read": self.n_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_read = state["n_read"]


def settings(**changes: Any) -> ActivationsConfig:
    return ActivationsConfig(**{"kind": ActivationsKind.live, "batch_seqs": 2, "drop_bos": False} | changes)


def harvester(tokens: Counting | None = None, sites: Sequence[Site] = (READ,), **changes: Any) -> Harvester:
    tokens = tokens or Counting()
    return Harvester(TokenIds(), tokens, sites, settings(**changes), seq_len=tokens.seq_len)


def ids(rows: Tensor) -> list[int]:
    return rows[:, 0].long().tolist()
