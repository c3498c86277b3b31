"""exp_011: with all MLPs replaced, what does each active feature buy? Evaluates finished runs; trains nothing.

    python experiments/exp_011_pareto_trained_all_layers/run.py 'runs=[output/exp_010_train_transcoder_pile_sweep/<time>]'

Transcoders (or SAEs) of single layers that are otherwise alike, seed included, become one set for all layers. Runs that
hold a decomposition of all layers are taken as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.config.compose import load
from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment

if TYPE_CHECKING:
    from nndecomp.decompositions.groups import SparseDictionary

ONE_LAYER = {"transcoder": "per_layer_transcoder", "sae": "per_layer_sae"}


@experiment("exp_011_pareto_trained_all_layers")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    require(bool(cfg.runs), "runs=[] names no finished run; write 'runs=[output/<experiment>/<time>]'")

    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import figures, style

    target = build.target(cfg)
    parts, seeds = collected(build.check_runs(cfg))
    whole = {name: together(name, each, target.shape.of(None).n_layers) for name, each in parts.items()}
    replacements = {name: [each.to(target.device)] for name, each in (whole | build.baselines(cfg, target)).items()}

    rows = build.measured(cfg, target, replacements, out.name, seeds)
    style.save(figures.pareto_axes(rows), out / "figures", "pareto_axes")
    style.save(figures.fvu_against_l0(rows), out / "figures", "fvu_against_l0")
    return build.reported(rows, out)


def collected(runs: list[Path]) -> tuple[dict[str, list["SparseDictionary"]], dict[str, int]]:
    """Dictionaries that belong together, by a name that says what they have in common, and the seed of each name."""
    from nndecomp.decompositions.groups import SparseDictionary

    parts: dict[str, list[SparseDictionary]] = {}
    seeds = {}
    for run in runs:
        seed = load(run / "config.yaml").seed
        for directory in sorted((run / "decompositions").iterdir()):
            dictionary = SparseDictionary.from_pretrained(directory)
            spec = dictionary.spec
            architecture = ONE_LAYER.get(spec.architecture, spec.architecture)
            k = "".join(f"_k{k}" for k in sorted(set(spec.activation.k)))
            name = f"{architecture}_{spec.activation.kind.value}{k}_n{spec.groups[0].n_features}_seed{seed}"
            require(
                name not in parts or spec.architecture in ONE_LAYER,
                f"runs hold {name} twice ({run} is one of them); evaluate runs that differ in other settings apart",
            )
            parts.setdefault(name, []).append(dictionary)
            seeds[name] = seed
    return parts, seeds


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
