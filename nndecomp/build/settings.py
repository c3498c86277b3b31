"""Whether settings fit each other and the target; no weight is loaded."""

from dataclasses import replace
from pathlib import Path

import torch

from nndecomp.activations.buffer import check_capacity
from nndecomp.activations.harvest import check_positions
from nndecomp.activations.sequences import check_sequences
from nndecomp.activations.store import open_store
from nndecomp.build.end_to_end import attends, check_batches, check_wiring, is_end_to_end, live_obstacle
from nndecomp.build.members import Member, decompositions, members
from nndecomp.build.parameter_checks import check_parameters
from nndecomp.build.presets import world
from nndecomp.build.pursuing import check_pursuit
from nndecomp.build.throughput_systems import check_systems
from nndecomp.build.toy_settings import toy_settings
from nndecomp.config.compose import load
from nndecomp.config.schema import (
    ActivationsKind,
    Inputs,
    RunConfig,
    TargetConfig,
    TargetKind,
    TokensKind,
    require,
)
from nndecomp.decompositions.wiring import wire
from nndecomp.targets.base import Shape
from nndecomp.targets.load import target_shape
from nndecomp.targets.pair import paired_shape
from nndecomp.training.log import check_log
from nndecomp.types import Site


def device(cfg: RunConfig) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU."""
    match cfg.device:
        case "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        case "mps":
            require(torch.backends.mps.is_available(), "device=mps is not on this machine; write device=auto")
        case name if name.startswith("cuda"):
            n_devices, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
            require(index < n_devices, f"device={name} is not among {n_devices} CUDA devices; write device=auto")
        case _:
            pass
    return torch.device(cfg.device)


def check(cfg: RunConfig, trains: bool = False, patches: bool = True, needs_runs: bool = False) -> None:
    """Refuses (SettingError) what sizes alone can refuse: no weight is loaded, nothing is written.

    trains: the experiment trains decompositions. patches: it puts them into the target, and compares them there. needs_runs: it
    looks at finished runs.
    """
    require(
        bool(cfg.runs) or not needs_runs,
        "runs=[] names no finished run; write 'runs=[output/<experiment>/<time>]'",
    )
    where = device(cfg)
    check_log(cfg.log)
    if cfg.throughput is not None:
        check_systems(cfg.throughput, where)
    if cfg.pretrain is not None:
        return  # the target is made by the run
    if cfg.toy is not None:
        toy_settings(cfg)
        return
    if cfg.ground_truth is not None:
        for name in cfg.ground_truth.worlds:
            check(replace(world(cfg, name, cfg.ground_truth.seeds[0]), ground_truth=None), trains, patches)
        return
    check_kinds(cfg)
    require(
        not patches or cfg.target.kind is not TargetKind.synthetic,
        "target.kind=synthetic computes nothing, so no decomposition can be put into it; measure recovery, as "
        "exp_019_ground_truth does, or write target=planted tokens=random",
    )
    shape = shape_of_target(cfg)
    check_length(cfg, shape)
    check_positions(cfg.activations, cfg.tokens.seq_len)
    if trains:
        for name, each in trainable(cfg).items():
            check_wiring(name, each.config, shape)
        if patches:
            check_comparable(cfg, shape)
            check_inputs(cfg, shape)
    check_parameters(cfg)
    if cfg.runs:
        check_runs(cfg)
    if not cfg.runs:
        check_pursuit(cfg, decompositions(cfg))
    sites = decomposed_sites(cfg, shape)
    if cfg.activations.store is not None:
        open_store(Path(cfg.activations.store), sites)


def check_kinds(cfg: RunConfig) -> None:
    """Whether target, tokens and activations can be of one run."""
    drawn, sizes = cfg.activations.kind is ActivationsKind.synthetic, cfg.target.kind is TargetKind.synthetic
    require(
        drawn == sizes,
        f"activations.kind={cfg.activations.kind.value} does not go with target.kind={cfg.target.kind.value}: rows "
        "that are drawn need sizes alone; write target=synthetic activations=synthetic",
    )
    require(
        (cfg.tokens.kind is TokensKind.random) == (cfg.target.kind is TargetKind.planted) or sizes,
        f"tokens.kind={cfg.tokens.kind.value} does not go with target.kind={cfg.target.kind.value}: tokens that are "
        "sets of keys are drawn evenly; write target=planted tokens=random",
    )


def shape_of_target(cfg: RunConfig) -> Shape:
    """Sizes of the model under study, or of both."""
    return target_shape(cfg.target) if cfg.paired_target is None else paired_shape(cfg.target, cfg.paired_target)


def decomposed_sites(cfg: RunConfig, shape: Shape) -> list[Site]:
    """Every site that a decomposition of the run reads or writes; SettingError if the target has no such site."""
    groups = [group for each in decompositions(cfg).values() for group in wire(each, shape).groups]
    return sorted({site for group in groups for site in (*group.reads, *group.writes)})


def check_comparable(cfg: RunConfig, shape: Shape) -> None:
    """What a model loses depends on which layers are replaced, so one table and figure are of the same layers."""
    first, *others = (
        (name, sorted({site.layer for group in wire(each, shape).groups for site in group.writes}))
        for name, each in decompositions(cfg).items()
    )
    for name, layers in others:
        require(
            layers == first[1],
            f"{name} writes layers={layers} and {first[0]} layers={first[1]}, but what one run compares takes the place "
            f"of the same layers; give {name} layers={first[1]}, or train it in a run of its own",
        )


def check_inputs(cfg: RunConfig, shape: Shape) -> None:
    """Where clean inputs are not asked for, every dictionary must answer to live ones."""
    if Inputs.clean in cfg.evaluation.inputs:
        return
    for name, each in trainable(cfg).items():
        obstacle = live_obstacle(each.config, shape)
        require(
            obstacle is None,
            f"evaluation.inputs=[live] measures nothing of {name}, since {obstacle}; write evaluation.inputs=[clean]",
        )


def check_length(cfg: RunConfig, shape: Shape) -> None:
    require(
        cfg.tokens.seq_len <= shape.n_ctx,
        f"tokens.seq_len={cfg.tokens.seq_len} is more than the {shape.n_ctx} tokens the target takes in",
    )


def check_runs(cfg: RunConfig) -> list[Path]:
    """The finished runs at or below `runs`, which all must be of the run's own target."""
    from nndecomp.report.collect import find_runs  # late: loads pandas

    runs = find_runs([Path(run) for run in cfg.runs])
    for run in runs:
        there = load(run / "config.yaml")
        for setting, theirs, ours in (
            ("target", there.target, cfg.target),
            ("paired_target", there.paired_target, cfg.paired_target),
        ):
            require(
                theirs == ours,
                f"runs: {run} is of {_named(setting, theirs)}, but this run has {_named(setting, ours)}",
            )
    return runs


def _named(setting: str, target: TargetConfig | None) -> str:
    if target is None:
        return f"no {setting}"
    return f"{setting}.path={target.path} (revision {target.revision}, {target.dtype.value})"


def trainable(cfg: RunConfig) -> dict[str, Member]:
    """The decompositions to train; SettingError if there is none, or their batches cannot be made."""
    every = members(cfg)
    found = {name: each for name, each in every.items() if not each.config.architecture.is_baseline}
    named = ", ".join(dict.fromkeys(each.config.architecture.value for each in every.values()))
    require(bool(found), f"decomposition.architecture={named} is a baseline that is never trained; write another one")
    if is_end_to_end(found):
        check_batches(cfg, "end_to_end")
    elif attends(found):
        check_batches(cfg, "architecture=lorsa")
        rows_at_most = cfg.activations.batch_seqs * cfg.tokens.seq_len
        check_sequences(cfg.activations.buffer_tokens, cfg.training.batch_tokens, rows_at_most, cfg.tokens.seq_len)
    elif cfg.activations.kind is ActivationsKind.live:
        rows_at_most = cfg.activations.batch_seqs * cfg.tokens.seq_len
        check_capacity(cfg.activations.buffer_tokens, cfg.training.batch_tokens, rows_at_most)
    return found
