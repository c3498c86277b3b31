"""exp_011: with all MLPs replaced, what does each active feature buy? Evaluates finished runs; trains nothing.

    python experiments/exp_011_pareto_trained_all_layers/run.py 'runs=[output/exp_010_train_transcoder_pile_sweep/<time>]'

Transcoders (or SAEs) of single layers that are otherwise alike, seed included, become one set for all layers. Runs that
hold a decomposition of all layers are taken as they are; parameter decompositions behind every gate of `evaluation`.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_011_pareto_trained_all_layers", needs_runs=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import figures, style

    target = build.target(cfg)
    runs = build.collected(cfg, target, again=False)
    rows = build.measured_runs(cfg, target, runs, out.name)
    style.save(figures.pareto_axes(rows), out / "figures", "pareto_axes")
    style.save(figures.fvu_against_l0(rows), out / "figures", "fvu_against_l0")
    return build.reported_runs(rows, runs, out)


if __name__ == "__main__":
    main()
