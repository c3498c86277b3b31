"""Rows -> what a parameter decomposition loses under each of evaluation.masks, and on each subset of its maps.

CE unrecovered = (CE - CE_clean) / (CE_zeros - CE_clean)        zeros: no component anywhere, biases stay
"""

import math

import pandas

from nndecomp.config.evaluation import EvaluatedMasks
from nndecomp.evaluation.bootstrap import Estimate
from nndecomp.report.results import Result, results

MEANING = {
    EvaluatedMasks.importance: "g",
    EvaluatedMasks.rounded: "1 where g > 0",
    EvaluatedMasks.ones: "1",
    EvaluatedMasks.zeros: "0",
    EvaluatedMasks.random: "even in [0, 1]",
    EvaluatedMasks.stochastic: "g + (1 - g) rho",
    EvaluatedMasks.pgd: "g + (1 - g) s, s found by ascent",
    EvaluatedMasks.pgd_shared: "g + (1 - g) s, one s for all text",
}
_ONLY = "ce_increase_only_"


def table(rows: pandas.DataFrame) -> pandas.DataFrame | None:
    """A line a mask and subset, of each decomposition that was measured so; None where none was."""
    lines = [line for result in results(rows) if result.inputs == "clean_gates" for line in _lines(result)]
    return pandas.DataFrame(lines) if lines else None


def _lines(result: Result) -> list[dict[str, str]]:
    measured = {kind: f"{kind.value}_masks" for kind in EvaluatedMasks if f"kl_{kind.value}_masks" in result.measured}
    subsets = [metric.removeprefix(_ONLY) for metric in result.measured if metric.startswith(_ONLY)]
    lines = [_line(result, f"{kind.value}, {MEANING[kind]}", condition) for kind, condition in measured.items()]
    worst = max(subsets, key=lambda name: result[f"kl_only_{name}"].value, default=None)
    for name in subsets:
        of = f" (worst of {len(subsets)})" if name == worst and len(subsets) > 1 else ""
        lines.append(_line(result, f"maps of {name} alone, g{of}", f"only_{name}"))
    return lines


def _line(result: Result, label: str, condition: str) -> dict[str, str]:
    increase, zeros = result[f"ce_increase_{condition}"], result["ce_increase_zeros_masks"]
    share = increase.value / zeros.value if zeros.low > 0 else math.nan
    name = (result.context.name or result.context.run).replace("_importance", "")
    return {
        "masks": f"{name}: {label}",
        "KL (nats)": _interval(result[f"kl_{condition}"]),
        "CE increase (nats)": _interval(increase),
        "CE unrecovered": "-" if math.isnan(share) else f"{share:z.1%}",
    }


def _interval(e: Estimate) -> str:
    return f"{e.value:z.3f}" if math.isnan(e.low) else f"{e.value:z.3f} [{e.low:z.3f}, {e.high:z.3f}]"
