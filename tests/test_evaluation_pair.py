"""Two models are measured one at a time: each row says which, and one's replacements leave the other alone."""

import pytest
import torch
from evaluation_parts import D, EachSite, ToyTarget, linear, text
from tiny_models import tiny_tokenizer
from torch import Tensor

from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.evaluation.rows import Context, Measurement, table
from nndecomp.evaluation.suite import evaluate
from nndecomp.report.results import results
from nndecomp.targets.pair import PairedTarget
from nndecomp.types import Point, Site

CFG = EvaluationConfig(n_seqs=6, batch_seqs=4, inputs=list(Inputs), patched=list(Patched), bootstrap=20)
TOKENS, KEEP = text()


def of(model: str | None, layer: int, point: Point = Point.mlp_out) -> Site:
    return Site(layer, point, model=model)


def toys() -> tuple[ToyTarget, ToyTarget]:
    """Of other weights and depth."""
    a, b = ToyTarget(2), ToyTarget(3)
    b.weights = torch.randn(3, D, D, generator=torch.Generator().manual_seed(7)) / D**0.5
    a.tokenizer = b.tokenizer = tiny_tokenizer()
    return a, b


def measured(target, writes: list[Site], maps) -> dict[tuple[str, str, str, str], Measurement]:
    reads = [Site(site.layer, Point.mlp_in, model=site.model) for site in writes]
    rows = evaluate(target, [EachSite(reads, writes, maps)], TOKENS, KEEP, {s: torch.zeros(D) for s in writes}, CFG, 0)
    return {(row.metric, row.site, row.patched, row.inputs): row for row in rows}


def test_each_model_of_a_pair_is_measured_as_it_is_by_itself():
    a, b = toys()
    both = measured(
        PairedTarget(a, b), [of("A", 0), of("A", 1), of("B", 0), of("B", 2)], [linear(i) for i in (0, 1, 0, 2)]
    )
    for model, alone, layers in (("A", a, (0, 1)), ("B", b, (0, 2))):
        single = measured(alone, [of(None, layer) for layer in layers], [linear(layer) for layer in layers])
        prediction = [key for key in single if key[0].startswith(("ce", "kl", "top1")) and key[3] != "live"]
        assert len(prediction) > 40
        for metric, site, patched, inputs in prediction:
            named = "-".join(f"{model}:{part}" for part in site.split("-"))
            assert both[metric, named, patched, inputs].value == pytest.approx(
                single[metric, site, patched, inputs].value
            )
        for metric in ("fvu", "mse", "cosine"):
            assert both[metric, f"{model}:all", "none", "clean"].value == pytest.approx(
                single[metric, "all", "none", "clean"].value
            )


def test_a_perfect_account_of_one_model_costs_it_nothing_and_says_nothing_of_the_other():
    a, b = toys()
    poor: Tensor = torch.zeros(D)
    rows = measured(PairedTarget(a, b), [of("A", 1), of("B", 1)], [a.mlp(1), lambda x: x * 0 + poor])
    assert rows["ce_increase", "A:all", "all", "clean"].value == pytest.approx(0, abs=1e-6)
    assert rows["kl", "B:all", "all", "clean"].value == pytest.approx(rows["kl_zero", "B:all", "all", "none"].value)
    assert rows["kl", "B:all", "all", "clean"].value > 0.01


def test_live_is_refused_with_the_reason():
    rows = measured(PairedTarget(*toys()), [of("A", 0), of("B", 0)], [linear(0), linear(0)])
    assert [key[0] for key in rows if key[3] == "live"] == ["live_obstacle"]
    assert "two models" in rows["live_obstacle", "all", "all", "live"].note


def test_one_model_of_a_pair_is_measured_live_as_well():
    a, b = toys()
    rows, alone = measured(PairedTarget(a, b), [of("B", 1)], [linear(1)]), measured(b, [of(None, 1)], [linear(1)])
    assert rows["kl", "B:all", "all", "live"].value == pytest.approx(alone["kl", "all", "all", "live"].value)


def test_the_report_has_a_result_for_each_model():
    a, b = toys()
    rows = measured(PairedTarget(a, b), [of("A", 0), of("B", 0)], [a.mlp(0), linear(0)]).values()
    context = Context("e", "r", "both", "a+b", "t", "heldout", "crosscoder", "0,0", 4, "topk", 2.0, 0)
    found = {result.context.name: result for result in results(table(context, rows))}
    assert list(found) == ["both in A", "both in B"]
    assert found["both in A"]["fvu"].value == pytest.approx(0, abs=1e-9) and found["both in B"]["fvu"].value > 0.1
    assert all(result["ce_increase_zero"].value == result["ce_increase_zero"].value for result in found.values())
    assert found["both in A"]["active_per_module"] == found["both in B"]["active_per_module"]
