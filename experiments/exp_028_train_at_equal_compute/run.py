"""exp_028: dictionaries that were all trained with the same number of floating-point operations.

    python experiments/exp_028_train_at_equal_compute/run.py
    python experiments/exp_028_train_at_equal_compute/run.py +scale=tiny flops=4e12   # the model that ships

What costs less a token is trained on more of them. Dictionaries of one kind are trained together, on a stream of their own, each
counted as if it were alone. Parameter decompositions of the same compute: exp_023 with the same `flops`.
"""

from pathlib import Path

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment


@experiment("exp_028_train_at_equal_compute", trains=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.report import compute, tables

    target = build.target(cfg)
    members = build.trainable(cfg)
    spent = build.equal_compute(cfg, target, members)
    table = compute.table({name: (each.flops, each.n_tokens) for name, each in spent.items()})
    write_text(out / "compute.md", tables.markdown(table))
    print(tables.terminal(table))

    dictionaries = {}
    for n_tokens in sorted({each.n_tokens for each in spent.values()}):
        alike = {name: member for name, member in members.items() if spent[name].n_tokens == n_tokens}
        dictionaries |= build.trained(build.with_tokens(cfg, n_tokens), target, out / f"tokens_{n_tokens}", alike)

    replacements = {name: [each] for name, each in (dictionaries | build.baselines(cfg, target)).items()}
    seeds = {name: member.seed for name, member in members.items()}
    rows = build.measured(cfg, target, replacements, out.name, seeds)
    return build.reported(rows, out)


if __name__ == "__main__":
    main()
