"""Whole sequences of activations, for what explains a position by the positions before it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.buffer import SlotOrder, check_capacity
from nndecomp.config.schema import require
from nndecomp.types import Layout


@dataclass(frozen=True)
class Sequences:
    """Activations at every position, and which positions count: only those are explained, but all can be attended to.

    `sequences[:, span]` takes columns, `- m` and `/ s` change their units, and `len` counts tokens, as for rows [token, width].
    """

    values: Float[Tensor, "batch pos width"]
    kept: Int[Tensor, " token"]  # positions that count, in flattened (batch, pos)
    tokens: Int[Tensor, "batch pos"] | None = None  # the text, where it is read for evaluation

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: tuple[slice, slice]) -> "Sequences":
        tokens, columns = index
        assert tokens == slice(None), f"sequences stay whole: take columns alone, not tokens {tokens}"
        return replace(self, values=self.values[..., columns])

    def __sub__(self, shift: Float[Tensor, " width"]) -> "Sequences":
        return replace(self, values=self.values - shift)

    def __truediv__(self, scale: Float[Tensor, " width"]) -> "Sequences":
        return replace(self, values=self.values / scale)

    def first(self, n_tokens: int) -> "Sequences":
        """As few of the first sequences as have that many positions."""
        n_seqs, seq_len = -(-n_tokens // self.values.shape[1]), self.values.shape[1]
        tokens = None if self.tokens is None else self.tokens[:n_seqs]
        return Sequences(self.values[:n_seqs], self.kept[self.kept < n_seqs * seq_len], tokens)

    def rows(self) -> Float[Tensor, "token width"]:
        """The positions that count."""
        return self.at_kept(self.values)

    def at_kept(self, values: Float[Tensor, "batch pos d"]) -> Float[Tensor, "token d"]:
        return values.flatten(0, 1).index_select(0, self.kept)


# What is read of a batch: tokens one by one, or in their sequences.
RowsOrSequences = Float[Tensor, "token _"] | Sequences


def rows_of(read: RowsOrSequences) -> Float[Tensor, "token width"]:
    """The tokens that count, one by one."""
    return read.rows() if isinstance(read, Sequences) else read


def beside(parts: Sequence[RowsOrSequences]) -> RowsOrSequences:
    """Columns of all, which are of the same tokens."""
    first = parts[0]
    if isinstance(first, Sequences):
        return replace(first, values=torch.cat([part.values for part in parts if isinstance(part, Sequences)], -1))
    return torch.cat([rows_of(part) for part in parts], 1)


@runtime_checkable
class SequenceSource(Protocol):
    """Sequences in order, `batch_seqs` at a time; usually a `Harvester`."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    seq_len: int

    @property
    def rows_at_most(self) -> int: ...
    def next_sequences(self) -> tuple[Float[Tensor, "batch pos width"], Bool[Tensor, "batch pos"]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SequenceBuffer:
    """Shuffles a stream of whole sequences, each served once: `buffer_tokens` positions of them are held.

    Raises SettingError if batches or buffer do not consist of whole sequences.
    """

    def __init__(self, source: SequenceSource, buffer_tokens: int, batch_tokens: int, seed: int) -> None:
        check_sequences(buffer_tokens, batch_tokens, source.rows_at_most, source.seq_len)
        self.source, self.layout = source, source.layout
        self.batch_seqs, self.fetched = batch_tokens // source.seq_len, source.rows_at_most // source.seq_len
        capacity, shape = buffer_tokens // source.seq_len, (source.seq_len, source.layout.width)
        self.values = torch.zeros(capacity, *shape, dtype=source.dtype, device=source.device)
        self.keep = torch.zeros(capacity, source.seq_len, dtype=torch.bool)  # on the CPU: a GPU is never waited for
        self.slots = SlotOrder(capacity, seed)

    def next_batch(self) -> Sequences:
        """`batch_tokens` positions, those that do not count among them, in fp32."""
        while self.slots.free >= self.fetched:
            values, keep = self.source.next_sequences()
            slots = self.slots.fill(len(values))
            self.values.index_copy_(0, slots.to(self.values.device, non_blocking=True), values)
            self.keep[slots] = keep
        slots = self.slots.serve(self.batch_seqs)
        kept = self.keep[slots].flatten().nonzero()[:, 0]
        device = self.values.device
        values = self.values.index_select(0, slots.to(device, non_blocking=True)).float()
        return Sequences(values, kept.to(device, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next batches. Tensors are the buffer's own: save them before the next batch."""
        state = {"source": self.source.state_dict(), "values": self.values, "keep": self.keep}
        return {**state, **self.slots.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        values = state["values"]
        assert values.shape == self.values.shape and values.dtype == self.values.dtype, (
            f"the saved buffer holds {tuple(values.shape)} {values.dtype}, "
            f"this one {tuple(self.values.shape)} {self.values.dtype}"
        )
        self.source.load_state_dict(state["source"])
        self.values.copy_(values)
        self.keep.copy_(state["keep"])
        self.slots.load_state_dict(state)


def check_sequences(buffer_tokens: int, batch_tokens: int, rows_at_most: int, seq_len: int) -> None:
    """SettingError if whole sequences do not fill a batch, or a buffer cannot hold enough of them."""
    require(
        batch_tokens % seq_len == 0,
        f"training.batch_tokens={batch_tokens} is not a multiple of tokens.seq_len={seq_len}; "
        "a decomposition of attention trains on whole sequences",
    )
    check_capacity(buffer_tokens // seq_len * seq_len, batch_tokens, rows_at_most)
