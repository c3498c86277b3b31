"""Parameter decompositions in the place of a model's maps: clean, with clean gates, and live, under the common measurements."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spd_parts import decomposed, small_language_model, text
from tiny_models import save_tiny_model
from torch.testing import assert_close

from nndecomp.config.schema import EvaluationConfig, Inputs, Patched
from nndecomp.config.spd import ImportanceConfig, ImportanceKind
from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.decompositions.spd.decomposition import Importances
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.decompositions.spd.pretrained import load_parameters, save_parameters
from nndecomp.errors import SettingError
from nndecomp.evaluation.costs import VALUE_BITS
from nndecomp.evaluation.patching import Batch, clean_run
from nndecomp.evaluation.rows import Measurement
from nndecomp.evaluation.suite import evaluate
from nndecomp.targets.base import Target
from nndecomp.types import Point, Site

MLPS = {"h.*.mlp.c_fc": 5, "h.*.mlp.down_proj": 4}
SHARED = ImportanceConfig(kind=ImportanceKind.shared_mlp, hidden=[7])
GLOBAL = ImportanceConfig(kind=ImportanceKind.global_shared_mlp, hidden=[7])
ALL = Gate(GateKind.topk, 4, delta=True)
KEPT = torch.ones(4, 6, dtype=torch.bool)
KEPT[:, 0] = False  # as BOS is


def gated(
    target: Target, gate: Gate, maps: dict[str, int] = MLPS, importance: ImportanceConfig = SHARED
) -> GatedParameters:
    return GatedParameters(decomposed(target.module(), maps, importance), target, gate)


def batch() -> Batch:
    tokens = text().tokens
    return Batch(tokens, KEPT.flatten().nonzero()[:, 0], slice(0, 4), torch.ones(4, 5, dtype=torch.bool))


def measured(target: Target, parameters: GatedParameters) -> dict[tuple[str, str, str], Measurement]:
    cfg = EvaluationConfig(n_seqs=4, batch_seqs=3, inputs=list(Inputs), patched=list(Patched), bootstrap=0)
    means = {site: torch.zeros(16) for site in parameters.writes}
    rows = evaluate(target, [parameters], text(), KEPT, means, cfg, seed=0)
    return {
        (row.metric, row.inputs, row.site if row.patched != "none" or row.metric != "ce" else "all"): row
        for row in rows
    }


@pytest.mark.parametrize(
    "patterns",
    [["h.*.mlp.c_fc", "h.*.mlp.down_proj"], ["h.*.attn.?_proj", "h.*.mlp.c_fc"], ["wte", "h.1.mlp.c_fc"]],
    ids=str,
)
def test_with_all_components_and_what_they_leave_the_model_is_itself(patterns: list[str]):
    target = small_language_model()
    importance = ImportanceConfig(kind=ImportanceKind.mlp, hidden=[3])  # the one that can be of an embedding
    whole = gated(target, ALL, dict.fromkeys(patterns, 4), importance)
    rows, _ = whole.answers(batch())
    clean = clean_run(target, batch(), whole.writes)
    logits = target.logits(batch().tokens)
    for site in whole.writes:
        assert_close(rows[site], clean.rows[site], rtol=1e-6, atol=1e-6)
    for gates in (None, whole.gates(batch().tokens)):
        with whole.inside(batch(), whole.writes, gates):
            assert_close(target.logits(batch().tokens), logits, rtol=1e-6, atol=1e-6)


def test_a_clean_answer_is_that_of_masked_matrices_to_the_undisturbed_input():
    target = small_language_model()
    parameters = gated(target, Gate(GateKind.importance))
    rows, active = parameters.answers(batch())
    reads = [Site(layer, Point.mlp_in) for layer in (0, 1)]
    clean = clean_run(target, batch(), reads)
    own = parameters.decomposition.components
    for layer, site in enumerate(parameters.writes):
        x = clean.rows[reads[layer]]
        c_fc, down = f"h.{layer}.mlp.c_fc", f"h.{layer}.mlp.down_proj"
        g = parameters.decomposition.importance_of(c_fc, x).g
        hidden = F.gelu((x @ own[c_fc].V * g) @ own[c_fc].U, approximate="tanh")
        undisturbed = F.gelu(x @ parameters.decomposition.maps[c_fc].matrix(), approximate="tanh")
        g_down = parameters.decomposition.importance_of(down, undisturbed).g
        assert_close(rows[site], (hidden @ own[down].V * g_down) @ own[down].U, rtol=1e-4, atol=1e-5)
        assert torch.equal(active.counts()[:, list(own).index(c_fc)], (g > 0).sum(1))


def test_gates_differ_between_clean_and_live_only_after_what_is_disturbed():
    target = small_language_model()
    parameters = gated(target, Gate(GateKind.topk, 2))
    clean = parameters.gates(batch().tokens)
    with parameters.inside(batch(), parameters.writes, None) as active:
        target.logits(batch().tokens)
    live = dict(zip(parameters.places, active().masks, strict=True))
    first = "h.0.mlp.c_fc"
    assert torch.equal(live[first], clean[first][1].flatten(0, 1)[batch().kept])
    assert not torch.equal(live["h.1.mlp.c_fc"], clean["h.1.mlp.c_fc"][1].flatten(0, 1)[batch().kept])


def test_positions_that_do_not_count_are_left_alone():
    target = small_language_model()
    parameters, one = gated(target, Gate(GateKind.topk, 1)), batch()
    site = Site(0, Point.mlp_out)
    whole = target.record(one.tokens, [site])[site]
    with parameters.inside(one, parameters.writes, None):
        replaced = target.record(one.tokens, [site])[site]
    assert torch.equal(replaced[:, 0], whole[:, 0]), "position 0 is not kept"
    assert not torch.isclose(replaced[:, 1:], whole[:, 1:]).all(-1).any()


def test_every_axis_by_hand_on_two_layers():
    """d_model 16, d_mlp 24: a component of c_fc or down_proj is 16 + 24 = 40 weights; 5 and 4 components a map; importances
    by MLPs of 7 hidden units; two of each map are active."""
    found = measured(target := small_language_model(), gated(target, Gate(GateKind.topk, 2)))
    by_hand = {
        "active_per_module": 2.0,  # of four maps, each 2
        "active_per_reconstruction": 4.0,  # 2 of c_fc and 2 of down_proj write to one MLP's output
        "active_parameters": 4 * 2 * 40.0,
        "gate_parameters": 2 * (16 * 7 + 7 * 5) + 2 * (24 * 7 + 7 * 4.0),
        "active_parameters_with_gate": 4 * 2 * 40.0 + 2 * (16 * 7 + 7 * 5) + 2 * (24 * 7 + 7 * 4),
        "description_length": 2 * 2 * (math.log2(5) + VALUE_BITS) + 2 * 2 * (math.log2(4) + VALUE_BITS),
    }
    for inputs in ("clean", "clean_gates", "live"):
        for axis, value in by_hand.items():
            assert found[axis, inputs, "all"].value == pytest.approx(value), f"{axis} {inputs}"
        assert {found["l0", inputs, f"L{n}.{m}"].value for n in (0, 1) for m in ("c_fc", "down_proj")} == {2.0}


def test_what_components_leave_counts_as_a_dense_map():
    found = measured(target := small_language_model(), gated(target, Gate(GateKind.topk, 2, delta=True)))
    assert found["active_parameters", "live", "all"].value == 4 * 2 * 40 + 4 * 16 * 24


def test_a_threshold_counts_what_exceeds_it_strictly():
    q = torch.tensor([[-1.0, 0.0, 0.3, 0.5, 0.7, 2.0]])
    m, active = Gate(GateKind.threshold, 0.5).open(Importances(q))
    assert m.tolist() == [[0, 0, 0, 0, 1, 1]] and active.sum() == 2
    m, active = Gate(GateKind.importance).open(Importances(q))
    assert_close(m, q.clamp(0, 1))
    assert active.tolist() == [[False, False, True, True, True, True]], "an importance of 0 is not active"


def test_the_largest_are_ranked_below_zero_too():
    """Ranked by importances clamped at 0, which of the components that do not matter is taken would be chance."""
    m, _ = Gate(GateKind.topk, 3).open(Importances(torch.tensor([[-3.0, -1.0, 0.5, -2.0]])))
    assert m.tolist() == [[0, 1, 1, 1]]


def test_components_of_all_maps_compete_for_one_k():
    gate = Gate(GateKind.topk_all, 3)
    opened = gate.open_all(
        {"a": Importances(torch.tensor([[5.0, 1.0]])), "b": Importances(torch.tensor([[2.0, 3.0, 0.0]]))}
    )
    assert opened["a"][0].tolist() == [[1, 0]] and opened["b"][0].tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    ("importance", "gate"), [(GLOBAL, Gate(GateKind.importance)), (SHARED, Gate(GateKind.topk_all, 6))]
)
def test_what_needs_all_maps_at_once_is_not_gated_live_and_says_why(importance: ImportanceConfig, gate: Gate):
    found = measured(target := small_language_model(), gated(target, gate, importance=importance))
    assert {inputs for _, inputs, _ in found} == {"none", "clean", "clean_gates", "live"}
    assert [metric for metric, inputs, _ in found if inputs == "live"] == ["live_obstacle"]
    assert "come after what it writes" in found["live_obstacle", "live", "all"].note


def test_live_errors_are_of_what_the_model_would_have_written_there():
    """With only the last layer's maps gated, what arrives there is undisturbed: live equals clean, error for error."""
    target = small_language_model()
    last = {"h.1.mlp.c_fc": 5, "h.1.mlp.down_proj": 4}
    found = measured(target, gated(target, Gate(GateKind.importance), last))
    for metric in ("fvu", "mse", "cosine"):
        clean, gates = found[metric, "clean", "L1.mlp_out"].value, found[metric, "clean_gates", "L1.mlp_out"].value
        assert clean == pytest.approx(gates, rel=1e-5)


