"""Settings -> training through the target: whether it can be, and what it reads."""

from collections.abc import Mapping, Sequence

import torch

from nndecomp.build.members import Member
from nndecomp.config.schema import (
    ActivationsKind,
    Architecture,
    DecompositionConfig,
    EndToEnd,
    RunConfig,
    Scope,
    Together,
    require,
)
from nndecomp.decompositions.architectures import dictionary_spec
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.patching import several_models
from nndecomp.targets.base import Shape, Target
from nndecomp.tokens import open_tokens
from nndecomp.training.clean_sequences import CleanSequences
from nndecomp.types import Site


def is_end_to_end(members: Mapping[str, Member]) -> bool:
    """Whether one of them is: all are then trained on the same batches of whole sequences."""
    return any(each.config.end_to_end is not EndToEnd.none for each in members.values())


def attends(members: Mapping[str, Member]) -> bool:
    """Whether one of them explains positions by earlier ones."""
    return any(each.config.architecture is Architecture.lorsa for each in members.values())


def sequences(cfg: RunConfig, target: Target, sites: Sequence[Site], members: Mapping[str, Member]) -> CleanSequences:
    """Batches of training.batch_tokens tokens in whole sequences, with the clean activations at `sites`."""
    return CleanSequences(
        target,
        open_tokens(cfg.tokens, target.tokenizer, cfg.seed),
        sites,
        cfg.activations,
        batch_seqs=cfg.training.batch_tokens // cfg.tokens.seq_len,
        seq_len=cfg.tokens.seq_len,
        logits=any(each.config.end_to_end is EndToEnd.kl for each in members.values()),
    )


def check_batches(cfg: RunConfig, setting: str) -> None:
    """SettingError unless batches of whole sequences can be had, which `setting` needs."""
    require(
        cfg.activations.kind is ActivationsKind.live,
        f"activations.kind={cfg.activations.kind.value} holds rows without their sequences, but decomposition.{setting} "
        "trains on whole ones; write activations=live",
    )
    require(
        cfg.training.batch_tokens % cfg.tokens.seq_len == 0,
        f"training.batch_tokens={cfg.training.batch_tokens} must be a multiple of tokens.seq_len={cfg.tokens.seq_len}, "
        f"since decomposition.{setting} trains on whole sequences",
    )


def live_obstacle(cfg: DecompositionConfig, shape: Shape) -> str | None:
    """Why a dictionary with these settings cannot take the place of its sites in a run that it changes, or None."""
    with torch.device("meta"):  # sizes alone
        dictionary = SparseDictionary(dictionary_spec(cfg, shape, ""))
    return several_models((*dictionary.reads, *dictionary.writes)) or dictionary.live_obstacle()


def check_wiring(name: str, cfg: DecompositionConfig, shape: Shape) -> None:
    """SettingError if all sites are to be replaced at once by what cannot answer site by site."""
    if cfg.end_to_end is EndToEnd.none or cfg.end_to_end_sites is Together.single:
        return
    with torch.device("meta"):  # sizes alone
        dictionary = SparseDictionary(dictionary_spec(cfg, shape, ""))
    advice = "; write decomposition.end_to_end_sites=single"
    require(
        cfg.scope is Scope.group or len(dictionary.banks) == 1,
        f"decomposition.scope=all lets features of all groups of {name} compete, so none is known before the last is "
        f"read, but decomposition.end_to_end_sites=all needs them one after the other{advice} or scope=group",
    )
    obstacle = dictionary.live_obstacle()
    require(
        obstacle is None,
        f"decomposition.end_to_end_sites=all cannot be done with {name}, since {obstacle}{advice}",
    )
