"""Rows -> one line a decomposition, and that as text."""

import math
import textwrap
from collections.abc import Mapping

import pandas

from nndecomp.evaluation.rows import Context

# What tells decompositions apart, as columns of the rows.
KEY = list(Context.__dataclass_fields__)


def wide(rows: pandas.DataFrame) -> pandas.DataFrame:
    """One line for each decomposition and `inputs`: its measurements with everything replaced, as columns.

    For a metric m: `m` its value, `m_low` and `m_high` its interval. Measurements made without replacements
    (`ce_clean`) and with ablations (`ce_zero`) stand on both lines. Ratios are made here, from the raw numbers.
    """
    whole = rows[rows.site == "all"]
    shared = whole[(whole.inputs == "none") & (whole.patched == "all")]
    lines = []
    for inputs in ("clean", "live"):
        # Reconstruction on clean inputs is measured in the undisturbed run, where nothing is patched.
        patched = ("all", "none") if inputs == "clean" else ("all",)
        own = whole[(whole.inputs == inputs) & whole.patched.isin(patched) & (whole.metric != "live_obstacle")]
        both = pandas.concat([own, shared.merge(own[KEY].drop_duplicates(), on=KEY)])
        lines.append(_columns(both).assign(inputs=inputs))
    table = pandas.concat(lines, ignore_index=True)
    assert len(table), "there is nothing to report: no rows with all sites replaced"
    for kind in ("zero", "mean"):
        if f"ce_increase_{kind}" in table:
            table[f"ce_recovered_{kind}"] = _recovered(table, kind)
    return table


def _columns(rows: pandas.DataFrame) -> pandas.DataFrame:
    twice = rows[rows.duplicated([*KEY, "metric"])]
    assert twice.empty, (
        f"{twice.metric.iloc[0]} of {twice.name.iloc[0]!r} in run {twice.run.iloc[0]} was measured twice"
    )
    # A missing k would drop its lines from a pivot; text does not go missing.
    keyed = rows.assign(k=rows.k.fillna(-1.0))
    pivot = keyed.pivot(index=KEY, columns="metric", values=["value", "low", "high"])
    pivot.columns = [metric if kind == "value" else f"{metric}_{kind}" for kind, metric in pivot.columns]
    table = pivot.reset_index()
    return table.assign(k=table.k.where(table.k >= 0))


def _recovered(table: pandas.DataFrame, kind: str) -> pandas.Series:
    """Share of the cross-entropy lost to ablation that the reconstruction gives back: 1 - increase / ablation's increase.

    Where ablation's own increase is not above 0 beyond its interval, there is no such share: nan.
    """
    lost = table[f"ce_increase_{kind}"].where(table[f"ce_increase_{kind}_low"] > 0)
    return 1 - table["ce_increase"] / lost


def summary(rows: pandas.DataFrame) -> pandas.DataFrame:
    """One line a decomposition, as text: size, sparsity, error and damage, clean and live, with intervals."""
    both = {inputs: part.set_index(KEY) for inputs, part in wide(rows).groupby("inputs")}
    either = both.get("clean", both.get("live"))
    assert either is not None
    lines = []
    for key, line in either.sort_values(["architecture", "active_per_reconstruction"]).iterrows():
        context = dict(zip(KEY, key, strict=True))
        cells = {
            "decomposition": context["name"] or context["run"],
            "active per module": _number(line, "active_per_module", ".1f"),
            "active per MLP": _number(line, "active_per_reconstruction", ".1f"),
            "dead": _number(line, "dead_fraction", ".1%"),
        }
        for inputs, part in both.items():
            there = part.loc[key] if key in part.index else pandas.Series(dtype=float)
            cells[f"fvu {inputs}"] = _number(there, "fvu", ".3f")
            cells[f"CE increase {inputs} (nats)"] = _interval(there, "ce_increase")
            cells[f"CE recovered {inputs}"] = _number(there, "ce_recovered_zero", ".1%")
        lines.append(cells)
    return pandas.DataFrame(lines)


def _number(line: pandas.Series, column: str, form: str) -> str:
    value = line.get(column, math.nan)
    return "-" if pandas.isna(value) else format(value, form)


def _interval(line: pandas.Series, column: str) -> str:
    if pandas.isna(line.get(column, math.nan)):
        return "-"
    value, low, high = (line[name] for name in (column, f"{column}_low", f"{column}_high"))
    return f"{value:.3f}" if pandas.isna(low) else f"{value:.3f} [{low:.2f}, {high:.2f}]"


def notices(rows: pandas.DataFrame) -> list[str]:
    """What could not be measured, and why: one sentence a decomposition."""
    noted = rows[rows.note != ""].drop_duplicates([*KEY, "note"])
    return [f"{row.name_ or row.run}: {row.note}" for row in noted.rename(columns={"name": "name_"}).itertuples()]


def terminal(table: pandas.DataFrame) -> str:
    """Columns aligned for a fixed-width font, names left and numbers right; long headings take several lines."""
    first = table.columns[0]
    widths = {column: max(*map(len, column.split()), *map(len, table[column])) for column in table}
    headings = {column: textwrap.wrap(column, width) for column, width in widths.items()}
    height = max(map(len, headings.values()))

    def line(cells: Mapping[str, str]) -> str:
        return "  ".join(cells[c].ljust(w) if c == first else cells[c].rjust(w) for c, w in widths.items()).rstrip()

    above = [{c: ([""] * (height - len(h)) + h)[n] for c, h in headings.items()} for n in range(height)]
    rule = {column: "-" * width for column, width in widths.items()}
    return "\n".join(map(line, [*above, rule, *table.to_dict("records")]))


def markdown(table: pandas.DataFrame) -> str:
    """A GitHub table."""
    lines = [list(table.columns), [":--", *["--:"] * (len(table.columns) - 1)], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def csv(table: pandas.DataFrame) -> str:
    """For a spreadsheet: of `wide`, raw numbers; of `summary`, what a reader sees."""
    return table.to_csv(index=False)
