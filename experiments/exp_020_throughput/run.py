"""exp_020: how long is a training step, of this library and of others?

python experiments/exp_020_throughput/run.py threads=2                       # the environment of README.md has the others
python experiments/exp_020_throughput/run.py threads=2 'throughput.at=[c3,c4]'
python experiments/exp_020_throughput/run.py +scale=smoke                    # seconds
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_020_throughput", patches=False)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    return step(cfg, out)


def step(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.report import style, tables, throughput

    (out / "traces").mkdir(exist_ok=True)
    times, floors = build.timed_steps(cfg, out)
    table, notes = throughput.table(times, floors), "\n".join(throughput.notes(times, floors))
    write_text(out / "table.md", tables.markdown(table) + f"\n{notes}\n")
    write_text(out / "table.csv", tables.comma_separated(table))
    write_text(out / "steps.csv", tables.comma_separated(throughput.raw(times, floors)))
    style.save(throughput.figure(times, floors), out / "figures", "throughput")
    print(f"{tables.terminal(table)}\n\n{notes}")
    return throughput.scores(times, floors)


if __name__ == "__main__":
    main()
