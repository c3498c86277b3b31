"""The tail of a parameter decomposition whose components are known."""

import pytest
import torch
from spd_parts import decomposed, small_language_model, text

from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.config.tail import TailConfig
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.evaluation.tail import Choice, Tail, tail
from nndecomp.report import tail as report

EVALUATION = EvaluationConfig(
    n_seqs=4, batch_seqs=3, inputs=[Inputs.clean], patched=[Patched.all], bootstrap=20, confidence=0.9
)
CFG = TailConfig(kept=[1.0, 0.5], thresholds=[0.0], n_bands=4, important=0.1)
C_FC, DOWN = "h.0.mlp.c_fc", "h.0.mlp.down_proj"


@torch.no_grad()
def exact(extra: int = 0) -> tuple[ParameterDecomposition, Tail]:
    """Each input coordinate of a map is a component, so that V U is the map; `extra` more are zero, and matter least.

    Importances are constants: the logit of component c is 1 - c / C.
    """
    target = small_language_model(1)
    made = decomposed(target.module(), {C_FC: 16 + extra, DOWN: 24 + extra})
    for own, linear in zip(made.components.values(), made.sizes, strict=True):
        n = linear.d_in
        own.V.zero_()
        own.U.zero_()
        own.V[:, :n] = torch.eye(n)
        own.U[:n] = linear.matrix()
    for function in made.importance.functions:
        for parameter in function.parameters():
            parameter.zero_()
        last = function.b[-1]
        last.copy_(1 - torch.arange(len(last)) / len(last))
    batch = text(padding=2)
    return made, tail(target, made, batch, batch.mask, CFG, EVALUATION, 0)


def test_components_that_are_all_of_their_maps_leave_nothing_over_and_cost_nothing_when_all_are_kept():
    made, found = exact()
    for each in found.maps:
        assert each.leftover == pytest.approx(0, abs=1e-6)
        assert each.component.tolist() == list(range(len(each.component))), "by logit, the largest first"
        torch.testing.assert_close(each.norm, made.maps[each.name].matrix().norm(dim=1), msg="|V_c| is 1")
    costs = {(k.map, k.choice, k.share): k.ce_increase.value for k in found.kept}
    assert set(costs) == {(m, c, s) for m in ("all", C_FC, DOWN) for c in Choice for s in CFG.kept}
    for (where, choice, share), cost in costs.items():
        assert (abs(cost) < 1e-5) == (share == 1.0), f"{where} {choice} {share} costs {cost}"
    assert costs["all", Choice.token, 0.5] == pytest.approx(costs["all", Choice.rank, 0.5], abs=1e-6), (
        "constant importances rank every token's components alike"
    )


def test_components_of_norm_zero_are_the_tail_and_can_be_dropped():
    _, found = exact(extra=24)
    down = found.maps[1]
    assert (down.norm[24:] == 0).all() and down.share_from()[24] == 0 and down.share_from()[0] == 1
    costs = {(k.map, k.choice, k.share): k.kl.value for k in found.kept}
    assert abs(costs[DOWN, Choice.rank, 0.5]) < 1e-5 and costs[DOWN, Choice.random, 0.5] > 1e-3


def test_counts_and_bands_are_those_of_the_logits_by_hand():
    _, found = exact()
    first = found.maps[0]
    assert first.logit.tolist() == pytest.approx([1 - c / 16 for c in range(16)])
    # g > 0.1 where 1 - c / 16 > 0.1: all but the last component of logit 1/16.
    assert first.often.tolist() == [1.0] * 15 + [0.0]
    assert report.counts(found, [0.5])["> 0.5"].tolist() == ["8", "12"]
    own = report.bands(found, 4)
    assert own["ranks"].tolist()[:4] == ["1-4", "5-8", "9-12", "13-16"]
    assert own["important on"].tolist()[3] == "75.00%"
    assert len(report.components(found)) == 16 + 24 and len(report.kept(found)) == 3 * len(Choice)
