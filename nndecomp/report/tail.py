"""The least important components of a parameter decomposition: tables and a figure."""

from collections.abc import Sequence

import matplotlib
import pandas
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.evaluation.tail import Choice, Kept, MapTail, Tail
from nndecomp.report import style
from nndecomp.report.figures import plain_ticks

# Of each way of choosing what is kept: colour, marker, line.
LOOKS = {
    Choice.token: (style.COLOURS["spd"], "o", "-"),
    Choice.rank: ("#0072B2", "s", "--"),
    Choice.random: (style.GREY, "^", ":"),
}
BANDS = 64  # of ranks, that a line joins
SHADES = "viridis"  # of maps, in the order of the model


def counts(found: Tail, thresholds: Sequence[float]) -> pandas.DataFrame:
    """One line a map: how many components have a mean logit above each threshold, and what no component holds."""
    lines = []
    for each in found.maps:
        above = {f"> {t:g}": f"{int((each.logit > t).sum())}" for t in sorted(thresholds)}
        lines.append(
            {"map": each.name, "components": len(each.logit), **above, "|W - VU| / |W|": f"{each.leftover:.4f}"}
        )
    return pandas.DataFrame(lines)


def bands(found: Tail, n: int) -> pandas.DataFrame:
    """One line a map and band of ranks: means over its components, and its share of the sum of norms."""
    lines = []
    for each in found.maps:
        for band in each.bands(n):
            lines.append(
                {
                    "map": each.name,
                    "ranks": f"{band.start + 1}-{band.stop}",
                    "logit": f"{each.logit[band].mean():.3f}",
                    "important on": f"{each.often[band].mean():.2%}",
                    "|V|": f"{each.V[band].mean():.3f}",
                    "|U|": f"{each.U[band].mean():.3f}",
                    "|V||U|": f"{each.norm[band].mean():.4f}",
                    "share of norms": f"{each.norm[band].sum() / each.norm.sum():.1%}",
                }
            )
    return pandas.DataFrame(lines)


def kept(found: Tail) -> pandas.DataFrame:
    """One line for each set of maps and way to choose: the increase in cross-entropy, nats, by the share that is kept."""
    by_line: dict[tuple[str, Choice], dict[float, Estimate]] = {}
    for each in found.kept:
        by_line.setdefault((each.map, each.choice), {})[each.share] = each.ce_increase
    return pandas.DataFrame(
        {
            "maps": where,
            "kept": choice.value,
            **{f"{share:.1%} kept": _text(by_share[share]) for share in sorted(by_share, reverse=True)},
        }
        for (where, choice), by_share in by_line.items()
    )


def components(found: Tail) -> pandas.DataFrame:
    """Every component, by rank."""
    columns = {"logit": "logit", "V": "norm_V", "U": "norm_U", "norm": "norm", "often": "share_important"}
    tables = []
    for each in found.maps:
        numbers = {column: getattr(each, name).tolist() for name, column in columns.items()}
        ranks = range(1, len(each.logit) + 1)
        own = {"map": each.name, "rank": ranks, "component": each.component.tolist(), **numbers}
        tables.append(pandas.DataFrame({**own, "share_of_norms_from_here": each.share_from().tolist()}))
    return pandas.concat(tables, ignore_index=True)


def scores(found: Tail) -> dict[str, float]:
    """Of each map what no component holds, and the increase in cross-entropy of all that were measured."""
    leftover = {f"{each.name}/leftover": each.leftover for each in found.maps}
    damage = {
        f"{each.map}/ce_increase_{each.choice.name}_{100 * each.share:g}": each.ce_increase.value for each in found.kept
    }
    return leftover | damage


def figure(found: Tail, important: float, target: str) -> Figure:
    """By rank, a line a map: mean logit, how often it is important, norm; and what dropping the rest costs, all maps at once."""
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(9.6, 5.6), layout="constrained")
        panels = drawn.subplots(2, 2)
        quantities = {
            "logit": "mean importance logit",
            "often": f"share of tokens with g > {important:g}",
            "norm": "|V| |U|",
        }
        for panel, (name, label) in zip(panels.flatten(), quantities.items(), strict=False):
            for each, colour in zip(found.maps, _shades(len(found.maps)), strict=True):
                x, y = _smooth(each, getattr(each, name))
                panel.plot(x, y, color=colour, linewidth=1.3, label=each.name)
            panel.set_ylabel(label)
            panel.set_xlabel("rank / number of components")
            panel.set_xlim(0, 1)
        panels[0, 0].axhline(0, color="black", linewidth=0.8, zorder=1)
        cost, where = panels[1, 1], found.kept[0].map
        for choice, (colour, marker, line) in LOOKS.items():
            points = sorted((each for each in found.kept if (each.map, each.choice) == (where, choice)), key=_share)
            x, y = [each.share for each in points], [each.ce_increase for each in points]
            cost.vlines(x, [e.low for e in y], [e.high for e in y], color=colour, linewidth=1.2)
            cost.plot(x, [e.value for e in y], line, color=colour, marker=marker, label=choice.value)
        cost.set_xlabel("share of components kept, " + ("all maps at once" if where == "all" else where))
        cost.set_ylabel("CE increase (nats)")
        if all(each.ce_increase.low > 0 for each in found.kept if each.map == where):
            cost.set_yscale("log")
        plain_ticks(cost)
        cost.legend(title="kept")
        drawn.suptitle(f"{target}: components by rank of their mean importance logit", x=0.01, ha="left", fontsize=10)
        drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return drawn


def _smooth(each: MapTail, values: Float[Tensor, " C"]) -> tuple[list[float], list[float]]:
    """Means over BANDS runs of ranks: single components scatter, and files stay small."""
    bands, n = each.bands(BANDS), len(each.logit)
    return [(band.start + band.stop) / 2 / n for band in bands], [values[band].mean().item() for band in bands]


def _share(each: Kept) -> float:
    return each.share


def _shades(n: int) -> list[tuple[float, float, float, float]]:
    colours = matplotlib.colormaps[SHADES]
    return [colours(0.9 * i / max(1, n - 1)) for i in range(n)]


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
