"""A dictionary of two models -> what differs between them, on held-out text, and its report."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nndecomp.activations.harvest import kept
from nndecomp.build.data import scales
from nndecomp.checkpoint import write_text
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.replacing import Sequences
from nndecomp.evaluation.model_diff import ModelDiff, model_diff
from nndecomp.evaluation.top_tokens import Moment, most_active
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens

MAX_SHARE = 0.5  # of a feature's maximum, from which on a token is one of its most active
MIN_TOKENS = 10  # on which a feature must have been active to be shown
N_FEATURES, N_MOMENTS, CONTEXT = 6, 3, 8  # features shown of each model, moments of each, tokens before


@dataclass(frozen=True)
class Compared:
    diff: ModelDiff
    moments: dict[int, list[Moment]]  # of the features that are most of one model, by row of `diff.features`


@torch.no_grad()
def compared(cfg: RunConfig, target: Target, dictionaries: Mapping[str, SparseDictionary]) -> dict[str, Compared]:
    """What each dictionary says of the two models, on the held-out text."""
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    keep, n = kept(text, cfg.activations), cfg.evaluation.batch_seqs
    sites = sorted({site for each in dictionaries.values() for site in (*each.reads, *each.writes)})
    scale = scales(cfg, target, sites)

    def batches() -> Iterator[tuple[Sequences, dict]]:
        for tokens, mask in zip(text.tokens.split(n), keep.split(n), strict=True):
            batch = Sequences(tokens.to(target.device), mask.flatten().nonzero()[:, 0].to(target.device))
            recorded = target.record(batch.tokens, sites)
            yield batch, {site: batch.rows(value) for site, value in recorded.items()}

    def of(made: SparseDictionary) -> Compared:
        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for _, rows in batches():
                layouts = (made.read_layout, made.write_layout)
                x, y = (torch.cat([rows[site] for site in layout.sites], 1) for layout in layouts)
                yield x, y

        diff = model_diff(made, scale, pairs, MAX_SHARE)
        chosen = diff.extremes(N_FEATURES, MIN_TOKENS)
        found = (
            (batch.tokens, batch.kept, made.encode(x)) for (batch, _), (x, _) in zip(batches(), pairs(), strict=True)
        )
        moments = most_active(found, chosen, N_MOMENTS, CONTEXT, [bank.n_features for bank in made.banks])
        return Compared(diff, moments)

    return {name: of(made) for name, made in dictionaries.items()}


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
