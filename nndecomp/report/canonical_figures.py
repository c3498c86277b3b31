"""Figures of which units are those of another decomposition too."""

from collections.abc import Mapping, Sequence
from itertools import product

import matplotlib
import torch
from jaxtyping import Int
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from nndecomp.evaluation.comparing_units import Comparison, Kind
from nndecomp.evaluation.unit_splitting import Cover
from nndecomp.report import style
from nndecomp.report.canonical import Line, mean, sizes_of

MOST = 4  # children or links that are told apart
ENDS = {"units of the first": "#0072B2", "units of the second": "#E69F00"}  # of the two that a panel's title names
LOOKS = {Kind.seed: ("same size, one to one", "matched"), Kind.size: ("in a larger one, the best", "best")}


def found_again(lines: Sequence[Line], colours: Mapping[str, str], cutoff: float) -> Figure:
    """Share of units found: a line a method, over sizes; by weights and by activity; chance dotted, untrained crosses."""
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(7.6, 5.2), layout="constrained")
        panels = drawn.subplots(2, 2, sharey=True)
        for row, by in zip(panels, ("weights", "activity"), strict=True):
            for panel, (kind, (title, how)) in zip(row, LOOKS.items(), strict=True):
                _found(panel, lines, kind, f"{by}_{how}", colours)
                panel.set_title(f"{title}, by {by}")
            row[0].set_ylabel(f"share of units > {cutoff}")
        panels[0][0].set_ylim(-0.02, max(0.1, panels[0][0].get_ylim()[1]))
        artists, labels = panels[0][0].get_legend_handles_labels()
        handles = [*artists, Line2D([], [], linestyle=":", color=style.GREY)]
        handles.append(Line2D([], [], linestyle="", marker="x", color=style.GREY))
        labels = [*labels, "chance", "in one before training"]
        style.legend_below(drawn, handles, labels)
    return drawn


def _found(panel: Axes, lines: Sequence[Line], kind: Kind, metric: str, colours: Mapping[str, str]) -> None:
    there = sorted(_of(lines, kind), key=lambda line: (line["first_times"], line["second_times"]))
    sizes = list(dict.fromkeys(map(sizes_of, there)))
    panel.set_xticks(range(len(sizes)), sizes)
    panel.margins(x=0.12)
    for method in dict.fromkeys(line["first_method"] for line in _of(lines, kind)):
        colour = style.colour(colours[method], list(dict.fromkeys(colours.values())))
        own = [line for line in there if line["first_method"] == method]
        panel.plot(
            [sizes.index(sizes_of(line)) for line in own],
            [line[f"{metric}_found"] for line in own],
            "o",
            color=colour,
            markersize=3.5,
            alpha=0.6,
        )
        means = {size: [line for line in own if sizes_of(line) == size] for size in map(sizes_of, own)}
        places = [sizes.index(size) for size in means]
        panel.plot(
            places, [mean(group, f"{metric}_found") for group in means.values()], "-", color=colour, label=method
        )
        panel.plot(places, [mean(group, f"{metric}_chance_found") for group in means.values()], ":", color=colour)
        if kind is Kind.seed:
            starts = [line for line in _of(lines, Kind.untrained) if line["first_method"] == method]
            panel.plot(
                [sizes.index(sizes_of(line)) for line in starts],
                [line[f"{metric}_found"] for line in starts],
                "x",
                color=colour,
                zorder=3,  # the points of the trained are at 0 too
            )


def children(found: Sequence[Comparison], colours: Mapping[str, str]) -> Figure:
    """How many units of the other cover a unit of the smallest size: a panel for each method that has larger ones, bars at the
    same size and in these; black lines are chance."""
    every = [each for each in found if each.pair.kind in LOOKS]
    smallest = min(each.pair.first.times for each in every)
    kept = [each for each in every if each.pair.first.times == smallest]
    methods = list(dict.fromkeys(each.pair.first.method for each in kept if each.pair.kind is Kind.size))
    sizes = sorted({each.pair.second.times for each in kept})
    width = 0.8 / len(sizes)

    def factor(times: int) -> str:
        return "" if times == smallest else f"{times // smallest} × "

    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.1 * len(methods) + 0.5, 3.0), layout="constrained")
        panels = drawn.subplots(1, len(methods), squeeze=False, sharey=True)[0]
        for panel, method in zip(panels, methods, strict=True):
            colour = style.colour(colours[method], list(dict.fromkeys(colours.values())))
            for i, times in enumerate(sizes):
                own = [each for each in kept if (each.pair.first.method, each.pair.second.times) == (method, times)]
                if own:
                    at = [bar + (i - (len(sizes) - 1) / 2) * width for bar in range(MOST + 1)]
                    panel.bar(at, _parts([each.cover for each in own]), width, color=colour, alpha=1 / (1 + i))
                    chance = _parts([each.cover_null for each in own])
                    for line, breadth in (("white", 2.5), ("black", 1)):  # a bar may be black too
                        panel.errorbar(at, chance, xerr=width / 2, fmt="none", ecolor=line, elinewidth=breadth)
            panel.set_title(method)
            panel.set_xticks(range(MOST + 1), ["lost", "kept", *map(str, range(2, MOST)), f"≥ {MOST}"])
            panel.set_xlabel("units that cover it")
        panels[0].set_ylabel("share of units")
        handles: list[Artist] = [
            Patch(color=style.GREY, alpha=1 / (1 + i), label=f"in one {factor(times)}as large")
            for i, times in enumerate(sizes)
        ]
        handles.append(Line2D([], [], color="black", label="chance"))
        style.legend_below(drawn, handles, [str(each.get_label()) for each in handles])
    return drawn


