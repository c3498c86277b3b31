"""Rows of independent sparse features, which toys read.

    x_j = b_j u_j,   b_j = 1 with probability p, else 0;   u_j even in [0, 1] (tms) or [-1, 1] (resid_mlp)

A batch depends on the seed, the split and its number alone, so that resuming needs one number.

(1 - p)^n of the rows have no feature: 37% where p = 0.01 and n = 100. They are one row that counts as many: see `gathered`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.synthetic_codes import generator
from nndecomp.config.toys import ToyConfig, ToyKind


class SparseFeatures:
    """Endless batches, made on the CPU; a `Stream` of the training loop."""

    def __init__(self, cfg: ToyConfig, batch_rows: int, seed: int, split: str, device: torch.device) -> None:
        self.cfg, self.batch_rows, self.seed, self.split, self.device = cfg, batch_rows, seed, split, device
        self.n_batches = 0

    def next_batch(self) -> Float[Tensor, "row feature"]:
        draw = generator("sparse features", self.split, self.seed, self.n_batches)
        self.n_batches += 1
        shape = (self.batch_rows, self.cfg.n_features)
        active = torch.rand(shape, generator=draw) < self.cfg.feature_probability
        values = torch.rand(shape, generator=draw)
        match self.cfg.kind:
            case ToyKind.tms:
                pass
            case ToyKind.resid_mlp:
                values = 2 * values - 1
        return (values * active).to(self.device)

    def state_dict(self) -> dict[str, Any]:
        return {"n_batches": self.n_batches, "batch_rows": self.batch_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["batch_rows"] == self.batch_rows, f"saved with {state}, not batches of {self.batch_rows}"
        self.n_batches = state["n_batches"]


@dataclass(frozen=True)
class CountedRows:
    """Rows of a batch, and how many equal ones each stands for."""

    x: Float[Tensor, "row feature"]
    count: Float[Tensor, " row"]


def gathered(x: Float[Tensor, "row feature"]) -> CountedRows:
    """Rows of zeros as the last row, the others as they are; without a last row where there are none."""
    some = (x != 0).any(1)
    n_zero = len(x) - int(some.sum())
    last = int(n_zero > 0)
    rows = torch.cat([x[some], x.new_zeros(last, x.shape[1])])
    return CountedRows(rows, torch.cat([x.new_ones(len(x) - n_zero), x.new_full((last,), n_zero)]))


class GatheredFeatures:
    """The batches of `SparseFeatures`, `gathered`; a `Stream` of the training loop."""

    def __init__(self, cfg: ToyConfig, batch_rows: int, seed: int, split: str, device: torch.device) -> None:
        self.all, self.device = SparseFeatures(cfg, batch_rows, seed, split, torch.device("cpu")), device

    def next_batch(self) -> CountedRows:
        batch = gathered(self.all.next_batch())
        return CountedRows(batch.x.to(self.device), batch.count.to(self.device))

    def state_dict(self) -> dict[str, Any]:
        return self.all.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.all.load_state_dict(state)


def one_hot(cfg: ToyConfig, size: float) -> Float[Tensor, "feature feature"]:
    """Row j has feature j alone."""
    return size * torch.eye(cfg.n_features)
