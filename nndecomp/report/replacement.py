"""Replacement models side by side at the same sparsity: a table and a figure, over seeds.

A method is measured at several k, each with several seeds. Its value at x0 active features lies on straight lines between
its own measurements, over log x; where it was not measured on both sides of x0 there is none. Means are over seeds;
intervals are those over sequences, their ends averaged over seeds; "sd" is the standard deviation over seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.report import style
from nndecomp.report.figures import MARKERS, plain_ticks
from nndecomp.report.results import NOTHING, Result, results

METRICS = {
    "top1_agreement": "top-1 agreement",
    "kl": "KL(target || replaced) (nats)",
    "ce_increase": "CE increase (nats)",
}
# How far a measurement may lie from x0 and still stand for it: batchtopk keeps k features a token on average only.
NEAR = 0.02


@dataclass(frozen=True)
class Kind:
    """What a measured decomposition is an instance of."""

    method: str  # as tables and legends name it
    matching: str  # what it has in common with the others of its table
    n_parameters: int | None  # that were trained for it


@dataclass(frozen=True)
class Mean:
    """Over seeds: the value, the ends of its interval over sequences; and how far seeds scatter."""

    estimate: Estimate
    sd: float


def mean_over_seeds(estimates: Sequence[Estimate]) -> Mean:
    n = len(estimates)
    assert n > 0, "a mean over no seeds"
    value, low, high = (sum(getattr(e, end) for e in estimates) / n for end in ("value", "low", "high"))
    sd = math.sqrt(sum((e.value - value) ** 2 for e in estimates) / (n - 1)) if n > 1 else math.nan
    return Mean(Estimate(value, low, high), sd)


def at_sparsity(points: Sequence[tuple[float, Estimate]], x0: float) -> Estimate:
    """Of points (x, estimate): the estimate at x0, linear in log x between the two nearest; NOTHING outside of them."""
    points = sorted(points, key=lambda point: point[0])
    near = [(abs(math.log(x / x0)), e) for x, e in points if abs(math.log(x / x0)) <= NEAR]
    if near:
        return min(near, key=lambda point: point[0])[1]
    for (x1, e1), (x2, e2) in zip(points, points[1:], strict=False):
        if x1 < x0 < x2:
            share = math.log(x0 / x1) / math.log(x2 / x1)
            ends = ("value", "low", "high")
            return Estimate(*((1 - share) * getattr(e1, end) + share * getattr(e2, end) for end in ends))
    return NOTHING


def matched(
    rows: pandas.DataFrame, kinds: Mapping[str, Sequence[Kind]], axis: str, x0: float, inputs: str = "live"
) -> pandas.DataFrame:
    """One line a method and matching: every metric with x0 active features on `axis`, of evaluation.costs."""
    lines = []
    for kind, of_kind in _by_kind(rows, kinds, inputs).items():
        line: dict[str, object] = {
            "matching": kind.matching,
            "method": kind.method,
            "features a layer": of_kind[0].context.n_features,
            "parameters": "-" if kind.n_parameters is None else f"{kind.n_parameters:,}",
        }
        for metric, label in METRICS.items():
            by_seed: dict[int, list[tuple[float, Estimate]]] = {}
            for result in of_kind:
                by_seed.setdefault(result.context.seed, []).append((result[axis].value, result[metric]))
            line[label] = _text(mean_over_seeds([at_sparsity(points, x0) for points in by_seed.values()]))
        lines.append(line)
    return pandas.DataFrame(lines)


def figure(rows: pandas.DataFrame, kinds: Mapping[str, Sequence[Kind]], axis: str, inputs: str = "live") -> Figure:
    """A row of panels a matching, a column a metric; bars are intervals over sequences, averaged over seeds."""
    by_kind = _by_kind(rows, kinds, inputs)
    matchings = list(dict.fromkeys(kind.matching for kind in by_kind))
    methods = list(dict.fromkeys(kind.method for kind in by_kind))
    with matplotlib.rc_context(style.RC):
        drawn = Figure(figsize=(9.6, 0.6 + 2.7 * len(matchings)), layout="constrained")
        panels = drawn.subplots(len(matchings), len(METRICS), squeeze=False, sharex=True, sharey="col")
        for line, matching in zip(panels, matchings, strict=True):
            for panel, (metric, label) in zip(line, METRICS.items(), strict=True):
                for kind, of_kind in by_kind.items():
                    if kind.matching == matching:
                        _series(panel, of_kind, axis, metric, kind.method, methods)
                panel.set_xscale("log")
                panel.set_ylabel(label)
                if metric != "top1_agreement":
                    panel.set_yscale("log")
                plain_ticks(panel)
            line[1].set_title(f"same {matching}")
        for panel in panels[-1]:
            panel.set_xlabel(style.AXES[axis])
        handles = {}
        for line in panels:
            artists, labels = line[0].get_legend_handles_labels()
            handles |= dict(zip(labels, artists, strict=True))
        drawn.legend(handles.values(), handles.keys(), loc="outside right upper")
    return drawn


def _series(
    panel: Axes, of_kind: Sequence[Result], axis: str, metric: str, method: str, methods: Sequence[str]
) -> None:
    by_k: dict[float, list[Result]] = {}
    for result in of_kind:
        by_k.setdefault(result.context.k, []).append(result)
    points = sorted(
        (sum(r[axis].value for r in same) / len(same), mean_over_seeds([r[metric] for r in same]).estimate)
        for same in by_k.values()
    )
    x, y = [point[0] for point in points], [point[1] for point in points]
    architecture = of_kind[0].context.architecture
    # Methods of one architecture (with a skip, without) share its colour. Dashes would mean clean inputs.
    colour = style.colour(architecture.removeprefix("skip_"), [architecture])
    marker = MARKERS[methods.index(method) % len(MARKERS)]
    line = ":" if "skip" in method else "-"
    panel.vlines(x, [e.low for e in y], [e.high for e in y], color=colour, linewidth=1.2)
    panel.plot(x, [e.value for e in y], line, color=colour, marker=marker, label=method)


def _by_kind(rows: pandas.DataFrame, kinds: Mapping[str, Sequence[Kind]], inputs: str) -> dict[Kind, list[Result]]:
    """In the order of `kinds`; a decomposition may stand in several tables."""
    found: dict[Kind, list[Result]] = {kind: [] for of_name in kinds.values() for kind in of_name}
    for result in results(rows):
        if result.inputs == inputs:
            for kind in kinds[result.context.name]:
                found[kind].append(result)
    missing = [kind.method for kind, of_kind in found.items() if not of_kind]
    assert not missing, f"{', '.join(missing)} was not measured with {inputs} inputs"
    return found


def _text(mean: Mean) -> str:
    e = mean.estimate
    if math.isnan(e.value):
        return "-"
    scatter = "" if math.isnan(mean.sd) else f" (sd {mean.sd:.3f})"
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]{scatter}"
