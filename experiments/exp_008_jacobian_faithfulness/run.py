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
    from nndecomp.decompositions.base import Replacement
    from nndecomp.targets.base import Target


@experiment("exp_008_jacobian_faithfulness", trains=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without

    target = build.target(cfg)
    build.check_faithful(cfg, target)
    replacements = build.finished(cfg, target) if cfg.runs else trained(cfg, target, out)
    seeds = {name: member.seed for name, member in build.members(cfg).items()}
    rows = build.faithful(cfg, target, replacements | build.baselines(cfg, target), out.name, seeds)
    return build.reported_faithfulness(rows, out)


def trained(cfg: RunConfig, target: "Target", out: Path) -> "dict[str, Replacement]":
    """Dictionaries, and the parameter decomposition of `spd` in a directory of its own, behind each of its gates."""
    from nndecomp import build

    found: dict[str, Replacement] = {**build.trained(cfg, target, out)}
    if cfg.spd is None:
        return found
    spd = build.trained_parameters(cfg, target, out / "spd")
    return {**found, **build.gated(cfg.evaluation, target, {"spd": spd})}


if __name__ == "__main__":
    main()
