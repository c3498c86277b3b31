"""How alike Jacobians are: a table over replacements, and a figure beside random active sets."""

import math
from collections.abc import Mapping

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.report import style
from nndecomp.report.figures import layers_in_words
from nndecomp.report.results import NOTHING, records_of

SCOPES = {"local": "one MLP", "end_to_end": "all MLPs, top logits"}
QUANTITIES = {"cosine": "cosine", "error": "relative error"}
COLUMNS = {"local": "MLP", "end_to_end": "logits"}
CONDITIONS = {
    "": "own active set",
    "_random": "random active set, as many",
    "_stochastic": "stochastic masks",
    "_zero": "no MLPs",
}
PANELS = [(scope, quantity) for scope in SCOPES for quantity in QUANTITIES]


def estimates(rows: pandas.DataFrame, site: str = "all") -> dict[str, dict[str, Estimate]]:
    """By name of the decomposition, then by metric."""
    found: dict[str, dict[str, Estimate]] = {}
    for record in records_of(rows.loc[rows.site == site, :]):
        own = found.setdefault(str(record["name"]), {})
        own[str(record["metric"])] = Estimate(record["value"], record["low"], record["high"])
    return found


def summary(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Two lines a decomposition, with its own and with random active sets, and one for a model without MLPs."""
    found = estimates(rows)
    lines = []
    for name, own in found.items():
        for end, label in (("", "own"), ("_random", "random"), ("_stochastic", "stochastic")):
            if f"jacobian_cosine_local{end}" not in own:
                continue
            active = f"{own['l0_end_to_end'].value:.1f}"
            lines.append({"decomposition": name, "active set": label, "active per module": active, **_cells(own, end)})
    # Of MLPs that are taken away nothing is known but what is lost with them.
    without = next(iter(found.values()))
    lines.append(
        {"decomposition": "(no MLPs)", "active set": "-", "active per module": "-", **_cells(without, "_zero")}
    )
    return pandas.DataFrame(lines)


def _cells(own: Mapping[str, Estimate], end: str) -> dict[str, str]:
    return {
        f"{COLUMNS[scope]} {QUANTITIES[quantity]}": _text(own.get(f"jacobian_{quantity}_{scope}{end}", NOTHING))
        for scope, quantity in PANELS
    }


def wide(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Every number, one a line, those of single layers too."""
    return rows.loc[
        :, ["name", "architecture", "k", "seed", "metric", "site", "value", "low", "high", "unit", "n_tokens"]
    ]


def scores(rows: pandas.DataFrame) -> dict[str, float]:
    return {f"{name}/{metric}": each.value for name, own in estimates(rows).items() for metric, each in own.items()}


def figure(rows: pandas.DataFrame) -> Figure:
    """A line a decomposition: filled its own active set, open a random one; bars are intervals over sequences."""
    found = estimates(rows)
    architectures = {str(r["name"]): str(r["architecture"]) for r in records_of(rows)}
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(9.6, 1.5 + 0.28 * len(found)), layout="constrained")
        panels = drawn.subplots(1, len(PANELS), sharey=True)
        for panel, (scope, quantity) in zip(panels, PANELS, strict=True):
            for y, (name, own) in enumerate(found.items()):
                colour = style.colour(architectures[name], sorted(set(architectures.values())))
                for end, (face, marker) in {
                    "_random": ("white", "o"),
                    "_stochastic": ("white", "s"),
                    "": (colour, "o"),
                }.items():
                    if (each := own.get(f"jacobian_{quantity}_{scope}{end}")) is not None:
                        _point(panel, each, y, colour, face, marker)
            without = {
                each.value
                for own in found.values()
                if (each := own.get(f"jacobian_{quantity}_{scope}_zero", NOTHING)) is not NOTHING
            }
            for value in without:
                panel.axvline(value, color="black", linewidth=0.9, linestyle="-.", zorder=1)
            panel.set_title(f"{SCOPES[scope]}:\n{QUANTITIES[quantity]}")
            panel.set_xlabel("cosine" if quantity == "cosine" else "|J' - J| / |J|")
            if quantity == "cosine":
                panel.set_xlim(min(0.0, panel.get_xlim()[0]), 1.02)
            else:
                panel.set_xlim(0, 1.04 * panel.get_xlim()[1])
        panels[0].set_yticks(range(len(found)), list(found))
        panels[0].invert_yaxis()
        drawn.suptitle(_title(rows), x=0.01, ha="left", fontsize=10)
        drawn.legend(
            handles=_legend(bool(rows.metric.str.endswith("_stochastic").any())), loc="outside lower center", ncols=4
        )
    return drawn


def _point(panel: Axes, each: Estimate, y: float, colour: str, face: str, marker: str) -> None:
    panel.hlines([y], [each.low], [each.high], color=colour, linewidth=1.2, zorder=3)
    panel.plot([each.value], [y], marker, color=colour, markerfacecolor=face, zorder=4)


def _title(rows: pandas.DataFrame) -> str:
    first = records_of(rows)[0]
    return f"{first['target']}, {layers_in_words(first['layers'])}: Jacobians beside the target's, active sets held constant"


def _legend(stochastic: bool) -> list[Line2D]:
    def point(condition: str, marker: str, face: str) -> Line2D:
        return Line2D(
            [], [], color="black", marker=marker, linestyle="", markerfacecolor=face, label=CONDITIONS[condition]
        )

    drawn = [point("_stochastic", "s", "white")] if stochastic else []
    without = Line2D([], [], color="black", linewidth=0.9, linestyle="-.", label=CONDITIONS["_zero"])
    return [point("", "o", "black"), point("_random", "o", "white"), *drawn, without]


def _text(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "-"
    if math.isnan(estimate.low):
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
