"""Trained dictionaries -> which features of one another has too, and what chance would have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nndecomp.activations.harvest import kept
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.evaluation.context import context
from nndecomp.evaluation.rows import join, table
from nndecomp.evaluation.stability import Again, Rows, again, decoder_rows, measurements, random_rows, written_rows
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Pair:
    """Two dictionaries of one method, by name: are the features of `first` in `second`, which may be wider?"""

    method: str
    first: str
    second: str
    wider: bool


def found_again(
    cfg: RunConfig,
    target: Target,
    trained: Mapping[str, SparseDictionary],
    untrained: Mapping[str, SparseDictionary],
    pairs: Sequence[Pair],
) -> list[Again]:
    """Of each pair, features that are alive on held-out text. `untrained` is what every `first` started from."""
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    keep, firsts = kept(text, cfg.activations), {pair.first for pair in pairs}
    rows: dict[str, Rows] = {}
    nulls: dict[str, dict[str, Rows]] = {}
    for i, (name, each) in enumerate(trained.items()):
        alive, written = written_rows(target, each, text, keep, cfg.evaluation.batch_seqs)
        rows[name] = decoder_rows(each, alive)
        if name in firsts:
            nulls[name] = {
                "random": random_rows(written, rows[name], cfg.seed + i),
                "untrained": decoder_rows(untrained[name], alive),
            }
    return [
        again(pair.method, pair.first, pair.second, pair.wider, rows[pair.first], rows[pair.second], nulls[pair.first])
        for pair in pairs
    ]


def found_again_rows(
    cfg: RunConfig,
    target: Target,
    trained: Mapping[str, SparseDictionary],
    found: Sequence[Again],
    run: str,
    seeds: Mapping[str, int],
) -> "DataFrame":
    """What was found again, as rows like any other measurement; each note says where it was looked for."""
    n_tokens = cfg.evaluation.n_seqs * cfg.tokens.seq_len
    tables = []
    for each in found:
        first = trained[each.first]
        about = context(cfg, target, [first], run, each.first, seeds[each.first])
        tables.append(table(about, measurements(each, [bank.name for bank in first.banks], n_tokens)))
    return join(tables)
