"""exp_005: what does each active component buy, with the MLP of layer 8 of GPT-2 replaced? Evaluates finished runs; trains nothing.

    python experiments/exp_005_pareto_gpt2/run.py 'runs=[<directories of finished runs>]'

Dictionaries are measured with their own selection and with the k largest features for each k of evaluation.topk, parameter
decompositions behind their thresholds and with the k largest components of each map, and of all maps together.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment


@experiment("exp_005_pareto_gpt2")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    require(bool(cfg.runs), "runs=[] names no finished run; write 'runs=[output/<experiment>/<time>]'")

    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import front_figures, fronts, style

    target = build.target(cfg)
    found = build.collected(cfg, target)
    replacements = found.replacements | {name: [each] for name, each in build.baselines(cfg, target).items()}
    rows = build.measured(cfg, target, replacements, out.name, found.seeds)
    for inputs in fronts.measured_inputs(rows):
        style.save(front_figures.figure_of_axes(rows, inputs), out / "figures", f"fronts_{inputs}")
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
