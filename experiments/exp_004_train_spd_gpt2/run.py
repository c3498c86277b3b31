"""exp_004: how few rank-one components of its weights does one MLP of GPT-2 need on a token?

python experiments/exp_004_train_spd_gpt2/run.py
python experiments/exp_004_train_spd_gpt2/run.py +scale=tiny   # the model that ships: minutes on a CPU
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_004_train_spd_gpt2")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    trained = build.parameters_at_flops(cfg, target, out)
    rows = build.measured_parameters(cfg, target, trained, out.name)
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
