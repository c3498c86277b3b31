"""Rows of recovery -> a table over seeds, and a figure. Each `run` is a world."""

import matplotlib
import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nndecomp.report import style

# By metric, or by metric and the class of true features it is of.
METRICS = {
    "matched_cosine": "matched cosine",
    "matched_cosine_null": "chance",
    "recovered_90": "recovered > 0.9",
    "recovered_95": "recovered > 0.95",
    "recovered_in_own_group": "exclusive in own group",
    "recovered_90 parents": "parents > 0.9",
    "absorption": "absorption",
    "split_features": "features a parent",
    "uniqueness": "uniqueness",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "l0": "L0",
    "true_l0": "true L0",
    "dead_fraction": "dead",
    "shrinkage": "shrinkage",
    "fvu": "fvu",
}
LINE = 0.19  # inches a decomposition


def over_seeds(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Mean and standard deviation over seeds: one line a world, decomposition and metric, in the order of the rows."""
    metric = rows.metric.where(rows.site == "all", rows.metric + " " + rows.site)
    known = rows.assign(metric=metric)[metric.isin(list(METRICS))]
    grouped = known.groupby(["run", "name", "metric"], sort=False)["value"]
    return grouped.agg(["mean", "std", "count"]).reset_index()


def summary(rows: pandas.DataFrame) -> pandas.DataFrame:
    """As text: mean ± standard deviation; a metric that was measured nowhere is left out."""
    found = over_seeds(rows)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for run, name, metric, mean, std, count in found.itertuples(index=False, name=None):
        line = lines.setdefault((run, name), {"world": run, "decomposition": name})
        line[metric] = f"{mean:z.2f} ± {std:.2f}" if count > 1 else f"{mean:z.2f}"
    columns = {metric: name for metric, name in METRICS.items() if any(metric in line for line in lines.values())}
    heads = {"world": "world", "decomposition": "decomposition"} | columns
    return pandas.DataFrame([{head: line.get(key, "-") for key, head in heads.items()} for line in lines.values()])


def figure(rows: pandas.DataFrame) -> Figure:
    """Matched cosine and F1 of every decomposition, a panel a world; bars are one standard deviation over seeds."""
    found = over_seeds(rows)
    columns = _in_columns({world: len(set(found.name[found.run == world])) for world in dict.fromkeys(found.run)})
    lines = max(sum(2 + n for n in column.values()) for column in columns)
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(3.6 * len(columns), LINE * lines + 0.6), layout="constrained")
        grid = drawn.add_gridspec(1, len(columns))
        panels: list[Axes] = []
        for c, column in enumerate(columns):
            # What a shorter column leaves is empty, so that lines are equally far apart everywhere.
            rest = lines - sum(2 + n for n in column.values())
            heights = [n + 1.0 for n in column.values()] + [rest + 1e-3]
            inner = grid[0, c].subgridspec(len(heights), 1, height_ratios=heights)
            for i, world in enumerate(column):
                panels.append(drawn.add_subplot(inner[i]))
                _panel(panels[-1], found.query("run == @world"))
                panels[-1].set_title(world, loc="left")
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return drawn


def _in_columns(sizes: dict[str, int]) -> list[dict[str, int]]:
    """Worlds in one column, or in two of about the same height."""
    worlds = list(sizes)
    if len(worlds) == 1:
        return [sizes]
    half = lambda cut: abs(sum(sizes[w] for w in worlds[:cut]) - sum(sizes[w] for w in worlds[cut:]))  # noqa: E731
    cut = min(range(1, len(worlds)), key=half)
    return [{world: sizes[world] for world in part} for part in (worlds[:cut], worlds[cut:])]


def _panel(panel: Axes, own: pandas.DataFrame) -> None:
    names = list(dict.fromkeys(own.name))[::-1]
    looks = {"matched_cosine": (style.COLOURS["transcoder"], "o"), "f1": (style.COLOURS["cross_layer_transcoder"], "s")}
    for metric, (colour, marker) in looks.items():
        of = own[own.metric == metric].set_index("name").loc[names]
        spread = of["std"].fillna(0)
        panel.errorbar(of["mean"], range(len(names)), xerr=spread, fmt=marker, color=colour, label=METRICS[metric])
    chance = float(np.mean(own.query("metric == 'matched_cosine_null'")["mean"]))
    panel.axvline(chance, color=style.GREY, linestyle=":", label="chance (cosine)")
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(-0.6, len(names) - 0.4)
    panel.set_xlim(0, 1.03)
