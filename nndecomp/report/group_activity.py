"""Whether some group of features is starved: what each is active on, where training starts and where it ends."""

from collections.abc import Mapping

import matplotlib
import pandas
from matplotlib.figure import Figure

from nndecomp.report import style

Activity = Mapping[str, pandas.DataFrame]  # of each decomposition: `evaluation.model_diff.group_activity`
COLOURS = {"A": "#0072B2", "shared": "#009E73", "B": "#D55E00"}


def table(start: Activity, end: Activity) -> pandas.DataFrame:
    """One line a group of features of each decomposition."""
    assert start.keys() == end.keys(), f"activity of {list(start)} at the start, of {list(end)} at the end"
    lines = []
    for name in end:
        for before, after in zip(start[name].to_dict("records"), end[name].to_dict("records"), strict=True):
            lines.append(
                {
                    "decomposition": f"{name} {after['group']}",
                    "features": str(after["n_features"]),
                    "alive at start": f"{before['alive']:.1%}",
                    "alive at end": f"{after['alive']:.1%}",
                    "l0 at start": f"{before['l0']:.2f}",
                    "l0 at end": f"{after['l0']:.2f}",
                }
            )
    return pandas.DataFrame(lines)


def figure(start: Activity, end: Activity) -> Figure:
    """Share of each group's features that are active at all, at the start (pale) and at the end."""
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(7.2, 2.8), layout="constrained")
        panels = drawn.subplots(1, len(end), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, end, strict=True):
            groups = list(end[name].group)
            for offset, found, alpha in ((-0.2, start[name], 0.4), (0.2, end[name], 1.0)):
                places = [place + offset for place in range(len(groups))]
                colours = [COLOURS.get(group, style.GREY) for group in groups]
                bars = panel.bar(places, found.alive * 100, width=0.38, color=colours, alpha=alpha)
                panel.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
            panel.set_xticks(range(len(groups)), groups)
            panel.set_title(name)
            panel.grid(axis="x", visible=False)
        panels[0].set_ylabel("features that are ever active (%)")
        panels[0].set_ylim(0, 110)
        drawn.suptitle("pale: where training starts; full: where it ends", fontsize=9, x=0.01, ha="left")
    return drawn
