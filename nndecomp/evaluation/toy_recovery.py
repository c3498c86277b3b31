"""How much of a toy, of which everything is known, a parameter decomposition found.

Directions. Of a map M [d_in, d_out] that reads features e_j [d_in], t_j = e_j M is what it makes of feature j, and component c
makes (e_j . V_c) U_c of it. Of one that writes features e_j [d_out], t_j = M e_j and component c gives V_c (U_c . e_j).

    c(j) = argmax over c of cos(component c's part of j, t_j)
    MMCS = mean over j of cos(part of c(j), t_j)            mean max cosine similarity
    ML2R = mean over j of |part of c(j)| / |t_j|            mean L2 ratio: below 1, components are shrunk

(Bushnaq, Braun and Sharkey 2025, arXiv 2506.20790, section 3.1; there e_j is a unit vector, and parts and t_j columns.) The
argmax is over components that are used: importance above TOLERANCE for some single feature. A component that is never used
points anywhere, and may by chance point best at a length of nearly nothing.

Importances. For inputs with one feature at ONE_HOT each, g [feature, component] is the identity where every feature has a
component of its own, and has few non-zero columns where components serve all features. Columns are permuted to be as near to
that as possible; `errors` counts entries further than TOLERANCE from it (from 0, for columns beyond those that are enough).
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.activations.sparse_features import SparseFeatures, one_hot
from nndecomp.config.toys import ToyConfig
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.components import Components
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.matching import match
from nndecomp.targets.toys import Toy

TOLERANCE = 0.1
ONE_HOT = 0.75  # size of the one feature


@dataclass(frozen=True)
class Directions:
    """Of features in one map, and of the component that points most nearly where each does."""

    target: Float[Tensor, "feature d"]
    part: Float[Tensor, "feature d"]  # of feature j in component c(j)
    component: Int[Tensor, " feature"]
    cosine: Float[Tensor, " feature"]
    l2_ratio: Float[Tensor, " feature"]

    @property
    def mmcs(self) -> float:
        return self.cosine.mean().item()

    @property
    def ml2r(self) -> float:
        return self.l2_ratio.mean().item()


@dataclass(frozen=True)
class MapRecovery:
    importance: Float[Tensor, "feature C"]  # columns permuted
    order: Int[Tensor, " C"]  # which component each column is
    enough: int | None  # components that all features share; null: one each
    errors: int
    leftover: float  # |M - V U| / |M|
    directions: Directions | None  # null where features are not single directions

    @property
    def n_used(self) -> int:
        return int(used(self.importance).sum())


@dataclass(frozen=True)
class ToyRecovery:
    maps: dict[str, MapRecovery]
    mse_toy: float  # of the toy from what it is to put out, on fresh rows
    mse_masked: float  # of the toy with masks g, nothing left over, from the toy itself
    l0: dict[str, float]  # components with g above TOLERANCE, mean over fresh rows, by map


def used(importance: Float[Tensor, "feature C"]) -> Tensor:
    """Which components are above TOLERANCE for some single feature."""
    return (importance > TOLERANCE).any(0)


@torch.no_grad()
def importances(
    decomposition: ParameterDecomposition, toy: Toy, x: Float[Tensor, "row feature"]
) -> dict[str, Float[Tensor, "row C"]]:
    """g of each map in the undisturbed run."""
    inputs: dict[str, Tensor] = {}
    with decomposition.recording(inputs):
        toy(x)
    return {name: each.g for name, each in decomposition.importances(inputs).items()}


@torch.no_grad()
def toy_recovery(decomposition: ParameterDecomposition, toy: Toy, cfg: ToyConfig, seed: int) -> ToyRecovery:
    device = next(decomposition.parameters()).device
    alone = importances(decomposition, toy, one_hot(cfg, ONE_HOT).to(device))
    x = SparseFeatures(cfg, cfg.heldout_rows, seed, "heldout", device).next_batch()
    g = importances(decomposition, toy, x)
    clean = toy(x)
    with decomposition.installed(masks.important(g, dict.fromkeys(g))):
        masked = toy(x)
    maps = {
        name: of_map(own, decomposition.maps[name].matrix(), alone[name], enough(cfg, name), features(toy, name))
        for name, own in decomposition.components.items()
    }
    return ToyRecovery(
        maps=maps,
        mse_toy=(clean - toy.wanted(x)).double().square().mean().item(),
        mse_masked=(masked - clean).double().square().mean().item(),
        l0={name: (each > TOLERANCE).double().sum(1).mean().item() for name, each in g.items()},
    )


def enough(cfg: ToyConfig, name: str) -> int | None:
    """How many components all features are known to share in a map; null: each has its own."""
    if any(fnmatchcase(name, pattern) for pattern in cfg.per_feature):
        return None
    (known,) = [n for pattern, n in cfg.shared.items() if fnmatchcase(name, pattern)]
    return known


@dataclass(frozen=True)
class Features:
    """Single directions of features at a map: where it reads them, or where it writes them."""

    at: Float[Tensor, "feature d"]
    read: bool


def features(toy: Toy, name: str) -> Features | None:
    read, written = toy.features_read(name), toy.features_written(name)
    assert read is None or written is None, f"{name} reads and writes features: which are scored is not said"
    if read is not None:
        return Features(read, True)
    return None if written is None else Features(written, False)


@torch.no_grad()
def of_map(
    own: Components,
    M: Float[Tensor, "d_in d_out"],
    g: Float[Tensor, "feature C"],
    enough: int | None,
    at: Features | None,
) -> MapRecovery:
    order = permutation(g, enough)
    permuted = g[:, order].cpu()
    return MapRecovery(
        importance=permuted,
        order=order.cpu(),
        enough=enough,
        errors=errors(permuted, enough),
        leftover=((M - own.product()).norm() / M.norm()).item(),
        directions=None if at is None else directions(own, M, at, used(g)),
    )


def permutation(g: Float[Tensor, "feature C"], enough: int | None) -> Int[Tensor, " C"]:
    """Columns in the order in which g is nearest to the identity (Kuhn 1955), the rest by their sums; or all by their sums."""
    by_sum = g.sum(0).argsort(descending=True, stable=True)
    if enough is not None:
        return by_sum
    first = match(g.double()).second.to(g.device)
    return torch.cat([first, by_sum[~torch.isin(by_sum, first)]])


def errors(permuted: Float[Tensor, "feature C"], enough: int | None) -> int:
    """Entries further than TOLERANCE from what is known."""
    if enough is not None:
        return int((permuted[:, enough:] > TOLERANCE).sum())
    identity = torch.eye(*permuted.shape)
    missing = max(0, permuted.shape[0] - permuted.shape[1])  # features for which there is no column
    return int(((permuted - identity).abs() > TOLERANCE).sum()) + missing


def directions(own: Components, M: Float[Tensor, "d_in d_out"], at: Features, used: Tensor) -> Directions | None:
    """None where no component is used."""
    if not used.any():
        return None
    e = at.at.to(M.device)
    shares, axes, target = (e @ own.V, own.U, e @ M) if at.read else (e @ own.U.T, own.V.T, e @ M.T)
    # cos((e_j . V_c) U_c, t_j) = sign(e_j . V_c) cos(U_c, t_j); a part of length 0 points nowhere.
    unit = torch.nn.functional.normalize
    cosine = shares.sign() * (unit(target, dim=1) @ unit(axes, dim=1).T)
    best = cosine.masked_fill(~used, -torch.inf).max(1)
    part = shares.gather(1, best.indices[:, None]) * axes[best.indices]
    return Directions(
        target=target.cpu(),
        part=part.cpu(),
        component=best.indices.cpu(),
        cosine=best.values.clamp(-1, 1).cpu(),
        l2_ratio=(part.norm(dim=1) / target.norm(dim=1)).cpu(),
    )


def scores(found: ToyRecovery) -> dict[str, float]:
    """By name, `<score>/<map>` where there is one a map."""
    values = {"mse_toy": found.mse_toy, "mse_masked": found.mse_masked}
    for name, own in found.maps.items():
        if own.directions is not None:
            values |= {f"mmcs/{name}": own.directions.mmcs, f"ml2r/{name}": own.directions.ml2r}
        values |= {f"errors/{name}": own.errors, f"used/{name}": own.n_used, f"leftover/{name}": own.leftover}
        values[f"l0/{name}"] = found.l0[name]
    return values
