"""The first rows of a text, harvested once for all who read it from its start: scales, rows to start from, training."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.harvest import Harvester
from nndecomp.types import Layout, Site

KEPT_BYTES = 2**30  # passes beyond are run anew by each reader


class FirstRows:
    """`harvest` gives a harvester of some sites at the start of the text; `sites` are all that any reader asks for."""

    def __init__(
        self, harvest: Callable[[Sequence[Site]], Harvester], sites: Sequence[Site], n_bytes: int = KEPT_BYTES
    ) -> None:
        self.harvest, self.harvester = harvest, harvest(sites)
        self.layout = self.harvester.layout
        self.n_kept = n_bytes // (self.harvester.rows_at_most * self.layout.width * self.harvester.dtype.itemsize)
        self.passes: list[Float[Tensor, "token width"]] = []
        self.states = [self.harvester.state_dict()]  # before each pass, and after the last

    def rows(self, i: int) -> Float[Tensor, "token width"]:
        """Of pass i, which is kept."""
        assert i < self.n_kept, f"pass {i} is not among the {self.n_kept} that are kept"
        while len(self.passes) <= i:
            self.passes.append(self.harvester.next_rows())
            self.states.append(self.harvester.state_dict())
        return self.passes[i]

    def reader(self, sites: Sequence[Site]) -> "Reader":
        return Reader(self, sites)


class Reader:
    """A `RowSource`: what a harvester of these sites alone would give, bit for bit."""

    def __init__(self, first: FirstRows, sites: Sequence[Site]) -> None:
        spans = first.layout.spans
        self.layout = Layout.of({site: first.layout.width_of(site) for site in sites})
        self.columns = [spans[site] for site in self.layout.sites]
        self.dtype, self.device = first.harvester.dtype, first.harvester.device
        self.rows_at_most = first.harvester.rows_at_most
        self.first: FirstRows | None = first
        self.n_read = 0
        self.harvest = first.harvest
        self.beyond: Harvester | None = None  # what is read when the kept passes are, and after a restart

    def next_rows(self) -> Float[Tensor, "token width"]:
        if self.first is not None and self.n_read == self.first.n_kept:
            self.load_state_dict(self.first.states[self.n_read])
        if self.first is None:
            assert self.beyond is not None, "passes are kept or run"
            return self.beyond.next_rows()
        rows = self.first.rows(self.n_read)
        self.n_read += 1
        return rows if self.layout == self.first.layout else torch.cat([rows[:, span] for span in self.columns], 1)

    def state_dict(self) -> dict[str, Any]:
        if self.first is not None:
            return self.first.states[self.n_read]
        assert self.beyond is not None, "passes are kept or run"
        return self.beyond.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.beyond = None, self.harvest(self.layout.sites)
        self.beyond.load_state_dict(state)
