"""Finished runs side by side: of every decomposition and part what it is made of, how it is used and what it costs.

`lines` has everything, `table` is for readers, `figure` shows the same. L0 of a whole is the sum over its parts, which may be
two maps of one MLP; alive are components active on some held-out token. mse and fvu of a part are of the site that its
layer writes, those of a whole are pooled over sites. CE increase and KL of a part are with its layer's site alone replaced, where
that was measured, and of a whole with all that it writes replaced.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from nndecomp.decompositions.parts import Part, Parts
from nndecomp.report import style
from nndecomp.report.figures import FACES, inputs_entry, layers_in_words, short
from nndecomp.report.results import records_of

WHOLE = "all"
_LAYER = re.compile(r"L(\d+)")
_PREFERRED = ("live", "clean_gates", "clean")  # what a reader is shown of a decomposition, the first that was measured


@dataclass(frozen=True)
class Trained:
    """What rows do not say of a decomposition; of a baseline, nothing was trained."""

    parts: Parts | None
    n_tokens: int


def lines(rows: pandas.DataFrame, trained: Mapping[tuple[str, str], Trained]) -> pandas.DataFrame:
    """One line for each decomposition, inputs and part, the whole last. `trained`: by run and name."""
    of_each: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records_of(rows):
        of_each.setdefault((record["run"], record["name"]), []).append(record)
    found = []
    for key, records in of_each.items():
        for inputs in style.INPUTS:
            own = [r for r in records if r["inputs"] == inputs and not r["note"]]
            if own:
                found += _of_one(own, inputs, trained[key])
    return pandas.DataFrame(found)


def _of_one(records: Sequence[dict[str, Any]], inputs: str, trained: Trained) -> list[dict[str, object]]:
    first = records[0]
    # Of a site or group; a run in which one site was replaced has numbers of the same name.
    whole = {(r["metric"], r["site"]): r for r in records if r["patched"] != "single"}
    alone = {(r["metric"], r["site"]): r for r in records if r["patched"] == "single"}
    parts = [site for metric, site in whole if metric == "l0"]
    sites = [site for metric, site in whole if metric == "fvu" and site != WHOLE]
    known = trained.parts
    sizes = {
        part: Part(int(first["n_features"]), 0, 0) if known is None else known.parts[part] for part in parts
    }  # of a baseline, whose parts are alike
    total = Part(sum(p.n_components for p in sizes.values()), 0, 0) if known is None else known.whole
    head = {
        **{name: first[name] for name in ("run", "name", "architecture", "activation", "k", "seed", "layers")},
        "inputs": inputs,
    }

    def line(
        part: str, size: Part, n_alive: int, l0: float, site: str | None, measured: Mapping[Any, Any]
    ) -> dict[str, object]:
        def number(metric: str, of: Mapping[Any, Any] = whole, end: str = "value") -> float:
            return of[metric, site][end] if (metric, site) in of else math.nan

        return {
            **head,
            "part": part,
            "components": size.n_components,
            "alive": n_alive,
            "dead_fraction": 1 - n_alive / size.n_components,
            "l0": l0,
            "ce_increase": number("ce_increase", measured),
            "ce_increase_low": number("ce_increase", measured, "low"),
            "ce_increase_high": number("ce_increase", measured, "high"),
            "kl": number("kl", measured),
            "mse": number("mse"),
            "fvu": number("fvu"),
            "parameters": size.parameters,
            "gate_parameters": size.gate_parameters,
            "training_tokens": trained.n_tokens,
        }

    alive = {p: round(sizes[p].n_components * (1 - whole["dead_fraction", p]["value"])) for p in parts}
    l0 = {p: whole["l0", p]["value"] for p in parts}
    own_lines = [line(p, sizes[p], alive[p], l0[p], _site_of(p, sites), alone) for p in parts]
    return [*own_lines, line(WHOLE, total, sum(alive.values()), sum(l0.values()), WHOLE, whole)]


def _site_of(part: str, sites: Sequence[str]) -> str | None:
    """The one written site of a part's layer, or None."""
    layer = _LAYER.match(part)
    own = [] if layer is None else [site for site in sites if site.startswith(f"{layer[0]}.")]
    return own[0] if len(own) == 1 else None


def shown(found: pandas.DataFrame) -> list[dict[str, Any]]:
    """Of each decomposition the inputs that a reader is shown, with a label that no other has."""
    records = records_of(found)
    measured: dict[tuple[str, str], set[str]] = {}
    for r in records:
        measured.setdefault((r["run"], r["name"]), set()).add(r["inputs"])
    best = {key: next(i for i in _PREFERRED if i in own) for key, own in measured.items()}
    kept = [r for r in records if r["inputs"] == best[r["run"], r["name"]]]
    wholes = [r for r in kept if r["part"] == WHOLE]
    labels = {(r["run"], r["name"]): _label(r, [o for o in wholes if o["name"] == r["name"]]) for r in wholes}
    return [{**r, "label": labels[r["run"], r["name"]]} for r in kept]


