"""exp_022: are the same features found again, with another seed and in a wider dictionary?

python experiments/exp_022_stability/run.py
python experiments/exp_022_stability/run.py +scale=smoke   # seconds

All dictionaries are trained on the same rows in the same order: only their first weights differ, and their width.
"""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.config.schema import RunConfig, require
from nndecomp.run import experiment

if TYPE_CHECKING:
    from nndecomp.build import Member, Pair

TIMES_WIDER = 2


@experiment("exp_022_stability", trains=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.evaluation.rows import write_rows
    from nndecomp.report import stability, style, tables

    members = build.trainable(cfg)
    wide = {f"{name}_wide": wider(each) for name, each in members.items()}
    sought = pairs(members)
    target = build.target(cfg)
    trained = build.trained(cfg, target, out, members | wide)
    found = build.found_again(cfg, target, trained, build.untrained(cfg, target, members), sought)

    seeds = {name: member.seed for name, member in members.items()}
    write_rows(build.found_again_rows(cfg, target, trained, found, out.name, seeds), out / "rows.parquet")
    table = stability.summary(found)
    write_text(out / "table.md", tables.markdown(table))
    write_text(out / "table.csv", tables.comma_separated(table))
    architectures = {method(name): member.config.architecture.value for name, member in members.items()}
    style.save(stability.figure(found, architectures), out / "figures", "stability")
    print(tables.terminal(table))
    return stability.scores(found)


def wider(member: "Member") -> "Member":
    return replace(member, config=replace(member.config, n_features=TIMES_WIDER * member.config.n_features))


def method(name: str) -> str:
    """`clt_k16_seed0` -> `clt_k16`."""
    return name.rpartition("_seed")[0]


def pairs(members: dict[str, "Member"]) -> list["Pair"]:
    """Of each method: every two seeds, then each seed in a wider dictionary of the next."""
    from nndecomp.build import Pair

    by_method: dict[str, list[str]] = {}
    for name in members:
        by_method.setdefault(method(name), []).append(name)
    for names in by_method.values():
        require(
            len(names) > 1 and "_seed" in names[0],
            "compare.seeds must name at least two, since features are looked for in another seed; "
            "write compare.seeds=[0,1]",
        )
    found = [Pair(each, a, b, wider=False) for each, names in by_method.items() for a, b in combinations(names, 2)]
    for each, names in by_method.items():
        found += [Pair(each, a, f"{b}_wide", wider=True) for a, b in zip(names, names[1:] + names[:1], strict=True)]
    return found


if __name__ == "__main__":
    main()
