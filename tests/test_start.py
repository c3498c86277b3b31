"""What training starts from: middles and directions of data, and the target's own weights."""

from typing import Any

import pytest
import torch
from decomposition_parts import ARCHITECTURES, F, config, objective, planted, row_layout
from torch import Tensor
from truth_parts import CPU, planted_settings

from nndecomp.activations.statistics import Affine, SiteScale
from nndecomp.config.schema import Activation, Architecture, Decoder, Directions, Encoder, InitialBias
from nndecomp.decompositions import archetypal
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.encoders import GluEncoder
from nndecomp.decompositions.geometry import geometric_median, principal_directions, unit
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.decompositions.start import COARSE, FINE
from nndecomp.errors import SettingError
from nndecomp.targets.planted import PlantedTarget
from nndecomp.types import Layout, Site

RELU: dict[str, Any] = {"activation": Activation.relu, "k": None}


def mean_distance(points: torch.Tensor, guess: torch.Tensor) -> float:
    return float((points - guess).double().norm(dim=1).mean())


def test_the_geometric_median_is_nearer_to_the_points_than_anything_around_it():
    points = torch.randn(400, 3).exp()
    found = geometric_median(points)
    nearest = mean_distance(points, found)
    assert nearest < mean_distance(points, points.mean(0))
    for step in (1e-1, 1e-2, 1e-3):
        around = found + step * unit(torch.randn(50, 3))
        assert min(mean_distance(points, guess) for guess in around) > nearest


def test_one_far_point_moves_the_mean_and_not_the_median():
    points = torch.randn(101, 2) * 0.1
    points[0] = torch.tensor([1e4, 0.0])
    assert points.mean(0).norm() > 50 and geometric_median(points).norm() < 0.1


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[2.0, 3.0]] * 5, [2.0, 3.0]),
        ([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0, 0.0]),  # the mean is a point, and right
        ([[0.0], [0.0], [0.0], [1.0], [9.0]], [0.0]),
    ],
)
def test_a_point_at_the_guess_is_no_division_by_zero(points: list, expected: list):
    """A fault of dictionary_learning: its weights 1 / |x - g| are not guarded, so that constant data give NaN."""
    torch.testing.assert_close(geometric_median(torch.tensor(points)), torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_iteration_leaves_a_point_that_is_not_the_median():
    """The mean of these is their first point, where the guarded sum must not stay."""
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-3.0, 0.0]])
    torch.testing.assert_close(points.mean(0), points[0])
    assert geometric_median(points)[0] > 0.9


