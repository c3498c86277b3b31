"""exp_000: which way of taking the MLPs of a language model apart costs least, at how many active features?

python experiments/exp_000_quickstart/run.py                # under 4 minutes on two CPU cores
python experiments/exp_000_quickstart/run.py +scale=smoke   # seconds
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_000_quickstart", trains=True, shares=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, out)
    baselines = build.baselines(cfg, target)

    replacements = {name: [each] for name, each in (dictionaries | baselines).items()}
    rows = build.measured(cfg, target, replacements, out.name)
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
