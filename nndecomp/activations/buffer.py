"""Shuffles a stream of rows: every row is served exactly once, far from the neighbours it came with."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import require
from nndecomp.types import Layout


@runtime_checkable
class RowSource(Protocol):
    """Rows in order, `rows_at_most` at a time; usually a `Harvester`."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device

    @property
    def rows_at_most(self) -> int: ...
    def next_rows(self) -> Float[Tensor, "token width"]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def check_capacity(capacity: int, batch_tokens: int, rows_at_most: int) -> None:
    """SettingError if a buffer of `capacity` rows cannot hold a batch to serve beside a batch of its source."""
    smallest = batch_tokens + rows_at_most
    require(
        capacity >= smallest,
        f"activations.buffer_tokens={capacity} is too small; it must hold training.batch_tokens={batch_tokens} "
        f"and the {rows_at_most} rows of one forward pass (batch_seqs x seq_len): {smallest} or more",
    )


class ShuffleBuffer:
    """`capacity` rows in one tensor, of which random ones are served and steadily replaced by fresh ones.

    `order` lists all slots in three parts:

        order[:filled]          filled anew since the last draw; they wait for the next one
        order[filled:cursor]    served, free to be filled
        order[cursor:]          to be served, in random order

    A batch is order[cursor : cursor + batch_tokens]. As soon as the free slots can hold one batch of the source, one is
    fetched, so refilling is spread evenly over the batches. When less than half would be left to serve, a new order is
    drawn over all rows held, old and fresh together: a row stays for a geometrically distributed number of draws,
    so rows mix across refills. The cost of a draw is O(1) a row.

    Raises SettingError if the buffer cannot hold a batch to serve beside a batch of the source.
    """

    def __init__(self, source: RowSource, capacity: int, batch_tokens: int, seed: int) -> None:
        check_capacity(capacity, batch_tokens, source.rows_at_most)
        self.source, self.layout, self.batch_tokens = source, source.layout, batch_tokens
        self.rows = torch.zeros(capacity, source.layout.width, dtype=source.dtype, device=source.device)
        self.order = torch.arange(capacity)
        self.filled, self.cursor = 0, capacity  # all free
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def capacity(self) -> int:
        return len(self.rows)

    def next_batch(self) -> Float[Tensor, "token width"]:
        """`batch_tokens` rows, in fp32."""
        while self.cursor - self.filled >= self.source.rows_at_most:
            self._refill()
        if self.capacity - self.cursor - self.batch_tokens < self.capacity // 2:
            self._draw()
        slots = self.order[self.cursor : self.cursor + self.batch_tokens]
        assert len(slots) == self.batch_tokens, f"{len(slots)} rows left to serve, {self.batch_tokens} wanted"
        self.cursor += self.batch_tokens
        return self.rows.index_select(0, slots.to(self.rows.device, non_blocking=True)).float()

    def _refill(self) -> None:
        fresh = self.source.next_rows()
        slots = self.order[self.filled : self.filled + len(fresh)]
        self.rows.index_copy_(0, slots.to(self.rows.device, non_blocking=True), fresh)
        self.filled += len(fresh)

    def _draw(self) -> None:
        free = self.order[self.filled : self.cursor]
        held = torch.cat([self.order[: self.filled], self.order[self.cursor :]])
        shuffled = held[torch.randperm(len(held), generator=self.generator)]
        self.order = torch.cat([free, shuffled])
        self.filled, self.cursor = 0, len(free)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next batches. Tensors are the buffer's own: save them before the next batch."""
        return {
            "source": self.source.state_dict(),
            "rows": self.rows,
            "order": self.order,
            "filled": self.filled,
            "cursor": self.cursor,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = state["rows"]
        assert rows.shape == self.rows.shape and rows.dtype == self.rows.dtype, (
            f"the saved buffer holds {tuple(rows.shape)} {rows.dtype}, this one {tuple(self.rows.shape)} {self.rows.dtype}"
        )
        self.source.load_state_dict(state["source"])
        self.rows.copy_(rows)
        self.order = state["order"].clone()
        self.filled, self.cursor = state["filled"], state["cursor"]
        self.generator.set_state(state["generator"])
