"""One rank's documents of one split, in order, endlessly; the position can be saved and restored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nndecomp.errors import SettingError
from nndecomp.tokens.documents import Body, Document, Documents

Side = Callable[[Document], bool]  # whether a document belongs to the split that is read


@runtime_checkable
class Reader(Protocol):
    @property
    def n_documents(self) -> int | None:
        """Before the split, if it is known without reading everything."""
        ...

    def one_pass(self) -> Iterator[Body]:
        """The documents of one epoch from where the reader stands, then the end."""
        ...

    def next(self) -> Body:
        """The next document; a new epoch, in a new order, follows the last one of the epoch."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EndlessReader(ABC):
    """Epoch after epoch of `one_pass`, which advances `self.epoch` when it ends."""

    name: str  # for the message about a split that is empty
    epoch: int

    @abstractmethod
    def one_pass(self) -> Iterator[Body]: ...

    def next(self) -> Body:
        for _ in range(2):  # what is left of this epoch, then a whole one
            for body in self.one_pass():
                return body
        raise SettingError(
            f"tokens.path: the documents of {self.name} leave none to read; "
            "give more text, another tokens.heldout_fraction, or fewer ranks"
        )


class IndexedReader(EndlessReader):
    """Documents reached by number: every epoch is a permutation of all of them, dealt to the ranks in turn."""

    def __init__(
        self, documents: Documents, side: Side, name: str, *, shuffle: bool, seed: int, rank: int, world_size: int
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.documents, self.side, self.name = documents, side, name
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.n_documents = len(range(rank, len(documents), world_size))
        self.load_state_dict({"epoch": 0, "cursor": 0})

    def _order(self) -> np.ndarray:
        n = len(self.documents)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        return order[self.rank :: self.world_size]

    def one_pass(self) -> Iterator[Body]:
        while self.cursor < len(self.order):
            document = self.documents[int(self.order[self.cursor])]
            self.cursor += 1
            if len(document.body) > 0 and self.side(document):
                yield document.body
        self.load_state_dict({"epoch": self.epoch + 1, "cursor": 0})

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.order = self._order()


class StreamedReader(EndlessReader):
    """Documents that can only be read one after the other: shuffled a window at a time.

    A position is that of the window's first document in the stream, and how far the window is used: restoring it
    reads one window again.
    """

    n_documents = None

    def __init__(
        self,
        rows: Any,  # datasets.IterableDataset of this rank
        document: Callable[[dict[str, Any]], Document],
        side: Side,
        name: str,
        *,
        window: int,
        seed: int,
        rank: int,
    ) -> None:
        self.pristine, self.document, self.side, self.name = rows, document, side, name
        self.n_window, self.seed, self.rank = window, seed, rank
        self.load_state_dict({"epoch": 0, "window": 0, "start": None, "cursor": 0})

    def _read_window(self, index: int, start: dict[str, Any] | None) -> None:
        """The next `n_window` documents of this side, in random order; none where the epoch ends."""
        documents = (self.document(row) for row in self.rows_left)
        kept = (document.body for document in documents if len(document.body) > 0 and self.side(document))
        window = list(islice(kept, self.n_window))
        order = np.random.default_rng([self.seed, self.epoch, index, self.rank]).permutation(len(window))
        self.window = [window[i] for i in order]
        self.index, self.start, self.cursor = index, start, 0

    def one_pass(self) -> Iterator[Body]:
        while self.window:
            if self.cursor == len(self.window):
                self._read_window(self.index + 1, self.rows.state_dict())
            else:
                self.cursor += 1
                yield self.window[self.cursor - 1]
        self.load_state_dict({"epoch": self.epoch + 1, "window": 0, "start": None, "cursor": 0})

    def state_dict(self) -> dict[str, Any]:
        """start: where in the stream the window begins; None is the beginning of the epoch."""
        return {"epoch": self.epoch, "window": self.index, "start": self.start, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.rows = deepcopy(self.pristine)
        self.rows.set_epoch(self.epoch)
        if state["start"] is not None:
            self.rows.load_state_dict(state["start"])
        self.rows_left = iter(self.rows)
        self._read_window(state["window"], state["start"])
        self.cursor = state["cursor"]
