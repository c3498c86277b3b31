"""A parameter decomposition under masks drawn, found or set, as rows of the common evaluation."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from spd_parts import decomposed, small_language_model, text
from test_spd_evaluation import KEPT, MLPS, SHARED, gated

from nndecomp import build
from nndecomp.config.compose import compose
from nndecomp.config.evaluation import EvaluatedMasks, MasksConfig
from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.config.spd import AscentConfig, SourceScope, SourceStart
from nndecomp.decompositions.spd.decomposition import ParameterDecomposition
from nndecomp.decompositions.spd.gated import GatedParameters, kept_positions
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.decompositions.spd.masks import Mask, important
from nndecomp.errors import SettingError
from nndecomp.evaluation.masking import kl_of, shared_sources
from nndecomp.evaluation.patching import Batch
from nndecomp.evaluation.rows import Context, Measurement, table
from nndecomp.evaluation.suite import evaluate
from nndecomp.report.masks import table as masks_table
from nndecomp.targets.base import Target
from nndecomp.targets.hooks import substituting

IMPORTANCE = Gate(GateKind.importance)
ALL = list(EvaluatedMasks)


def measured(target: Target, parameters: GatedParameters, masks: MasksConfig, **changes: Any) -> dict[str, Measurement]:
    """By metric: of masks, and of the gate with gates of the undisturbed run."""
    values: dict[str, Any] = {"inputs": [Inputs.clean_gates], "batch_seqs": 3, "bootstrap": 0}
    cfg = EvaluationConfig(n_seqs=4, patched=[Patched.all], masks=masks, **{**values, **changes})
    means = {site: torch.zeros(16) for site in parameters.writes}
    rows = evaluate(target, [parameters], text(padding=1), KEPT, means, cfg, seed=0)
    return {row.metric: row for row in rows if row.inputs in ("clean_gates", "none") and row.patched == "all"}


def kls(target: Target, parameters: GatedParameters, kinds: list[EvaluatedMasks], **settings: Any) -> dict[str, float]:
    few_steps = {"pgd": AscentConfig(n_steps=5, step_size=0.3)}
    found = measured(target, parameters, MasksConfig(kinds=kinds, **{**few_steps, **settings}))
    return {kind.value: found[f"kl_{kind.value}_masks"].value for kind in kinds}


def with_importances(decomposition: ParameterDecomposition, q: float) -> ParameterDecomposition:
    """The same logit of every component on every token."""
    with torch.no_grad():
        for name, parameter in decomposition.importance.named_parameters():
            parameter.fill_(q if name.endswith("b.1") else 0.0)
    return decomposition


def perfect(target: Target) -> ParameterDecomposition:
    """V the identity and U the matrix: components are the weights, to the last bit."""
    decomposition = decomposed(target.module(), {"h.*.mlp.c_fc": 16, "h.*.mlp.down_proj": 24}, SHARED)
    with torch.no_grad():
        for name, own in decomposition.components.items():
            own.V.copy_(torch.eye(*own.V.shape))
            own.U.copy_(decomposition.maps[name].matrix())
    return decomposition


def test_masks_that_are_gates_lose_what_these_gates_lose():
    target = small_language_model()
    parameters = gated(target, IMPORTANCE)
    found = measured(target, parameters, MasksConfig(kinds=[EvaluatedMasks.importance, EvaluatedMasks.rounded]))
    binary = measured(target, parameters.with_gate(Gate(GateKind.threshold, 0)), MasksConfig())
    for metric in ("ce_increase", "kl", "top1_agreement"):
        assert found[f"{metric}_importance_masks"].value == found[metric].value
        assert found[f"{metric}_rounded_masks"].value == binary[metric].value
    assert found["ce_importance_masks"].value == found["ce_replaced"].value
    assert found["kl_rounded_masks"].value != found["kl_importance_masks"].value


def test_without_components_every_map_returns_its_bias():
    """Of the small model's maps, which have none: zeros, at the positions that count."""
    target = small_language_model()
    parameters = gated(target, IMPORTANCE)
    found = measured(target, parameters, MasksConfig(kinds=[EvaluatedMasks.zeros]))
    assert found["ce_increase_zeros_masks"].value == pytest.approx(found["ce_increase_zero"].value, rel=1e-5)
    assert found["kl_zeros_masks"].value > 0.01, "the MLPs matter"


