"""Finished runs -> what stands in one comparison: dictionaries of all its layers, and gated parameter decompositions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nndecomp.build.parameters import NAME, gated, left_out, saved_parameters
from nndecomp.build.settings import check_runs
from nndecomp.config.compose import load
from nndecomp.config.schema import RunConfig, require
from nndecomp.decompositions.base import Replacement
from nndecomp.decompositions.conversion import is_own_topk, to_topk, topk_obstacle
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.stack import stack
from nndecomp.targets.base import Target
from nndecomp.types import Point, Site

ONE_LAYER = {"transcoder": "per_layer_transcoder", "sae": "per_layer_sae"}


@dataclass(frozen=True)
class Collected:
    """By a name that says what tells them apart, and the seed that each was trained with."""

    replacements: dict[str, list[Replacement]]
    seeds: dict[str, int]
    notices: list[str]  # on each that has no point at some sparsity that evaluation asks for: a sentence that names it


def collected(cfg: RunConfig, target: Target, again: bool = True) -> Collected:
    """Of the finished runs of `runs`, everything that takes the place of the MLPs of decomposition.layers (null: of all).

    Transcoders (or SAEs) of single layers that are otherwise alike, seed included, become one dictionary. `again`: for each k of
    evaluation.topk a dictionary stands there once more, with the k largest features of each token and group in place of its own
    selection, where that can be.
    """
    layers = cfg.decomposition.layers or list(range(target.shape.of(None).n_layers))
    parts: dict[str, list[SparseDictionary]] = {}
    found: dict[str, list[Replacement]] = {}
    seeds: dict[str, int] = {}
    notices: list[str] = []
    for run in check_runs(cfg):
        trained = load(run / "config.yaml")
        for directory in sorted(each.parent for each in run.rglob("decompositions/*/config.json")):
            if directory.name == NAME:
                components = _parameters(cfg, target, directory.parents[1], layers)
                size = max(each.costs[0].n_components for each in components.values())
                assert trained.spd is not None, f"{run} trained a parameter decomposition without settings for it"
                own, of_seed = f"{NAME}_n{size}_m{trained.spd.minimality:g}", f"seed{trained.seed}"
                decomposition = next(iter(components.values())).decomposition
                notices += left_out(cfg.evaluation, f"{own}_{of_seed}", decomposition)
                for gate, each in components.items():
                    name = f"{own}_{gate}_{of_seed}"
                    require(
                        name not in found,
                        f"runs hold {name} twice ({run} is one of them); evaluate runs that differ in other settings apart",
                    )
                    found[name], seeds[name] = [each], trained.seed
                continue
            dictionary = SparseDictionary.from_pretrained(directory, target.device)
            seed = _seed(directory.name, trained.seed)
            name = _name(dictionary, seed)
            one_layer = dictionary.spec.architecture in ONE_LAYER
            require(
                name not in parts or one_layer,
                f"runs hold {name} twice ({run} is one of them); evaluate runs that differ in other settings apart",
            )
            parts.setdefault(name, []).append(dictionary)
            seeds[name] = seed
    whole = {name: together(name, each, layers) for name, each in parts.items()}
    for name, each in whole.items():
        found[name] = [each]
        for k in cfg.evaluation.topk if again else ():
            if topk_obstacle(each, k) is None and not is_own_topk(each, k):
                found[f"{name}_topk{k}"], seeds[f"{name}_topk{k}"] = [to_topk(each, k)], seeds[name]
        notices += without_points(name, each, cfg.evaluation.topk if again else ())
    return Collected(found, seeds, notices)


def without_points(name: str, dictionary: SparseDictionary, ks: Sequence[int]) -> list[str]:
    """A sentence for each reason why some k have no point."""
    reasons = {k: obstacle for k in ks if (obstacle := topk_obstacle(dictionary, k)) is not None}
    return [
        f"{name} has no points at k = {', '.join(str(k) for k in ks if reasons.get(k) == reason)}, since {reason}"
        for reason in dict.fromkeys(reasons.values())
    ]


def _parameters(cfg: RunConfig, target: Target, run: Path, layers: Sequence[int]) -> Mapping[str, GatedParameters]:
    """Behind each gate; only maps of the compared MLPs take part, others stay as they are."""
    writes = [Site(layer, Point.mlp_out) for layer in layers]
    decomposition = saved_parameters(run, target)
    places = {target.place_of_map(name)[1] for name in decomposition.maps}
    missing = [str(site) for site in writes if site not in places]
    require(not missing, f"runs: {run} decomposes no map that writes {', '.join(missing)}; add a run that does")
    made = gated(cfg.evaluation, target, {NAME: decomposition}, writes)
    return {name.removeprefix(f"{NAME}_"): each for name, each in made.items()}


def _seed(name: str, of_run: int) -> int:
    """Members of a comparison say their seed in their name; alone, a decomposition has the run's."""
    suffix = name.rpartition("_seed")[2]
    return int(suffix) if "_seed" in name and suffix.isdigit() else of_run


def _name(dictionary: SparseDictionary, seed: int) -> str:
    spec = dictionary.spec
    architecture = ONE_LAYER.get(spec.architecture, spec.architecture)
    skip = "skip_" if spec.skip else ""
    k = "".join(f"_k{k}" for k in sorted(set(spec.activation.k)))
    return f"{skip}{architecture}_{spec.activation.kind.value}{k}_n{spec.groups[0].n_features}_seed{seed}"


def together(name: str, parts: list[SparseDictionary], layers: Sequence[int]) -> SparseDictionary:
    """One dictionary of all compared layers."""
    own = {site.layer for part in parts for site in part.writes}
    missing = sorted(set(layers) - own)
    require(not missing, f"runs: {name} has no layer {', '.join(map(str, missing))} of those compared; add those runs")
    further = sorted(own - set(layers))
    require(
        not further,
        f"runs: {name} has layer {', '.join(map(str, further))} too, but decomposition.layers={list(layers)} are compared",
    )
    one = parts[0].spec.architecture
    return stack(parts, ONE_LAYER[one]) if one in ONE_LAYER and len(parts) > 1 else parts[0]
