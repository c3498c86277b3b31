"""exp_026: does a parameter decomposition find what a toy is made of?

python experiments/exp_026_spd_toys/run.py                # toy=tms_5_2, or another of conf/toy
python experiments/exp_026_spd_toys/run.py +scale=smoke   # seconds
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_026_spd_toys", patches=False)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.evaluation.toy_recovery import scores
    from nndecomp.report import style, tables, toys

    toy = build.trained_toy(cfg, out / "toy")
    decomposition = build.decomposed_toy(cfg, toy, out)
    found = build.recovered_toy(cfg, toy, decomposition)

    table = toys.summary(found)
    write_text(out / "table.md", tables.markdown(table))
    write_text(out / "table.csv", tables.comma_separated(table))
    style.save(toys.figure(found), out / "figures", "recovery")
    print(tables.terminal(table))
    return scores(found)


if __name__ == "__main__":
    main()
