"""exp_020: how long is a training step, of this library and of others?

python experiments/exp_020_throughput/run.py threads=2                       # the environment of README.md has the others
python experiments/exp_020_throughput/run.py threads=2 'throughput.at=[c3,c4]'
python experiments/exp_020_throughput/run.py +scale=smoke                    # seconds
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.config.schema import Question, RunConfig
from nndecomp.run import experiment

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@experiment("exp_020_throughput", patches=False)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.report import growth, speeds, throughput

    assert cfg.throughput is not None
    match cfg.throughput.question:
        case Question.step | Question.clt:
            (out / "traces").mkdir(exist_ok=True)
            times, floors = build.timed_steps(cfg, out)
            said = "\n".join(throughput.notes(times, floors))
            write(out, throughput.table(times, floors), throughput.raw(times, floors), said)
            draw(out, throughput.figure(times, floors))
            return throughput.scores(times)
        case Question.growth:
            axes, times, floors = build.grown_steps(cfg, out)
            write(out, growth.table(axes, times, floors), throughput.raw(times, floors), throughput.method(times))
            draw(out, growth.figure(axes, times, floors))
            return growth.scores(axes, times, floors)
        case Question.quality:
            found = build.agreements(cfg)
            write(out, throughput.agreed(found), throughput.curves(found), "")
            return throughput.agreement_scores(found)
        case Question.start:
            found = build.start_times(cfg, out)
            write(out, speeds.seconds(found), speeds.raw(found), "")
            return speeds.seconds_scores(found)
        case Question.harvest:
            found = build.speeds(cfg, out)
            share = build.waiting(cfg, out / "training")
            said = f"Training lost {share:.1%} of its time to waiting for rows."
            write(out, speeds.table(found), speeds.raw(found), said)
            return speeds.scores(found) | {"waiting_share": share}


def write(out: Path, table: "DataFrame", raw: "DataFrame", notes: str) -> None:
    """What a reader sees, and every number it is made of."""
    from nndecomp.checkpoint import write_text
    from nndecomp.report import tables

    write_text(out / "table.md", tables.markdown(table) + f"\n{notes}\n")
    write_text(out / "table.csv", tables.comma_separated(table))
    write_text(out / "raw.csv", tables.comma_separated(raw))
    print(f"{tables.terminal(table)}\n\n{notes}")


def draw(out: Path, figure: "Figure") -> None:
    from nndecomp.report import style

    style.save(figure, out / "figures", "throughput")


if __name__ == "__main__":
    main()
