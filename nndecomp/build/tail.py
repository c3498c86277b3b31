"""A parameter decomposition -> what its least important components still hold, and the report of it."""

from pathlib import Path

from nndecomp.activations.harvest import kept
from nndecomp.build.parameters import saved_parameters, trained_parameters
from nndecomp.build.settings import check_runs
from nndecomp.checkpoint import write_text
from nndecomp.config.schema import RunConfig, require
from nndecomp.config.tail import TailConfig
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.tail import Choice, Tail, tail
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens


def asked(cfg: RunConfig) -> TailConfig:
    require(cfg.tail is not None, "tail=null names nothing to look at; write e.g. +tail.kept=[1.0,0.9,0.5]")
    assert cfg.tail is not None
    return cfg.tail


def one_decomposition(cfg: RunConfig, target: Target, out: Path) -> ParameterDecomposition:
    """That of the one finished run, or trained now."""
    if not cfg.runs:
        return trained_parameters(cfg, target, out)
    runs = check_runs(cfg)
    require(
        len(runs) == 1,
        f"runs holds {len(runs)} runs ({', '.join(map(str, runs))}); give the one whose tail is looked at",
    )
    return saved_parameters(runs[0], target)


def diagnosed(cfg: RunConfig, target: Target, decomposition: ParameterDecomposition) -> Tail:
    """On held-out text."""
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    return tail(target, decomposition, text, kept(text, cfg.activations), asked(cfg), cfg.evaluation, cfg.seed)


def reported_tail(cfg: RunConfig, found: Tail, out: Path) -> dict[str, float]:
    """Writes tables, CSVs and the figure, prints the tables, and returns the scores."""
    from nndecomp.report import style, tables  # late: matplotlib and pandas are slow to import
    from nndecomp.report import tail as report

    settings = asked(cfg)
    made = {
        "counts": report.counts(found, settings.thresholds),
        "bands": report.bands(found, settings.n_bands),
        "kept": report.kept(found),
    }
    write_text(out / "table.md", "\n".join(map(tables.markdown, made.values())))
    for name, table in {**made, "components": report.components(found)}.items():
        write_text(out / f"{name}.csv", tables.comma_separated(table))
    style.save(report.figure(found, settings.important, cfg.target.path), out / "figures", "tail")
    whole = made["kept"].head(len(Choice))  # all maps at once; the rest is long, and in table.md
    print(tables.terminal(made["counts"]), tables.terminal(whole), sep="\n\n")
    return report.scores(found)
