"""Which units are those of another decomposition too: raw numbers, one line a pair, and tables, one line a kind of pair."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import pandas
import torch

from nndecomp.evaluation.comparing_units import Comparison, Instance, Kind, in_every
from nndecomp.evaluation.unit_matching import Compared, Sought
from nndecomp.evaluation.unit_splitting import Cover

P = 0.001
SOUGHT = {
    Kind.seed: "other seed",
    Kind.untrained: "before training",
    Kind.size: "larger, other seed",
    Kind.method: "other method",
}

# What was measured of one pair, by name.
Line = Mapping[str, Any]


def raw(found: Iterable[Comparison], cutoff: float) -> list[Line]:
    """Everything that was measured, as numbers; nan where it means nothing."""
    return [_raw(each, cutoff) for each in found]


def _raw(of: Comparison, cutoff: float) -> Line:
    line: dict[str, Any] = {"kind": of.pair.kind.value}
    for which, instance, n in (("first", of.pair.first, of.n), ("second", of.pair.second, of.n_back)):
        line |= {f"{which}_method": instance.method, f"{which}_times": instance.times, f"{which}_seed": instance.seed}
        line[f"{which}_units"] = n
    for by in ("weights", "activity"):
        for how, sought in _looks(of.by().get(by)).items():
            line |= {f"{by}_{how}_{what}": value for what, value in _numbers(sought, cutoff).items()}
    line["nearest_agree"] = of.agreement()
    for end, cover in (("", of.cover), ("_back", of.cover_back), ("_chance", of.cover_null)):
        line |= {f"{what}{end}": value for what, value in _covered(cover).items()}
    none = of.absorbed is None or len(of.absorbed.fraction) == 0
    line["absorption_parents"] = 0 if of.absorbed is None else len(of.absorbed.fraction)
    line["absorption_fraction"] = math.nan if none or of.absorbed is None else of.absorbed.fraction.mean().item()
    line["absorption_full"] = math.nan if none or of.absorbed is None else of.absorbed.full.mean().item()
    graph = of.graph
    line |= {"edges": graph.n_edges, "edges_one_to_one": graph.share_one_to_one()}
    line |= {"degree": graph.degree.double().mean().item(), "degree_back": graph.degree_back.double().mean().item()}
    line |= {"linked": _share(graph.degree > 0), "linked_back": _share(graph.degree_back > 0)}
    line["largest_component"] = int(graph.components[0]) if len(graph.components) else 0
    return line


def _looks(compared: Compared | None) -> dict[str, Sought | None]:
    if compared is None:
        return dict.fromkeys(("best", "matched", "best_back"))
    return {"best": compared.best, "matched": compared.matched, "best_back": compared.best_back}


def _numbers(sought: Sought | None, cutoff: float) -> dict[str, float]:
    if sought is None:
        return dict.fromkeys(("mean", "found", "p_001", "chance_mean", "chance_found"), math.nan)
    return {
        "mean": sought.similarity.mean().item(),
        "found": sought.share_above(cutoff),
        "p_001": _share(sought.p() <= P),
        "chance_mean": sought.null.mean().item(),
        "chance_found": sought.share_of_null_above(cutoff),
    }


def _covered(cover: Cover | None) -> dict[str, float]:
    if cover is None:
        return dict.fromkeys(("lost", "kept", "split", "children", "recall", "precision"), math.nan)
    shares = {"lost": _share(cover.parts == 0), "kept": _share(cover.parts == 1), "split": _share(cover.parts > 1)}
    means = {"children": cover.n_children.double(), "recall": cover.recall, "precision": cover.precision}
    return shares | {what: each.mean().item() for what, each in means.items()}


def _share(holds: torch.Tensor) -> float:
    return holds.double().mean().item()


def found_table(lines: Sequence[Line], cutoff: float) -> pandas.DataFrame:
    """Within a method: units found again, one to one at the same size, and the best of a larger one."""
    table = []
    for (method, kind, sizes), group in _grouped(lines, [Kind.seed, Kind.untrained, Kind.size]):
        how = "best" if kind is Kind.size else "matched"
        cells = {"method": method, "size": sizes, "looked for in": SOUGHT[kind], "pairs": str(len(group))}
        cells["units"] = _text(group, "first_units", decimals=0)
        for by in ("weights", "activity"):
            cells[f"{by}: mean"] = _text(group, f"{by}_{how}_mean")
            cells[f"{by} > {cutoff}"] = _text(group, f"{by}_{how}_found", percent=True)
            cells[f"{by} > {cutoff} by chance"] = _text(group, f"{by}_{how}_chance_found", percent=True)
            cells[f"{by}: p ≤ {P}"] = _text(group, f"{by}_{how}_p_001", percent=True)
        cells["nearest by both"] = _text(group, "nearest_agree", percent=True)
        table.append(cells)
    return pandas.DataFrame(table)


def split_table(lines: Sequence[Line]) -> pandas.DataFrame:
    """Within a method: what becomes of a unit, at the same size (a seed's doing) and in larger ones."""
    table = []
    for (method, kind, sizes), group in _grouped(lines, [Kind.seed, Kind.size]):
        cells = {"method": method, "size": sizes, "in": SOUGHT[kind]}
        cells |= {what: _text(group, what, percent=True) for what in ("kept", "split", "lost")}
        cells["lost by chance"] = _text(group, "lost_chance", percent=True)
        cells |= {f"mean {what}": _text(group, what) for what in ("children", "recall", "precision")}
        cells["absorbed"] = _text(group, "absorption_fraction", percent=True)
        cells["wholly absorbed"] = _text(group, "absorption_full", percent=True)
        table.append(cells)
    return pandas.DataFrame(table)


def method_table(lines: Sequence[Line], cutoff: float, linked: float) -> pandas.DataFrame:
    """Between methods, one line for each direction."""
    table = []
    pairs: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line["kind"] == Kind.method.value:
            pairs.setdefault((line["first_method"], line["second_method"]), []).append(line)
    for (first, second), group in pairs.items():
        for own, other, back in ((first, second, ""), (second, first, "_back")):
            cells = {"units of": own, "looked for in": other, "pairs": str(len(group))}
            for by in ("weights", "activity"):
                cells[f"{by} > {cutoff}"] = _text(group, f"{by}_best{back}_found", percent=True)
                cells[f"{by}: p ≤ {P}"] = _text(group, f"{by}_best{back}_p_001", percent=True)
            cells |= {what: _text(group, f"{what}{back}", percent=True) for what in ("kept", "split", "lost")}
            cells[f"linked to any (> {linked})"] = _text(group, f"linked{back}", percent=True)
            cells["mean links"] = _text(group, f"degree{back}")
            cells["links one to one"] = _text(group, "edges_one_to_one", percent=True)
            table.append(cells)
    return pandas.DataFrame(table)


def everywhere(found: Sequence[Comparison], cutoff: float) -> dict[str, float]:
    """Of each method and size: the share of the first seed's units that are found, one to one by weights, in every other seed."""
    by_first: dict[Instance, list[torch.Tensor]] = {}
    for each in found:
        if each.pair.kind is Kind.seed and each.weights is not None:
            by_first.setdefault(each.pair.first, []).append(each.weights.matched.similarity)
    first_seeds: dict[tuple[str, int], Instance] = {}
    for each in by_first:
        first_seeds.setdefault((each.method, each.times), each)
    return {
        f"{method}/x{times}/in_every_seed": _share(in_every(by_first[first], cutoff))
        for (method, times), first in first_seeds.items()
    }


def scores(lines: Sequence[Line]) -> dict[str, float]:
    """The few numbers by which runs are compared at a glance."""
    scores: dict[str, float] = {}
    for (method, kind, sizes), group in _grouped(lines, [Kind.seed, Kind.size]):
        name, how = f"{method}/{sizes.replace(' ', '_').replace('×', 'x')}", "best" if kind is Kind.size else "matched"
        for by in ("weights", "activity"):
            scores[f"{name}/found_by_{by}"] = mean(group, f"{by}_{how}_found")
        scores[f"{name}/split"] = mean(group, "split")
    return scores


def mean(group: Sequence[Line], metric: str) -> float:
    return fmean(float(line[metric]) for line in group)


def _grouped(lines: Sequence[Line], kinds: Sequence[Kind]) -> list[tuple[tuple[str, Kind, str], list[Line]]]:
    """Pairs of one method, kind and sizes."""
    groups: dict[tuple[str, Kind, str], list[Line]] = {}
    for line in lines:
        if (kind := Kind(line["kind"])) in kinds:
            groups.setdefault((line["first_method"], kind, sizes_of(line)), []).append(line)
    return list(groups.items())


def sizes_of(line: Line) -> str:
    first, second = line["first_times"], line["second_times"]
    return f"×{first}" if first == second else f"×{first} in ×{second}"


def _text(group: Sequence[Line], metric: str, percent: bool = False, decimals: int = 2) -> str:
    """Mean over pairs, ± their standard deviation where there are several; - where nothing was measured."""
    each = [float(line[metric]) * (100 if percent else 1) for line in group]
    if any(map(math.isnan, each)):
        return "-"
    places, unit = (1, "%") if percent else (decimals, "")
    spread = f" ± {stdev(each):.{places}f}" if len(each) > 1 else ""
    return f"{fmean(each):.{places}f}{spread}{unit}"
