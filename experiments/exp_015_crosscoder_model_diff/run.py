"""exp_015: which features do two models share, and which has only one of them?

python experiments/exp_015_crosscoder_model_diff/run.py
python experiments/exp_015_crosscoder_model_diff/run.py +scale=tiny   # tiny and tiny_docs: minutes on a CPU
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_015_crosscoder_model_diff", trains=True, shares=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, out)
    rows = build.measured(cfg, target, {name: [each] for name, each in dictionaries.items()}, out.name)
    found = build.compared(cfg, target, dictionaries)
    return build.reported(rows, out) | build.reported_difference(found, target, out)


if __name__ == "__main__":
    main()
