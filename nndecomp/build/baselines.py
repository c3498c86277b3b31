"""Settings -> what needs no training: neurons, principal and random directions."""

from jaxtyping import Float
from torch import Tensor

from nndecomp.build.data import initial_rows
from nndecomp.build.members import decompositions
from nndecomp.config.schema import Architecture, DecompositionConfig, Ranking, RunConfig
from nndecomp.decompositions.attribution import AttributedNeurons
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.directions import build_directions
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.wiring import wire
from nndecomp.targets.base import Target
from nndecomp.types import Site


def baselines(cfg: RunConfig, target: Target) -> dict[str, Decomposition]:
    """What the run compares with and need not train.

    Directions are of decomposition.initial_tokens rows of training text, the same for all that have the same sites.
    """
    rows: dict[tuple[tuple[Site, ...], int], Float[Tensor, "token d_writes"]] = {}

    def baseline(each: DecompositionConfig) -> Decomposition:
        wiring = wire(each, target.shape)
        if each.architecture is Architecture.neurons:
            return build_neurons(each, target)
        sites = tuple(site for group in wiring.groups for site in group.writes)
        if (sites, each.initial_tokens) not in rows:
            rows[sites, each.initial_tokens] = initial_rows(cfg, target, sites, each.initial_tokens)
        return build_directions(each, target.shape, rows[sites, each.initial_tokens], cfg.seed, target.name)

    found = decompositions(cfg).items()
    return {name: baseline(each) for name, each in found if each.architecture.is_baseline}


def build_neurons(cfg: DecompositionConfig, target: Target) -> NeuronBaseline:
    """Raises SettingError as `nndecomp.decompositions.wiring.wire` does."""
    wiring = wire(cfg, target.shape)
    layers = [group.reads[0].layer for group in wiring.groups]
    if cfg.ranking is Ranking.attribution:
        return AttributedNeurons(target, layers, wiring.k)
    return NeuronBaseline(target, layers, wiring.k, cfg.ranking)
