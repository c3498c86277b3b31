"""exp_005: what does each active component buy, with the MLP of layer 8 of GPT-2 replaced? Evaluates finished runs; trains nothing.

    python experiments/exp_005_pareto_gpt2/run.py 'runs=[<directories of finished runs>]'

Dictionaries are measured with their own selection and with the k largest features for each k of evaluation.topk, parameter
decompositions behind their thresholds and with the k largest components of each map, and of all maps together.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_005_pareto_gpt2", needs_runs=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    runs = build.collected(cfg, target)
    rows = build.measured_runs(cfg, target, runs, out.name)
    return build.reported_runs(rows, runs, out)


if __name__ == "__main__":
    main()
