"""exp_017: which replacement model predicts as the model does, at the same sparsity and at the same size?

    python experiments/exp_017_clt_replacement_model/run.py
    python experiments/exp_017_clt_replacement_model/run.py +scale=tiny   # the model that ships

Every method takes the place of all MLPs at once, each reading what arrives in the replaced model. Beside dictionaries with
the same number of features stand those with as many parameters as the cross-layer transcoder has.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment

if TYPE_CHECKING:
    from nndecomp.build import Member
    from nndecomp.report.replacement import Kind
    from nndecomp.targets.base import Shape

REFERENCE = "clt"  # whose parameters the others are given
FEATURES, PARAMETERS = "number of features", "number of parameters"
ACTIVE = {"active_per_module": "a layer", "active_per_reconstruction": "an MLP"}


@experiment("exp_017_clt_replacement_model", trains=True)
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
    from nndecomp import build  # late: loads torch, which --help does without
    from nndecomp.checkpoint import write_text
    from nndecomp.report import replacement, style, tables

    target = build.target(cfg)
    members = build.trainable(cfg)
    sized = same_size(members, target.shape)
    dictionaries = build.trained(cfg, target, out, members | sized)
    replacements = {name: [each] for name, each in (dictionaries | build.baselines(cfg, target)).items()}
    seeds = {name: member.seed for name, member in (members | sized).items()}

    rows = build.measured(cfg, target, replacements, out.name, seeds)
    kinds = kinds_of(build.members(cfg), sized, target.shape)
    middle = sorted(cfg.compare.k)[len(cfg.compare.k) // 2] if cfg.compare is not None else 0
    for axis in (*ACTIVE, "active_parameters"):
        style.save(replacement.figure(rows, kinds, axis), out / "figures", f"replacement_{axis}")
    for axis, of in ACTIVE.items():
        table = replacement.matched(rows, kinds, axis, middle)
        write_text(out / f"matched_{axis}.md", tables.markdown(table))
        print(f"At {middle} active features {of}, live:", tables.terminal(table), sep="\n")
    return build.reported(rows, out)


def same_size(members: dict[str, "Member"], shape: "Shape") -> dict[str, "Member"]:
    """What is not as large as the reference, with as many features as make it so."""
    from nndecomp.decompositions.sizes import n_features_for, n_parameters

    reference = next(each.config for name, each in members.items() if variant(name) == REFERENCE)
    budget = n_parameters(reference, shape)
    sizes = {name: n_features_for(each.config, shape, budget) for name, each in members.items()}
    return {
        f"{name}_same_size": replace(each, config=replace(each.config, n_features=sizes[name]))
        for name, each in members.items()
        if sizes[name] != each.config.n_features
    }


def variant(name: str) -> str:
    """`skip_transcoder_k16_seed0` -> `skip_transcoder`."""
    return name.rpartition("_k")[0]


def kinds_of(members: dict[str, "Member"], sized: dict[str, "Member"], shape: "Shape") -> dict[str, list["Kind"]]:
    """Of every measured decomposition: its method, its size, and what it has in common with those it stands beside."""
    from nndecomp.decompositions.sizes import n_parameters
    from nndecomp.report.replacement import Kind

    def kinds(name: str, member: "Member", *matchings: str) -> list[Kind]:
        size = None if member.config.architecture.is_baseline else n_parameters(member.config, shape)
        return [Kind(variant(name).replace("_", " "), matching, size) for matching in matchings]

    both = {name for name in members if f"{name}_same_size" not in sized}
    same = {n: kinds(n, each, FEATURES, *([PARAMETERS] if n in both else [])) for n, each in members.items()}
    return same | {name: kinds(name, each, PARAMETERS) for name, each in sized.items()}


if __name__ == "__main__":
    main()