@pytest.mark.parametrize("delta", [True, False])
def test_where_everything_is_important_a_perfect_decomposition_loses_nothing(delta: bool):
    target = small_language_model()
    parameters = GatedParameters(with_importances(perfect(target), 1.5), target, IMPORTANCE)
    found = kls(target, parameters, ALL, delta=delta)
    unharmed = ("importance", "rounded", "ones", "stochastic", "pgd", "pgd_shared")
    assert all(found[kind] < 1e-6 for kind in unharmed), found
    assert found["zeros"] > 0.01 and found["random"] > 0.01, "these masks do not ask what is important"


def test_where_nothing_is_important_rounded_masks_are_none_and_stochastic_ones_are_random():
    target = small_language_model()
    parameters = GatedParameters(with_importances(perfect(target), -1.0), target, IMPORTANCE)
    found = kls(target, parameters, ALL, delta=False)
    assert found["rounded"] == found["importance"] == found["zeros"]
    assert found["stochastic"] == found["random"], "drawn from the same seed"
    assert found["ones"] < 1e-6


def test_what_components_leave_takes_part_in_stochastic_and_adversarial_masks_alone():
    """With components of no weight the leftover is all of the weights, of which mu are there."""
    target = small_language_model()
    decomposition = with_importances(perfect(target), 1.5)
    with torch.no_grad():
        for own in decomposition.components.values():
            own.U.zero_()
    parameters = GatedParameters(decomposition, target, IMPORTANCE)
    one_step = AscentConfig(n_steps=1, step_size=0.1)  # after many the adversary has turned the leftover off
    with_delta, without = (kls(target, parameters, ALL, delta=delta, pgd=one_step) for delta in (True, False))
    assert len(set(without.values())) == 1, "no component does anything"
    assert {kind for kind in without if with_delta[kind] != without[kind]} == {
        "stochastic",
        "pgd",
        "pgd_shared",
    }


@pytest.mark.parametrize("scope", [SourceScope.single, SourceScope.each])
def test_the_adversary_does_more_damage_than_importances_and_more_with_every_step(scope: SourceScope):
    """It begins at m = g, s = 0, mu = 0, which is in its box."""
    target = small_language_model()
    parameters = gated(target, IMPORTANCE)

    def found(n_steps: int, **changes: Any) -> dict[str, float]:
        ascent = AscentConfig(
            n_steps=n_steps, step_size=0.05, source_start=SourceStart.zeros, source_scope=scope, **changes
        )
        return kls(target, parameters, [EvaluatedMasks.importance, EvaluatedMasks.pgd], pgd=ascent)

    damages = [found(n)["pgd"] for n in (1, 4, 16)]
    assert [found(1)["importance"], *damages] == sorted([found(1)["importance"], *damages])
    assert damages[0] > found(1)["importance"] and damages[-1] > 1.05 * damages[0]


def test_the_adversary_finds_worse_masks_than_chance():
    target = small_language_model()
    found = kls(target, gated(target, IMPORTANCE), [EvaluatedMasks.stochastic, EvaluatedMasks.pgd])
    assert found["pgd"] > found["stochastic"] > 0


def test_the_adversary_climbs_the_very_kl_that_is_scored():
    """The fault: climbing what is predicted of padding."""
    target = small_language_model()
    parameters, padded = gated(target, IMPORTANCE), text(padding=2)
    mask = padded.mask
    batch = Batch(padded.tokens, KEPT.flatten().nonzero()[:, 0], slice(0, 4), mask[:, 1:] & mask[:, :-1])
    gates = {name: g for name, (g, _) in parameters.gates(batch.tokens).items()}
    masks = important(gates, dict.fromkeys(gates, kept_positions(batch)))
    means = {site: torch.zeros(16) for site in parameters.writes}
    cfg = EvaluationConfig(
        n_seqs=4, batch_seqs=4, bootstrap=0, inputs=[Inputs.clean_gates], patched=[Patched.all], masks=MasksConfig()
    )
    rows = evaluate(target, [parameters], padded, KEPT, means, cfg, seed=0)
    (scored,) = (row.value for row in rows if row.metric == "kl" and row.inputs == "clean_gates")
    assert float(kl_of(target, parameters, batch)(masks).detach()) == pytest.approx(scored, rel=1e-5)


