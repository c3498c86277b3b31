"""exp_010: what does each layer's transcoder cost at k = 8, 16, 32, 64? One job a layer and k; exp_011 combines them.

python experiments/exp_010_train_transcoder_pile_sweep/run.py hydra/launcher=slurm
python experiments/exp_010_train_transcoder_pile_sweep/run.py +sweep=seed decomposition.k=8,64
python experiments/exp_010_train_transcoder_pile_sweep/run.py +scale=tiny   # the model that ships
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_010_train_transcoder_pile_sweep", trains=True, shares=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, out)
    rows = build.measured(cfg, target, {name: [each] for name, each in dictionaries.items()}, out.name)
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
