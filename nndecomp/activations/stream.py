"""What training reads: batches of rows, without end, from the target as it runs or from a store."""

import hashlib
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.activations.manifest import BLOCK_ROWS
from nndecomp.activations.store import Store
from nndecomp.types import Layout


@runtime_checkable
class RowStream(Protocol):
    """Every row once (an epoch, for a store), in shuffled order, on the training device, in fp32.

    The state holds tensors and plain values: `torch.load(..., weights_only=True)` reads it back, and restoring it gives
    the same next batches bit for bit.
    """

    layout: Layout

    def next_batch(self) -> Float[Tensor, "token width"]:
        """`batch_tokens` rows; the batch size is the caller's, and never varies."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def _permutation(n: int, *seed: int) -> Int[Tensor, "n"]:
    """A random order of n things that depends on `seed` alone."""
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    return torch.randperm(n, generator=torch.Generator().manual_seed(int.from_bytes(digest) >> 1))


class StoreStream:
    """Rows of a store in a new order every epoch, each once an epoch.

    Blocks of adjacent rows are put in random order; a window of them, `window_rows` rows, is shuffled row by row; a
    batch is the next rows of the window. The order is a function of (seed, epoch, window), so all there is to save is
    how many rows were served. Within a batch rows stand in the order of the store, which is the fastest to read, and
    the kernel is asked for the blocks of the next window while this one is served.
    """

    def __init__(self, store: Store, batch_tokens: int, seed: int, window_rows: int, device: torch.device) -> None:
        self.store, self.layout, self.device = store, store.layout, device
        self.batch_tokens, self.seed, self.n_served = batch_tokens, seed, 0
        self.window_rows = max(1, window_rows // BLOCK_ROWS) * BLOCK_ROWS
        self.windows = -(-store.n_rows // self.window_rows)  # an epoch
        self.blocks_of_epoch = lru_cache(maxsize=2)(self._blocks_of_epoch)
        self.order_of_window = lru_cache(maxsize=2)(self._order_of_window)

    def _blocks_of_epoch(self, epoch: int) -> Int[Tensor, "block"]:
        """The full blocks in random order; rows that fill no block come last."""
        n_full, rest = divmod(self.store.n_rows, BLOCK_ROWS)
        full = _permutation(n_full, self.seed, epoch)
        return torch.cat([full, torch.tensor([n_full])]) if rest else full

    def _blocks_of_window(self, epoch: int, window: int) -> Int[Tensor, "block"]:
        per_window = self.window_rows // BLOCK_ROWS
        return self.blocks_of_epoch(epoch)[window * per_window : (window + 1) * per_window]

    def _order_of_window(self, epoch: int, window: int) -> Int[Tensor, "token"]:
        """Positions in the store of the rows of a window, in the order in which they are served."""
        blocks = self._blocks_of_window(epoch, window)
        n_rows = min(self.window_rows, self.store.n_rows - window * self.window_rows)
        place = _permutation(n_rows, self.seed, epoch, window)
        return blocks[place // BLOCK_ROWS] * BLOCK_ROWS + place % BLOCK_ROWS

    def _next_rows(self, n_rows: int) -> Int[Tensor, "token"]:
        """Positions in the store of the next rows of the window, at most `n_rows`."""
        epoch, served = divmod(self.n_served, self.store.n_rows)
        window, offset = divmod(served, self.window_rows)
        order = self.order_of_window(epoch, window)
        index = order[offset : offset + n_rows]
        # As large a share of the next window is asked for as is served of this one.
        ahead = self._blocks_of_window(*((epoch, window + 1) if window + 1 < self.windows else (epoch + 1, 0)))
        share = [len(ahead) * (offset + n) // len(order) for n in (0, len(index))]
        self.store.will_need(ahead[share[0] : share[1]])
        self.n_served += len(index)
        return index

    def next_batch(self) -> Float[Tensor, "token width"]:
        """`batch_tokens` rows, in fp32; they may come from two windows or epochs."""
        index = self._next_rows(self.batch_tokens)
        while len(index) < self.batch_tokens:
            index = torch.cat([index, self._next_rows(self.batch_tokens - len(index))])
        rows = self.store.gather(index.sort().values, pinned=self.device.type == "cuda")
        return rows.to(self.device, non_blocking=True).float()

    def state_dict(self) -> dict[str, Any]:
        return {"store": self.store.manifest.identity, "n_rows": self.store.n_rows, "n_served": self.n_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        here = self.state_dict()
        assert (state["store"], state["n_rows"]) == (here["store"], here["n_rows"]), f"saved with {state}, not {here}"
        self.n_served = state["n_served"]
