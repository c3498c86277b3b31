"""Rows of recovery -> a table over seeds, and a figure. Each `run` is a world."""

import matplotlib
import pandas
from matplotlib.figure import Figure

from nndecomp.report import style

METRICS = {
    "matched_cosine": "matched cosine",
    "matched_cosine_null": "chance",
    "recovered_90": "recovered > 0.9",
    "recovered_95": "recovered > 0.95",
    "uniqueness": "uniqueness",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "l0": "L0",
    "true_l0": "true L0",
    "dead_fraction": "dead",
    "shrinkage": "shrinkage",
    "fvu": "fvu",
    "absorption": "absorption",
}


def over_seeds(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Mean and standard deviation over seeds: one line a world, decomposition and metric, in the order of the rows."""
    whole = rows[(rows.site == "all") & rows.metric.isin(list(METRICS))]
    grouped = whole.groupby(["run", "name", "metric"], sort=False)["value"]
    return grouped.agg(["mean", "std", "count"]).reset_index()


def summary(rows: pandas.DataFrame) -> pandas.DataFrame:
    """As text: mean ± standard deviation; a metric that was measured nowhere is left out."""
    found = over_seeds(rows)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for run, name, metric, mean, std, count in found.itertuples(index=False, name=None):
        line = lines.setdefault((run, name), {"world": run, "decomposition": name})
        line[METRICS[metric]] = f"{mean:z.2f} ± {std:.2f}" if count > 1 else f"{mean:z.2f}"
    return pandas.DataFrame(list(lines.values())).fillna("-")


def figure(rows: pandas.DataFrame) -> Figure:
    """Matched cosine and F1 of every decomposition, a panel a world; bars are one standard deviation over seeds."""
    found = over_seeds(rows)
    worlds = list(dict.fromkeys(found["run"]))
    looks = {"matched_cosine": (style.COLOURS["transcoder"], "o"), "f1": (style.COLOURS["cross_layer_transcoder"], "s")}
    with matplotlib.rc_context(style.RC):
        tallest = max(len(found.loc[found["run"] == world, "name"].unique()) for world in worlds)
        drawn = Figure(figsize=(2.9 * len(worlds) + 1.2, 0.3 * tallest + 1.4), layout="constrained")
        panels = drawn.subplots(1, len(worlds), squeeze=False)[0]
        for panel, world in zip(panels, worlds, strict=True):
            own = found.loc[found["run"] == world]
            names = list(dict.fromkeys(own["name"]))[::-1]
            for metric, (colour, marker) in looks.items():
                of = own.loc[own["metric"] == metric].set_index("name").loc[names]
                spread = of["std"].fillna(0)
                panel.errorbar(
                    of["mean"], range(len(names)), xerr=spread, fmt=marker, color=colour, label=METRICS[metric]
                )
            chance = own.loc[own["metric"] == "matched_cosine_null", "mean"].mean()
            panel.axvline(chance, color=style.GREY, linestyle=":", label="chance (cosine)")
            panel.set_yticks(range(len(names)), names)
            panel.set_xlim(0, 1.03)
            panel.set_title(world)
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn
