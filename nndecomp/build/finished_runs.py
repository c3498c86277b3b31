"""Finished runs -> what they hold, measured beside baselines, and the report; and the same of a parameter decomposition trained now."""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.build.baselines import baselines
from nndecomp.build.collecting import Collected
from nndecomp.build.compute import parameters_at_compute
from nndecomp.build.measuring import measured, reported
from nndecomp.build.parameters import NAME, gated, left_out, trained_parameters
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.targets.base import Target

if TYPE_CHECKING:
    from pandas import DataFrame


def measured_runs(cfg: RunConfig, target: Target, runs: Collected, run: str) -> "DataFrame":
    """Rows for all that the runs hold, and for the baselines of `compare`."""
    beside = {name: [each] for name, each in baselines(cfg, target).items()}
    return measured(cfg, target, runs.replacements | beside, run, runs.seeds)


def reported_runs(rows: "DataFrame", runs: Collected, out: Path) -> dict[str, float]:
    """As `reported`, with the fronts over every x-axis, and a sentence on each decomposition that lacks points."""
    from nndecomp.report import front_figures, fronts, style  # late: matplotlib and pandas are slow to import

    for inputs in fronts.measured_inputs(rows):
        style.save(front_figures.figure_of_axes(rows, inputs), out / "figures", f"fronts_{inputs}")
    scores = reported(rows, out)
    for notice in runs.notices:
        print(notice)
    return scores


def parameters_at_flops(cfg: RunConfig, target: Target, out: Path) -> ParameterDecomposition:
    """Trained on as many tokens as `flops` allow, which are counted first and printed; null: on training.n_tokens."""
    from nndecomp.report import compute, tables

    if cfg.flops is not None:
        cfg, spent = parameters_at_compute(cfg, target)
        print(tables.terminal(compute.table({NAME: (spent.flops, spent.n_tokens)})))
    return trained_parameters(cfg, target, out)


def measured_parameters(cfg: RunConfig, target: Target, decomposition: ParameterDecomposition, run: str) -> "DataFrame":
    """Rows for each gate of `evaluation`; says which have no place."""
    behind = gated(cfg.evaluation, target, {NAME: decomposition})
    for notice in left_out(cfg.evaluation, NAME, decomposition):
        print(notice)
    return measured(cfg, target, {name: [each] for name, each in behind.items()}, run)
