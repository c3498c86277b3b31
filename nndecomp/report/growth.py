"""How a training step grows with features, k, batch and layers -> a table and a figure with fitted slopes.

slope of log time over log size, by least squares on medians: 1 where time is proportional, 0 where it does not matter
"""

from collections.abc import Mapping, Sequence
from math import log
from statistics import linear_regression

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nndecomp.evaluation.timing import Floor, Times, middle
from nndecomp.report import style

LABELS = {
    "n_features": "features",
    "k": "active features a token (k)",
    "batch_tokens": "tokens a batch",
    "n_layers": "layers of a cross-layer transcoder",
}
LOOKS = {
    "torch": ("#0072B2", "o"),
    "native": ("#D55E00", "s"),
    "native_int8": ("#CC79A7", "^"),
    "floor": ("#000000", ""),
}
Growth = Mapping[str, Mapping[str, int]]  # of each axis: names of sizes and their values on it


def lines(
    axis: Mapping[str, int], times: Sequence[Times], floors: Sequence[Floor]
) -> dict[str, dict[int, list[float]]]:
    """Of each backend, and of the floor: seconds of every round at each value."""
    found: dict[str, dict[int, list[float]]] = {}
    for each in times:
        if each.size in axis:
            found.setdefault(str(each.subject.backend), {})[axis[each.size]] = each.wall
    for floor in floors:
        if floor.name in axis:
            found.setdefault("floor", {})[axis[floor.name]] = floor.wall
    return found


def slope(line: Mapping[int, Sequence[float]]) -> float:
    values = sorted(line)
    return linear_regression([log(x) for x in values], [log(middle(line[x]).value) for x in values]).slope


def table(axes: Growth, times: Sequence[Times], floors: Sequence[Floor]) -> pandas.DataFrame:
    """One line a value of an axis and backend, its slope on the first."""
    made = []
    for name, axis in axes.items():
        for system, line in lines(axis, times, floors).items():
            for first, (value, wall) in zip([True] + [False] * len(line), sorted(line.items()), strict=False):
                milliseconds = middle([1000 * seconds for seconds in wall])
                made.append(
                    {
                        "axis": name,
                        "of": system,
                        "value": f"{value:,}",
                        "ms a step": str(milliseconds),
                        "slope": f"{slope(line):.2f}" if first and len(line) > 1 else "",
                    }
                )
    return pandas.DataFrame(made)


def scores(axes: Growth, times: Sequence[Times], floors: Sequence[Floor]) -> dict[str, float]:
    return {
        f"slope/{name}/{system}": slope(line)
        for name, axis in axes.items()
        for system, line in lines(axis, times, floors).items()
        if len(line) > 1
    }


def figure(axes: Growth, times: Sequence[Times], floors: Sequence[Floor]) -> Figure:
    """A panel an axis, both axes logarithmic."""
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.3 * len(axes) + 0.5, 3.1), layout="constrained")
        panels = drawn.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, (name, axis) in zip(panels, axes.items(), strict=True):
            for system, line in lines(axis, times, floors).items():
                _line(panel, system, line)
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_xticks(sorted(axis.values()), [f"{value:,}" for value in sorted(axis.values())], rotation=30)
            panel.minorticks_off()
            panel.set_xlabel(LABELS[name])
            panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.4)
        panels[0].set_ylabel("ms a training step")
    return drawn


def _line(panel: Axes, system: str, line: Mapping[int, Sequence[float]]) -> None:
    colour, marker = LOOKS[system]
    values = sorted(line)
    found = [middle([1000 * seconds for seconds in line[value]]) for value in values]
    label = f"{system}, slope {slope(line):.2f}" if len(line) > 1 else system
    panel.plot(
        values,
        [each.value for each in found],
        "--" if system == "floor" else "-",
        color=colour,
        marker=marker,
        label=label,
    )
    panel.vlines(values, [each.low for each in found], [each.high for each in found], color=colour, linewidth=0.8)
