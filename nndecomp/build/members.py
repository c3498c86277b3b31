"""Which decompositions a run has: the one of `decomposition`, or the grid of `compare`, or `presets`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nndecomp.build.presets import presets
from nndecomp.config.compose import changed
from nndecomp.config.molt_lorsa_checks import RANKS
from nndecomp.config.schema import (
    Activation,
    Architecture,
    CompareConfig,
    Decoder,
    DecompositionConfig,
    Ranking,
    RunConfig,
    require,
)


@dataclass(frozen=True)
class Member:
    """One decomposition of a run, and the seed of its first weights."""

    config: DecompositionConfig
    seed: int


def members(cfg: RunConfig) -> dict[str, Member]:
    """Every decomposition of a run by name: `<architecture or variant>_k<k>_seed<seed>`, of what the grid varies."""
    if cfg.presets:
        sizes = cfg.decomposition.n_features, cfg.decomposition.k
        return {name: Member(each, cfg.seed) for name, each in presets(cfg.presets, *sizes).items()}
    if cfg.compare is None:
        return {cfg.decomposition.architecture.value: Member(cfg.decomposition, cfg.seed)}
    seeds = {"": cfg.seed} if cfg.compare.seeds is None else {f"_seed{seed}": seed for seed in cfg.compare.seeds}
    found = {}
    for name, each in _grid(cfg.decomposition, cfg.compare).items():
        # What is never trained has no first weights.
        own = {"": cfg.seed} if each.architecture.is_baseline else seeds
        found |= {f"{name}{suffix}": Member(each, seed) for suffix, seed in own.items()}
    return found


def decompositions(cfg: RunConfig) -> dict[str, DecompositionConfig]:
    """The settings of every decomposition of a run by name."""
    return {name: member.config for name, member in members(cfg).items()}


def _grid(base: DecompositionConfig, compare: CompareConfig) -> dict[str, DecompositionConfig]:
    found = {
        f"{architecture.value}_k{k}": of_architecture(base, architecture, k)
        for architecture in compare.architectures
        for k in compare.k
    }
    for name, settings in compare.variants.items():
        found |= {f"{name}{suffix}": changed(base, each) for suffix, each in _over_k(settings, compare.k).items()}
    return found


def _over_k(settings: Mapping[str, Any], ks: list[int]) -> dict[str, Mapping[str, Any]]:
    return {"": settings} if "k" in settings else {f"_k{k}": {**settings, "k": k} for k in ks}


def of_architecture(cfg: DecompositionConfig, architecture: Architecture, k: int) -> DecompositionConfig:
    """The same settings with another wiring, where it takes the place of the MLPs, as its file in conf/ has it."""
    match architecture:
        case Architecture.per_layer_sae:
            reads, changes = ["mlp_out"], {"skip": False, "centre_input": True, "decoder": Decoder.unit_norm}
        case Architecture.per_layer_transcoder | Architecture.cross_layer_transcoder | Architecture.molt:
            reads, changes = ["mlp_in"], {}
        case Architecture.neurons | Architecture.principal_directions | Architecture.random_directions:
            return _baseline(cfg, architecture, k)
        case other:
            require(
                False,
                f"compare.architectures has {other.value}, which does not take the place of all MLPs; write per_layer_sae, "
                "per_layer_transcoder, cross_layer_transcoder, molt, neurons, principal_directions or random_directions",
            )
            raise AssertionError
    changes["ranking"] = Ranking.activation  # what is said of neurons is for them, who may stand beside others
    if architecture is not Architecture.molt:  # what is said of ranks is for molt, which may stand beside others
        changes["ranks"] = [list(pair) for pair in RANKS]
    return replace(cfg, architecture=architecture, reads=reads, writes=["mlp_out"], k=k, **changes)


def _baseline(cfg: DecompositionConfig, architecture: Architecture, k: int) -> DecompositionConfig:
    """In the place of the MLPs, and of all that is said of training nothing but the layers and the rows to start from."""
    neurons = architecture is Architecture.neurons
    return DecompositionConfig(
        architecture=architecture,
        reads=["mlp_hidden" if neurons else "mlp_out"],
        writes=["mlp_out"],
        layers=cfg.layers,
        n_features=max(cfg.n_features, k),  # their number is the target's; this only must not refuse k
        activation=Activation.topk if neurons else Activation.abs_topk,
        k=k,
        ranking=cfg.ranking if neurons else Ranking.activation,
        initial_tokens=cfg.initial_tokens,
    )