def test_maps_outside_the_compared_sites_stay_as_they_are():
    target = small_language_model()
    maps = {**MLPS, "h.*.attn.o_proj": 3}
    decomposition = decomposed(target.module(), maps, GLOBAL)
    sites = [Site(0, Point.mlp_out), Site(1, Point.mlp_out)]
    restricted = GatedParameters(decomposition, target, Gate(GateKind.importance), sites)
    assert [cost.name for cost in restricted.costs] == ["L0.c_fc", "L1.c_fc", "L0.down_proj", "L1.down_proj"]
    assert restricted.writes == tuple(sites)
    one = batch()
    attention = Site(0, Point.attn_out)
    with restricted.inside(one, restricted.writes, restricted.gates(one.tokens)):
        assert torch.equal(
            target.record(one.tokens, [attention])[attention],
            small_language_model().record(one.tokens, [attention])[attention],
        )


def test_saved_and_loaded_it_answers_the_same_and_refuses_another_model(tmp_path: Path):
    target = small_language_model()
    parameters = gated(target, Gate(GateKind.importance))
    save_parameters(parameters.decomposition, tmp_path / "spd", target.name)
    loaded = GatedParameters(load_parameters(tmp_path / "spd", target.module()), target, parameters.gate)
    for site, rows in parameters.answers(batch())[0].items():
        assert torch.equal(loaded.answers(batch())[0][site], rows)
    other = small_language_model()
    with torch.no_grad():
        other.module().get_parameter("h.0.mlp.c_fc.weight").mul_(1.5)
    with pytest.raises(SettingError, match="another model"):
        load_parameters(tmp_path / "spd", other.module())
    with pytest.raises(SettingError, match=r"h\.1\.mlp\.c_fc, a linear map that this model does not have"):
        load_parameters(tmp_path / "spd", small_language_model(n_layers=1).module())


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia", "gemma2"])
def test_logits_are_the_head_of_what_it_reads_in_every_family(family: str, tmp_path: Path):
    from nndecomp.targets.load import load_target

    path = save_tiny_model(family, tmp_path / family)
    target = load_target(TargetConfig(kind=TargetKind.huggingface, path=str(path)), torch.device("cpu"))
    tokens = text().tokens
    assert_close(target.head(target.final(tokens)), target.logits(tokens))
    names = [
        name for name, module in target.module().named_modules() if name.endswith(("c_fc", "up_proj", "dense_h_to_4h"))
    ]
    assert [target.place_of_map(name)[1] for name in names] == [Site(layer, Point.mlp_out) for layer in range(3)]


def test_a_map_of_no_layer_is_refused():
    with pytest.raises(SettingError, match="lm_head is no part of"):
        small_language_model().place_of_map("lm_head")


@pytest.mark.slow
def test_after_its_warm_up_all_components_of_the_shipped_model_are_the_model():
    """Without what they leave over: the increase in cross-entropy is under 0.01 nats (measured: 0.00003)."""
    from nndecomp import build
    from nndecomp.build.parameters import objective
    from nndecomp.config.compose import compose

    cfg = compose(
        "exp_023_train_spd_pile",
        ["+scale=tiny", "evaluation.n_seqs=8", "evaluation.batch_seqs=8", "evaluation.mean_seqs=8"],
    )
    assert cfg.spd is not None
    target = build.target(cfg)
    made = objective(cfg, cfg.spd, target)
    made.start("warm-up")
    unmasked = GatedParameters(made.decomposition, target, Gate(GateKind.topk, 256))
    rows = build.measured(cfg, target, {"unmasked": [unmasked]}, "run")
    increase = rows[(rows.metric == "ce_increase") & (rows.site == "all")]
    assert set(increase.inputs) == {"clean", "clean_gates", "live"} and (increase.value.abs() < 0.01).all()
