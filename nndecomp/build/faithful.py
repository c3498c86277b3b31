"""Replacements of MLPs -> how alike their derivatives are to the target's, and its report."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.activations.harvest import kept
from nndecomp.build.members import decompositions
from nndecomp.build.parameters import NAME, gated, saved_parameters
from nndecomp.build.settings import check_runs
from nndecomp.checkpoint import write_text
from nndecomp.config.faithfulness import FaithfulnessConfig
from nndecomp.config.schema import Activation, Architecture, Ranking, RunConfig, require
from nndecomp.decompositions.base import Replacement
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.held import PURSUES
from nndecomp.decompositions.wiring import wire
from nndecomp.evaluation.context import context
from nndecomp.evaluation.faithfulness import faithfulness
from nndecomp.evaluation.held import check_mlps, held
from nndecomp.evaluation.rows import join, table, write_rows
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens

if TYPE_CHECKING:
    from pandas import DataFrame


def asked(cfg: RunConfig) -> FaithfulnessConfig:
    require(
        cfg.faithfulness is not None,
        "faithfulness=null says nothing; write faithfulness.tokens_per_seq=4 faithfulness.n_logits=10",
    )
    assert cfg.faithfulness is not None
    return cfg.faithfulness


def check_faithful(cfg: RunConfig, target: Target) -> None:
    """SettingError, before training, for decompositions that could not be compared afterwards."""
    n_logits, n_vocab = asked(cfg).n_logits, target.shape.of(None).n_vocab
    require(n_logits <= n_vocab, f"faithfulness.n_logits={n_logits} is more than the target's {n_vocab} tokens")
    for name, each in decompositions(cfg).items():
        groups = wire(each, target.shape).groups
        check_mlps(name, {s for g in groups for s in g.reads}, {s for g in groups for s in g.writes})
        require(each.activation is not Activation.matching_pursuit, PURSUES)
        require(
            each.architecture is not Architecture.neurons or each.ranking is not Ranking.attribution,
            f"decomposition.ranking=attribution of {name} is known only when a run is over, so it cannot take the place of "
            "all MLPs at once; write ranking=activation or output_norm",
        )


def finished(cfg: RunConfig, target: Target) -> dict[str, Replacement]:
    """What the runs hold, by its name, and that of its run where two have the same; parameter decompositions behind each gate."""
    directories = [each for run in check_runs(cfg) for each in sorted((run / "decompositions").iterdir())]
    names = [each.name for each in directories]
    found: dict[str, Replacement] = {}
    for name, each in zip(names, directories, strict=True):
        unique = name if names.count(name) == 1 else f"{each.parents[1].name}/{name}"
        if name == NAME:
            found |= gated(cfg.evaluation, target, {unique: saved_parameters(each.parents[1], target)})
        else:
            found[unique] = SparseDictionary.from_pretrained(each, target.device)
    return found


def faithful(
    cfg: RunConfig,
    target: Target,
    replacements: Mapping[str, Replacement],
    run: str,
    seeds: Mapping[str, int] | None = None,
) -> "DataFrame":
    """Rows for each named replacement, on held-out text. `seeds` are those of training, where they are not the run's."""
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    keep = kept(text, cfg.activations)
    each = {name: held(name, target, replacement) for name, replacement in replacements.items()}
    found = faithfulness(target, each, text, keep, asked(cfg), cfg.evaluation, cfg.seed)
    contexts = {
        name: context(cfg, target, [replacement], run, name, (seeds or {}).get(name, cfg.seed))
        for name, replacement in replacements.items()
    }
    return join([table(contexts[name], measurements) for name, measurements in found.items()])


def reported_faithfulness(rows: "DataFrame", out: Path) -> dict[str, float]:
    """Writes rows, table, CSV and figure, prints the table, and returns the scores."""
    from nndecomp.report import faithfulness as report  # late: matplotlib and pandas are slow to import
    from nndecomp.report import style, tables

    write_rows(rows, out / "rows.parquet")
    summary = report.summary(rows)
    write_text(out / "table.md", tables.markdown(summary))
    write_text(out / "table.csv", tables.comma_separated(report.wide(rows)))
    style.save(report.figure(rows), out / "figures", "faithfulness")
    print(tables.terminal(summary))
    return report.scores(rows)