def test_of_a_text_that_is_one_batch_shared_sources_are_those_of_the_batch():
    target = small_language_model()
    masks = MasksConfig(kinds=[EvaluatedMasks.pgd, EvaluatedMasks.pgd_shared])
    found = measured(target, gated(target, IMPORTANCE), masks, batch_seqs=4)
    assert found["kl_pgd_shared_masks"].value == found["kl_pgd_masks"].value > 0


@pytest.mark.parametrize("scope", [SourceScope.single, SourceScope.across_batch])
def test_shared_sources_climb_the_kl_of_all_text_however_it_is_cut_into_batches(scope: SourceScope):
    """Against ascent on all of it at once. The second sequence is mostly padding: predictions count, not batches."""
    target = small_language_model()
    parameters, padded = gated(target, IMPORTANCE), text(2, padding=3)
    ascent = AscentConfig(n_steps=8, step_size=0.1, source_scope=scope)
    cfg = MasksConfig(kinds=[EvaluatedMasks.pgd_shared], pgd=ascent)

    def batch(seqs: slice) -> Batch:
        mask = padded.mask[seqs]
        kept = (KEPT[:2] & padded.mask)[seqs].flatten().nonzero()[:, 0]
        return Batch(padded.tokens[seqs], kept, seqs, mask[:, 1:] & mask[:, :-1])

    one_by_one = shared_sources(target, parameters, lambda: map(batch, [slice(0, 1), slice(1, 2)]), cfg, seed=0)
    whole = batch(slice(0, 2))
    gates = {name: g for name, (g, _) in parameters.gates(whole.tokens).items()}
    routes = dict.fromkeys(gates, kept_positions(whole))
    torch.manual_seed(0)
    positions = 6 if scope is SourceScope.across_batch else 1
    s = {name: torch.rand(1, positions, g.shape[-1] + 1) for name, g in gates.items()}
    for _ in range(8):
        leaves = {name: each.clone().requires_grad_() for name, each in s.items()}
        masks = {
            name: Mask(g + (1 - g) * leaves[name][..., :-1], leaves[name][..., -1].expand(2, 6), routes[name])
            for name, g in gates.items()
        }
        found = torch.autograd.grad(kl_of(target, parameters, whole)(masks), list(leaves.values()))
        s = {name: (each + 0.1 * g.sign()).clamp(0, 1) for (name, each), g in zip(s.items(), found, strict=True)}
    torch.testing.assert_close(one_by_one, s)


def test_an_adversary_for_each_sequence_does_more_damage_than_one_for_all():
    target = small_language_model()
    ascent = AscentConfig(n_steps=6, step_size=0.1, source_start=SourceStart.zeros)
    masks = MasksConfig(kinds=[EvaluatedMasks.importance, EvaluatedMasks.pgd, EvaluatedMasks.pgd_shared], pgd=ascent)
    found = measured(target, gated(target, IMPORTANCE), masks, batch_seqs=1)
    importance, shared, own = (found[f"kl_{kind}_masks"].value for kind in ("importance", "pgd_shared", "pgd"))
    assert importance < shared < own


def test_positions_where_no_component_stands_are_left_alone():
    target = small_language_model()
    parameters = gated(target, IMPORTANCE)
    first = target.logits(text().tokens)[:, 0]
    seen = []
    with substituting({parameters.decomposition.maps["h.0.mlp.c_fc"].tap: lambda x, y: seen.append(y[:, 0])}):
        kls(target, parameters, [EvaluatedMasks.pgd])
    torch.testing.assert_close(target.logits(text().tokens)[:, 0], first)
    assert len({tuple(each.flatten().tolist()) for each in seen}) == len(range(0, 4, 3)), "position 0 is not kept"


