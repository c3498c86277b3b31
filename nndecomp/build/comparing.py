"""A dictionary of two models -> what differs between them, on held-out text, and its report."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nndecomp.activations.harvest import kept
from nndecomp.build.data import scales
from nndecomp.checkpoint import write_text
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.replacing import Sequences
from nndecomp.evaluation.model_diff import ModelDiff, group_activity, model_diff
from nndecomp.evaluation.top_tokens import Moment, most_active
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens
from nndecomp.types import Site

if TYPE_CHECKING:
    from pandas import DataFrame

MAX_SHARE = 0.5  # of a feature's maximum, from which on a token is one of its most active
MIN_TOKENS = 10  # on which a feature must have been active to be shown
N_FEATURES, N_MOMENTS, CONTEXT = 6, 3, 8  # features shown of each model, moments of each, tokens before


@dataclass(frozen=True)
class Compared:
    diff: ModelDiff
    moments: dict[int, list[Moment]]  # of the features that are most of one model, by row of `diff.features`


class _Text:
    """Held-out text, as often as one wants to read it, and what both models make of it at the sites of some dictionaries."""

    def __init__(self, cfg: RunConfig, target: Target, dictionaries: Mapping[str, SparseDictionary]) -> None:
        self.target, self.text = target, heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
        self.keep, self.n = kept(self.text, cfg.activations), cfg.evaluation.batch_seqs
        self.sites = sorted({site for each in dictionaries.values() for site in (*each.reads, *each.writes)})

    def batches(self) -> Iterator[tuple[Sequences, dict[Site, Tensor]]]:
        device = self.target.device
        for tokens, mask in zip(self.text.tokens.split(self.n), self.keep.split(self.n), strict=True):
            batch = Sequences(tokens.to(device), mask.flatten().nonzero()[:, 0].to(device))
            recorded = self.target.record(batch.tokens, self.sites)
            yield batch, {site: batch.rows(value) for site, value in recorded.items()}

    def pairs(self, made: SparseDictionary) -> Iterator[tuple[Tensor, Tensor]]:
        """What it reads and what it writes."""
        for _, rows in self.batches():
            x, y = (torch.cat([rows[site] for site in each.sites], 1) for each in (made.read_layout, made.write_layout))
            yield x, y


@torch.no_grad()
def compared(cfg: RunConfig, target: Target, dictionaries: Mapping[str, SparseDictionary]) -> dict[str, Compared]:
    """What each dictionary says of the two models, on the held-out text."""
    text = _Text(cfg, target, dictionaries)
    scale = scales(cfg, target, text.sites)

    def of(made: SparseDictionary) -> Compared:
        diff = model_diff(made, scale, lambda: text.pairs(made), MAX_SHARE)
        chosen = diff.extremes(N_FEATURES, MIN_TOKENS)
        found = (
            (batch.tokens, batch.kept, made.encode(x))
            for (batch, _), (x, _) in zip(text.batches(), text.pairs(made), strict=True)
        )
        moments = most_active(found, chosen, N_MOMENTS, CONTEXT, [bank.n_features for bank in made.banks])
        return Compared(diff, moments)

    return {name: of(made) for name, made in dictionaries.items()}


@torch.no_grad()
def activity(cfg: RunConfig, target: Target, dictionaries: Mapping[str, SparseDictionary]) -> dict[str, "DataFrame"]:
    """How much each group is active on the held-out text, selecting as training does: no threshold has to be known yet."""
    text = _Text(cfg, target, dictionaries)
    return {
        name: group_activity(made, (made.encode(x) for x, _ in text.pairs(made)))
        for name, made in ((name, copy.deepcopy(each).train()) for name, each in dictionaries.items())
    }


def reported_difference(found: Mapping[str, Compared], target: Target, out: Path) -> dict[str, float]:
    """Writes tables, figures and examples for each dictionary, prints the tables, and returns the scores."""
    from nndecomp.report import model_diff as report  # late: matplotlib and pandas are slow to import
    from nndecomp.report import style, tables

    kinds = report.kinds_table({name: each.diff for name, each in found.items()})
    groups = report.groups_table({name: each.diff for name, each in found.items()})
    text = [tables.markdown(kinds), tables.markdown(groups)]
    for name, each in found.items():
        write_text(path := out / f"features_{name}.csv", each.diff.features.to_csv(index=False))
        print(f"features of {name} -> {path}")
        style.save(report.figure(each.diff, name), out / "figures", f"difference_{name}")
        text.append(report.examples(name, each.diff, each.moments, target.tokenizer))
    write_text(out / "difference.md", "\n".join(text))
    print(tables.terminal(kinds), tables.terminal(groups), sep="\n\n")
    return {
        f"{name}/{kind}": float(count) for name, each in found.items() for kind, count in each.diff.counts().items()
    }


def reported_activity(start: Mapping[str, "DataFrame"], end: Mapping[str, "DataFrame"], out: Path) -> dict[str, float]:
    """Writes a table and a figure of how active each group is at the start and at the end, prints it, returns the scores."""
    from nndecomp.report import group_activity, style, tables  # late: matplotlib and pandas are slow to import

    table = group_activity.table(start, end)
    write_text(out / "activity.md", tables.markdown(table))
    style.save(group_activity.figure(start, end), out / "figures", "activity")
    print(tables.terminal(table))
    return {
        f"{name}/alive_{group}_{when}": float(alive)
        for when, found in (("start", start), ("end", end))
        for name, each in found.items()
        for group, alive in zip(each.group, each.alive, strict=True)
    }
