"""Rows -> the front of each family: the least it loses for what it spends, and the area under that.

A family is what rows call an architecture, whatever its sizes, activation functions and sparsities. The front of one seed is
made of its points (x, y) that no other beats, having neither more x nor more y. Between two of them it is linear in log x;
after the last it stays where it is, since more may be spent than helps; before the first there is none.

    area = 1 / log(b / a)  integral from a to b of y d(log x)      mean of y over log x, in the unit of y

[a, b] is the range of x in which all families were measured, with all their seeds. Where that is less than a factor of 2, it
is the widest one in which as many families as possible were, and the others are named.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.report import style
from nndecomp.report.replacement import mean_over_seeds
from nndecomp.report.results import Result, records_of, results

# What the cost of gates alone is does not change along a front.
AXES = {axis: label for axis, label in style.AXES.items() if axis != "gate_parameters"}
MIN_RANGE = 2.0  # b / a: a mean over less says little


@dataclass(frozen=True)
class Point:
    x: float
    y: Estimate


Front = Sequence[Point]


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats, by x; y falls along it."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y.value)):
        if not best or point.y.value < best[-1].y.value:
            best.append(point)
    return best


def at(line: Front, x: float) -> Estimate:
    """The front's height at x, where there is a front."""
    assert line[0].x <= x, f"the front begins at {line[0].x}, after {x}"
    for left, right in zip(line, line[1:], strict=False):
        if x < right.x:
            share = math.log(x / left.x) / math.log(right.x / left.x)
            ends = ("value", "low", "high")
            return Estimate(*((1 - share) * getattr(left.y, e) + share * getattr(right.y, e) for e in ends))
    return line[-1].y


def area(line: Front, a: float, b: float) -> Estimate:
    """Mean height over log x from a to b, by trapezoids; its interval is that of the ends of the points' intervals."""
    knots = [a, *(point.x for point in line if a < point.x < b), b]
    heights = [at(line, x) for x in knots]
    sums = dict.fromkeys(("value", "low", "high"), 0.0)
    for x1, x2, y1, y2 in zip(knots, knots[1:], heights, heights[1:], strict=False):
        for end in sums:
            sums[end] += math.log(x2 / x1) * (getattr(y1, end) + getattr(y2, end)) / 2
    return Estimate(*(sums[end] / math.log(b / a) for end in ("value", "low", "high")))


@dataclass(frozen=True)
class Family:
    """Of one architecture: the measured points of each seed."""

    name: str
    points: Mapping[int, Sequence[Point]]

    @property
    def low(self) -> float:
        """From here on every seed has a front."""
        return max(min(point.x for point in own) for own in self.points.values())

    @property
    def high(self) -> float:
        """Up to here every seed was measured."""
        return min(max(point.x for point in own) for own in self.points.values())

    @property
    def fronts(self) -> list[list[Point]]:
        """One a seed."""
        return [front(own) for own in self.points.values()]

    def spans(self, a: float, b: float) -> bool:
        return self.low <= a and b <= self.high


def families(found: Sequence[Result], axis: str, metric: str, inputs: str) -> list[Family]:
    """What was measured of each; points that a log axis cannot show, and numbers that do not exist, left out."""
    points: dict[str, dict[int, list[Point]]] = {}
    for result in found:
        x, y = result[axis].value, result[metric]
        if result.inputs == inputs and x > 0 and not math.isnan(y.value):
            points.setdefault(result.context.architecture, {}).setdefault(result.context.seed, []).append(Point(x, y))
    return [Family(name, points[name]) for name in style.in_order(points)]


def common_range(every: Sequence[Family]) -> tuple[float, float] | None:
    """That of the areas; None if no two families were measured in a common one."""
    ranges = [(f.low, g.high) for f in every for g in every if g.high >= MIN_RANGE * f.low]
    measured = {(a, b): sum(family.spans(a, b) for family in every) for a, b in ranges}
    best = max(ranges, key=lambda ab: (measured[ab], ab[1] / ab[0]), default=None)
    return best if best is not None and measured[best] > 1 else None


