"""The next rows are made while the last ones are used: by a thread of its own, on a GPU on a stream of its own.

next_rows   hands out the pass that was under way, and starts the one after it
state_dict  is that before the pass under way, which is run again after a restart: nothing is skipped or read twice
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.buffer import RowSource


def can_run_ahead(device: torch.device) -> bool:
    """On a CPU: whether as many cores are free as training uses, so that a pass takes none from it and, with as many threads
    as it would have in line, gives the same bits."""
    match device.type:
        case "cuda":
            return True
        case "cpu":
            return len(os.sched_getaffinity(0)) >= 2 * torch.get_num_threads()
        case _:
            return False


class Ahead:
    """A `RowSource`: the rows of `source`, whose model nobody else runs meanwhile (`Target.twin`)."""

    def __init__(self, source: RowSource) -> None:
        self.source, self.layout, self.dtype, self.device = source, source.layout, source.dtype, source.device
        self.rows_at_most = source.rows_at_most
        # Threads of torch are counted for each thread that calls it.
        self.pool = ThreadPoolExecutor(1, "harvest", torch.set_num_threads, (torch.get_num_threads(),))
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.state = source.state_dict()
        self.under_way: Future[Tensor] | None = None

    def next_rows(self) -> Float[Tensor, "token width"]:
        rows = (self._started() if self.under_way is None else self.under_way).result()
        if self.side is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.side)
            rows.record_stream(current)
        self.state = self.source.state_dict()
        self.under_way = self._started()
        return rows

    def _started(self) -> "Future[Tensor]":
        if self.side is None:
            return self.pool.submit(self.source.next_rows)
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        return self.pool.submit(self._on_side)

    def _on_side(self) -> Float[Tensor, "token width"]:
        with torch.cuda.device(self.device), torch.cuda.stream(self.side):
            return self.source.next_rows()

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.under_way is not None:
            self.under_way.result()
            self.under_way = None
        self.source.load_state_dict(state)
        self.state = self.source.state_dict()