def _parts(covers: Sequence[Cover]) -> list[float]:
    """Share of units with 0 (lost), 1, ..., MOST or more children."""
    return _shares(torch.cat([each.parts for each in covers]), MOST)


def _shares(counts: Int[Tensor, " unit"], most: int) -> list[float]:
    """Share of units with a count of 0, 1, ..., `most` or more."""
    return (counts.clamp(max=most).bincount(minlength=most + 1) / len(counts)).tolist()


def degrees(found: Sequence[Comparison], of: Sequence[str]) -> Figure | None:
    """Links of units of the methods `of` with units of every other method, both ways; None where there are none."""
    chosen: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for each in found:
        first, second = each.pair.first.method, each.pair.second.method
        if each.pair.kind is not Kind.method or (first in of) == (second in of):
            continue
        degree, back = each.graph.degree, each.graph.degree_back
        if first in of:
            chosen.setdefault((first, second), []).append((degree, back))
        else:
            chosen.setdefault((second, first), []).append((back, degree))
    if not chosen:
        return None
    rows = list(dict.fromkeys(own for own, _ in chosen))
    columns = list(dict.fromkeys(other for _, other in chosen))
    missing = [f"{own} and {other}" for own, other in product(rows, columns) if (own, other) not in chosen]
    assert not missing, f"{', '.join(missing)} were not compared, but {', '.join(map(' and '.join, chosen))} were"
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.3 * len(columns) + 0.6, 2.0 * len(rows) + 0.7), layout="constrained")
        panels = drawn.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        for row, own in zip(panels, rows, strict=True):
            for panel, other in zip(row, columns, strict=True):
                for i, colour in enumerate(ENDS.values()):
                    share = _shares(torch.cat([both[i] for both in chosen[own, other]]), MOST + 1)
                    panel.bar([bar + (i - 0.5) * 0.4 for bar in range(MOST + 2)], share, 0.4, color=colour)
                panel.set_title(f"{own} and {other}")
                panel.set_xticks(range(MOST + 2), [*map(str, range(MOST + 1)), f"> {MOST}"])
            row[0].set_ylabel("share of units")
        for panel in panels[-1]:
            panel.set_xlabel("links")
        style.legend_below(drawn, [Patch(color=colour) for colour in ENDS.values()], list(ENDS))
    return drawn


def between(lines: Sequence[Line], cutoff: float) -> Figure:
    """Share of the row's units that the column has too, by activity: every method in every other, and in itself of another
    seed (at the size at which methods meet)."""
    chosen = _of(lines, Kind.method)
    methods = list(dict.fromkeys(line[f"{which}_method"] for which in ("first", "second") for line in chosen))
    sizes = {line[f"{which}_method"]: line[f"{which}_times"] for which in ("first", "second") for line in chosen}
    share: dict[tuple[str, str], float] = {}
    for first in methods:
        own = [line for line in _of(lines, Kind.seed) if line["first_method"] == first]
        if group := [line for line in own if line["first_times"] == sizes[first]]:
            share[first, first] = mean(group, "activity_best_found")
        for second in methods:
            if group := [line for line in chosen if (line["first_method"], line["second_method"]) == (first, second)]:
                share[first, second] = mean(group, "activity_best_found")
                share[second, first] = mean(group, "activity_best_back_found")
    grid = [[share.get((own, other), float("nan")) for other in methods] for own in methods]
    with matplotlib.rc_context(style.RC):
        side = 0.7 * len(methods)
        drawn = Figure(figsize=(side + 1.6, side + 1.2), layout="constrained")
        panel = drawn.subplots()
        panel.imshow(grid, vmin=0, vmax=1, cmap="Blues")
        for (own, other), value in share.items():
            at = methods.index(other), methods.index(own)
            panel.text(*at, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black")
        panel.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
        panel.set_yticks(range(len(methods)), methods)
        panel.grid(False)
        panel.set_xlabel(f"are also in (correlation > {cutoff})")
        panel.set_ylabel("units of")
    return drawn


def _of(lines: Sequence[Line], kind: Kind) -> list[Line]:
    return [line for line in lines if line["kind"] == kind.value]
