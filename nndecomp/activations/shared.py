"""One stream of rows that several trainings read in step with each other, each the columns of its own sites.

What a reader sees, and what it saves, is what a stream of its sites alone would give it, bit for bit: of a row, columns at
one site do not depend on which sites stand beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.stream import RowStream
from nndecomp.types import Layout, Site

BY_COLUMN = "rows"  # what a stream's state has a column of for each of its own


class SharedStream:
    def __init__(self, stream: RowStream) -> None:
        self.stream, self.layout = stream, stream.layout
        self.views: list[View] = []
        self.batch: Tensor | None = None
        self.n_made = 0

    def view(self, sites: Sequence[Site]) -> "View":
        self.views.append(View(self, sites))
        return self.views[-1]

    def take(self, n_taken: int) -> Float[Tensor, "token width"]:
        """The batch after `n_taken` others, which is made when the first view asks for it."""
        if n_taken == self.n_made:
            self._restore()
            self.batch = self.stream.next_batch()
            self.n_made += 1
        assert n_taken == self.n_made - 1 and self.batch is not None, f"batch {n_taken} of {self.n_made} is gone"
        return self.batch

    def _restore(self) -> None:
        """All views together know what the stream held."""
        saved = [view.loaded for view in self.views if view.loaded is not None]
        if not saved:
            return
        assert len(saved) == len(self.views), f"{len(saved)} of {len(self.views)} trainings go on from a saved state"
        whole = dict(saved[0])
        if BY_COLUMN in whole:
            rows = torch.empty(len(whole[BY_COLUMN]), self.layout.width, dtype=whole[BY_COLUMN].dtype)
            for view, state in zip(self.views, saved, strict=True):
                for theirs, ours in zip(view.spans, view.layout.spans.values(), strict=True):
                    rows[:, theirs] = state[BY_COLUMN][:, ours]
            whole[BY_COLUMN] = rows
        self.stream.load_state_dict(whole)
        for view in self.views:
            view.loaded = None


class View:
    """A `RowStream`."""

    def __init__(self, shared: SharedStream, sites: Sequence[Site]) -> None:
        self.shared = shared
        self.layout = Layout.of({site: shared.layout.width_of(site) for site in sites})
        self.spans = [shared.layout.spans[site] for site in self.layout.sites]
        self.n_taken = 0
        self.loaded: dict[str, Any] | None = None

    def _own(self, rows: Float[Tensor, "n all_width"]) -> Float[Tensor, "n width"]:
        whole = self.layout == self.shared.layout
        return rows if whole else torch.cat([rows[:, span] for span in self.spans], 1)

    def next_batch(self) -> Float[Tensor, "token width"]:
        batch = self._own(self.shared.take(self.n_taken))
        self.n_taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        state = self.shared.stream.state_dict()
        return {**state, BY_COLUMN: self._own(state[BY_COLUMN])} if BY_COLUMN in state else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state
