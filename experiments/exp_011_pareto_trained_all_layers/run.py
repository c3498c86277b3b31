"""exp_011: with all MLPs replaced, what does each active feature buy? Evaluates finished runs; trains nothing.

    python experiments/exp_011_pareto_trained_all_layers/run.py 'runs=[output/exp_010_train_transcoder_pile_sweep/<time>]'

Transcoders (or SAEs) of single layers that are otherwise alike, seed included, become one set for all layers. Runs that
hold a decomposition of all layers are taken as they are; parameter decompositions behind every gate of `evaluation`.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment


@experiment("exp_011_pareto_trained_all_layers")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    require(bool(cfg.runs), "runs=[] names no finished run; write 'runs=[output/<experiment>/<time>]'")

    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import figures, front_figures, fronts, style

    target = build.target(cfg)
    found = build.collected(cfg, target, again=False)
    replacements = found.replacements | {name: [each] for name, each in build.baselines(cfg, target).items()}

    rows = build.measured(cfg, target, replacements, out.name, found.seeds)
    style.save(figures.pareto_axes(rows), out / "figures", "pareto_axes")
    style.save(figures.fvu_against_l0(rows), out / "figures", "fvu_against_l0")
    for inputs in fronts.measured_inputs(rows):
        style.save(front_figures.figure_of_axes(rows, inputs), out / "figures", f"fronts_{inputs}")
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
