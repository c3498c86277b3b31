"""exp_009: why does cross-entropy jump when the last components of a parameter decomposition are dropped?

python experiments/exp_009_diagnose_tail/run.py 'runs=[output/exp_004_train_spd_gpt2/<time>]'
python experiments/exp_009_diagnose_tail/run.py +scale=tiny    # the model that ships: trains a decomposition first
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_009_diagnose_tail")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    decomposition = build.one_decomposition(cfg, target, out)
    return build.reported_tail(cfg, build.diagnosed(cfg, target, decomposition), out)


if __name__ == "__main__":
    main()
