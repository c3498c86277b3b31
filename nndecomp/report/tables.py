"""Results -> one line a decomposition, and that as text."""

import csv
import io
import math
import textwrap
from collections.abc import Mapping

import pandas

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.evaluation.rows import Context
from nndecomp.report.results import Result, records_of, results
from nndecomp.report.style import INPUTS


def wide(rows: pandas.DataFrame) -> pandas.DataFrame:
    """One line for each decomposition and `inputs`, metrics as columns: `m`, and its interval `m_low` and `m_high`.

    Ratios (`ce_recovered_zero`, `ce_recovered_mean`) are made here, from the raw numbers.
    """
    return pandas.DataFrame([_wide(result) for result in results(rows)])


def _wide(result: Result) -> dict[str, object]:
    numbers = {
        f"{metric}{end}": value
        for metric, estimate in result.measured.items()
        for end, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
    }
    ratios = {f"ce_recovered_{kind}": result.recovered(kind) for kind in ("zero", "mean")}
    return {**vars(result.context), "inputs": result.inputs, **numbers, **ratios}


def summary(rows: pandas.DataFrame) -> pandas.DataFrame:
    """One line a decomposition, as text: sparsity, error and damage, for each of the inputs, with intervals."""
    found = results(rows)
    modes = [inputs for inputs in INPUTS if any(result.inputs == inputs for result in found)]
    by_context: dict[Context, dict[str, Result]] = {}
    for result in found:
        by_context.setdefault(result.context, {})[result.inputs] = result
    lines = [(next(iter(each.values())), each) for each in by_context.values()]
    lines.sort(key=lambda line: (line[0].context.architecture, line[0]["active_per_reconstruction"].value))
    return pandas.DataFrame([_cells(first, {inputs: each.get(inputs) for inputs in modes}) for first, each in lines])


def _cells(first: Result, modes: Mapping[str, Result | None]) -> dict[str, str]:
    of_mode = {inputs: result or Result(first.context, inputs, {}) for inputs, result in modes.items()}
    inputs, counted = next(iter(of_mode.items()))  # clean, where it was measured
    cells = {
        "decomposition": first.context.name or first.context.run,
        f"active per module {INPUTS[inputs]}": _number(counted["active_per_module"].value, ".1f"),
        f"active per site {INPUTS[inputs]}": _number(counted["active_per_reconstruction"].value, ".1f"),
        "dead": _number(first["dead_fraction"].value, ".1%"),
    }
    for inputs, there in of_mode.items():
        cells[f"fvu {INPUTS[inputs]}"] = _number(there["fvu"].value, ".3f")
        cells[f"CE increase {INPUTS[inputs]} (nats)"] = _interval(there["ce_increase"])
        cells[f"CE recovered {INPUTS[inputs]}"] = _number(there.recovered("zero"), ".1%")
    return cells


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, f"z{form}")  # z: what rounds to zero has no sign


def _interval(estimate: Estimate) -> str:
    if math.isnan(estimate.value) or math.isnan(estimate.low):
        return _number(estimate.value, ".3f")
    value, low, high = (_number(each, ".3f") for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def notices(rows: pandas.DataFrame) -> list[str]:
    """What could not be measured, and why: one sentence a decomposition."""
    noted = [f"{each['name'] or each['run']}: {each['note']}" for each in records_of(rows) if each["note"]]
    no_share = [
        f"{result.context.name or result.context.run}: CE recovered is '-', because zero-ablation raises CE by "
        f"{_interval(result['ce_increase_zero'])} nats, which is not above 0 beyond its interval"
        for result in results(rows)
        if math.isnan(result.recovered("zero")) and not math.isnan(result["ce_increase_zero"].value)
    ]
    return list(dict.fromkeys([*noted, *no_share]))


def terminal(table: pandas.DataFrame) -> str:
    """Columns aligned for a fixed-width font, names left and numbers right; long headings take several lines."""
    records = _text(table)
    columns = list(records[0])
    widths = {c: max(*map(len, c.split()), *(len(record[c]) for record in records)) for c in columns}
    headings = {c: textwrap.wrap(c, width) for c, width in widths.items()}
    height = max(map(len, headings.values()))

    def line(cells: Mapping[str, str]) -> str:
        sides = {c: cells[c].ljust(w) if c == columns[0] else cells[c].rjust(w) for c, w in widths.items()}
        return "  ".join(sides.values()).rstrip()

    above = [{c: ([""] * (height - len(h)) + h)[n] for c, h in headings.items()} for n in range(height)]
    rule = {c: "-" * width for c, width in widths.items()}
    return "\n".join(map(line, [*above, rule, *records]))


def markdown(table: pandas.DataFrame) -> str:
    """A GitHub table."""
    records = _text(table)
    columns = list(records[0])
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *([*record.values()] for record in records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def comma_separated(table: pandas.DataFrame) -> str:
    """For a spreadsheet: of `wide`, raw numbers; of `summary`, what a reader sees."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.itertuples(index=False, name=None))
    return text.getvalue()


def _text(table: pandas.DataFrame) -> list[dict[str, str]]:
    assert len(table), "an empty table says nothing"
    return [{column: str(cell) for column, cell in record.items()} for record in records_of(table)]
