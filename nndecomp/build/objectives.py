"""Settings -> what training lowers: a dictionary, and rows in the units in which it is trained."""

from collections.abc import Mapping

from nndecomp.activations.first_rows import FirstRows
from nndecomp.build.data import scales
from nndecomp.build.members import Member
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.decompositions.wiring import wire
from nndecomp.targets.base import Shape, Target
from nndecomp.types import Layout, Site


def sites_of(members: Mapping[str, Member], shape: Shape) -> list[Site]:
    """Everything that one of them reads or writes."""
    groups = [group for each in members.values() for group in wire(each.config, shape).groups]
    return sorted({site for group in groups for site in (*group.reads, *group.writes)})


def objectives_of(
    cfg: RunConfig, target: Target, members: Mapping[str, Member], first: FirstRows | None = None
) -> tuple[dict[str, DictionaryObjective], list[Site]]:
    """Objectives, and the sites of the rows that they take."""
    dictionaries = {
        name: build_dictionary(each.config, target.shape, each.seed, target.device, target.name)
        for name, each in members.items()
    }
    sites = sites_of(members, target.shape)
    layout = Layout.of({site: target.shape.width(site) for site in sites})
    scale = scales(cfg, target, sites, first)
    return {
        name: DictionaryObjective(each, members[name].config, layout, scale) for name, each in dictionaries.items()
    }, sites
