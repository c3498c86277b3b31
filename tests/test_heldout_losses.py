"""Losses of training on held-out text: those that training takes of a batch, and nothing moves."""

from typing import Any

import pytest
import torch
from spd_parts import loss_term, objective_on_text, small_language_model, text
from torch.testing import assert_close

from nndecomp.config.compose import compose
from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.config.spd import Masks, Reconstructed, ReconstructionConfig, Routing, SourceScope
from nndecomp.errors import SettingError
from nndecomp.evaluation.heldout_losses import loss_rows, losses, means
from nndecomp.evaluation.rows import Context, table
from nndecomp.report.losses import table as losses_table
from nndecomp.tokens.batch import TokenBatch
from nndecomp.training.parameters import SPDObjective

FIXED = {
    "importance": loss_term(Masks.importance),
    "ones": loss_term(Masks.ones, routing=Routing.layerwise),
    "hidden": loss_term(Masks.importance, reconstructed=Reconstructed.hidden),
}


def made(terms: dict[str, ReconstructionConfig], **changes: Any) -> SPDObjective:
    objective = objective_on_text(small_language_model(), terms, p_end=0.4, frequency=0.5, **changes)
    objective.eval()
    return objective


def part(batch: TokenBatch, *rows: int) -> TokenBatch:
    at = list(rows)
    return TokenBatch(batch.tokens[at], batch.mask[at], batch.is_bos[at])


def trained(objective: SPDObjective, batch: TokenBatch, progress: float) -> dict[str, torch.Tensor]:
    """What a training step takes of the batch."""
    total, terms = objective.loss(batch, progress)
    return {
        "total": total,
        **{name: each for name, each in terms.items() if name != "loss" and not name.startswith("l0")},
    }


@pytest.mark.parametrize("progress", [0.5, 1.0])
def test_of_one_batch_they_are_the_losses_that_training_takes_of_it(progress: float):
    objective = made(
        {**FIXED, "drawn": loss_term(Masks.stochastic), "pgd": loss_term(Masks.pgd, n_steps=2, step_size=0.3)}
    )
    padded = text(padding=2)
    found = means(*losses(objective, padded, 4, progress, seed=3))
    objective.train()
    torch.manual_seed(3)
    expected = trained(objective, padded, progress)
    assert list(found) == [
        "loss/total",
        "loss/faithfulness",
        "loss/minimality",
        *(f"loss/{name}" for name in objective.cfg.losses),
    ]
    for name, value in expected.items():
        assert found[f"loss/{name}"] == pytest.approx(value.item(), rel=1e-6)


def test_of_several_batches_they_are_the_mean_over_tokens_and_what_fills_no_batch_is_left_out():
    """Minimality's frequency term sums over a batch: over all of the text it would be another number."""
    objective, padded = made(FIXED), text(5, padding=0)
    padded = TokenBatch(padded.tokens, padded.mask.clone(), padded.is_bos)
    padded.mask[3, 2:] = False  # of the second batch 8 tokens are real, of the first 12
    found = means(*losses(objective, padded, 2, 1.0, seed=0))
    first, second = (trained(objective, part(padded, *rows), 1.0) for rows in ((0, 1), (2, 3)))
    for name in first:
        expected = (12 * first[name] + 8 * second[name]) / 20
        assert found[f"loss/{name}"] == pytest.approx(expected.item(), rel=1e-5)
    at_once = means(*losses(objective, part(padded, 0, 1, 2, 3), 4, 1.0, seed=0))
    assert found["loss/minimality"] != pytest.approx(at_once["loss/minimality"], rel=1e-3)
    assert found["loss/importance"] == pytest.approx(at_once["loss/importance"], rel=1e-5)


def test_text_shorter_than_a_batch_is_one_batch():
    objective = made(FIXED)
    short = part(text(), 0, 1, 2)
    assert means(*losses(objective, short, 4, 1.0, seed=0)) == means(*losses(objective, short, 3, 1.0, seed=0))


def test_nothing_moves_neither_components_nor_sources_nor_torchs_generator():
    terms = {"persistent": loss_term(Masks.persistent_pgd, n_steps=2), "pgd": loss_term(Masks.pgd)}
    objective = made(terms)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    losses(objective, text(), 4, 1.0, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert all(each.grad is None for each in objective.parameters())
    objective.train()
    with pytest.raises(AssertionError, match="sources that persist would be moved"):
        losses(objective, text(), 4, 1.0, seed=0)


def test_sources_that_persist_are_as_training_left_them():
    """At zero they are no damage: m = g and nothing is left over, as masks that are importances have it."""
    objective = made({"persistent": loss_term(Masks.persistent_pgd), "importance": loss_term(Masks.importance)})
    random = means(*losses(objective, text(), 4, 1.0, seed=0))
    for name, source in objective.adversaries.named_buffers():
        if "source" in name:
            source.zero_()
    zero = means(*losses(objective, text(), 4, 1.0, seed=0))
    assert zero["loss/persistent"] == pytest.approx(zero["loss/importance"], rel=1e-6)
    assert random["loss/persistent"] != pytest.approx(zero["loss/persistent"], rel=1e-3)


def test_rows_have_units_and_intervals_over_batches_and_the_table_a_line_a_loss():
    objective = made(FIXED)
    evaluation = EvaluationConfig(n_seqs=4, batch_seqs=4, inputs=[Inputs.clean], patched=[Patched.all], bootstrap=50)
    several = list(loss_rows(objective.cfg, *losses(objective, text(), 2, 1.0, 0), evaluation, seed=0))
    one = list(loss_rows(objective.cfg, *losses(objective, text(), 4, 1.0, 0), evaluation, seed=0))
    units = {row.metric.removeprefix("loss/"): row.unit for row in several}
    assert units["importance"] == "nats" and units["hidden"] == "squared activation" and units["total"] == "none"
    by_name = {row.metric: row for row in several}
    assert by_name["loss/importance"].low < by_name["loss/importance"].value < by_name["loss/importance"].high
    assert all(row.low != row.low for row in one), "one batch has no interval"
    context = Context("e", "r", "spd_importance", "t", "t", "heldout", "spd", "0", 5, "importance", float("nan"), 0)
    shown = losses_table(table(context, one))
    assert shown is not None
    assert list(shown["loss"]) == ["total", "faithfulness", "minimality", *FIXED]
    assert_close([float(each) for each in shown["held-out"]], [row.value for row in one], rtol=1e-2, atol=0)
    assert losses_table(table(context, [])) is None


@pytest.mark.parametrize("scope", [SourceScope.each, SourceScope.repeated])
def test_sources_for_single_sequences_want_a_whole_batch_of_held_out_text(scope: SourceScope):
    from nndecomp.build.parameter_checks import check_parameters

    asked = f"+spd.losses={{p: {{coefficient: 1.0, masks: persistent_pgd, source_scope: {scope.value}, source_repeats: 4}}}}"
    check_parameters(compose("exp_023_train_spd_pile", ["+scale=smoke", asked, "evaluation.n_seqs=8"]))
    with pytest.raises(SettingError, match=r"losses.p.source_scope=.* 8 sequences of a batch, but evaluation.n_seqs=4"):
        check_parameters(compose("exp_023_train_spd_pile", ["+scale=smoke", asked]))
