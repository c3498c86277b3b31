"""Dictionaries of other libraries beside our own, trained alike -> a table, a figure and scores.

A fit is {"method", "library", "repair", "seed", "theirs": {"fvu", "l0", "dead", "ms"}, "ours": {...}}; ms is of CPU a step.
"""

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import mean, variance
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nndecomp.report import style

REPAIRS = {
    None: "",
    "count_before_the_jump": ", L0 counted before the jump",
}
METRICS = (("fvu", ".4f", True), ("l0", ".2f", True), ("dead", ".1%", False), ("ms", ".1f", False))
Fits = Sequence[Mapping[str, Any]]


def grouped(fits: Fits) -> dict[tuple[str, str], Fits]:
    """By method and library, in the order of the fits; one entry a seed."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in fits:
        found.setdefault((each["method"], each["library"] + REPAIRS[each["repair"]]), []).append(each)
    return dict(found)


def table(fits: Fits, versions: Mapping[str, str]) -> str:
    """Markdown: means over seeds, and for what was asked also ours - theirs beside the seeds' own deviation."""
    heads = ["method", "library"]
    for metric, _, compared in METRICS:
        heads += [f"{metric} theirs", f"{metric} ours", *(["difference", "seed noise"] if compared else [])]
    lines = [line(heads), line(["---"] * len(heads))]
    for (method, library), each in grouped(fits).items():
        cells = [method, library]
        for metric, form, compared in METRICS:
            theirs, ours = ([one[who][metric] for one in each] for who in ("theirs", "ours"))
            cells += [f"{mean(theirs):{form}}", f"{mean(ours):{form}}"]
            if compared:
                cells += [f"{mean(ours) - mean(theirs):+{form}}", f"{noise(theirs, ours):{form}}"]
        lines.append(line(cells))
    n_seeds = len(next(iter(grouped(fits).values())))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    said = f"Means over {n_seeds} seeds; seed noise is one library's standard deviation over them; ms of CPU a step. {named}."
    return "\n".join([*lines, "", said, ""])


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def noise(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """sqrt((var theirs + var ours) / 2), variances over seeds."""
    return sqrt((variance(theirs) + variance(ours)) / 2)


def scores(fits: Fits) -> dict[str, float]:
    """Means over seeds."""
    return {
        f"{method}/{library}/{who}_{metric}": mean(one[who][metric] for one in each)
        for (method, library), each in grouped(fits).items()
        for who in ("theirs", "ours")
        for metric in ("fvu", "l0")
    }


def figure(fits: Fits) -> Figure:
    """fvu and l0 of theirs (filled) and ours (open), a dot a seed, a line a method and library."""
    groups = grouped(fits)
    with matplotlib.rc_context(style.RC):
        made = Figure(figsize=(8.2, 0.9 + 0.32 * len(groups)), layout="constrained")
        panels = made.subplots(1, 2, sharey=True)
        for panel, metric in zip(panels, ("fvu", "l0"), strict=True):
            for y, each in enumerate(groups.values()):
                for who, shift, face in (("theirs", -0.14, "#0072B2"), ("ours", 0.14, "none")):
                    values = [one[who][metric] for one in each]
                    at = [y + shift] * len(values)
                    label = who if y == 0 else None
                    panel.scatter(values, at, s=26, facecolors=face, edgecolors="#0072B2", label=label)
        panels[0].set_yticks(range(len(groups)), [f"{method}: {library}" for method, library in groups])
        panels[0].invert_yaxis()
        panels[0].set_xlabel("fraction of variance unexplained")
        panels[1].set_xlabel("active features a token")
        made.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return made
