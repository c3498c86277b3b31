"""One rank's documents of one split, in order, endlessly; the position can be saved and restored."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nndecomp.errors import SettingError
from nndecomp.tokens.documents import Body, Document, Documents

Side = Callable[[Document], bool]  # whether a document belongs to the split that is read


@runtime_checkable
class Reader(Protocol):
    n_documents: int | None  # before the split, if it is known without reading everything

    def one_pass(self) -> Iterator[Body]:
        """The documents of one epoch from where the reader stands, then the end."""
        ...

    def next(self) -> Body:
        """The next document; a new epoch, in a new order, follows the last one of the epoch."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EndlessReader:
    """Epoch after epoch of `one_pass`, which advances `self.epoch` when it ends."""

    name: str  # for the message about a split that is empty
    epoch: int

    def one_pass(self) -> Iterator[Body]:
        raise NotImplementedError

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
