"""Identities before maps, decomposed as maps with M = 1: what of the stream a module reads is used."""

from pathlib import Path

import pytest
import torch
from spd_parts import chain, decomposed, gradients, loss_term, objective_on_vectors, small_language_model
from test_spd_evaluation import batch
from torch import nn
from torch.testing import assert_close

from nndecomp.config.spd import ImportanceConfig, ImportanceKind, Masks
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.decompositions.spd.masks import Mask
from nndecomp.decompositions.spd.pretrained import load_parameters, save_parameters
from nndecomp.errors import SettingError
from nndecomp.targets.maps import MapKind, find_maps

BEFORE = "2.pre_identity"
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def test_it_is_a_map_of_the_unit_matrix_without_bias_and_as_wide_as_what_its_module_reads():
    (identity,) = find_maps(chain(4, 6, 3), {BEFORE: 7})
    assert (identity.name, identity.kind, identity.d_in, identity.d_out) == (BEFORE, MapKind.identity, 6, 6)
    assert torch.equal(identity.matrix(), torch.eye(6)) and identity.bias() is None and identity.part == BEFORE


def test_masked_coordinates_are_missing_from_what_the_module_reads_and_from_nothing_else():
    """V = U = 1: components are coordinates."""
    model = chain(4, 6, 3)
    decomposition = decomposed(model, {BEFORE: 6})
    own = decomposition.components[BEFORE]
    with torch.no_grad():
        own.V.copy_(torch.eye(6))
        own.U.copy_(torch.eye(6))
    m = torch.tensor([1.0, 0, 1, 1, 0, 1]).expand(5, 6)
    with decomposition.installed({BEFORE: Mask(m, None, None)}):
        found = model(X)
    assert_close(found, model[2](model[:2](X) * m))
    assert torch.equal(model(X), model[2](model[1](model[0](X)))), "outside, the model is itself"


def test_a_map_and_the_identity_before_it_are_masked_one_after_the_other():
    model = chain(4, 6, 3)
    decomposition = decomposed(model, {"2": 5, BEFORE: 7})
    first, second = decomposition.components[BEFORE], decomposition.components["2"]
    draw = torch.Generator().manual_seed(2)
    m1, m2 = torch.rand(5, 7, generator=draw), torch.rand(5, 5, generator=draw)
    outputs: dict[str, torch.Tensor] = {}
    with decomposition.installed({BEFORE: Mask(m1, None, None), "2": Mask(m2, None, None)}, outputs), torch.no_grad():
        found = model(X)
        z = (model[:2](X) @ first.V * m1) @ first.U
        assert_close(outputs[BEFORE], z)
        assert_close(found, (z @ second.V * m2) @ second.U + model[2].bias)


def test_with_all_components_and_what_they_leave_the_model_is_itself():
    target = small_language_model()
    maps = {"h.*.mlp.c_fc.pre_identity": 5, "h.*.mlp.c_fc": 5, "h.*.attn.q_proj.pre_identity": 5}
    whole = GatedParameters(decomposed(target.module(), maps), target, Gate(GateKind.topk, 5, delta=True))
    logits = target.logits(batch().tokens)
    for gates in (None, whole.gates(batch().tokens)):
        with whole.inside(batch(), whole.writes, gates):
            assert_close(target.logits(batch().tokens), logits, rtol=1e-6, atol=1e-6)


def test_a_component_of_an_identity_is_a_vector_read_and_a_vector_written():
    """d_model 16, d_mlp 24; the identity of c_fc is of the MLP's input, that of down_proj of its neurons."""
    target = small_language_model()
    maps = {"h.1.mlp.*_proj.pre_identity": 5, "h.1.mlp.c_fc.pre_identity": 5}
    made = GatedParameters(decomposed(target.module(), maps), target, Gate(GateKind.topk, 2, delta=True))
    costs = [(cost.name, cost.parameters, cost.linear_parameters) for cost in made.costs]
    assert costs == [("L1.down_proj.pre_identity", 48, 24 * 24), ("L1.c_fc.pre_identity", 32, 16 * 16)]
    assert [str(site) for site in (*made.reads, *made.writes)] == ["L1.mlp_in", "L1.mlp_out"]


def test_it_is_trained_like_any_map():
    """Every parameter is reached, the faithfulness loss is of V U against 1."""
    model = chain(4, 6, 3)
    objective = objective_on_vectors(model, {"r": loss_term(Masks.stochastic)}, maps={BEFORE: 8})
    loss, terms = objective.loss(X, 0.0)
    product = objective.decomposition.components[BEFORE].product()
    assert_close(terms["faithfulness"], (torch.eye(6) - product).square().mean().detach())
    assert all(
        g.abs().sum() > 0 for name, g in gradients(loss, objective).items() if name.startswith("decomposition.b")
    )


def test_saved_and_loaded_it_answers_the_same(tmp_path: Path):
    target = small_language_model()
    maps = {"h.*.mlp.c_fc.pre_identity": 5, "h.*.mlp.c_fc": 4}
    made = GatedParameters(decomposed(target.module(), maps), target, Gate(GateKind.importance))
    save_parameters(made.decomposition, tmp_path / "spd", target.name)
    loaded = GatedParameters(load_parameters(tmp_path / "spd", target.module()), target, made.gate)
    for site, rows in made.answers(batch())[0].items():
        assert torch.equal(loaded.answers(batch())[0][site], rows)
    with pytest.raises(SettingError, match=r"h.1.mlp.c_fc.pre_identity, a linear map that this model does not have"):
        load_parameters(tmp_path / "spd", small_language_model(n_layers=1).module())


def test_only_patterns_that_say_so_are_of_identities():
    assert [each.name for each in find_maps(chain(2, 3, 4), {"[02]*": 3, "0.pre_identity": 2})] == [
        "0",
        "2",
        "0.pre_identity",
    ]


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        (
            {"0.pre_identity": 3},
            "spd.maps: 0.pre_identity would be an identity of tokens; name a Linear or Conv1D before",
        ),
        ({"1.pre_identity": 3, "[1].pre_identity": 2}, "1.pre_identity is matched by 1.pre_identity and by"),
        ({"7.pre_identity": 3}, "7.pre_identity matches none of the target's linear maps"),
    ],
)
def test_identities_that_cannot_be_are_refused_in_a_sentence(patterns: dict[str, int], sentence: str):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)).requires_grad_(False)
    with pytest.raises(SettingError) as refused:
        find_maps(model, patterns)
    assert sentence in str(refused.value)


def test_a_conv1d_reads_what_its_identity_puts_there():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(6, 4)
    model = nn.Sequential(conv).eval().requires_grad_(False)
    decomposition = decomposed(model, {"0.pre_identity": 4})
    own = decomposition.components["0.pre_identity"]
    m = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))
    with decomposition.installed({"0.pre_identity": Mask(m, None, None)}), torch.no_grad():
        assert_close(model(X), ((X @ own.V * m) @ own.U) @ conv.weight + conv.bias)


def test_importances_of_an_identity_see_its_input():
    model = chain(4, 6, 3)
    for kind in ImportanceKind:
        if kind is ImportanceKind.global_shared_transformer:
            continue
        decomposition = decomposed(model, {BEFORE: 3}, ImportanceConfig(kind=kind, hidden=[5]))
        inputs: dict[str, torch.Tensor] = {}
        with decomposition.recording(inputs), torch.no_grad():
            model(X)
        assert torch.equal(inputs[BEFORE], model[:2](X))
        assert decomposition.importances(inputs)[BEFORE].q.shape == (5, 3)
