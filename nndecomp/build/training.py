"""Settings -> objectives -> trained dictionaries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nndecomp.activations.first_rows import FirstRows
from nndecomp.activations.sequences import SequenceBuffer, Sequences
from nndecomp.activations.shared import View
from nndecomp.activations.stream import RowStream
from nndecomp.build.data import first_rows, initial_rows, initial_sequences, shuffled_sequences, stream
from nndecomp.build.end_to_end import attends, is_end_to_end, sequences
from nndecomp.build.flops import utilisation
from nndecomp.build.measuring import heldout, measured, scores
from nndecomp.build.members import Member
from nndecomp.build.objectives import objectives_of, sites_of
from nndecomp.build.settings import trainable
from nndecomp.config.schema import (
    ActivationsKind,
    Patched,
    RunConfig,
)
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens
from nndecomp.training.clean_sequences import CleanSequences
from nndecomp.training.end_to_end import EndToEndObjective
from nndecomp.training.log import Log
from nndecomp.training.loop import train
from nndecomp.training.objective import Stream
from nndecomp.training.state import saved_steps
from nndecomp.types import Site

Objectives = dict[str, DictionaryObjective] | dict[str, EndToEndObjective]


def trained(
    cfg: RunConfig, target: Target, out: Path, members: Mapping[str, Member] | None = None
) -> dict[str, SparseDictionary]:
    """Trains every dictionary of the run on one stream, going on from a checkpoint, and saves them; those that were saved
    before are read.

    members: what to train, where it is not what the settings name.
    """
    members = trainable(cfg) if members is None else members
    if is_saved(out, members):
        return {name: SparseDictionary.from_pretrained(_place(out, name), target.device) for name in members}
    check_heldout(cfg, target)
    used = utilisation(cfg, target, members)
    objectives, rows = prepared(cfg, target, out, members)
    evaluate = looking(cfg, target, objectives, out.name) if cfg.training.evaluate_every else None
    with Log(out, cfg.log, name=f"{cfg.name}/{out.name}") as log:
        train(
            objectives,
            rows,
            cfg.training,
            out,
            log=log,
            evaluate=evaluate,
            utilisation=used,
            description=cfg.name,
        )
    return save(out, objectives)


def is_saved(out: Path, members: Mapping[str, Member]) -> bool:
    return all(_place(out, name).exists() for name in members)


def save(out: Path, objectives: Objectives) -> dict[str, SparseDictionary]:
    """Of trained objectives, the dictionaries."""
    finished = {name: objective.finished() for name, objective in objectives.items()}
    for name, dictionary in finished.items():
        dictionary.save_pretrained(_place(out, name))
    return finished


def _place(out: Path, name: str) -> Path:
    return out / "decompositions" / name


def check_heldout(cfg: RunConfig, target: Target) -> None:
    """Too little held-out text is refused now, not at the end."""
    if cfg.activations.kind is not ActivationsKind.synthetic:
        heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)


def prepared(
    cfg: RunConfig,
    target: Target,
    out: Path,
    members: Mapping[str, Member],
    first: FirstRows | None = None,
    view: View | None = None,
) -> tuple[Objectives, Stream]:
    """Objectives as they stand before the first step, unless there is a checkpoint to go on from, and what they train on.

    first: rows that are harvested already. view: what to train on, where it is not a stream of the run's own.
    """
    sites = sites_of(members, target.shape)
    first = first_rows(cfg, target, sites) if first is None else first
    local, _ = objectives_of(cfg, target, members, first)
    rows = _batches(cfg, target, sites, members, first) if view is None else view
    if not saved_steps(out / "checkpoint"):
        begin(cfg, target, local, members, sites, first)
    through = is_end_to_end(members)
    return {name: EndToEndObjective(each, target) for name, each in local.items()} if through else local, rows


def untrained(
    cfg: RunConfig, target: Target, members: Mapping[str, Member] | None = None
) -> dict[str, SparseDictionary]:
    """What training starts from, before its first step."""
    members = trainable(cfg) if members is None else members
    objectives, sites = objectives_of(cfg, target, members)
    begin(cfg, target, objectives, members, sites)
    return {name: objective.finished() for name, objective in objectives.items()}


def _batches(
    cfg: RunConfig, target: Target, sites: Sequence[Site], members: Mapping[str, Member], first: FirstRows | None
) -> RowStream | SequenceBuffer | CleanSequences:
    """One stream for all: of rows where that is enough, else of whole sequences."""
    if is_end_to_end(members):
        return sequences(cfg, target, sites, members)
    return shuffled_sequences(cfg, target, sites) if attends(members) else stream(cfg, target, sites, first)


def begin(
    cfg: RunConfig,
    target: Target,
    objectives: Mapping[str, DictionaryObjective],
    members: Mapping[str, Member],
    sites: Sequence[Site],
    first: FirstRows | None = None,
) -> None:
    """Starts every objective, from as many as it asks for of rows that all have in common."""
    n = {name: members[name].config.initial_tokens for name in objectives}
    attends = any(objective.dictionary.needs_sequences for objective in objectives.values())
    largest = max(n.values())
    rows = (
        initial_sequences(cfg, target, sites, largest) if attends else initial_rows(cfg, target, sites, largest, first)
    )
    for name, objective in objectives.items():
        own = rows.first(n[name]) if isinstance(rows, Sequences) else rows[: n[name]]
        objective.start(own, target, members[name].seed)


def looking(
    cfg: RunConfig, target: Target, objectives: Mapping[str, DictionaryObjective | EndToEndObjective], run: str
) -> Callable[[int], dict[str, float]]:
    """What the loop calls for held-out scores on the way; the text is read once."""
    quick = replace(cfg, evaluation=replace(cfg.evaluation, patched=[Patched.all], bootstrap=0, pursuit=[]))
    text = heldout(cfg, target, sorted({site for each in objectives.values() for site in each.dictionary.writes}))

    def look(step: int) -> dict[str, float]:
        now = {name: [objective.finished()] for name, objective in objectives.items()}
        return scores(measured(quick, target, now, run, text=text))

    return look
