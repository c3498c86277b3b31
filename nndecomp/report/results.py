"""Rows -> one result for each decomposition and `inputs`: what was measured with everything replaced."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas

from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.evaluation.rows import Context
from nndecomp.report.style import INPUTS

NOTHING = Estimate(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Result:
    """`measured` by metric. Measurements without replacements (ce_clean) and with ablations (ce_zero) stand in the
    results of all inputs."""

    context: Context
    inputs: str  # clean | live | clean_gates
    measured: dict[str, Estimate]

    def __getitem__(self, metric: str) -> Estimate:
        """nan where it was not measured."""
        return self.measured.get(metric, NOTHING)

    def recovered(self, kind: str) -> float:
        """Share of the cross-entropy lost to zero- or mean-ablation that the reconstruction gives back.

            1 - ce_increase / ce_increase_kind

        Where ablation's own increase is not above 0 beyond its interval there is no such share: nan.
        """
        lost = self[f"ce_increase_{kind}"]
        return 1 - self["ce_increase"].value / lost.value if lost.low > 0 else math.nan


def results(rows: pandas.DataFrame) -> list[Result]:
    """In the order of the rows, and of `style.INPUTS`."""
    by_context: defaultdict[Context, list[dict[str, Any]]] = defaultdict(list)
    for record in records_of(rows):
        if record["site"] == "all" or record["site"].endswith(":all"):
            by_context[_context(record)].append(record)
    found = []
    for context, records in (each for item in by_context.items() for each in _of_each_model(*item)):
        shared = [r for r in records if (r["inputs"], r["patched"]) == ("none", "all")]
        for inputs in INPUTS:
            # Reconstruction on clean inputs is measured in the undisturbed run, where nothing is patched.
            patched = ("all", "none") if inputs == "clean" else ("all",)
            own = [r for r in records if r["inputs"] == inputs and r["patched"] in patched and not r["note"]]
            if own:
                found.append(Result(context, inputs, _by_metric(context, [*shared, *own])))
    assert found, "there is nothing to report: no rows with all sites replaced"
    return found


def _of_each_model(
    context: Context, records: Sequence[dict[str, Any]]
) -> list[tuple[Context, Sequence[dict[str, Any]]]]:
    """Of a decomposition of two models: what was measured in each, beside what is common to both (its active features)."""
    sites = dict.fromkeys(r["site"] for r in records if r["site"] != "all")
    if not sites:
        return [(context, records)]
    found = []
    for site in sites:
        own = [r for r in records if r["site"] == site]
        metrics = {r["metric"] for r in own}
        common = [r for r in records if r["site"] == "all" and r["metric"] not in metrics]
        model = site.removesuffix(":all")
        found.append((replace(context, name=f"{context.name or context.run} in {model}"), [*own, *common]))
    return found


def records_of(table: pandas.DataFrame) -> list[dict[str, Any]]:
    """One dict a line."""
    return [dict(zip(map(str, table.columns), line, strict=True)) for line in table.itertuples(index=False, name=None)]


def _context(record: dict[str, Any]) -> Context:
    values: dict[str, Any] = {field.name: record[field.name] for field in fields(Context)}
    if math.isnan(values["k"]):
        values["k"] = math.nan  # one object for all: nan is equal to itself by identity only
    return Context(**values)


def _by_metric(context: Context, records: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    measured: dict[str, Estimate] = {}
    for r in records:
        assert r["metric"] not in measured, f"{r['metric']} of {context.name!r} in run {context.run} was measured twice"
        measured[r["metric"]] = Estimate(r["value"], r["low"], r["high"])
    return measured
