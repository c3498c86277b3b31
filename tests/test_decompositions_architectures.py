"""Wiring: which group reads and writes what, and what is refused before any model is loaded."""

import pytest
import torch
from decomposition_parts import ACTIVATIONS, N_LAYERS, PURSUIT, SHAPE, D, F, config, dictionary, inputs, settled

from nndecomp.config.schema import Activation, Architecture, CodeNormalisation, Encoder
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.spec import ActivationSpec, DictionarySpec, GroupSpec
from nndecomp.decompositions.stack import stack
from nndecomp.decompositions.wiring import wire
from nndecomp.errors import SettingError
from nndecomp.types import Point, Site

CLT = {"architecture": Architecture.cross_layer_transcoder}
PLT = {"architecture": Architecture.per_layer_transcoder}


def out(layer: int) -> Site:
    return Site(layer, Point.mlp_out)


def test_a_cross_layer_transcoder_writes_its_own_and_later_layers():
    groups = wire(config(**CLT), SHAPE).groups
    assert [group.reads for group in groups] == [(Site(layer, Point.mlp_in),) for layer in range(N_LAYERS)]
    assert [group.writes for group in groups] == [(out(0), out(1), out(2)), (out(1), out(2)), (out(2),)]


def test_a_cross_layer_transcoder_stores_a_triangle_of_decoder_blocks_and_nothing_else():
    made = dictionary(**CLT)
    decoders = sum(bank.W_dec.numel() for bank in made.banks)
    assert decoders == F * D * N_LAYERS * (N_LAYERS + 1) // 2
    encoders = N_LAYERS * (F * D + F)
    assert sum(p.numel() for p in made.parameters()) == decoders + encoders + N_LAYERS * D


def test_a_cross_layer_transcoder_never_writes_backwards():
    made = settled(**CLT)
    x = inputs(made).requires_grad_()
    y_hat, _ = made(x)
    for layer in range(N_LAYERS):
        written = y_hat[:, made.write_layout.spans[out(layer)]].square().sum()
        (grad,) = torch.autograd.grad(written, x, retain_graph=True)
        reaches = [bool(grad[:, span].any()) for span in made.read_layout.spans.values()]
        assert reaches == [source <= layer for source in range(N_LAYERS)]


@pytest.mark.parametrize("activation", [Activation.topk, Activation.batchtopk])
@pytest.mark.parametrize("skip", [False, True])
def test_a_cross_layer_transcoder_without_cross_layer_blocks_is_a_stack_of_transcoders(activation, skip):
    clt = settled(**CLT, activation=activation, skip=skip)
    parts = [
        settled(architecture=Architecture.transcoder, layers=[layer], activation=activation, skip=skip)
        for layer in range(N_LAYERS)
    ]
    with torch.no_grad():
        for layer, (bank, part) in enumerate(zip(clt.banks, parts, strict=True)):
            bank.W_dec[:, D:] = 0
            if bank.W_skip is not None:
                bank.W_skip[:, D:] = 0
                bank.W_skip[:, :D] = part.banks[0].W_skip
            bank.W_enc.copy_(part.banks[0].W_enc)
            bank.b_enc.copy_(part.banks[0].b_enc)
            bank.W_dec[:, :D] = part.banks[0].W_dec
            clt.b_dec[clt.write_layout.spans[out(layer)]] = part.b_dec
            if activation is Activation.batchtopk:
                clt.activation.threshold[layer] = part.activation.threshold[0]
    x = inputs(clt)
    y_hat, codes = clt(x)
    y_stacked, codes_stacked = stack(parts, "per_layer_transcoder")(x)
    torch.testing.assert_close(y_stacked, y_hat, rtol=0, atol=1e-12)
    assert torch.equal(codes_stacked.counts(), codes.counts())


def test_a_layer_starts_the_same_alone_in_a_stack_and_in_a_cross_layer_transcoder():
    single = dictionary(architecture=Architecture.transcoder, layers=[1]).banks[0]
    stacked = dictionary(**PLT).banks[1]
    crossed = dictionary(**CLT).banks[1]
    assert torch.equal(single.W_enc, stacked.W_enc) and torch.equal(single.W_enc, crossed.W_enc)
    assert torch.equal(single.W_dec, stacked.W_dec) and torch.equal(single.W_dec, crossed.W_dec[:, :D])
    other = dictionary(seed=1, **PLT).banks[1]
    assert not torch.equal(other.W_enc, stacked.W_enc)
    assert not torch.equal(dictionary(**PLT).banks[0].W_enc, stacked.W_enc)


def test_starting_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    dictionary(**CLT)
    assert torch.equal(torch.get_rng_state(), before)


def test_encoder_rows_start_with_norm_1_and_an_sae_starts_tied():
    sae = dictionary(architecture=Architecture.sae, reads=["L0.mlp_out"], writes=["L0.mlp_out"]).banks[0]
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_a_linear_map_is_perfect_by_construction(skip):
    """Features +e_i and -e_i for every coordinate give back x = relu(x) - relu(-x), through any matrix M."""
    M, bias, S = torch.randn(D, D), torch.randn(D), torch.randn(D, D)
    made = dictionary(architecture=Architecture.transcoder, layers=[1], n_features=2 * D, k=D, skip=skip)
    bank = made.banks[0]
    with torch.no_grad():
        bank.W_enc.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        rest = M - S if skip else M
        bank.W_dec.copy_(torch.cat([rest, -rest]))
        made.b_dec.copy_(bias)
        if bank.W_skip is not None:
            bank.W_skip.copy_(S)
    x = inputs(made, 100)
    y = x @ M + bias
    residual = (made.eval()(x)[0] - y).detach()
    assert float(residual.square().sum() / (y - y.mean(0)).square().sum()) < 1e-12


