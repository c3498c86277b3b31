"""Finished runs -> what they hold, measured beside baselines, and the report; and the same of a parameter decomposition trained now."""

from pathlib import Path
from typing import TYPE_CHECKING

from nndecomp.build.baselines import baselines
from nndecomp.build.collecting import Collected
from nndecomp.build.compute import parameters_at_compute
from nndecomp.build.measuring import measured, reported
from nndecomp.build.parameters import NAME, batch_seqs, gated, left_out, trained_objective
from nndecomp.config.schema import RunConfig
from nndecomp.decompositions.spd.gates import GateKind
from nndecomp.evaluation.context import context
from nndecomp.evaluation.heldout_losses import loss_rows, losses
from nndecomp.evaluation.rows import join, table
from nndecomp.targets.base import Target
from nndecomp.tokens import heldout_tokens
from nndecomp.training.parameters import SPDObjective

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


def parameters_at_flops(cfg: RunConfig, target: Target, out: Path) -> SPDObjective:
    """Trained on as many tokens as `flops` allow, which are counted first and printed; null: on training.n_tokens."""
    from nndecomp.report import compute, tables

    if cfg.flops is not None:
        cfg, spent = parameters_at_compute(cfg, target)
        print(tables.terminal(compute.table({NAME: (spent.flops, spent.n_tokens)})))
    return trained_objective(cfg, target, out)


def measured_parameters(cfg: RunConfig, target: Target, trained: SPDObjective, run: str) -> "DataFrame":
    """Rows for each gate of `evaluation`, and for the losses that trained it; says which gates have no place."""
    decomposition = trained.finished()
    behind = gated(cfg.evaluation, target, {NAME: decomposition})
    for notice in left_out(cfg.evaluation, NAME, decomposition):
        print(notice)
    rows = measured(cfg, target, {name: [each] for name, each in behind.items()}, run)
    text = heldout_tokens(cfg.tokens, target.tokenizer, cfg.evaluation.n_seqs)
    name, gate = next((name, each) for name, each in behind.items() if each.gate.kind is GateKind.importance)
    found = loss_rows(trained.cfg, *losses(trained, text, batch_seqs(cfg), 1.0, cfg.seed), cfg.evaluation, cfg.seed)
    return join([rows, table(context(cfg, target, [gate], run, name, cfg.seed), found)])
