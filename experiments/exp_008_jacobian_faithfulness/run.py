"""exp_008: do replacements of MLPs compute as the target does, or only return what it returns?

    python experiments/exp_008_jacobian_faithfulness/run.py +scale=tiny                                 # trains, then compares
    python experiments/exp_008_jacobian_faithfulness/run.py +scale=tiny 'runs=[output/<experiment>/<time>]'  # finished runs

Compared are derivatives: of single MLPs, and of the whole model's logits with all MLPs replaced.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment

if TYPE_CHECKING:
    from nndecomp.decompositions.base import Decomposition
    from nndecomp.targets.base import Target


@experiment("exp_008_jacobian_faithfulness", trains=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    build.check_faithful(cfg, target)
    decompositions = finished(cfg, target) if cfg.runs else build.trained(cfg, target, out)
    seeds = {name: member.seed for name, member in build.members(cfg).items()}
    rows = build.faithful(cfg, target, {**decompositions, **build.baselines(cfg, target)}, out.name, seeds)
    return build.reported_faithfulness(rows, out)


def finished(cfg: RunConfig, target: "Target") -> "dict[str, Decomposition]":
    """Every dictionary of the finished runs, by its name, and that of its run where two have the same name."""
    from nndecomp import build
    from nndecomp.decompositions.groups import SparseDictionary

    directories = [each for run in build.check_runs(cfg) for each in sorted((run / "decompositions").iterdir())]
    names = [each.name for each in directories]
    unique = [
        name if names.count(name) == 1 else f"{each.parents[1].name}/{name}"
        for name, each in zip(names, directories, strict=True)
    ]
    return {
        name: SparseDictionary.from_pretrained(each, target.device)
        for name, each in zip(unique, directories, strict=True)
    }


if __name__ == "__main__":
    main()
