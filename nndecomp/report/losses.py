"""Rows -> the losses that trained a parameter decomposition, on held-out text."""

import math

import pandas

from nndecomp.evaluation.heldout_losses import metric
from nndecomp.report.results import records_of


def table(rows: pandas.DataFrame) -> pandas.DataFrame | None:
    """A line a loss, of each decomposition that was measured so; None where none was."""
    found = [each for each in records_of(rows) if each["metric"].startswith(metric(""))]
    several = len({each["name"] for each in found}) > 1
    lines = [
        {
            "loss": f"{each['name']}: {name}" if several else name,
            "held-out": _interval(each["value"], each["low"], each["high"]),
            "unit": "" if each["unit"] == "none" else each["unit"],
        }
        for each in found
        for name in [each["metric"].removeprefix(metric(""))]
    ]
    return pandas.DataFrame(lines) if lines else None


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.3g}" if math.isnan(low) else f"{value:.3g} [{low:.3g}, {high:.3g}]"
