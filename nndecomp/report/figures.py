"""Rows -> figures. Nothing is read or written here; `style.save` writes.

Filled markers and solid lines are live measurements, open markers and dashed lines clean ones, pale markers and dotted lines
those of components on live inputs with gates of the clean run: everywhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, SymmetricalLogLocator

from nndecomp.report import style
from nndecomp.report.results import Result, results

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES: dict[str, Any] = {"live": "-", "clean": "--", "clean_gates": (0, (1, 1.2))}
# Of markers, by the colour of their edge.
FACES: dict[str, Callable[[str], Any]] = {
    "live": str,
    "clean": lambda _: "white",
    "clean_gates": lambda colour: (*to_rgb(colour), 0.35),
}
REFERENCES = {"ce_increase_zero": ("zero ablation", "-."), "ce_increase_mean": ("mean ablation", ":")}


def pareto(rows: pandas.DataFrame, axis: str = "active_per_reconstruction") -> Figure:
    """Cross-entropy increase against one x-axis of evaluation.costs, all sites replaced."""
    return _draw(rows, [axis], "ce_increase")


def pareto_axes(rows: pandas.DataFrame) -> Figure:
    """The same over every x-axis."""
    return _draw(rows, list(style.AXES), "ce_increase")


def fvu_against_l0(rows: pandas.DataFrame) -> Figure:
    """Fraction of variance unexplained, pooled over sites, against active components per module."""
    return _draw(rows, ["active_per_module"], "fvu")


def _draw(rows: pandas.DataFrame, axes: Sequence[str], metric: str) -> Figure:
    points = results(rows)
    for what in ("target", "layers"):
        found = sorted({getattr(point.context, what) for point in points})
        assert len(found) == 1, f"one figure compares on one {what}, these rows have {', '.join(found)}"
    with matplotlib.rc_context(style.RC):
        columns = min(len(axes), 3)
        lines = -(-len(axes) // columns)
        beside = 2.4 * (len(axes) % columns == 0)  # for the legend, where no panel is empty
        figure = Figure(figsize=(6.4, 3.8) if len(axes) == 1 else (9.6 + beside, 3.1 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
        for panel, axis in zip(panels, axes, strict=False):
            _panel(panel, points, axis, metric, label_references=axis == axes[0])
        for panel in panels[::columns]:
            panel.set_ylabel({"ce_increase": "CE increase (nats)", "fvu": "fraction of variance unexplained"}[metric])
        for panel in panels[len(axes) :]:
            panel.set_axis_off()
        figure.suptitle(title(points), x=0.01, ha="left", fontsize=10)
        spare = panels[len(axes)] if len(axes) < len(panels) else None
        if spare is None:
            figure.legend(handles=_legend(points), loc="outside right upper", handlelength=3)
        else:
            spare.legend(handles=_legend(points), loc="center", fontsize=9, handlelength=3)
    return figure


def title(points: Sequence[Result]) -> str:
    context = points[0].context
    return (
        f"{context.target}, {layers_in_words(context.layers)} replaced (target CE {_mean(points, 'ce_clean'):.3f} nats)"
    )


def layers_in_words(listed: str) -> str:
    """`2` -> layer 2; `0,1,2` -> layers 0 to 2; `0,2` -> layers 0,2."""
    layers = [int(layer) for layer in listed.split(",")]
    together = layers == list(range(layers[0], layers[0] + len(layers)))
    which = f"{layers[0]} to {layers[-1]}" if together else listed
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {which}"


def _mean(points: Sequence[Result], metric: str) -> float:
    return sum(point[metric].value for point in points) / len(points)


def _variants(points: Sequence[Result], architecture: str) -> list[tuple[str, int]]:
    """Activation functions and sizes in which an architecture occurs: told apart by markers."""
    own = [point.context for point in points if point.context.architecture == architecture]
    return sorted({(context.activation, context.n_features) for context in own})


def _architectures(points: Sequence[Result]) -> list[str]:
    return style.in_order(p.context.architecture for p in points)


def _look(points: Sequence[Result], architecture: str, variant: tuple[str, int]) -> tuple[str, str]:
    """Colour by architecture, marker by variant; baselines, whose colours are alike, begin with another marker each."""
    first = style.BASELINES.index(architecture) if architecture in style.BASELINES else 0
    marker = MARKERS[(first + _variants(points, architecture).index(variant)) % len(MARKERS)]
    return style.colour(architecture, _architectures(points)), marker


def _series(points: Sequence[Result]) -> dict[tuple[str, str, int, str], list[Result]]:
    """Points that one line joins: k varies along it, seeds scatter around it."""
    series: dict[tuple[str, str, int, str], list[Result]] = {}
    for point in points:
        c = point.context
        series.setdefault((c.architecture, c.activation, c.n_features, point.inputs), []).append(point)
    return series


def _line(part: Sequence[Result], axis: str, metric: str) -> list[tuple[float, float]]:
    """Means over seeds, by x. Where there is no k, every point is a setting of its own."""
    settings: dict[float, list[Result]] = {}
    for point in part:
        k = point.context.k
        settings.setdefault(-point[axis].value if math.isnan(k) else k, []).append(point)
    return sorted((_mean(same, axis), _mean(same, metric)) for same in settings.values())


def _panel(panel: Axes, points: Sequence[Result], axis: str, metric: str, label_references: bool) -> None:
    for (architecture, activation, n_features, inputs), part in _series(points).items():
        colour, marker = _look(points, architecture, (activation, n_features))
        x, y = [point[axis].value for point in part], [point[metric] for point in part]
        # Drawn from end to end: a percentile interval need not hold its own estimate.
        panel.vlines(x, [e.low for e in y], [e.high for e in y], color=colour, linewidth=1.2, zorder=3)
        face, order = FACES[inputs](colour), 5 if inputs == "live" else 4
        panel.plot(x, [e.value for e in y], marker, color=colour, markerfacecolor=face, zorder=order)
        panel.plot(*zip(*_line(part, axis, metric), strict=True), linestyle=LINES[inputs], color=colour, zorder=2)
    references = {name: _mean(points, name) for name in REFERENCES} if metric == "ce_increase" else {}
    estimates = [point[metric] for point in points]
    values = [*(e.value for e in estimates), *references.values()]
    panel.set_xscale("log")
    panel.set_xlabel(style.AXES[axis])
    scale_y(panel, values, [end for e in estimates for end in (e.low, e.high)])
    plain_ticks(panel)
    heights = {
        name: panel.transLimits.transform(panel.transScale.transform((1, y)))[1] for name, y in references.items()
    }
    for name, height in references.items():
        panel.axhline(height, color="black", linewidth=0.9, linestyle=REFERENCES[name][1], zorder=1)
        if label_references:
            # Above its line, where there is less data, unless the other line is in the way.
            above = not any(0 < other - heights[name] < 0.07 for other in heights.values())
            panel.annotate(
                REFERENCES[name][0],
                (1.0, height),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2 if above else -2),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
                fontsize=7.5,
            )


def scale_y(panel: Axes, values: Sequence[float], ends: Sequence[float]) -> None:
    """Linear for a narrow range of values; log for a wide one, symlog if some are not above 0.

    `ends` of intervals stretch a linear axis. On a log axis those that reach 0 run off the lower edge.
    """
    low, high = min(values), max(values)
    reach = [each for each in (*values, *ends) if not math.isnan(each)]
    if low > 0 and high / low > 8:
        panel.set_yscale("log")
        panel.set_ylim(low / 1.6, max(reach) * 1.4)
    elif low <= 0 and high > 8 * -low:
        panel.set_yscale("symlog", linthresh=high / 50, linscale=0.7)
        panel.set_ylim(min(reach) - high / 100, max(reach) * 1.4)
    elif low > 0:
        panel.set_ylim(0, max(reach) * 1.12)


def plain_ticks(panel: Axes) -> None:
    """1, 2, 5, 10, ... rather than powers of ten; thousands as 2k, 5M."""
    for axis, scale in ((panel.xaxis, panel.get_xscale()), (panel.yaxis, panel.get_yscale())):
        match scale:
            case "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            case "symlog":
                axis.set_major_locator(SymmetricalLogLocator(axis.get_transform(), subs=(1, 2, 5)))
            case _:
                continue
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def _legend(points: Sequence[Result]) -> list[Line2D]:
    """One entry a method, then what filled and open markers mean."""
    entries = []
    for architecture in _architectures(points):
        variants = _variants(points, architecture)
        for activation, n_features in variants:
            colour, marker = _look(points, architecture, (activation, n_features))
            # Of the variants only what differs between them.
            differs = [len(set(each)) > 1 for each in zip(*variants, strict=True)]
            detail = [f", {each}" for each, told in zip((activation, n_features), differs, strict=True) if told]
            label = style.name(architecture) + "".join(detail)
            entries.append(Line2D([], [], color=colour, marker=marker, label=label))
    there = [inputs for inputs in style.INPUTS if any(point.inputs == inputs for point in points)]
    return [*entries, *map(inputs_entry, sorted(there, key=list(FACES).index))]


def inputs_entry(inputs: str) -> Line2D:
    """What markers and lines say of the inputs, for a legend."""
    face, words = FACES[inputs]("black"), style.INPUTS[inputs]
    label = f"{words} inputs" if inputs in ("live", "clean") else f"{words}, live components"
    return Line2D([], [], color="black", marker="o", markerfacecolor=face, linestyle=LINES[inputs], label=label)
