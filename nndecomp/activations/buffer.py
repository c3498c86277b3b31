"""Shuffles a stream of rows: every row is served exactly once, far from the neighbours it came with."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
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


class SlotOrder:
    """Which slots of a buffer are served next, and which are filled anew.

    `order` lists all slots in three parts:

        order[:filled]          filled anew since the last draw; they wait for the next one
        order[filled:cursor]    served, free to be filled
        order[cursor:]          to be served, in random order

    When less than half would be left to serve, a new order is drawn over all that is held, old and fresh together: what
    is held stays for a geometrically distributed number of draws, so it mixes across refills. The cost of a draw is
    O(1) a slot.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.order = torch.arange(capacity)
        self.filled, self.cursor = 0, capacity  # all free
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def free(self) -> int:
        return self.cursor - self.filled

    def fill(self, n: int) -> Int[Tensor, " slot"]:
        """n free slots, which then wait for the next draw."""
        assert n <= self.free, f"{n} slots to fill, {self.free} free"
        self.filled += n
        return self.order[self.filled - n : self.filled]

    def serve(self, n: int) -> Int[Tensor, " slot"]:
        """The next n slots in random order, which then are free."""
        capacity = len(self.order)
        if capacity - self.cursor - n < capacity // 2:
            self._draw()
        slots = self.order[self.cursor : self.cursor + n]
        assert len(slots) == n, f"{len(slots)} slots left to serve, {n} wanted"
        self.cursor += n
        return slots

    def _draw(self) -> None:
        free = self.order[self.filled : self.cursor]
        held = torch.cat([self.order[: self.filled], self.order[self.cursor :]])
        shuffled = held[torch.randperm(len(held), generator=self.generator)]
        self.order = torch.cat([free, shuffled])
        self.filled, self.cursor = 0, len(free)

    def state_dict(self) -> dict[str, Any]:
        generator = self.generator.get_state()
        return {"order": self.order, "filled": self.filled, "cursor": self.cursor, "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order = state["order"].clone()
        self.filled, self.cursor = state["filled"], state["cursor"]
        self.generator.set_state(state["generator"])


class ShuffleBuffer:
    """`capacity` rows in one tensor, of which random ones are served and steadily replaced by fresh ones.

    As soon as the free slots can hold one batch of the source, one is fetched, so refilling is spread evenly over the
    batches.

    Raises SettingError if the buffer cannot hold a batch to serve beside a batch of the source.
    """

    def __init__(self, source: RowSource, capacity: int, batch_tokens: int, seed: int) -> None:
        check_capacity(capacity, batch_tokens, source.rows_at_most)
        self.source, self.layout, self.batch_tokens = source, source.layout, batch_tokens
        self.rows = torch.zeros(capacity, source.layout.width, dtype=source.dtype, device=source.device)
        self.slots = SlotOrder(capacity, seed)

    @property
    def capacity(self) -> int:
        return len(self.rows)

    def next_batch(self) -> Float[Tensor, "token width"]:
        """`batch_tokens` rows, in fp32."""
        while self.slots.free >= self.source.rows_at_most:
            fresh = self.source.next_rows()
            slots = self.slots.fill(len(fresh))
            self.rows.index_copy_(0, slots.to(self.rows.device, non_blocking=True), fresh)
        slots = self.slots.serve(self.batch_tokens)
        return self.rows.index_select(0, slots.to(self.rows.device, non_blocking=True)).float()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the next batches. Tensors are the buffer's own: save them before the next batch."""
        return {"source": self.source.state_dict(), "rows": self.rows, **self.slots.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = state["rows"]
        assert rows.shape == self.rows.shape and rows.dtype == self.rows.dtype, (
            f"the saved buffer holds {tuple(rows.shape)} {rows.dtype}, this one {tuple(self.rows.shape)} {self.rows.dtype}"
        )
        self.source.load_state_dict(state["source"])
        self.rows.copy_(rows)
        self.slots.load_state_dict(state)