def _label(record: Mapping[str, Any], same_name: Sequence[Mapping[str, Any]]) -> str:
    """Its name, and where others have the same what tells them apart."""
    words = {
        "k": f"k={record['k']:g}",
        "layers": layers_in_words(record["layers"]),
        "seed": f"seed {record['seed']}",
        "run": record["run"],
    }
    label, others = str(record["name"]), list(same_name)
    for what, word in words.items():
        if len({str(other[what]) for other in others}) > 1:
            label = f"{label}, {word}"
            others = [other for other in others if str(other[what]) == str(record[what])]
    return label


def table(found: pandas.DataFrame) -> pandas.DataFrame:
    """For readers: a line a part, and one for the whole, in bold."""
    return pandas.DataFrame([_cells(r) for r in shown(found)])


def printed(wholes: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """The wholes alone, in few columns."""
    left_out = ("part", "replaced", "KL (nats)", "alive")
    cells = ({**_cells(r), "decomposition": r["label"]} for r in wholes)
    return pandas.DataFrame([{c: text for c, text in each.items() if c not in left_out} for each in cells])


def _cells(r: Mapping[str, Any]) -> dict[str, str]:
    whole, alone = r["part"] == WHOLE, "-" if math.isnan(r["ce_increase"]) else "its layer alone"
    interval = (
        "" if math.isnan(r["ce_increase_low"]) else f" [{r['ce_increase_low']:z.3f}, {r['ce_increase_high']:z.3f}]"
    )
    return {
        "decomposition": r["label"] if not whole else f"**{r['label']}**",
        "part": r["part"],
        "replaced": layers_in_words(r["layers"]) if whole else alone,
        "inputs": style.INPUTS[r["inputs"]],
        "components": f"{r['components']:,}",
        "alive": f"{r['alive']:,}",
        "dead": f"{r['dead_fraction']:.1%}",
        "L0": f"{r['l0']:.1f}" + (" (sum)" if whole else ""),
        "CE increase (nats)": _number(r["ce_increase"]) + interval,
        "KL (nats)": _number(r["kl"]),
        "MSE": _number(r["mse"], ".3g"),
        "FVU": _number(r["fvu"]),
        "parameters": _count(r["parameters"]),
        "of these, gate": _count(r["gate_parameters"]),
        "training tokens": _count(r["training_tokens"]),
    }


def _number(value: float, form: str = ".3f") -> str:
    return "-" if math.isnan(value) else format(value, f"z{form}")


def _count(value: int | float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{int(value):,}"


PANELS = {
    "l0": "active components\nof a part",
    "dead_fraction": "dead components",
    "ce_increase": "CE increase (nats)",
    "fvu": "fraction of variance\nunexplained",
    "parameters": "parameters trained\n(open: of the gate)",
}


def figure(found: pandas.DataFrame) -> Figure:
    """A line a decomposition, a panel a column: small marks are parts, large ones the whole (of L0, the mean over parts)."""
    records = shown(found)
    labels = list(dict.fromkeys(r["label"] for r in records))
    architectures = style.in_order(r["architecture"] for r in records)
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(10.4, 1.1 + 0.21 * len(labels)), layout="constrained")
        panels = drawn.subplots(1, len(PANELS), sharey=True, squeeze=False)[0]
        for panel, (metric, label) in zip(panels, PANELS.items(), strict=True):
            for y, own in enumerate(labels):
                colour = style.colour(next(r["architecture"] for r in records if r["label"] == own), architectures)
                _row(panel, y, [r for r in records if r["label"] == own], metric, colour)
            _scale(panel, metric)
            panel.set_xlabel(label)
        panels[0].set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        handles = [inputs_entry(inputs) for inputs in _PREFERRED if any(r["inputs"] == inputs for r in records)]
        for handle in handles:
            handle.set_linestyle("none")
        drawn.legend(handles=handles, loc="outside upper right", ncols=len(handles))
    return drawn


def _row(panel: Axes, y: int, records: Sequence[Mapping[str, Any]], metric: str, colour: str) -> None:
    parts = [r for r in records if r["part"] != WHOLE]
    (whole,) = [r for r in records if r["part"] == WHOLE]
    face = FACES[whole["inputs"]](colour)
    if metric in ("l0", "dead_fraction", "fvu") and len(parts) > 1:
        panel.plot([r[metric] for r in parts], [y] * len(parts), "|", color=colour, markersize=7, zorder=2)
    value = whole[metric] / len(parts) if metric == "l0" else whole[metric]
    if metric == "ce_increase":
        panel.hlines(y, whole["ce_increase_low"], whole["ce_increase_high"], color=colour)
    if metric == "parameters":
        if not value:
            return  # nothing was trained
        panel.plot([whole["gate_parameters"]], [y], "o", color=colour, markerfacecolor="white", zorder=3)
        face = colour
    panel.plot([value], [y], "o", color=colour, markerfacecolor=face, zorder=3)


def _scale(panel: Axes, metric: str) -> None:
    """Log for what spans much; a panel is narrow, so ticks are few."""
    shown = [float(x) for line in panel.lines for x in line.get_xdata()]  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    if metric != "dead_fraction" and low > 0 and high > 10 * low:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.set_xlim(min(0.0, 1.1 * low), 1.1 * high or 1.0)
        panel.xaxis.set_major_locator(MaxNLocator(3))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
