"""Two decompositions compared, unit by unit: found again, split, absorbed, joined many with many."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.config.canonical import CanonicalConfig
from nndecomp.evaluation.unit_graph import Graph, graph
from nndecomp.evaluation.unit_matching import Compared, by_activity, by_weights, groups_of
from nndecomp.evaluation.unit_splitting import Absorbed, Cover, absorption_across, cover
from nndecomp.evaluation.units import Units


class Kind(Enum):
    """In what the second decomposition differs from the first."""

    seed = "seed"  # the seed of first weights alone
    untrained = "untrained"  # the seed, and it was never trained
    size = "size"  # more units, and the seed
    method = "method"


@dataclass(frozen=True)
class Instance:
    """One decomposition of a run."""

    method: str
    times: int  # its size, as a multiple of the method's own
    seed: int
    trained: bool = True

    @property
    def name(self) -> str:
        return f"{self.method}_x{self.times}_seed{self.seed}"


@dataclass(frozen=True)
class Pair:
    kind: Kind
    first: Instance
    second: Instance


@dataclass(frozen=True)
class Comparison:
    pair: Pair
    n: int  # units of the first that are compared
    n_back: int  # of the second
    weights: Compared | None  # null: nothing that one reads or writes is read or written by the other
    activity: Compared
    cover: Cover  # of units of the first, by units of the second
    cover_back: Cover | None  # of units of the second, by units of the first; null: within a method
    cover_null: Cover  # of the first, by the second with its text shifted
    absorbed: Absorbed | None  # null: other methods, whose units need not write to be active
    graph: Graph

    def by(self) -> dict[str, Compared]:
        return {"activity": self.activity} | ({} if self.weights is None else {"weights": self.weights})

    def agreement(self) -> float:
        """Share of units whose nearest one by weights is the nearest by activity too; nan without weights."""
        if self.weights is None:
            return float("nan")
        return (self.weights.nearest() == self.activity.nearest()).double().mean().item()


def compare(
    pair: Pair, a: Sequence[Units], b: Sequence[Units], cfg: CanonicalConfig, seed: int, min_shift: int
) -> Comparison:
    """Units of both that are active on enough of the text. min_shift: as `unit_matching.by_activity`."""
    groups = groups_of(a, b)
    activity = by_activity(a, b, cfg.n_null, seed, min_shift)
    own = [(first.activity, second.activity) for first, second in groups]
    by = torch.randint(min_shift, own[0][0].n_tokens - min_shift + 1, (), generator=torch.Generator().manual_seed(seed))
    across = pair.kind is not Kind.method
    return Comparison(
        pair,
        sum(first.n for first, _ in groups),
        sum(second.n for _, second in groups),
        by_weights(a, b, cfg.n_null, seed),
        activity,
        Cover.joined([cover(first, second) for first, second in own]),
        None if across else Cover.joined([cover(second, first) for first, second in own]),
        Cover.joined([cover(first, second.shifted(int(by))) for first, second in own]),
        Absorbed.joined([absorption_across(*group, cfg.found) for group in groups]) if across else None,
        graph(activity, cfg.linked),
    )


def in_every(found: Sequence[Float[Tensor, " unit"]], cutoff: float) -> Bool[Tensor, " unit"]:
    """Of similarities of the same units with several other decompositions: above the cutoff in each."""
    assert found, "units are found in every other decomposition only where there is one"
    return torch.stack(list(found)).amin(0) > cutoff
