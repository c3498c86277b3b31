"""Figures of which units are those of another decomposition too."""

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nndecomp.evaluation.comparing_units import Comparison, Kind
from nndecomp.report import style
from nndecomp.report.canonical import Line, mean, sizes_of

MOST = 4  # children or links that are told apart
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
        panels[0][0].set_ylim(-0.02, 1.02)
        artists, labels = panels[0][0].get_legend_handles_labels()
        handles = [*artists, Line2D([], [], linestyle=":", color=style.GREY)]
        handles.append(Line2D([], [], linestyle="", marker="x", color=style.GREY))
        labels = [*labels, "chance", "in one before training"]
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return drawn


def _found(panel: Axes, lines: Sequence[Line], kind: Kind, metric: str, colours: Mapping[str, str]) -> None:
    there = sorted(_of(lines, kind), key=lambda line: (line["first_times"], line["second_times"]))
    sizes = list(dict.fromkeys(map(sizes_of, there)))
    panel.set_xticks(range(len(sizes)), sizes)
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
            )


def children(found: Sequence[Comparison], colours: Mapping[str, str]) -> Figure:
    """How many units of the other cover a unit: a panel a method, bars at the same size and in larger ones."""
    kept = [each for each in found if each.pair.kind in LOOKS]
    methods = list(dict.fromkeys(each.pair.first.method for each in kept))
    sizes = list(dict.fromkeys((each.pair.first.times, each.pair.second.times) for each in kept))
    smallest = min(first for first, _ in sizes)
    sizes = sorted(pair for pair in sizes if pair[0] == smallest)
    shades = [1.0, 0.6, 0.3, 0.15]
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.5 * len(methods) + 0.4, 2.7), layout="constrained")
        panels = drawn.subplots(1, len(methods), squeeze=False, sharey=True)[0]
        for panel, method in zip(panels, methods, strict=True):
            colour = style.colour(colours[method], list(dict.fromkeys(colours.values())))
            width = 0.8 / len(sizes)
            for i, (pair, shade) in enumerate(zip(sizes, shades, strict=False)):
                own = [
                    each
                    for each in kept
                    if each.pair.first.method == method and (each.pair.first.times, each.pair.second.times) == pair
                ]
                if not own:
                    continue
                parts = torch.cat([each.cover.parts for each in own]).clamp(max=MOST)
                share = parts.bincount(minlength=MOST + 1) / len(parts)
                label = "same size, other seed" if pair[0] == pair[1] else f"×{pair[1] // pair[0]}, other seed"
                at = torch.arange(MOST + 1) + (i - (len(sizes) - 1) / 2) * width
                panel.bar(at, share, width, color=colour, alpha=shade, label=label)
            panel.set_title(method)
            panel.set_xticks(range(MOST + 1), ["lost", "kept", *map(str, range(2, MOST)), f"≥ {MOST}"])
            panel.legend()
        panels[0].set_ylabel("share of units")
        for panel in panels:
            panel.set_xlabel("units of the other that cover it")
    return drawn


def degrees(found: Sequence[Comparison], of: Sequence[str]) -> Figure | None:
    """Links of units of the methods `of` with units of every other method, both ways; None where there are none."""
    chosen: dict[tuple[str, str], list[tuple[torch.Tensor, torch.Tensor]]] = {}
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
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.3 * len(columns) + 0.6, 2.0 * len(rows) + 0.7), layout="constrained")
        panels = drawn.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
        for row, own in zip(panels, rows, strict=True):
            for panel, other in zip(row, columns, strict=True):
                for i, (label, colour) in enumerate(((f"of {own}", "#0072B2"), ("of the other", "#E69F00"))):
                    degree = torch.cat([both[i] for both in chosen[own, other]]).clamp(max=MOST + 1)
                    share = degree.bincount(minlength=MOST + 2) / len(degree)
                    at = torch.arange(MOST + 2) + (i - 0.5) * 0.4
                    panel.bar(at, share, 0.4, color=colour, label=label)
                panel.set_title(f"{own} and {other}")
                panel.set_xticks(range(MOST + 2), [*map(str, range(MOST + 1)), f"> {MOST}"])
            row[0].set_ylabel("share of units")
        for panel in panels[-1]:
            panel.set_xlabel("links")
        artists, _ = panels[0][0].get_legend_handles_labels()
        drawn.legend(artists, ["of the one", "of the other"], loc="outside lower center", ncols=2)
    return drawn


def between(lines: Sequence[Line], cutoff: float) -> Figure:
    """Share of the row's units that the column has too, by activity: every method in every other."""
    chosen = _of(lines, Kind.method)
    methods = list(dict.fromkeys(line[f"{which}_method"] for which in ("first", "second") for line in chosen))
    share = torch.full((len(methods), len(methods)), float("nan"), dtype=torch.float64)
    for i, first in enumerate(methods):
        for j, second in enumerate(methods):
            group = [line for line in chosen if (line["first_method"], line["second_method"]) == (first, second)]
            if group:
                share[i, j], share[j, i] = mean(group, "activity_best_found"), mean(group, "activity_best_back_found")
    with matplotlib.rc_context(style.RC):
        side = 0.75 * len(methods)
        drawn = Figure(figsize=(side + 2.2, side + 1.2), layout="constrained")
        panel = drawn.subplots()
        panel.imshow(share, vmin=0, vmax=1, cmap="Blues")
        for i in range(len(methods)):
            for j in range(len(methods)):
                if i != j:
                    value = share[i, j].item()
                    panel.text(
                        j, i, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black"
                    )
        panel.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
        panel.set_yticks(range(len(methods)), methods)
        panel.grid(False)
        panel.set_xlabel(f"are also in, correlation > {cutoff}")
        panel.set_ylabel("units of")
    return drawn


def _of(lines: Sequence[Line], kind: Kind) -> list[Line]:
    return [line for line in lines if line["kind"] == kind.value]