def test_principal_directions_are_those_in_which_points_vary_whatever_their_mean():
    basis = torch.linalg.qr(torch.randn(6, 6)).Q
    spread = torch.tensor([5.0, 3.0, 0.1, 0.1, 0.1, 0.1])
    points = (torch.randn(3000, 6) * spread) @ basis.T + 100 * basis[:, 5]
    found = principal_directions(points, 2)
    torch.testing.assert_close(found.T @ found, torch.eye(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ found.T, basis[:, :2] @ basis[:, :2].T, atol=2e-2, rtol=0)


# Dictionaries.


def started(architecture: str = "sae", n_rows: int = 400, **settings: Any) -> tuple[DictionaryObjective, Tensor]:
    """And the rows it was started from, in its own units."""
    made = objective(**ARCHITECTURES[architecture], **(RELU | settings))
    rows = planted(made.layout, n_rows, seed=7) + torch.linspace(-1, 1, made.layout.width)
    made.start(rows)
    return made, made.writes(rows)


def affine(layout: Layout) -> dict[Site, SiteScale]:
    """Another mean and another scale at every column."""
    draw = torch.Generator().manual_seed(3)
    widths = zip(layout.sites, layout.widths, strict=True)
    return {s: Affine(torch.randn(d, generator=draw), 0.5 + torch.rand(d, generator=draw)) for s, d in widths}


@pytest.mark.parametrize("architecture", ["crosscoder", "per_layer_transcoder"])
def test_the_bias_starts_in_the_middle_of_rows_as_training_sees_them(architecture: str):
    """A fault of dictionary_learning's BatchTopK trainer: it takes the median of raw rows, and trains on scaled ones."""
    settings = ARCHITECTURES[architecture]
    made = objective(**settings, **RELU, initial_bias=InitialBias.geometric_median)
    made = DictionaryObjective(made.dictionary, made.cfg, made.layout, affine(made.layout))
    rows = 50 + 10 * planted(made.layout, 300)
    made.start(rows)
    for site, span in made.dictionary.write_layout.spans.items():
        columns = rows[:, made.layout.spans[site]]
        affinity = affine(made.layout)[site]
        assert isinstance(affinity, Affine)
        scaled = (columns - affinity.mean) / affinity.scale
        torch.testing.assert_close(made.dictionary.b_dec[span], geometric_median(scaled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "expected"), [(InitialBias.zero, 0.0), (InitialBias.mean, 1.0)])
def test_the_bias_starts_at_zero_or_at_the_mean(kind: InitialBias, expected: float):
    made, y = started(initial_bias=kind)
    torch.testing.assert_close(made.dictionary.b_dec.detach(), expected * y.mean(0))


@pytest.mark.parametrize("architecture", ["sae", "crosscoder", "cross_layer_transcoder"])
def test_rows_of_the_active_subspace_lie_in_the_leading_directions_of_each_site(architecture: str):
    made, y = started(architecture, directions=Directions.active_subspace, subspace_share=0.5)
    random = objective(**ARCHITECTURES[architecture], **RELU).dictionary
    for g, (spec, bank) in enumerate(zip(made.dictionary.spec.groups, made.dictionary.banks, strict=True)):
        for site in spec.writes:
            columns = made.dictionary.write_layout.spans[site]
            points = y[:, columns].double()
            own = slice(columns.start - bank.writes.start, columns.stop - bank.writes.start)
            rows, before = (W.detach()[:, own].double() for W in (bank.W_dec, random.banks[g].W_dec))
            leading = torch.linalg.svd(points - points.mean(0)).Vh[:3]  # of 6 coordinates
            torch.testing.assert_close(rows @ leading.T @ leading, rows, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(rows.norm(dim=1), before.norm(dim=1), atol=1e-5, rtol=1e-4)
        if spec.reads == spec.writes:
            cosine = torch.nn.functional.cosine_similarity(bank.W_enc, bank.W_dec)
            torch.testing.assert_close(cosine, torch.ones(F), msg="a tied encoder goes where the decoder does")


def test_tied_is_as_asked_for_and_refused_where_widths_differ():
    transcoder = ARCHITECTURES["transcoder"]
    parallel = {}
    for tied in (True, False):
        (bank,) = objective(**transcoder, tied=tied).dictionary.banks
        parallel[tied] = torch.nn.functional.cosine_similarity(bank.W_enc, bank.W_dec)
    assert (parallel[True] > 0.9999).all() and (parallel[False].abs() < 0.99).any()
    with pytest.raises(SettingError, match="tied=true needs groups that write as many coordinates as they read"):
        objective(**ARCHITECTURES["cross_layer_transcoder"], tied=True)


@pytest.mark.parametrize("encoder", list(Encoder))
@pytest.mark.parametrize("activation", [Activation.relu, Activation.gated, Activation.jumprelu])
def test_centred_pre_activations_have_mean_zero(activation: Activation, encoder: Encoder):
    made = objective(activation=activation, k=None, encoder=encoder, centre_pre_activations=True)
    rows = planted(made.layout, 300) + 3
    made.start(rows)
    x = made.reads(rows)
    for bank in made.dictionary.banks:
        mean = (x[:, bank.reads] @ bank.W_enc.T + bank.b_enc).mean(0)
        torch.testing.assert_close(mean, torch.zeros(F), atol=1e-4, rtol=0)


def test_the_searched_norm_leaves_the_least_error_of_the_whole_grid():
    made, y = started(decoder_norm_search=True)
    (bank,) = made.dictionary.banks
    found = bank.W_dec.detach().norm(dim=1)
    torch.testing.assert_close(found, found[:1].expand(F))
    shape, errors = unit(bank.W_dec.detach()), {}
    for norm in {*COARSE.tolist(), *(found[0] + FINE).tolist(), float(found[0])}:
        with torch.no_grad():
            bank.W_dec.copy_(norm * shape)
            errors[norm] = float((made.dictionary(y)[0] - y).square().sum())
    best = min(errors, key=lambda norm: errors[norm])
    assert abs(best - float(found[0])) < 1e-4, errors


def test_the_searched_norm_is_the_one_that_is_right():
    """Of orthogonal features that are present or not, read by their own directions: what is read is what is written."""
    made = objective(
        **ARCHITECTURES["sae"], **RELU, n_features=6, initial_bias=InitialBias.zero, decoder_norm_search=True
    )
    (bank,) = made.dictionary.banks
    directions = torch.linalg.qr(torch.randn(6, 6)).Q
    with torch.no_grad():
        bank.W_enc.copy_(directions)
        bank.W_dec.copy_(3 * directions)
    made.start((torch.rand(500, 6) < 0.3).float() @ directions)
    torch.testing.assert_close(bank.W_dec.norm(dim=1), torch.ones(6), atol=1e-2, rtol=0)


def of_planted(**settings: Any) -> tuple[DictionaryObjective, PlantedTarget, Tensor, Tensor]:
    """Transcoders of MLPs of 16 relu neurons, in units with means; with what the MLPs read and write."""
    target = PlantedTarget("planted", planted_settings(), CPU, torch.float32)
    cfg = config(**({"n_features": 20, **RELU, "initial_bias": InitialBias.zero} | settings))
    made = build_dictionary(cfg, target.shape, 0, CPU, "planted")
    layout = row_layout(made)
    found = DictionaryObjective(made, cfg, layout, affine(layout))
    recorded = target.record(torch.arange(240).view(2, 120), layout.sites)
    rows = torch.cat([recorded[site].flatten(0, 1) for site in layout.sites], 1)
    found.start(rows, target, seed=0)
    raw = [torch.cat([recorded[site].flatten(0, 1) for site in each], 1) for each in (made.reads, made.writes)]
    return found, target, raw[0], raw[1]


def test_features_that_start_as_all_relu_neurons_compute_what_the_mlp_does():
    made, _, x, y = of_planted(directions=Directions.neurons, n_features=16)
    shift = made.finished()(x)[0] - y
    torch.testing.assert_close(shift, made.writes.m.expand_as(y), atol=1e-4, rtol=1e-4, msg="b_dec is 0 in its units")


@pytest.mark.parametrize("architecture", [Architecture.per_layer_transcoder, Architecture.cross_layer_transcoder])
def test_features_that_start_as_neurons_fire_as_they_do(architecture: Architecture):
    made, target, x, _ = of_planted(directions=Directions.neurons, architecture=architecture, decoder_norm=0.3)
    codes = made.finished().encode(x)
    for group, bank, spec in zip(codes, made.dictionary.banks, made.dictionary.spec.groups, strict=True):
        neurons = target.neurons_of(spec.reads[0])
        own = (x[:, bank.reads] @ neurons.read.T + neurons.bias).relu()
        assert torch.equal(
            group.dense()[:, :16] > 1e-5, own / (neurons.read * made.reads.s[bank.reads]).norm(dim=1) > 1e-5
        )
        n_own = target.shape.of(None).d_model
        torch.testing.assert_close(bank.W_dec[:16, :n_own].norm(dim=1), torch.full((16,), 0.3))
        assert not bank.W_dec[:16, n_own:].any(), "an MLP does not write to later layers"
        assert bank.W_dec[16:, :n_own].any(), "features beyond the neurons are random"


def test_features_start_with_what_the_mlp_answers_to_their_own_direction():
    made, target, x, _ = of_planted(directions=Directions.mlp_response)
    reads, writes = made.reads, made.writes
    for bank, spec in zip(made.dictionary.banks, made.dictionary.spec.groups, strict=True):
        inside = ((x - reads.m) / reads.s)[:, bank.reads]
        mean = inside.mean(0)
        radius = (inside - mean).norm(dim=1).mean()
        answers = []
        for direction in bank.W_enc.detach():
            raw = (mean + radius * direction) * reads.s[bank.reads] + reads.m[bank.reads]
            answers.append(target.mlp_of(spec.reads[0], raw[None])[0] / writes.s[bank.writes])
        expected = unit(torch.stack(answers) - torch.stack(answers).mean(0))
        torch.testing.assert_close(unit(bank.W_dec.detach()), expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(bank.W_dec.norm(dim=1), torch.full((20,), 0.1))


def test_directions_of_an_mlp_are_refused_where_there_is_none():
    with pytest.raises(SettingError, match="directions=neurons is for transcoders"):
        objective(**ARCHITECTURES["sae"], directions=Directions.neurons)


def test_archetypes_are_rows_of_the_start_and_not_of_the_first_batch():
    settings = {"decoder": Decoder.archetypal, "archetypes": 300, "archetypal_slack": 0.0}
    made, y = started(n_rows=400, **settings)
    archetypes = archetypal.archetypes_of(made.dictionary.banks[0])
    points = y - made.dictionary.b_dec
    assert not (archetypes.C[:, None] - points[None]).abs().amax(2).amin(1).any()
    assert len(torch.unique(archetypes.C, dim=0)) > 32, "more than a batch has"
    before = archetypes.C.clone()
    made.loss(planted(made.layout, 32, seed=1), 0.0)
    assert torch.equal(archetypes.C, before)


def test_a_glu_encoder_starts_half_open():
    """A fault of Language-Model-SAEs: the gate's bias is never filled, so that NaN may be in it."""
    made, _ = started(encoder=Encoder.glu)
    (bank,) = made.dictionary.banks
    assert isinstance(bank.encoder, GluEncoder) and not bank.encoder.b_glu.any()
