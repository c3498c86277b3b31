"""exp_016: do features that can only be of one model find what only that model has, and how are they best chosen?

python experiments/exp_016_dedicated_feature_crosscoder/run.py
python experiments/exp_016_dedicated_feature_crosscoder/run.py +scale=tiny   # tiny and tiny_docs: minutes on a CPU
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_016_dedicated_feature_crosscoder", trains=True, shares=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    start = build.activity(cfg, target, build.untrained(cfg, target))
    dictionaries = build.trained(cfg, target, out)
    end = build.activity(cfg, target, dictionaries)
    rows = build.measured(cfg, target, {name: [each] for name, each in dictionaries.items()}, out.name)
    found = build.compared(cfg, target, dictionaries)
    scores = build.reported(rows, out) | build.reported_difference(found, target, out)
    return scores | build.reported_activity(start, end, out)


if __name__ == "__main__":
    main()
