"""Which starts fit which groups; each refusal is one sentence, before any weight is loaded."""

from collections.abc import Sequence

from nndecomp.config.schema import DecompositionConfig, Directions, require
from nndecomp.decompositions.spec import GroupSpec
from nndecomp.targets.base import Shape
from nndecomp.types import Point, Site


def check_start(cfg: DecompositionConfig, groups: Sequence[GroupSpec], shape: Shape) -> None:
    if cfg.tied is True:
        for group in groups:
            read, write = (sum(shape.width(site) for site in sites) for sites in (group.reads, group.writes))
            require(
                read == write,
                f"decomposition.tied=true needs groups that write as many coordinates as they read, "
                f"but group {group.name} reads {read} and writes {write}",
            )
    if cfg.directions in (Directions.mlp_response, Directions.neurons):
        for group in groups:
            require(
                [site.point for site in group.reads] == [Point.mlp_in] and len(_own(group)) == 1,
                f"decomposition.directions={cfg.directions.value} is for transcoders, which read the mlp_in of a layer and "
                f"write its mlp_out, but group {group.name} reads {', '.join(map(str, group.reads))}",
            )


def _own(group: GroupSpec) -> list[Site]:
    """Where the MLP writes that reads what the group reads."""
    read = group.reads[0]
    return [s for s in group.writes if (s.point, s.model, s.layer) == (Point.mlp_out, read.model, read.layer)]