def test_costs_count_what_a_feature_reads_and_writes():
    first, *_, last = dictionary(**CLT).costs
    assert (first.name, first.n_components, first.n_writes) == ("L0", F, N_LAYERS)
    assert (first.parameters, first.gate_parameters) == (D + N_LAYERS * D, F * D)
    assert (last.n_writes, last.parameters) == (1, 2 * D)
    (skipping,) = dictionary(architecture=Architecture.transcoder, layers=[1], skip=True).costs
    assert (first.linear_parameters, skipping.linear_parameters) == (0, D * D)


def test_hook_names_and_sites_and_points_are_the_same_places():
    by_hook = config(architecture=Architecture.sae, reads=["blocks.1.hook_mlp_out"], writes=["L1.mlp_out"])
    by_point = config(architecture=Architecture.sae, reads=["mlp_out"], writes=["mlp_out"], layers=[1])
    assert wire(by_hook, SHAPE) == wire(by_point, SHAPE)


def test_a_group_that_reads_what_runs_after_its_writes_cannot_be_run_live():
    early, late = Site(0, Point.mlp_out), Site(2, Point.mlp_in)
    spec = DictionarySpec(
        architecture="backwards",
        target="toy",
        widths={early: D, late: D},
        groups=(GroupSpec("backwards", (late,), (early,), F),),
        activation=ActivationSpec(Activation.relu),
    )
    assert SparseDictionary(spec).live_obstacle() == (
        "group backwards reads L2.mlp_in, which runs after L0.mlp_out, which it writes"
    )


def test_a_site_cannot_be_written_before_its_groups_have_read():
    run = settled(**CLT).live_run()
    run.read(Site(0, Point.mlp_in), torch.zeros(4, D, dtype=torch.float64))
    run.write(out(0))
    with pytest.raises(AssertionError, match=r"L1.mlp_out is written before groups \['L1'\]"):
        run.write(out(1))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (PLT | {"layers": [0, 3]}, "decomposition.layers=.* asks for layer 3, but the target has layers 0 to 2"),
        (PLT | {"reads": ["resid_mid"]}, "decomposition.reads asks for site L0.resid_mid, but the target has no"),
        (PLT | {"reads": ["L7.mlp_in"]}, "decomposition.reads asks for site L7.mlp_in"),
        (PLT | {"reads": ["mlp_inn"]}, "decomposition.reads: site 'mlp_inn' is not a site"),
        (PLT | {"reads": []}, "decomposition.reads is empty"),
        (PLT | {"reads": ["mlp_in", "L0.mlp_in"]}, "decomposition.reads=.* names a site twice"),
        (PLT | {"reads": ["mlp_in", "resid_pre"]}, "two sites in one layer"),
        (PLT | {"reads": ["L0.mlp_in"]}, "do not pair"),
        (PLT | {"reads": ["L0.mlp_in"], "layers": [0]}, "has no meaning for the single site 'L0.mlp_in'"),
        (PLT | {"k": [3, 3]}, r"decomposition.k=\[3, 3\] has 2 entries, but the decomposition has 3 groups"),
        ({"architecture": Architecture.transcoder}, "decomposition.reads stands for 3 sites .* per_layer_transcoder"),
        ({"architecture": Architecture.sae, "reads": ["mlp_out"]}, "decomposition.reads stands for 3 sites"),
        ({"architecture": Architecture.sae, "layers": [0]}, "decomposition.writes=.* writes what it reads"),
        (
            {"architecture": Architecture.sae, "reads": ["mlp_out"], "layers": [0], "skip": True},
            "decomposition.skip=true would let",
        ),
        (CLT | {"reads": ["L0.mlp_in", "L1.resid_pre", "L2.mlp_in"]}, "mixes points"),
        ({"architecture": Architecture.neurons}, "can only have mlp_hidden"),
        ({"architecture": Architecture.neurons, "reads": ["mlp_hidden"], "k": 11}, "more than the 10 features"),
    ],
)
def test_what_cannot_work_is_refused_by_name(settings, sentence):
    with pytest.raises(SettingError, match=sentence):
        wire(config(**settings), SHAPE)


def test_stacking_parts_that_write_the_same_site_is_refused():
    part = dictionary(architecture=Architecture.transcoder, layers=[1])
    with pytest.raises(SettingError, match="both write L1.mlp_out"):
        stack([part, part], "per_layer_transcoder")


@pytest.mark.parametrize("activation", ACTIVATIONS | PURSUIT)
@pytest.mark.parametrize("encoder", Encoder)
def test_a_stack_computes_what_its_parts_compute(activation, encoder):
    settings = (ACTIVATIONS | PURSUIT)[activation]
    if activation == "matching_pursuit":
        settings = settings | {"architecture": Architecture.sae, "reads": ["mlp_out"]}
    else:
        settings = settings | {"architecture": Architecture.transcoder, "encoder": encoder}
        settings = settings | {"code_normalisation": CodeNormalisation.sae}
    parts = [settled(seed=layer, layers=[layer], **settings) for layer in (2, 0)]
    for part in parts:
        ones = torch.ones(D)
        part.fold(2 * ones, 2 * ones, ones, ones)
    stacked = stack(parts, "stacked")
    x = inputs(stacked)
    y_hat, _ = stacked(x)
    for part in parts:
        own = x[:, stacked.read_layout.spans[part.reads[0]]]
        torch.testing.assert_close(y_hat[:, stacked.write_layout.spans[part.writes[0]]], part(own)[0])
