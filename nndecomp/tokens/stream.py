"""Rows of tokens without end, and the rows that training never sees."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from nndecomp.config.schema import TokensConfig, TokensKind, require
from nndecomp.tokens.batch import Row, TokenBatch
from nndecomp.tokens.documents import Document, files_documents, stdlib_documents
from nndecomp.tokens.encoding import Encoding
from nndecomp.tokens.hub import hub_reader
from nndecomp.tokens.random_ids import RandomTokens
from nndecomp.tokens.readers import IndexedReader, Reader
from nndecomp.tokens.stdlib_docs import stdlib_docs_documents

# Rows are dealt from this many documents in turn, so that a batch holds many documents, not many pieces of one.
N_LANES = 32
N_AHEAD = 16  # documents tokenised at once
HELDOUT_BLOCK = 1024  # held-out rows mixed together, so that the first few already come from many documents


class TokenStream:
    """Endless over the training split, reshuffled every epoch.

    Packed rows come from several lanes in turn. A lane is a run of documents joined by EOS; it takes the next document
    of the epoch when it has not enough left for a row, so nothing is dropped and nothing read twice in an epoch.
    """

    def __init__(self, reader: Reader, encoding: Encoding) -> None:
        self.reader, self.encoding = reader, encoding
        n_lanes = min(N_LANES, encoding.cfg.shuffle_documents, reader.n_documents or N_LANES)
        self.lanes: list[deque[int]] = [deque() for _ in range(n_lanes)]
        self.turn = 0
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Tokenise the next documents; they are read again when a position among them is restored."""
        self.ahead_from = self.reader.state_dict()
        self.ahead = self.encoding.ids([self.reader.next() for _ in range(N_AHEAD)])
        self.n_used = 0

    def _documents(self) -> Iterator[list[int]]:
        while True:
            if self.n_used == N_AHEAD:
                self._read_ahead()
            self.n_used += 1
            yield self.ahead[self.n_used - 1]

    def _next_row(self) -> Row:
        if not self.encoding.joined:
            return self.encoding.document_row(next(self._documents()))
        row = self.encoding.packed_row(self.lanes[self.turn], self._documents())
        assert row is not None, "an endless stream ended"
        self.turn = (self.turn + 1) % len(self.lanes)
        return row

    def next_batch(self, batch_seqs: int) -> TokenBatch:
        rows = [self._next_row() for _ in range(batch_seqs)]
        return TokenBatch.of(rows, self.encoding.cfg.seq_len, self.encoding.pad)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; restored, the same next batches follow, bit for bit."""
        return {
            "reader": self.ahead_from,
            "n_used": self.n_used,
            "lanes": [list(lane) for lane in self.lanes],
            "turn": self.turn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert len(state["lanes"]) == len(self.lanes), f"{len(state['lanes'])} lanes saved, {len(self.lanes)} here"
        self.reader.load_state_dict(state["reader"])
        self._read_ahead()
        self.n_used, self.turn = state["n_used"], state["turn"]
        self.lanes = [deque(lane) for lane in state["lanes"]]


def open_reader(cfg: TokensConfig, *, heldout: bool, seed: int, rank: int = 0, world_size: int = 1) -> Reader:
    """The documents of the training split or of the held-out one."""
    require(
        cfg.heldout_split is None or cfg.kind is TokensKind.hub,
        f"tokens.heldout_split={cfg.heldout_split} needs tokens.kind=hub; "
        f"{cfg.kind.value} holds out tokens.heldout_fraction of the documents",
    )
    require(
        cfg.heldout_split != cfg.split,
        f"tokens.heldout_split={cfg.heldout_split} is the training split; name another, or null to hold out by hash",
    )

    def side(document: Document) -> bool:
        return cfg.heldout_split is not None or document.heldout(cfg.heldout_fraction) == heldout

    name = f"the {'held-out' if heldout else 'training'} split of {cfg.path or cfg.kind.value}"
    match cfg.kind:
        case TokensKind.stdlib:
            documents = stdlib_documents()
        case TokensKind.stdlib_docs:
            documents = stdlib_docs_documents()
        case TokensKind.files:
            documents = files_documents(cfg)
        case TokensKind.random:
            require(False, "tokens.kind=random has no documents; write tokens=stdlib, or another text")
            raise AssertionError
        case TokensKind.hub:
            split = cfg.heldout_split if heldout and cfg.heldout_split is not None else cfg.split
            window = 1 if heldout else cfg.shuffle_documents
            return hub_reader(cfg, side, name, split, window=window, seed=seed, rank=rank, world_size=world_size)
    shuffle = heldout or cfg.shuffle_documents > 1
    return IndexedReader(documents, side, name, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)


def open_tokens(
    cfg: TokensConfig, tokenizer: Any, seed: int, rank: int = 0, world_size: int = 1
) -> TokenStream | RandomTokens:
    """The training split. Ranks read disjoint documents that together are all of them."""
    if cfg.kind is TokensKind.random:
        return RandomTokens(len(tokenizer), cfg.seq_len, f"train {seed} {rank}")
    encoding = Encoding.of(cfg, tokenizer)
    return TokenStream(open_reader(cfg, heldout=False, seed=seed, rank=rank, world_size=world_size), encoding)


def heldout_tokens(cfg: TokensConfig, tokenizer: Any, n_seqs: int) -> TokenBatch:
    """The first `n_seqs` rows of the held-out split, in an order that never changes."""
    if cfg.kind is TokensKind.random:
        return RandomTokens(len(tokenizer), cfg.seq_len, "heldout").next_batch(n_seqs)
    encoding = Encoding.of(cfg, tokenizer)
    reader = open_reader(cfg, heldout=True, seed=0)
    rows, found = encoding.rows(reader.one_pass()), []
    while len(found) < n_seqs and (block := list(islice(rows, HELDOUT_BLOCK))):
        found += [block[i] for i in np.random.default_rng(0).permutation(len(block))]
    require(
        len(found) >= n_seqs,
        f"evaluation.n_seqs={n_seqs}: the held-out split of tokens.path={cfg.path} has {len(found)} rows of "
        f"tokens.seq_len={cfg.seq_len}; {_more_heldout(cfg, reader)}",
    )
    return TokenBatch.of(found[:n_seqs], cfg.seq_len, encoding.pad)


def _more_heldout(cfg: TokensConfig, reader: Reader) -> str:
    """What to change where the held-out split is too small."""
    if cfg.kind is not TokensKind.files:
        return "ask for fewer, or raise tokens.heldout_fraction"
    return (
        f"{reader.n_documents} documents were found (a .txt file is one) and {cfg.heldout_fraction:.0%} of them are "
        "held out: give more files, or a .jsonl with one document a line, raise tokens.heldout_fraction, or ask for fewer"
    )


def training_documents(cfg: TokensConfig, seed: int) -> Iterator[str]:
    """The training split's texts once, e.g. to train a tokenizer on."""
    require(
        cfg.tokens_column is None,
        f"tokens.tokens_column={cfg.tokens_column} has no text; leave it null to train a tokenizer",
    )
    for body in open_reader(cfg, heldout=False, seed=seed).one_pass():
        assert isinstance(body, str)
        yield body.lower() if cfg.lowercase else body
