"""exp_012: what is each trained decomposition made of, how much of it is used, and what does it cost the model?

python experiments/exp_012_model_table/run.py 'runs=[output/exp_010_train_transcoder_pile_sweep/<time>]'

A table over finished runs, parameter decompositions among them; trains and measures nothing.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_012_model_table", needs_runs=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    return build.reported_table(build.model_table(cfg, build.target(cfg)), out)


if __name__ == "__main__":
    main()
