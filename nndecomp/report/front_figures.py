"""Fronts, drawn: of each family the mean over seeds, a band from the lowest to the highest, and every measured point.

Points that another of the same family and seed beats are small. Bars are intervals over sequences. The range over which areas
are taken is shaded.
"""

import math
from collections.abc import Sequence

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nndecomp.report import style
from nndecomp.report.figures import FACES, LINES, MARKERS, inputs_entry, plain_ticks, scale_y, title
from nndecomp.report.fronts import AXES, Family, at, common_range, families, measured_inputs
from nndecomp.report.results import Result, results

LABELS = {"ce_increase": "CE increase (nats)", "kl": "KL(target || replaced) (nats)"}
STEPS = 60  # of log x, at which the mean over seeds is drawn


def figure(rows: pandas.DataFrame, axis: str = "active_per_reconstruction", metric: str = "ce_increase") -> Figure:
    """Over one x-axis, a panel for each of the inputs."""
    found = results(rows)
    return _drawn(found, [(axis, inputs) for inputs in measured_inputs(rows)], metric, columns=2)


def figure_of_axes(rows: pandas.DataFrame, inputs: str, metric: str = "ce_increase") -> Figure:
    """Over every x-axis, measured in one way."""
    return _drawn(results(rows), [(axis, inputs) for axis in AXES], metric, columns=3)


def _drawn(found: Sequence[Result], panels: Sequence[tuple[str, str]], metric: str, columns: int) -> Figure:
    columns, lines = min(columns, len(panels)), math.ceil(len(panels) / columns)
    by_panel = {(axis, inputs): families(found, axis, metric, inputs) for axis, inputs in panels}
    names = style.in_order(family.name for every in by_panel.values() for family in every)
    values = [point.y for every in by_panel.values() for f in every for own in f.points.values() for point in own]
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(0.6 + 3.0 * columns + 2.4 * (columns < 3), 0.5 + 2.9 * lines), layout="constrained")
        axes = drawn.subplots(lines, columns, sharey=True, squeeze=False).flatten()
        for panel, ((axis, inputs), every) in zip(axes, by_panel.items(), strict=False):
            for family in every:
                _family(panel, family, inputs, names)
            panel.set_xscale("log")
            panel.set_xlabel(AXES[axis])
            if len({inputs for _, inputs in panels}) > 1:
                panel.set_title(f"{style.INPUTS[inputs]} inputs", loc="left", fontsize=9)
            if (between := common_range(every)) is not None:
                panel.axvspan(*between, color="#F3F3F3", zorder=0, linewidth=0)
        scale_y(axes[0], [e.value for e in values], [end for e in values for end in (e.low, e.high)])
        for panel in axes[: len(panels)]:
            plain_ticks(panel)
        for panel in axes[::columns]:
            panel.set_ylabel(LABELS[metric])
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        handles = [_entry(name, names) for name in names]
        handles += [inputs_entry(inputs) for inputs in dict.fromkeys(inputs for _, inputs in panels)]
        if len(panels) < len(axes):
            axes[-1].legend(handles=handles, loc="center", handlelength=3)
        else:
            drawn.legend(handles=handles, loc="outside right upper", handlelength=3)
        drawn.suptitle(title(found), x=0.01, ha="left", fontsize=10)
    return drawn


def _look(name: str, names: Sequence[str]) -> tuple[str, str]:
    return style.colour(name, list(names)), MARKERS[names.index(name) % len(MARKERS)]


def _entry(name: str, names: Sequence[str]) -> Line2D:
    colour, marker = _look(name, names)
    return Line2D([], [], color=colour, marker=marker, label=style.name(name))


def _family(panel: Axes, family: Family, inputs: str, names: Sequence[str]) -> None:
    (colour, marker), face = _look(family.name, names), FACES[inputs]
    for own, line in zip(family.points.values(), family.fronts, strict=True):
        panel.vlines([p.x for p in own], [p.y.low for p in own], [p.y.high for p in own], color=colour, linewidth=0.9)
        for points, size in (([p for p in own if p not in line], 2.5), (line, 4.5)):
            x, y = [p.x for p in points], [p.y.value for p in points]
            panel.plot(
                x, y, linestyle="none", marker=marker, markersize=size, color=colour, markerfacecolor=face(colour)
            )
    if family.high <= family.low:
        return
    x = [family.low * (family.high / family.low) ** (i / STEPS) for i in range(STEPS + 1)]
    heights = [[at(line, each).value for line in family.fronts] for each in x]
    panel.fill_between(x, list(map(min, heights)), list(map(max, heights)), color=colour, alpha=0.15, linewidth=0)
    means = [sum(each) / len(each) for each in heights]
    panel.plot(x, means, linestyle=LINES[inputs], color=colour, zorder=2.5)
