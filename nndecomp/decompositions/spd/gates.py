"""Which components take part on a token, once a parameter decomposition is looked at rather than trained.

    importance   m = g, and what has g > 0 counts as active: masks as they are trained, without the stochastic part
    threshold    m = 1 where g > value, else 0
    topk         m = 1 for the k components of each map with the largest logits q, else 0
    topk_all     the same for k components of all maps together

Ranking by q rather than by g leaves no ties: all components that do not matter have g = 0. `delta` adds what the components
leave of the weights, which is dense, so that it counts as a linear map beside them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.decompositions.spd.decomposition import Importances


class GateKind(Enum):
    importance = "importance"
    threshold = "threshold"
    topk = "topk"
    topk_all = "topk_all"


@dataclass(frozen=True)
class Gate:
    kind: GateKind
    value: int | float | None = None  # threshold: above which; topk: k of each map; topk_all: k of all maps together
    delta: bool = False

    def __post_init__(self) -> None:
        match self.kind, self.value:
            case GateKind.importance, None:
                pass
            case GateKind.threshold, float(value) | int(value):
                assert 0 <= value < 1, f"a threshold of {value} is not from 0 up to 1"
            case GateKind.topk | GateKind.topk_all, int(value):
                assert value > 0, f"top {value} components"
            case kind, value:
                raise AssertionError(f"a gate of kind {kind.value} with value {value}")

    @property
    def name(self) -> str:
        """`threshold0.5`, `topk16`, `importance_delta`."""
        value = "" if self.value is None else f"{self.value:g}"
        return f"{self.kind.value}{value}{'_delta' if self.delta else ''}"

    @property
    def of_one_map(self) -> bool:
        """Whether the gate of a map needs its own importances alone."""
        return self.kind is not GateKind.topk_all

    def open(self, importances: Importances) -> tuple[Float[Tensor, "*rows C"], Bool[Tensor, "*rows C"]]:
        """m of one map, and which of its components count as active."""
        match self.kind, self.value:
            case GateKind.importance, None:
                return importances.g, importances.g > 0
            case GateKind.threshold, value if value is not None:
                return _binary(importances.g > value)
            case GateKind.topk, int(k):
                return _binary(_largest(importances.q, k))
            case _:
                raise AssertionError(f"{self.name} is of all maps together")

    def open_all(
        self, importances: Mapping[str, Importances]
    ) -> dict[str, tuple[Float[Tensor, "*rows C"], Bool[Tensor, "*rows C"]]]:
        """Of all maps, by map."""
        if self.of_one_map:
            return {name: self.open(each) for name, each in importances.items()}
        assert isinstance(self.value, int), f"top {self.value} of all maps"
        q = torch.cat([each.q for each in importances.values()], -1)
        chosen = _largest(q, self.value).split([each.q.shape[-1] for each in importances.values()], -1)
        return {name: _binary(each) for name, each in zip(importances, chosen, strict=True)}


def _largest(q: Float[Tensor, "*rows C"], k: int) -> Bool[Tensor, "*rows C"]:
    assert k <= q.shape[-1], f"top {k} of {q.shape[-1]} components"
    return torch.zeros_like(q, dtype=torch.bool).scatter_(-1, q.topk(k, dim=-1, sorted=False).indices, True)


def _binary(active: Bool[Tensor, "*rows C"]) -> tuple[Float[Tensor, "*rows C"], Bool[Tensor, "*rows C"]]:
    return active.float(), active
