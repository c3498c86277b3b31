"""exp_027: train any preset of conf/decomposition on any target, alone or several side by side on one stream.

python experiments/exp_027_train_presets/run.py decomposition=gated
python experiments/exp_027_train_presets/run.py +trainers=dictionary_learning
python experiments/exp_027_train_presets/run.py +scale=tiny decomposition=gated   # the model that ships: a minute on a CPU
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_027_train_presets", trains=True, shares=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import presets, style

    target = build.target(cfg)
    dictionaries = build.trained(cfg, target, out)
    rows = build.measured(cfg, target, {name: [each] for name, each in dictionaries.items()}, out.name)
    style.save(presets.figure(rows), out / "figures", "presets")
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
