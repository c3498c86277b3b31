"""exp_002: how well does one transcoder replace the last MLP of a model of children's stories?

python experiments/exp_002_train_transcoder_ss/run.py
python experiments/exp_002_train_transcoder_ss/run.py +scale=tiny   # the model that ships: minutes on a CPU
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_002_train_transcoder_ss", trains=True, shares=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, out)
    rows = build.measured(cfg, target, {name: [each] for name, each in dictionaries.items()}, out.name)
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
