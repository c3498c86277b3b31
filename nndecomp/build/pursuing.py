"""Dictionaries measured a second time, with codes that a pursuit finds in place of those of their encoders."""

from collections.abc import Mapping, Sequence

from nndecomp.config.schema import Activation, Architecture, CodeNormalisation, DecompositionConfig, RunConfig, require
from nndecomp.decompositions.base import Replacement
from nndecomp.decompositions.conversion import pursuit_obstacle, to_pursuit
from nndecomp.decompositions.groups import SparseDictionary

_NO_DICTIONARY = (Architecture.molt, Architecture.lorsa)


def check_pursuit(cfg: RunConfig, named: Mapping[str, DecompositionConfig]) -> None:
    """Refuses evaluation.pursuit where nothing can be pursued, or has too few features."""
    ks = cfg.evaluation.pursuit
    possible = {
        name: each
        for name, each in named.items()
        if each.reads == each.writes
        and not (each.architecture.is_baseline or each.architecture in _NO_DICTIONARY)
        and each.code_normalisation is not CodeNormalisation.decoupled
        and each.activation is not Activation.matching_pursuit
    }
    require(not ks or bool(possible), _nothing(ks, named))
    for name, each in possible.items():
        smallest = min(n for n in [each.n_features, *(each.n_exclusive or [])] if n > 0)
        require(
            max(ks, default=0) <= smallest,
            f"evaluation.pursuit={ks} takes more features than the {smallest} of a group of {name}",
        )


def pursued(
    ks: Sequence[int], replacements: Mapping[str, Sequence[Replacement]]
) -> dict[str, tuple[str, list[SparseDictionary]]]:
    """Name -> the name of what is pursued, and the pursuits, for every replacement that can be and every k."""
    found: dict[str, tuple[str, list[SparseDictionary]]] = {}
    for name, parts in replacements.items():
        dictionaries = [each for each in parts if isinstance(each, SparseDictionary) and pursuit_obstacle(each) is None]
        if len(dictionaries) == len(parts):
            found |= {f"{name}_pursuit{k}": (name, [to_pursuit(each, k) for each in dictionaries]) for k in ks}
    require(not ks or bool(found), _nothing(ks, replacements))
    return found


def pursuits(cfg: RunConfig, dictionaries: Mapping[str, SparseDictionary]) -> dict[str, SparseDictionary]:
    """What evaluation.pursuit adds to dictionaries that are measured one by one."""
    found = pursued(cfg.evaluation.pursuit, {name: [each] for name, each in dictionaries.items()})
    return {name: pursuit for name, (_, [pursuit]) in found.items()}


def _nothing(ks: Sequence[int], names: Mapping[str, object]) -> str:
    return (
        f"evaluation.pursuit={list(ks)} is for dictionaries that write what they read and are not trained as pursuits, "
        f"such as sae and crosscoder; none of {', '.join(names)} is"
    )
