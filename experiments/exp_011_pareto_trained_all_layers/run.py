"""exp_011: with all MLPs replaced, what does each active feature buy? Evaluates finished runs; trains nothing.

    python experiments/exp_011_pareto_trained_all_layers/run.py 'runs=[output/exp_010_train_transcoder_pile_sweep/<time>]'

Transcoders (or SAEs) of single layers that are otherwise alike, seed included, become one set for all layers. Runs that
hold a decomposition of all layers are taken as they are; parameter decompositions behind every gate of `evaluation`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.config.compose import load
from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment

if TYPE_CHECKING:
    from nndecomp.decompositions.base import Replacement
    from nndecomp.decompositions.groups import SparseDictionary
    from nndecomp.targets.base import Target

ONE_LAYER = {"transcoder": "per_layer_transcoder", "sae": "per_layer_sae"}


@experiment("exp_011_pareto_trained_all_layers")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    require(bool(cfg.runs), "runs=[] names no finished run; write 'runs=[output/<experiment>/<time>]'")

    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import figures, front_figures, fronts, style

    target = build.target(cfg)
    runs = build.check_runs(cfg)
    parts, seeds = collected(runs)
    parameters, own_seeds = collected_parameters(cfg, target, runs)
    whole = {name: together(name, each, target.shape.of(None).n_layers) for name, each in parts.items()}
    found = [*(whole | parameters).items(), *build.baselines(cfg, target).items()]
    replacements = {name: [each.to(target.device)] for name, each in found}

    rows = build.measured(cfg, target, replacements, out.name, seeds | own_seeds)
    style.save(figures.pareto_axes(rows), out / "figures", "pareto_axes")
    style.save(figures.fvu_against_l0(rows), out / "figures", "fvu_against_l0")
    for inputs in fronts.measured_inputs(rows):
        style.save(front_figures.figure_of_axes(rows, inputs), out / "figures", f"fronts_{inputs}")
    return build.reported(rows, out)


def saved(run: Path) -> list[Path]:
    return sorted((run / "decompositions").iterdir())


def collected(runs: list[Path]) -> tuple[dict[str, list["SparseDictionary"]], dict[str, int]]:
    """Dictionaries that belong together, by a name that says what they have in common, and the seed of each name."""
    from nndecomp.build.parameters import NAME
    from nndecomp.decompositions.groups import SparseDictionary

    parts: dict[str, list[SparseDictionary]] = {}
    seeds = {}
    for directory in (each for run in runs for each in saved(run) if each.name != NAME):
        run = directory.parents[1]
        seed = seed_of(run, directory.name)
        dictionary = SparseDictionary.from_pretrained(directory)
        spec = dictionary.spec
        architecture = ("skip_" if spec.skip else "") + ONE_LAYER.get(spec.architecture, spec.architecture)
        k = "".join(f"_k{k}" for k in sorted(set(spec.activation.k)))
        name = f"{architecture}_{spec.activation.kind.value}{k}_n{spec.groups[0].n_features}_seed{seed}"
        require(
            name not in parts or spec.architecture in ONE_LAYER,
            f"runs hold {name} twice ({run} is one of them); evaluate runs that differ in other settings apart",
        )
        parts.setdefault(name, []).append(dictionary)
        seeds[name] = seed
    return parts, seeds


def seed_of(run: Path, name: str) -> int:
    """Of a decomposition's first weights; a run that compares several may have one for each."""
    from nndecomp import build

    cfg = load(run / "config.yaml")
    member = build.members(cfg).get(name)
    return cfg.seed if member is None else member.seed


def collected_parameters(
    cfg: RunConfig, target: "Target", runs: list[Path]
) -> tuple[dict[str, "Replacement"], dict[str, int]]:
    """Parameter decompositions of all MLPs behind every gate, and the seed of each."""
    from nndecomp import build
    from nndecomp.build.parameters import NAME
    from nndecomp.types import Point, Site

    mlps = {Site(layer, Point.mlp_out) for layer in range(target.shape.of(None).n_layers)}
    found: dict[str, Replacement] = {}
    seeds, names = {}, set[str]()
    for run in (run for run in runs if run / "decompositions" / NAME in saved(run)):
        decomposition = build.saved_parameters(run, target)
        seed = load(run / "config.yaml").seed
        name = f"{NAME}_C{max(decomposition.sizes.values())}_seed{seed}"
        require(name not in names, f"runs hold {name} twice ({run} is one of them)")
        names.add(name)
        of_gates = build.gated(cfg.evaluation, target, {name: decomposition})
        for gate, each in of_gates.items():
            require(
                set(each.writes) == mlps,
                f"runs: {run} decomposes {', '.join(decomposition.maps)}, but what is compared takes the place of all MLPs",
            )
            found[gate], seeds[gate] = each, seed
    return found, seeds


def together(name: str, parts: list["SparseDictionary"], n_layers: int) -> "SparseDictionary":
    """One dictionary of all layers."""
    from nndecomp.decompositions.stack import stack

    layers = {site.layer for part in parts for site in part.writes}
    missing = sorted(set(range(n_layers)) - layers)
    require(not missing, f"runs: {name} has no layer {', '.join(map(str, missing))} of {n_layers}; add those runs")
    one = parts[0].spec.architecture
    return stack(parts, ONE_LAYER[one]) if one in ONE_LAYER else parts[0]


if __name__ == "__main__":
    main()
