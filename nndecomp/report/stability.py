"""Which features were found again: a table over pairs of dictionaries, and the whole distribution as a figure."""

from collections.abc import Mapping, Sequence

import matplotlib
import pandas
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from nndecomp.evaluation.stability import CUTOFFS, Again, share_above
from nndecomp.report import style

SOUGHT = {False: "other seed, matched", True: "other seed and wider, best"}  # by Again.wider
LOOKS = {"random": ("random directions", style.GREY, ":"), "untrained": ("before training", "#000000", "--")}


def summary(found: Sequence[Again]) -> pandas.DataFrame:
    """One line a method and kind of pair: means over pairs, and ± their standard deviation where there are several."""
    lines = []
    for (method, wider), pairs in _grouped(found).items():
        shares = {
            f"> {cutoff}": _text([share_above(pair.cosine, cutoff) for pair in pairs], percent=True)
            for cutoff in CUTOFFS
        }
        chance = {
            f"{label} > {cutoff}": _text([share_above(pair.nulls[null], cutoff) for pair in pairs], percent=True)
            for null, (label, *_) in LOOKS.items()
            for cutoff in CUTOFFS[:2]
        }
        lines.append(
            {
                "method": method,
                "looked for in": SOUGHT[wider],
                "pairs": len(pairs),
                "alive": _text([float(len(pair.cosine)) for pair in pairs], decimals=0),
                "mean cosine": _text([pair.cosine.mean().item() for pair in pairs]),
                **shares,
                **chance,
                "split": _text([(pair.parts > 1).double().mean().item() for pair in pairs], percent=True)
                if wider
                else "-",
            }
        )
    return pandas.DataFrame(lines)


def scores(found: Sequence[Again]) -> dict[str, float]:
    """Shares of features found again, mean over pairs, with what random directions reach."""
    scores: dict[str, float] = {}
    for (method, wider), pairs in _grouped(found).items():
        name = f"{method}/{'contained' if wider else 'found_again'}"
        for cutoff in CUTOFFS:
            by_kind = {"": [pair.cosine for pair in pairs], "_random": [pair.nulls["random"] for pair in pairs]}
            for end, cosines in by_kind.items():
                each = [share_above(cosine, cutoff) for cosine in cosines]
                scores[f"{name}_{100 * cutoff:.0f}{end}"] = sum(each) / len(each)
    return scores


def figure(found: Sequence[Again], colours: Mapping[str, str]) -> Figure:
    """Share of features above a cosine, over all cosines: a column a method, a row a kind of pair, a line a pair.

    colours: architecture of each method, for its colour.
    """
    grouped = _grouped(found)
    methods, kinds = list(dict.fromkeys(method for method, _ in grouped)), list(dict.fromkeys(w for _, w in grouped))
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(2.6 * len(methods) + 0.6, 2.3 * len(kinds) + 0.8), layout="constrained")
        panels = drawn.subplots(len(kinds), len(methods), squeeze=False, sharex=True, sharey=True)
        for line, wider in zip(panels, kinds, strict=True):
            for panel, method in zip(line, methods, strict=True):
                for pair in grouped.get((method, wider), []):
                    for null, (label, colour, dashes) in LOOKS.items():
                        _curve(panel, pair.nulls[null], colour, dashes, label)
                    architecture = colours[method]
                    _curve(panel, pair.cosine, style.colour(architecture, [architecture]), "-", "after training")
                panel.set_xlim(0, 1)
                panel.set_ylim(0, 1.02)
            line[0].set_ylabel(f"{SOUGHT[wider]}:\nshare of features above")
        for panel, method in zip(panels[0], methods, strict=True):
            panel.set_title(method)
        for panel in panels[-1]:
            panel.set_xlabel("cosine")
        artists, labels = panels[0][0].get_legend_handles_labels()
        handles = dict(zip(labels, artists, strict=True))
        style.legend_below(drawn, list(handles.values()), list(handles))
    return drawn


def _curve(panel: Axes, cosine: Float[Tensor, " feature"], colour: str, dashes: str, label: str) -> None:
    """1 - the empirical distribution function, at 200 cosines: files stay small, however many features there are."""
    x = torch.linspace(0, 1, 201, dtype=torch.float64)
    panel.plot(
        x.tolist(), [share_above(cosine, at) for at in x.tolist()], dashes, color=colour, linewidth=1.1, label=label
    )


def _grouped(found: Sequence[Again]) -> dict[tuple[str, bool], list[Again]]:
    grouped: dict[tuple[str, bool], list[Again]] = {}
    for each in found:
        grouped.setdefault((each.method, each.wider), []).append(each)
    return grouped


def _text(values: Sequence[float], percent: bool = False, decimals: int = 2) -> str:
    each = torch.tensor(values, dtype=torch.float64) * (100 if percent else 1)
    places, unit = (1, "%") if percent else (decimals, "")
    spread = f" ± {each.std().item():.{places}f}" if len(each) > 1 else ""
    return f"{each.mean().item():.{places}f}{spread}{unit}"
