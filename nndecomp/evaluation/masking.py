"""A parameter decomposition under masks drawn or found around its importances, at the kept positions of held-out text.

Importances are of the undisturbed run and components read what arrives, as in training. What is drawn depends on the seed and on the
first sequence of the batch alone; sources of pgd climb the KL of the very predictions that are scored, one batch at a time, those of
pgd_shared that of all batches together: gradients of all are added before each step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nndecomp.config.evaluation import EvaluatedMasks, MasksConfig
from nndecomp.config.spd import Sampling
from nndecomp.decompositions.spd import masks
from nndecomp.decompositions.spd.adversary import LossOf, Sources, attacked, beginning, damaging, shared_pgd
from nndecomp.decompositions.spd.gated import GatedParameters, kept_positions
from nndecomp.decompositions.spd.masks import Gates, Masking, Routes
from nndecomp.evaluation.patching import Batch
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.randomness import random_state_kept
from nndecomp.training.subjects import LanguageModel

Condition = tuple[str, AbstractContextManager[None]]


def masked_runs(
    target: Target, parameters: GatedParameters, batch: Batch, cfg: MasksConfig, seed: int, shared: Sources
) -> Iterator[Condition]:
    """What rows call it, and the context within which the target runs so. shared: as `shared_sources` found them."""
    if not cfg.kinds and not cfg.subsets:
        return
    installed = parameters.decomposition.installed
    gates, routes = _gates(parameters, batch)
    for kind in cfg.kinds:
        with random_state_kept():
            torch.manual_seed(seed + batch.seqs.start)
            masking = _masking(kind, target, parameters, batch, gates, routes, cfg, shared)
        yield f"{kind.value}_masks", installed(masking)
    for name, patterns in cfg.subsets.items():
        chosen = {each: routes[each] for each in chosen_maps(gates, patterns)}
        yield f"only_{name}", installed(masks.important(gates, chosen))


def shared_sources(
    target: Target, parameters: GatedParameters, batches: Callable[[], Iterable[Batch]], cfg: MasksConfig, seed: int
) -> Sources:
    """The sources of pgd_shared, none where it is not asked for: s climbs the mean KL over the predictions of all batches.

    `batches` begins anew for each step of ascent; one batch at a time is in memory.
    """
    if EvaluatedMasks.pgd_shared not in cfg.kinds:
        return {}
    n = sum(int(batch.predicts.sum()) for batch in batches())

    def losses() -> Iterator[tuple[float, LossOf]]:
        for batch in batches():
            gates, routes = _gates(parameters, batch)
            kl = kl_of(target, parameters, batch)
            yield int(batch.predicts.sum()) / n, partial(_damage, kl, gates, routes, cfg.delta)

    with random_state_kept():
        torch.manual_seed(seed)
        started = beginning(_gates(parameters, next(iter(batches())))[0], cfg.pgd)
    return shared_pgd(losses, started, cfg.pgd.n_steps, cfg.pgd.step_size)


def _damage(
    kl: Callable[[Masking], Tensor], gates: Gates, routes: Routes, delta: bool, s: Mapping[str, Tensor]
) -> Tensor:
    return kl(damaging(gates, routes, s, delta))


def _gates(parameters: GatedParameters, batch: Batch) -> tuple[Gates, Routes]:
    """Of the undisturbed run, where components stand in for their maps."""
    gates = {name: g for name, (g, _) in parameters.gates(batch.tokens).items()}
    return gates, dict.fromkeys(gates, kept_positions(batch))


def chosen_maps(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _masking(
    kind: EvaluatedMasks,
    target: Target,
    parameters: GatedParameters,
    batch: Batch,
    gates: Gates,
    routes: Routes,
    cfg: MasksConfig,
    shared: Sources,
) -> Masking:
    match kind:
        case EvaluatedMasks.importance:
            return masks.important(gates, routes)
        case EvaluatedMasks.rounded:
            return masks.without_leftover(gates, routes, lambda g: (g > 0).to(g.dtype))
        case EvaluatedMasks.ones:
            return masks.ones(gates, routes)
        case EvaluatedMasks.zeros:
            return masks.without_leftover(gates, routes, torch.zeros_like)
        case EvaluatedMasks.random:
            return masks.without_leftover(gates, routes, torch.rand_like)
        case EvaluatedMasks.stochastic:
            return masks.stochastic(gates, routes, Sampling.continuous, cfg.delta)
        case EvaluatedMasks.pgd:
            return attacked(kl_of(target, parameters, batch), gates, routes, cfg.pgd, cfg.delta)
        case EvaluatedMasks.pgd_shared:
            return damaging(gates, routes, shared, cfg.delta)


def kl_of(target: Target, parameters: GatedParameters, batch: Batch) -> Callable[[Masking], Float[Tensor, ""]]:
    """Mean KL(P || Q) of the batch's scored predictions, Q under given masks, with a gradient where masks have one."""
    language = LanguageModel(target)
    predicts = F.pad(batch.predicts, (0, 1))  # what follows the last token is not known
    text = TokenBatch(batch.tokens, predicts, torch.zeros_like(predicts))
    reference = language.reference(language.run(text))

    def kl(masking: Masking) -> Tensor:
        with parameters.decomposition.installed(masking):
            return language.divergence(reference, language.run(text), text)

    return kl
