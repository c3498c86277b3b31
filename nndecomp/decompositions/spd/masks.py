"""Masks of the components, drawn or found, and where they apply.

m = g + (1 - g) rho         rho ~ U(0, 1), or 0 or 1 with even chances: never below the importance g
mu ~ U(0, 1)                of what the components leave over, independent of g

With rho of 0 or 1, half of the masks are g itself, whatever g is; the g of these masks is of 1.05 q - 0.05 U(0, 1), so that
components near 0 and 1 are still told apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.config.spd import ReconstructionConfig, Routing, Sampling
from nndecomp.decompositions.spd.sigmoids import lower_leaky

Gates = Mapping[str, Float[Tensor, "*rows C"]]  # g by map
_SPREAD = 0.05


@dataclass(frozen=True)
class Mask:
    """Of one map; see `components.masked`."""

    m: Float[Tensor, "*rows C"]
    mu: Float[Tensor, "*rows"] | None
    route: Bool[Tensor, "*rows"] | None


Masking = Mapping[str, Mask]  # by map; maps that are not in it stay as they are
Routes = Mapping[str, Bool[Tensor, "*rows"] | None]


def gate(q: Float[Tensor, "*rows C"], sampling: Sampling) -> Float[Tensor, "*rows C"]:
    """g, lower-leaky in q, of which masks are made in training."""
    match sampling:
        case Sampling.continuous:
            return lower_leaky(q)
        case Sampling.binomial:
            return lower_leaky((1 + _SPREAD) * q - _SPREAD * torch.rand_like(q))


def stochastic(gates: Gates, routes: Routes, sampling: Sampling, delta: bool) -> dict[str, Mask]:
    """Drawn anew from torch's generator: for each map, position and component, and the leftover for each map and position."""
    return {name: Mask(*_drawn(g, sampling, delta), routes[name]) for name, g in gates.items() if name in routes}


def _drawn(g: Float[Tensor, "*rows C"], sampling: Sampling, delta: bool) -> tuple[Tensor, Tensor | None]:
    rho = torch.rand_like(g) if sampling is Sampling.continuous else torch.randint_like(g, 2)
    mu = torch.rand_like(g[..., 0]) if delta else None
    return g + (1 - g) * rho, mu


def important(gates: Gates, routes: Routes) -> dict[str, Mask]:
    return without_leftover(gates, routes, lambda g: g)


def ones(gates: Gates, routes: Routes) -> dict[str, Mask]:
    return without_leftover(gates, routes, torch.ones_like)


def without_leftover(gates: Gates, routes: Routes, m_of: Callable[[Tensor], Tensor]) -> dict[str, Mask]:
    """m as a function of g."""
    return {name: Mask(m_of(g), None, routes[name]) for name, g in gates.items() if name in routes}


def adversarial(
    gates: Gates, routes: Routes, sources: Mapping[str, Float[Tensor, "*source C1"]], delta: bool
) -> dict[str, Mask]:
    """m = g + (1 - g) s, mu = the last entry of s; sources broadcast over sequences and positions."""
    found = {}
    for name in (each for each in gates if each in routes):
        g, s = gates[name], sources[name]
        mu = s[..., -1].expand(g.shape[:-1]) if delta else None
        found[name] = Mask(g + (1 - g) * s[..., :-1], mu, routes[name])
    return found


def routes_of(gates: Gates, cfg: ReconstructionConfig) -> list[Routes]:
    """Which maps are replaced where, in each run that the loss makes; drawn from torch's generator."""
    first = next(iter(gates.values()))
    match cfg.routing:
        case Routing.all:
            return [dict.fromkeys(gates)]
        case Routing.layerwise:
            return [{name: None} for name in gates]
        case Routing.subset:
            chosen = subset(len(gates), tuple(first.shape[:-1]), first.device)
            return [dict(zip(gates, chosen, strict=True))]
        case Routing.share:
            return [{name: torch.rand_like(g[..., 0]) < cfg.routed_share for name, g in gates.items()}]


def subset(n_maps: int, rows: tuple[int, ...], device: torch.device) -> Bool[Tensor, "map *rows"]:
    """At each position k of the maps, k even in 1 .. n_maps, and each set of k as likely as any other."""
    k = torch.randint(1, n_maps + 1, rows, device=device)
    permutation = torch.rand(n_maps, *rows, device=device).argsort(0)
    return permutation < k
