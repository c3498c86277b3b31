"""Which decompositions a run has, and whether its settings fit each other and the target; no weight is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nndecomp.activations.buffer import check_capacity
from nndecomp.activations.harvest import check_positions
from nndecomp.activations.store import open_store
from nndecomp.config.compose import load
from nndecomp.config.schema import (
    Activation,
    ActivationsKind,
    Architecture,
    Decoder,
    DecompositionConfig,
    RunConfig,
    TargetConfig,
    require,
)
from nndecomp.decompositions.wiring import wire
from nndecomp.targets.base import Shape
from nndecomp.targets.load import target_shape
from nndecomp.targets.pair import paired_shape
from nndecomp.training.log import check_log
from nndecomp.types import Site

if TYPE_CHECKING:
    pass


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


def decompositions(cfg: RunConfig) -> dict[str, DecompositionConfig]:
    """Every decomposition of a run by name: the one of `decomposition`, or the grid of `compare`."""
    if cfg.compare is None:
        return {cfg.decomposition.architecture.value: cfg.decomposition}
    return {
        f"{architecture.value}_k{k}": of_architecture(cfg.decomposition, architecture, k)
        for architecture in cfg.compare.architectures
        for k in cfg.compare.k
    }


def of_architecture(cfg: DecompositionConfig, architecture: Architecture, k: int) -> DecompositionConfig:
    """The same settings with another wiring, where it takes the place of the MLPs, as its file in conf/ has it."""
    match architecture:
        case Architecture.per_layer_sae:
            reads, changes = ["mlp_out"], {"skip": False, "centre_input": True, "decoder": Decoder.unit_norm}
        case Architecture.per_layer_transcoder | Architecture.cross_layer_transcoder:
            reads, changes = ["mlp_in"], {}
        case Architecture.neurons:
            # Their number is the target's d_mlp; n_features only must not refuse k.
            reads, changes = ["mlp_hidden"], {"activation": Activation.topk, "n_features": max(cfg.n_features, k)}
        case other:
            require(
                False,
                f"compare.architectures has {other.value}, which does not take the place of all MLPs; "
                "write per_layer_sae, per_layer_transcoder, cross_layer_transcoder or neurons",
            )
            raise AssertionError
    return replace(cfg, architecture=architecture, reads=reads, writes=["mlp_out"], k=k, **changes)


def check(cfg: RunConfig, trains: bool = False) -> None:
    """Refuses (SettingError) what sizes alone can refuse: no weight is loaded, nothing is written.

    trains: the experiment trains decompositions.
    """
    device(cfg)
    check_log(cfg.log)
    if cfg.pretrain is not None:
        return  # the target is made by the run
    shape = shape_of_target(cfg)
    check_length(cfg, shape)
    check_positions(cfg.activations, cfg.tokens.seq_len)
    if trains:
        trainable(cfg)
    if cfg.runs:
        check_runs(cfg)
    sites = decomposed_sites(cfg, shape)
    if cfg.activations.store is not None:
        open_store(Path(cfg.activations.store), sites)


def shape_of_target(cfg: RunConfig) -> Shape:
    """Sizes of the model under study, or of both."""
    return target_shape(cfg.target) if cfg.paired_target is None else paired_shape(cfg.target, cfg.paired_target)


def decomposed_sites(cfg: RunConfig, shape: Shape) -> list[Site]:
    """Every site that a decomposition of the run reads or writes; SettingError if the target has no such site."""
    groups = [group for each in decompositions(cfg).values() for group in wire(each, shape).groups]
    return sorted({site for group in groups for site in (*group.reads, *group.writes)})


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


def trainable(cfg: RunConfig) -> dict[str, DecompositionConfig]:
    """The decompositions to train; SettingError if there is none, or the buffer cannot hold their rows."""
    every = decompositions(cfg)
    configs = {name: each for name, each in every.items() if each.architecture is not Architecture.neurons}
    require(bool(configs), "decomposition.architecture=neurons is a baseline that is never trained; write another one")
    if cfg.activations.kind is ActivationsKind.live:
        rows_at_most = cfg.activations.batch_seqs * cfg.tokens.seq_len
        check_capacity(cfg.activations.buffer_tokens, cfg.training.batch_tokens, rows_at_most)
    return configs
