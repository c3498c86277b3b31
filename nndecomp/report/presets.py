"""Decompositions told apart by their names alone, as a list of presets has them, in the place of the same sites."""

import matplotlib
import pandas
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nndecomp.report import style
from nndecomp.report.figures import MARKERS, layers_in_words, plain_ticks
from nndecomp.report.results import results

METRICS = {"fvu": "fraction of variance unexplained", "ce_increase": "CE increase (nats)"}


def figure(rows: pandas.DataFrame) -> Figure:
    """Reconstruction, and what the model loses, against active features a module; one marker a preset."""
    every = results(rows)
    inputs = min(point.inputs for point in every)  # clean, or live where only that was measured
    points = [point for point in every if point.inputs == inputs]
    names = list(dict.fromkeys(point.context.name for point in points))
    colours = list(dict.fromkeys([*style.COLOURS.values(), *style.OTHER]))
    looks = {name: (colours[i % len(colours)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(8.4, 3.6), layout="constrained")
        for panel, (metric, label) in zip(drawn.subplots(1, 2), METRICS.items(), strict=True):
            for point in points:
                colour, marker = looks[point.context.name]
                x, y = point["active_per_module"].value, point[metric]
                panel.vlines(x, y.low, y.high, color=colour, linewidth=1.2)
                panel.plot(x, y.value, marker, color=colour)
            panel.set_xscale("log")
            if min(point[metric].value for point in points) > 0:
                panel.set_yscale("log")
            panel.set_xlabel("active features per module")
            panel.set_ylabel(label)
            plain_ticks(panel)
        handles = [
            Line2D([], [], linestyle="none", color=colour, marker=marker, label=name)
            for name, (colour, marker) in looks.items()
        ]
        drawn.legend(handles=handles, loc="outside right upper")
        context = points[0].context
        drawn.suptitle(f"{context.target}, {layers_in_words(context.layers)}, {inputs}", x=0.01, ha="left", fontsize=10)
    return drawn
