"""Other libraries' trainers behind one face, given this package's settings and first weights, to compare with.

    sae-lens               SAETrainer.step over TrainingSAE; evaluated as the SAE that it saves
    dictionary-learning    <Trainer>.update; evaluated as its dictionary encodes by default

Both come with the extra `bench` and are imported here alone, when asked for. Settings are handed over by their meaning;
what a library cannot do is refused by an assertion, so that nothing is compared that differs unnoticed.
"""

import importlib.util
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.schema import (
    DecompositionConfig,
    DType,
    Reconstruction,
    TrainingConfig,
    require,
)
from nndecomp.decompositions.groups import SparseDictionary

LIBRARIES = ("sae-lens", "dictionary-learning")


def check_installed() -> None:
    """SettingError if a library to compare with is missing."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name.replace("-", "_")) is None]
    require(
        not missing,
        f"{' and '.join(missing)} cannot be imported: this experiment needs the extra `bench` in an environment of "
        "its own; experiments/exp_025_parity_with_peers/README.md has the commands",
    )


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


@dataclass(frozen=True)
class Fit:
    """How well rows are reconstructed: sums over all of them in float64."""

    fvu: float  # sum |y - y_hat|^2 / sum |y - mean y|^2
    l0: float  # active features a row
    dead: float  # share of features active on none of the rows


@runtime_checkable
class Reconstructs(Protocol):
    def reconstruct(
        self, rows: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        """Reconstructions, and codes whose entries other than 0 are active."""
        ...


class Peer(ABC):
    """A dictionary of one site that writes what it reads, in training in another library."""

    @abstractmethod
    def step(self, rows: Float[Tensor, "token width"], step: int) -> None:
        """One training step, with all that the library does in one."""

    @abstractmethod
    def reconstruct(
        self, rows: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        """Reconstructions and codes as the library gives them to its users once training has ended."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """W_enc and W_dec [feature, width] and b_dec [width], as they are now."""


@dataclass(frozen=True)
class Own:
    """This library's, for the same measurement."""

    dictionary: SparseDictionary

    def reconstruct(
        self, rows: Float[Tensor, "token width"]
    ) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token feature"]]:
        y_hat, codes = self.dictionary(rows)
        return y_hat, codes[0].dense()


@torch.no_grad()
def fit(peer: Reconstructs, rows: Float[Tensor, "token width"], batch: int = 4096) -> Fit:
    """Of anything with `reconstruct`, on rows it was not trained on."""
    error = torch.zeros((), dtype=torch.float64)
    fired, n_active = torch.zeros(0), 0
    for part in rows.split(batch):
        y_hat, codes = peer.reconstruct(part)
        error += (part.double() - y_hat.double()).square().sum()
        active = codes != 0
        n_active += int(active.sum())
        fired = fired + active.sum(0) if len(fired) else active.sum(0)
    spread = (rows.double() - rows.double().mean(0)).square().sum()
    return Fit(float(error / spread), n_active / len(rows), float((fired == 0).double().mean()))


def check_shared(dictionary: SparseDictionary, cfg: DecompositionConfig) -> None:
    """What both libraries have in common."""
    assert len(dictionary.banks) == 1 and dictionary.reads == dictionary.writes, "the libraries train SAEs of one site"
    assert cfg.reconstruction is Reconstruction.sum_of_squares, f"they minimise sums, not {cfg.reconstruction.value}"


def autocast(training: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=training.autocast is DType.bfloat16)


def learning_rate(cfg: DecompositionConfig, training: TrainingConfig) -> float:
    return training.lr if cfg.lr is None else cfg.lr


def betas(cfg: DecompositionConfig, training: TrainingConfig) -> tuple[float, float]:
    beta1, beta2 = training.betas if cfg.betas is None else cfg.betas
    return beta1, beta2