def measured_inputs(rows: pandas.DataFrame) -> list[str]:
    """Of style.INPUTS, those with which two families or more have fronts to compare."""
    found = results(rows)
    fronts = {inputs: families(found, "active_per_reconstruction", "ce_increase", inputs) for inputs in style.INPUTS}
    return [inputs for inputs, each in fronts.items() if common_range(each) is not None]


def areas(rows: pandas.DataFrame, metric: str = "ce_increase") -> pandas.DataFrame:
    """One line for each of the inputs, x-axis and family.

    x_low and x_high are a and b, measured_low and measured_high the family's own; area, low and high the mean over seeds of
    the area and of its interval over sequences, sd how far seeds scatter; nan where the family does not span the range.
    """
    found, lines = results(rows), []
    for inputs in measured_inputs(rows):
        for axis in AXES:
            every = families(found, axis, metric, inputs)
            between = common_range(every)
            if between is None:
                continue
            for family in every:
                line: dict[str, object] = {"metric": metric, "inputs": inputs, "axis": axis, "family": family.name}
                line |= {"x_low": between[0], "x_high": between[1], "seeds": len(family.points)}
                line |= {"measured_low": family.low, "measured_high": family.high}
                of_seeds = [area(each, *between) for each in family.fronts] if family.spans(*between) else []
                mean = mean_over_seeds(of_seeds or [Estimate(math.nan, math.nan, math.nan)])
                e = mean.estimate
                lines.append({**line, "area": e.value, "low": e.low, "high": e.high, "sd": mean.sd})
    return pandas.DataFrame(lines)


def table(found: pandas.DataFrame, inputs: str, axes: Sequence[str] = tuple(AXES)) -> pandas.DataFrame:
    """Of `areas`: a line a family, the least area over the first axis first; a column an axis. For readers."""
    cells = {(r["family"], r["axis"]): r for r in records_of(found) if r["inputs"] == inputs and r["axis"] in axes}
    columns = [axis for axis in axes if any(axis == measured for _, measured in cells)]
    of_first = {family: r["area"] for (family, axis), r in cells.items() if axis == columns[0]}
    ordered = sorted(of_first, key=lambda family: math.inf if math.isnan(of_first[family]) else of_first[family])
    return pandas.DataFrame(
        [
            {
                "family": style.name(family),
                **{_heading(cells[family, axis]): _cell(cells[family, axis]) for axis in columns},
                "seeds": str(cells[family, columns[0]]["seeds"]),
            }
            for family in ordered
        ]
    )


def _heading(record: Mapping[str, Any]) -> str:
    return f"{AXES[record['axis']]}, {_reach(record, 'x')}"


def _reach(record: Mapping[str, Any], of: str) -> str:
    ends = (record[f"{of}_low"], record[f"{of}_high"])
    return " to ".join(f"{end:.3g}" if end < 1000 else f"{end:,.0f}" for end in ends)


def _cell(record: Mapping[str, Any]) -> str:
    if math.isnan(record["area"]):
        return "-"
    interval = "" if math.isnan(record["low"]) else f" [{record['low']:z.3f}, {record['high']:z.3f}]"
    return f"{record['area']:z.3f}{interval}" + ("" if math.isnan(record["sd"]) else f" (sd {record['sd']:.3f})")


def left_out(found: pandas.DataFrame) -> list[str]:
    """Which axes have no areas, and which families, and why: one sentence each."""
    without = [
        f"{style.INPUTS[inputs]}: no areas over {label}, since no two families were measured over a common factor of {MIN_RANGE:g}"
        for inputs in dict.fromkeys(found.inputs)
        for axis, label in AXES.items()
        if axis not in set(found[found.inputs == inputs].axis)
    ]
    return without + [
        f"{style.name(r['family'])}, {style.INPUTS[r['inputs']]}: no area over {AXES[r['axis']]}, measured from "
        f"{_reach(r, 'measured')} with every seed, not from {_reach(r, 'x')}"
        for r in records_of(found)
        if math.isnan(r["area"])
    ]