def test_subsets_mask_their_maps_alone_and_all_of_them_are_the_gate():
    target = small_language_model()
    parameters = gated(target, IMPORTANCE)
    subsets = {"reads": ["h.*.mlp.c_fc"], "last": ["h.1.*"], "all": ["h.0.*", "*down_proj", "*c_fc"]}
    found = measured(target, parameters, MasksConfig(subsets=subsets))
    assert found["kl_only_all"].value == found["kl"].value
    alone = GatedParameters(parameters.decomposition, target, IMPORTANCE, parameters.writes[1:])
    assert found["kl_only_last"].value == pytest.approx(measured(target, alone, MasksConfig())["kl"].value, rel=1e-6)
    assert 0 < found["kl_only_reads"].value != found["kl_only_last"].value


def test_what_is_drawn_depends_on_the_seed_alone_and_leaves_torchs_generator_where_it_was():
    target = small_language_model()
    parameters = gated(target, IMPORTANCE)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = kls(target, parameters, [EvaluatedMasks.stochastic])
    assert torch.equal(torch.rand(2), expected)
    assert kls(target, parameters, [EvaluatedMasks.pgd, EvaluatedMasks.stochastic])["stochastic"] == first["stochastic"]


def test_a_decomposition_is_measured_so_once_behind_its_importances():
    target = small_language_model()
    masks = MasksConfig(kinds=[EvaluatedMasks.ones])
    for gate in (Gate(GateKind.threshold, 0), replace(IMPORTANCE, delta=True)):
        assert not [metric for metric in measured(target, gated(target, gate), masks) if "masks" in metric]
    assert [metric for metric in measured(target, gated(target, IMPORTANCE), masks) if "masks" in metric]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("evaluation.masks.kinds=[pgd,pgd]", r"evaluation.masks.kinds=\['pgd', 'pgd'\] must name each once"),
        ("evaluation.masks.pgd.n_steps=0", "evaluation.masks.pgd.n_steps=0 must be a number of steps"),
        ("evaluation.masks.pgd.step_size=0", "evaluation.masks.pgd.step_size=0.* must be positive"),
        ("+evaluation.masks.subsets.none=[]", r"evaluation.masks.subsets.none=\[\] must be a word and patterns"),
        (
            "evaluation.masks={kinds: [pgd_shared], pgd: {source_scope: each}}",
            "evaluation.masks.pgd.source_scope=each has sources for single sequences, .* cannot share",
        ),
        (
            "evaluation.masks.pgd.source_scope=repeated",
            "evaluation.masks.pgd.source_repeats=8 must divide evaluation.batch_seqs=4",
        ),
    ],
)
def test_masks_that_cannot_be_are_refused_in_a_sentence(asked: str, sentence: str):
    with pytest.raises(SettingError, match=sentence):
        compose("exp_023_train_spd_pile", ["+scale=smoke", asked])


def test_a_subset_of_no_decomposed_map_is_refused():
    target = small_language_model()
    cfg = EvaluationConfig(
        n_seqs=4,
        batch_seqs=4,
        inputs=[Inputs.clean],
        patched=[Patched.all],
        masks=MasksConfig(subsets={"attention": ["h.*.attn.*"]}),
    )
    with pytest.raises(SettingError, match=r"subsets.attention=\['h.\*.attn.\*'\] matches none of the maps"):
        build.gated(cfg, target, {"spd": decomposed(target.module(), MLPS)})


def test_the_table_has_a_line_a_mask_and_the_share_that_is_lost_and_names_the_worst_subset():
    def row(metric: str, value: float) -> Measurement:
        return Measurement(metric, value, "nats", "all", "all", "clean_gates", 10, value - 0.1, value + 0.1)

    context = Context("e", "r", "spd_importance_seed0", "t", "t", "heldout", "spd", "0", 5, "importance", math.nan, 0)
    found = {"importance_masks": 1.0, "zeros_masks": 4.0, "only_reads": 0.5, "only_last": 0.75}
    rows = [row(f"{metric}_{name}", value) for name, value in found.items() for metric in ("kl", "ce_increase")]
    made = masks_table(table(context, rows))
    assert made is not None
    assert list(made["masks"]) == [
        "spd_seed0: importance, g",
        "spd_seed0: zeros, 0",
        "spd_seed0: maps of reads alone, g",
        "spd_seed0: maps of last alone, g (worst of 2)",
    ]
    assert list(made["CE unrecovered"]) == ["25.0%", "100.0%", "12.5%", "18.8%"]
    assert masks_table(table(context, [row("ce_increase", 1.0)])) is None
