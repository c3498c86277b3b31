"""Trained decompositions on data of which everything is known -> how much of it they found."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from nndecomp.activations.planted import planted_truth
from nndecomp.activations.truth import Truth
from nndecomp.build.data import synthetic
from nndecomp.config.schema import ActivationsKind, Plan, RunConfig, require
from nndecomp.decompositions.base import Decomposition
from nndecomp.evaluation.context import context
from nndecomp.evaluation.recovery import Recovery, measurements, recovery
from nndecomp.evaluation.rows import join, table
from nndecomp.targets.base import Target
from nndecomp.targets.planted import PlantedTarget
from nndecomp.tokens import heldout_tokens

if TYPE_CHECKING:
    from pandas import DataFrame


def truth(cfg: RunConfig, target: Target, decomposition: Decomposition, n_tokens: int) -> Truth:
    """Fresh rows at what a decomposition reads and writes, and what made them.

    Of planted chains a decomposition whose features write several sites is asked for whole chains, others for single rules.
    """
    sites = sorted({*decomposition.reads, *decomposition.writes})
    if cfg.activations.kind is ActivationsKind.synthetic:
        return synthetic(cfg, target, sites).heldout(n_tokens)
    require(
        isinstance(target, PlantedTarget),
        f"target.path={cfg.target.path} holds no known features; write target=planted tokens=random, or target=synthetic "
        "activations=synthetic",
    )
    assert isinstance(target, PlantedTarget)
    tokens = heldout_tokens(cfg.tokens, target.tokenizer, -(-n_tokens // cfg.tokens.seq_len)).tokens
    across = max(cost.n_writes for cost in decomposition.costs) > 1
    chains = target.rules.plan is Plan.chain and across
    return planted_truth(target, tokens, sites, chains)


def recovered(
    cfg: RunConfig, target: Target, decompositions: Mapping[str, Decomposition], n_tokens: int
) -> dict[str, Recovery]:
    return {name: recovery(each, truth(cfg, target, each, n_tokens), cfg.seed) for name, each in decompositions.items()}


def recovery_rows(
    cfg: RunConfig,
    target: Target,
    decompositions: Mapping[str, Decomposition],
    found: Mapping[str, Recovery],
    run: str,
) -> "DataFrame":
    """What was recovered, as rows like any other measurement; `run` says which world."""
    tables = []
    for name, each in decompositions.items():
        about = context(cfg, target, [each], run, name, cfg.seed)
        if cfg.activations.kind is ActivationsKind.synthetic:
            about = replace(about, tokens="synthetic")
        tables.append(table(about, measurements(found[name])))
    return join(tables)
