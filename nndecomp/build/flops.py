"""Settings -> what training every decomposition of a run costs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nndecomp.activations.harvest import Harvester
from nndecomp.activations.sequences import Sequences
from nndecomp.build.data import harvester, stream
from nndecomp.build.end_to_end import attends, is_end_to_end, sequences
from nndecomp.build.members import Member
from nndecomp.build.objectives import objectives_of
from nndecomp.build.parameters import objective, token_batches
from nndecomp.build.settings import trainable
from nndecomp.config.schema import ActivationsKind, DType, RunConfig, require
from nndecomp.targets.base import Target
from nndecomp.training.end_to_end import EndToEndObjective
from nndecomp.training.flops import TrainingFlops, count, spd_flops, step_flops
from nndecomp.training.randomness import random_state_kept
from nndecomp.training.utilisation import Utilisation, peak_flops


def training_flops(
    cfg: RunConfig, target: Target, members: Mapping[str, Member] | None = None
) -> dict[str, TrainingFlops]:
    """Of each decomposition, as if it were trained alone: the target runs as far as its own sites ask for.

    Rows of a store, and synthetic ones, cost no pass of the target. What is measured before the first step (statistics of rows,
    directions to start from) is not in it.
    """
    members = trainable(cfg) if members is None else members
    return {name: _of(cfg, target, {name: member}) for name, member in members.items()}


def parameter_flops(cfg: RunConfig, target: Target) -> TrainingFlops:
    """Of the parameter decomposition of `spd`."""
    spd = cfg.spd
    require(
        spd is not None,
        "spd=null names no parameter decomposition whose training could be counted; write e.g. +spd=tiny",
    )
    assert spd is not None
    return spd_flops(objective(cfg, spd, target), token_batches(cfg, target).next_batch(), cfg.training)


def utilisation(cfg: RunConfig, target: Target, members: Mapping[str, Member]) -> Utilisation | None:
    """What is logged of a run's dictionaries on one stream, if that is asked for."""
    if not cfg.log.utilisation:
        return None
    with random_state_kept():
        costs = training_flops(cfg, target, members).values()
        dtype = torch.bfloat16 if cfg.training.autocast is DType.bfloat16 else torch.float32
        own = sum(each.objective + each.optimiser for each in costs)
        return Utilisation(max(each.target for each in costs) + own, peak_flops(target.device, dtype))


def _of(cfg: RunConfig, target: Target, one: Mapping[str, Member]) -> TrainingFlops:
    objectives, sites = objectives_of(cfg, target, one)
    (local,), n_tokens = objectives.values(), cfg.training.batch_tokens
    if is_end_to_end(one):
        read = sequences(cfg, target, sites, one)
        clean = count(read.next_batch)
        loss, optimiser = step_flops(EndToEndObjective(local, target), read.next_batch(), cfg.training)
        return TrainingFlops(clean / n_tokens, loss / n_tokens, optimiser / n_tokens)
    if cfg.activations.kind is not ActivationsKind.live:
        loss, optimiser = step_flops(local, stream(cfg, target, sites).next_batch(), cfg.training)
        return TrainingFlops(0.0, loss / n_tokens, optimiser / n_tokens)
    read = harvester(cfg, target, sites)
    passes: list[Tensor] = []
    clean = count(lambda: passes.append(read.next_rows()))
    batch = _sequences(read, n_tokens) if attends(one) else _rows(read, passes[0], n_tokens)
    loss, optimiser = step_flops(local, batch, cfg.training)
    return TrainingFlops(clean / len(passes[0]), loss / n_tokens, optimiser / n_tokens)


def _rows(read: Harvester, rows: Tensor, n: int) -> Tensor:
    while len(rows) < n:
        rows = torch.cat([rows, read.next_rows()])
    return rows[:n].float()


def _sequences(read: Harvester, n_tokens: int) -> Sequences:
    n_seqs = n_tokens // read.seq_len
    values, keep = read.next_sequences()
    while len(values) < n_seqs:
        more, of_more = read.next_sequences()
        values, keep = torch.cat([values, more]), torch.cat([keep, of_more])
    kept = keep[:n_seqs].flatten().nonzero()[:, 0]
    return Sequences(values[:n_seqs].float(), kept.to(values.device))
