"""Trained dictionaries -> held-out measurements, and their report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from nndecomp.activations.harvest import kept
from nndecomp.activations.statistics import measure, site_means
from nndecomp.checkpoint import write_text
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.base import Replacement
from nndecomp.evaluation.context import context
from nndecomp.evaluation.rows import join, table, write_rows
from nndecomp.evaluation.suite import evaluate_all
from nndecomp.targets.base import Target
from nndecomp.tokens import TokenBatch, heldout_tokens
from nndecomp.types import Site

if TYPE_CHECKING:
    from pandas import DataFrame

from nndecomp.build.data import harvester
from nndecomp.build.members import members
from nndecomp.build.pursuing import pursued


@dataclass(frozen=True)
class Heldout:
    """Held-out text, which of its positions count, and the mean of each written site over training text."""

    tokens: TokenBatch
    keep: Bool[Tensor, "batch pos"]
    means: dict[Site, Float[Tensor, " width"]]


def heldout(cfg: RunConfig, target: Target, writes: Sequence[Site]) -> Heldout:
    tokens = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    rows = harvester(cfg, target, writes)
    means = site_means(measure(rows, cfg.evaluation.mean_seqs * cfg.tokens.seq_len), rows.layout)
    return Heldout(tokens, kept(tokens, cfg.activations), means)


def measured(
    cfg: RunConfig,
    target: Target,
    replacements: Mapping[str, Sequence[Replacement]],
    run: str,
    seeds: Mapping[str, int] | None = None,
    text: Heldout | None = None,
) -> "DataFrame":
    """Rows for each named replacement, on held-out text, read anew unless it is given; with those of evaluation.pursuit.

    `seeds` are those of training, where they are not those of the run's members.
    """
    own_seeds = {name: member.seed for name, member in members(cfg).items()} | dict(seeds or {})
    again = pursued(cfg.evaluation.pursuit, replacements)
    trained_as = {**{name: name for name in replacements}, **{name: of for name, (of, _) in again.items()}}
    replacements = {**replacements, **{name: parts for name, (_, parts) in again.items()}}
    writes = sorted({site for parts in replacements.values() for part in parts for site in part.writes})
    text = heldout(cfg, target, writes) if text is None else text
    found = evaluate_all(target, replacements, text.tokens, text.keep, text.means, cfg.evaluation, cfg.seed)
    contexts = {
        name: context(cfg, target, parts, run, name, own_seeds.get(trained_as[name], cfg.seed))
        for name, parts in replacements.items()
    }
    return join([table(contexts[name], measurements) for name, measurements in found.items()])


def scores(rows: "DataFrame") -> dict[str, float]:
    """The few numbers by which runs are compared at a glance, everything replaced: scores.json.

    Of two models those of each, `crosscoder/ce_increase_clean_A`, and what is common to both.
    """
    whole = rows[(rows.site.str.fullmatch("([A-Z]:)?all")) & rows.metric.isin(["ce_increase", "fvu"])]
    columns = (whole[column] for column in ("name", "metric", "inputs", "site", "value"))
    return {
        f"{name}/{metric}_{inputs}{'' if site == 'all' else f'_{site[0]}'}": value
        for name, metric, inputs, site, value in zip(*columns, strict=True)
    }


def reported(rows: "DataFrame", out: Path) -> dict[str, float]:
    """Writes the rows, draws the Pareto figure, writes and prints the table, and returns the scores.

    Where families have fronts to compare, these too, and the areas under them; masks of evaluation.masks, and held-out losses.
    """
    from nndecomp.report import (
        figures,
        fronts,
        losses,
        masks,
        style,
        tables,
    )  # late: matplotlib and pandas are slow to import

    write_rows(rows, out / "rows.parquet")
    style.save(figures.pareto(rows), out / "figures", "pareto")
    table = tables.summary(rows)
    write_text(out / "table.md", tables.markdown(table))
    print(tables.terminal(table), *tables.notices(rows), sep="\n")
    under_masks = masks.table(rows)
    if under_masks is not None:
        write_text(out / "masks.md", tables.markdown(under_masks))
        print(f"\nunder masks (evaluation.masks)\n{tables.terminal(under_masks)}")
    of_training = losses.table(rows)
    if of_training is not None:
        write_text(out / "losses.md", tables.markdown(of_training))
        print(f"\nlosses of training on held-out text\n{tables.terminal(of_training)}")
    if fronts.measured_inputs(rows):
        report_fronts(rows, out)
    return scores(rows)


def report_fronts(rows: "DataFrame", out: Path) -> None:
    """Draws the front of each family; writes the areas under them, as numbers and as a table, and prints the last one."""
    from nndecomp.report import front_figures, fronts, style, tables

    style.save(front_figures.figure(rows), out / "figures", "fronts")
    found = fronts.areas(rows)
    write_text(out / "areas.csv", tables.comma_separated(found))
    measured = fronts.measured_inputs(rows)
    by_inputs = [
        f"{style.INPUTS[inputs]} inputs\n\n{tables.markdown(fronts.table(found, inputs))}" for inputs in measured
    ]
    notes = "".join(f"\n{sentence}\n" for sentence in fronts.left_out(found))
    write_text(out / "areas.md", "\n".join(by_inputs) + notes)
    said = fronts.table(found, measured[-1], ("active_per_reconstruction", "description_length"))
    print(f"\nmean CE increase along the front, {style.INPUTS[measured[-1]]} inputs (areas.md has every x-axis)")
    print(tables.terminal(said))
