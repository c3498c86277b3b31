"""Where rows of activations come from, and how they are scaled and mixed."""

from dataclasses import dataclass
from enum import Enum

from nndecomp.config.checks import DType, require
from nndecomp.config.synthetic import SyntheticConfig


class ActivationsKind(Enum):
    live = "live"  # harvested from the target as training goes
    store = "store"  # read from a directory written before
    synthetic = "synthetic"  # drawn from features that are known


class Normalisation(Enum):
    """How rows are scaled for training, with m the mean and E over the data; folded exactly into the weights that are saved."""

    none = "none"  # x
    dataset = "dataset"  # x / s, at each site such that E|x|^2 = width
    shared = "shared"  # x / s, one s for all sites such that E|x|^2 = width over all: a louder site weighs more
    centred = "centred"  # (x - m) / s, at each site such that E|x|^2 = width
    coordinate = "coordinate"  # (x - m) / s, at each coordinate such that E x^2 = 1


@dataclass(kw_only=True)
class ActivationsConfig:
    kind: ActivationsKind
    store: str | None = None  # kind=store: the directory
    batch_seqs: int = 32  # sequences per forward pass of the target
    buffer_tokens: int = 131072  # rows mixed together by the shuffle buffer
    dtype: DType = DType.float32  # of rows in the buffer and in a store
    normalisation: Normalisation = Normalisation.dataset
    normalisation_tokens: int = 1_000_000  # rows, none of them masked, over which m and s are measured
    drop_bos: bool = True  # mask BOS positions, whose norm dwarfs all others
    drop_first: int = 0  # positions at the start of each row to mask: attention sinks
    synthetic: SyntheticConfig | None = None  # kind=synthetic: the features
    verify: bool = False  # kind=store: check every byte against its checksum before training

    def __post_init__(self) -> None:
        require(self.batch_seqs > 0, f"activations.batch_seqs={self.batch_seqs} must be positive")
        require(self.buffer_tokens > 0, f"activations.buffer_tokens={self.buffer_tokens} must be positive")
        require(
            self.normalisation_tokens > 0,
            f"activations.normalisation_tokens={self.normalisation_tokens} must be positive",
        )
        require(
            self.drop_first >= 0,
            f"activations.drop_first={self.drop_first} must be 0 or more positions",
        )
        require(
            (self.kind is ActivationsKind.store) == (self.store is not None),
            f"activations.store={self.store} does not go with activations.kind={self.kind.value}; "
            "a store directory is needed for kind=store, and for nothing else",
        )
        require(
            (self.kind is ActivationsKind.synthetic) == (self.synthetic is not None),
            f"activations.kind={self.kind.value} does not go with activations.synthetic: kind=synthetic needs the features "
            "to draw from, and nothing else does; write activations=synthetic",
        )
