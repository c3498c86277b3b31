"""Finished runs -> one table of what they trained, and its report."""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.build.parameters import NAME, saved_parameters
from nndecomp.build.settings import check_runs
from nndecomp.checkpoint import write_text
from nndecomp.config.compose import load
from nndecomp.config.schema import RunConfig, require
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.parts import parts_of_dictionary, parts_of_parameters
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.evaluation.context import SPD
from nndecomp.evaluation.rows import join, read_rows
from nndecomp.targets.base import Target

if TYPE_CHECKING:
    from pandas import DataFrame

    from nndecomp.report.model_table import Trained


def model_table(cfg: RunConfig, target: Target) -> "DataFrame":
    """A line for each decomposition that the runs measured, inputs and part."""
    from nndecomp.report import model_table as report  # late: matplotlib and pandas are slow to import

    tables, trained = [], {}
    for run in check_runs(cfg):
        rows = read_rows(run / "rows.parquet").assign(run=str(run))
        tables.append(rows.astype({"run": "string"}))
        for name, architecture in dict(zip(rows.name, rows.architecture, strict=True)).items():
            trained[str(run), name] = _trained(run, name, architecture, target)
    return report.lines(join(tables), trained)


def _trained(run: Path, name: str, architecture: str, target: Target) -> "Trained":
    from nndecomp.report.model_table import Trained
    from nndecomp.report.style import BASELINES

    if architecture in BASELINES:
        return Trained(None, 0)
    training = load(run / "config.yaml").training
    n_tokens = training.n_tokens // training.batch_tokens * training.batch_tokens
    own = NAME if architecture.startswith(SPD) else name.partition("_pursuit")[0]
    directory = run / "decompositions" / own
    require(
        directory.is_dir(),
        f"runs: {run} measured {name} but did not train it, so how many parameters it has is not known; give the run that did",
    )
    if own == NAME:
        decomposition = saved_parameters(run, target)
        costs = GatedParameters(decomposition, target, Gate(GateKind.importance)).costs
        return Trained(parts_of_parameters(decomposition, [cost.name for cost in costs]), n_tokens)
    return Trained(parts_of_dictionary(SparseDictionary.from_pretrained(directory)), n_tokens)


def reported_table(found: "DataFrame", out: Path) -> dict[str, float]:
    """Writes the lines, a table and a figure, prints the table, and returns the scores."""
    from nndecomp.report import model_table as report
    from nndecomp.report import style, tables

    write_text(out / "table.csv", tables.comma_separated(found))
    shown = report.table(found)
    write_text(out / "table.md", tables.markdown(shown))
    style.save(report.figure(found), out / "figures", "model_table")
    whole = [each for each in report.shown(found) if each["part"] == report.WHOLE]
    print(tables.terminal(report.printed(whole)))
    return {f"{each['label']}/{metric}": each[metric] for each in whole for metric in ("ce_increase", "fvu")}
