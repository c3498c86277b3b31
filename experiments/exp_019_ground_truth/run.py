"""exp_019: how much of what is known does each dictionary find?

python experiments/exp_019_ground_truth/run.py
python experiments/exp_019_ground_truth/run.py +scale=smoke   # seconds
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment


@experiment("exp_019_ground_truth", trains=True, patches=False)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.evaluation.rows import join, write_rows
    from nndecomp.report import recovery, style, tables

    known = cfg.ground_truth
    require(known is not None, "ground_truth=null names no world; write ground_truth.worlds=[separated]")
    assert known is not None
    found = []
    for name in known.worlds:
        for seed in known.seeds:
            each = build.world(cfg, name, seed)
            target = build.target(each)
            dictionaries = build.trained(each, target, out / "worlds" / f"{name}_seed{seed}")
            dictionaries |= build.pursuits(each, dictionaries)
            recovered = build.recovered(each, target, dictionaries, known.heldout_tokens)
            found.append(build.recovery_rows(each, target, dictionaries, recovered, name))
    rows = join(found)
    write_rows(rows, out / "rows.parquet")
    table = recovery.summary(rows)
    write_text(out / "table.md", tables.markdown(table))
    write_text(out / "table.csv", tables.comma_separated(recovery.over_seeds(rows)))
    style.save(recovery.figure(rows), out / "figures", "recovery")
    print(tables.terminal(table))
    whole = recovery.over_seeds(rows)
    return {f"{run}/{name}/{metric}": mean for run, name, metric, mean, *_ in whole.itertuples(index=False, name=None)}


if __name__ == "__main__":
    main()
