"""Dictionaries of other libraries beside our own, trained alike -> a table, a figure and scores.

A fit is {"method", "library", "repair", "seed", "theirs": {"fvu", "l0", "dead"}, "ours": {...}}.
"""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nndecomp.report import style

REPAIRS = {
    None: "",
    "count_before_the_jump": ", L0 counted before the jump",
    "detach_gate_decoder": ", gate's decoder detached",
}
Fits = Sequence[Mapping[str, Any]]


def grouped(fits: Fits) -> dict[tuple[str, str], Fits]:
    """By method and library, in the order of the fits; one entry a seed."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in fits:
        found.setdefault((each["method"], each["library"] + REPAIRS[each["repair"]]), []).append(each)
    return dict(found)


def table(fits: Fits, versions: Mapping[str, str]) -> str:
    """Markdown: means over seeds and their standard deviation."""
    lines = [
        "| method | library | fvu theirs | fvu ours | l0 theirs | l0 ours | dead theirs | dead ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, library), each in grouped(fits).items():
        cells = [
            cell(each, who, metric, form)
            for metric, form in (("fvu", ".4f"), ("l0", ".2f"), ("dead", ".1%"))
            for who in ("theirs", "ours")
        ]
        lines.append(f"| {method} | {library} | {' | '.join(cells)} |")
    n_seeds = len(next(iter(grouped(fits).values())))
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join([*lines, "", f"Mean and standard deviation over {n_seeds} seeds. {named}.", ""])


def cell(fits: Fits, who: str, metric: str, form: str) -> str:
    values = [each[who][metric] for each in fits]
    return f"{mean(values):{form}} ± {stdev(values):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def scores(fits: Fits) -> dict[str, float]:
    """Means over seeds."""
    return {
        f"{method}/{library}/{who}_{metric}": mean(one[who][metric] for one in each)
        for (method, library), each in grouped(fits).items()
        for who in ("theirs", "ours")
        for metric in ("fvu", "l0")
    }


def figure(fits: Fits) -> Figure:
    """fvu of theirs (filled) and ours (open), a dot a seed, a line a method and library."""
    groups = grouped(fits)
    with matplotlib.rc_context(style.RC):
        made = Figure(figsize=(7.2, 0.6 + 0.32 * len(groups)), layout="constrained")
        panel = made.subplots()
        for y, each in enumerate(groups.values()):
            for who, shift, face in (("theirs", -0.14, "#0072B2"), ("ours", 0.14, "none")):
                values = [one[who]["fvu"] for one in each]
                label = who if y == 0 else None
                at = [y + shift] * len(values)
                panel.scatter(values, at, s=26, facecolors=face, edgecolors="#0072B2", label=label)
        panel.set_yticks(range(len(groups)), [f"{method}: {library}" for method, library in groups])
        panel.invert_yaxis()
        panel.set_xlabel("fraction of variance unexplained, held-out rows")
        panel.legend(loc="best")
    return made
