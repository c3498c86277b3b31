"""Training compute in place of a number of tokens: what `flops` buy each decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nndecomp.build.flops import parameter_flops, training_flops
from nndecomp.build.members import Member
from nndecomp.config.schema import RunConfig, require
from nndecomp.targets.base import Target
from nndecomp.training.flops import TrainingFlops


@dataclass(frozen=True)
class Spent:
    flops: TrainingFlops
    n_tokens: int


def equal_compute(cfg: RunConfig, target: Target, members: Mapping[str, Member]) -> dict[str, Spent]:
    """Tokens for each dictionary, whole batches of them, so that each trains with `flops` as nearly as batches allow; null: with
    what training.n_tokens cost the most expensive of them."""
    costs = training_flops(cfg, target, members)
    budget = cfg.flops or max(each.of(cfg.training.n_tokens) for each in costs.values())
    return {name: _spent(cfg, each, budget) for name, each in costs.items()}


def parameters_at_compute(cfg: RunConfig, target: Target) -> tuple[RunConfig, Spent]:
    """The settings with as many tokens as `flops` allow the parameter decomposition of `spd`, its warm-up included."""
    assert cfg.flops is not None, "flops say how much"
    spent = _spent(cfg, parameter_flops(cfg, target), cfg.flops)
    return with_tokens(cfg, spent.n_tokens), spent


def _spent(cfg: RunConfig, flops: TrainingFlops, budget: float) -> Spent:
    n = cfg.training.batch_tokens
    require(
        budget >= flops.of(n),
        f"flops={budget:.3g} are fewer than the {flops.of(n):.3g} of one step (and of what comes before it); write more",
    )
    return Spent(flops, int(flops.tokens(budget)) // n * n)


def with_tokens(cfg: RunConfig, n_tokens: int) -> RunConfig:
    return replace(cfg, training=replace(cfg.training, n_tokens=n_tokens))
