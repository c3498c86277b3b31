"""Whether the settings of a toy and of its decomposition fit each other."""

from fnmatch import fnmatchcase

from nndecomp.config.schema import RunConfig, require
from nndecomp.config.spd import SPDConfig
from nndecomp.config.toys import ToyConfig
from nndecomp.decompositions.spd.decomposition import check_tied
from nndecomp.targets.maps import find_maps
from nndecomp.targets.toys import build_toy


def toy_settings(cfg: RunConfig) -> tuple[ToyConfig, SPDConfig]:
    """Both, checked against each other."""
    require(cfg.toy is not None, "toy=null names no toy; write toy=tms_5_2")
    require(cfg.spd is not None, "spd=null says nothing of how the toy is decomposed; conf/toy/*.yaml have both")
    assert cfg.toy is not None and cfg.spd is not None
    maps = find_maps(build_toy(cfg.toy, cfg.seed), cfg.spd.maps)
    for linear, n_components in maps.items():
        own = [pattern for pattern in cfg.toy.per_feature if fnmatchcase(linear.name, pattern)]
        shared = [pattern for pattern in cfg.toy.shared if fnmatchcase(linear.name, pattern)]
        require(
            len(own) + len(shared) == 1,
            f"spd.maps has {linear.name}, which one pattern of toy.per_feature={cfg.toy.per_feature} or "
            f"toy.shared={cfg.toy.shared} must match, not {len(own) + len(shared)}",
        )
        require(
            not own or n_components >= cfg.toy.n_features,
            f"spd.maps has {n_components} components for {linear.name}, too few for one each of "
            f"toy.n_features={cfg.toy.n_features}",
        )
    check_tied(maps, cfg.spd.tie)
    return cfg.toy, cfg.spd
