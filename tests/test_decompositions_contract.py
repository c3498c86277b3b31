"""What every architecture promises with every activation function. A new architecture joins by one entry in
`decomposition_parts.ARCHITECTURES`."""

import copy
from typing import Any

import pytest
import torch
from decomposition_parts import (
    ACTIVATIONS,
    ARCHITECTURES,
    GLU,
    GRID,
    PURSUIT,
    dictionary,
    inputs,
    objective,
    planted,
    row_layout,
    settled,
    train,
)
from reference.dictionary import forward as slow_forward

from nndecomp.config.schema import Activation, Architecture, Scope
from nndecomp.decompositions import encoding
from nndecomp.decompositions.codes import DenseCodes, SparseCodes
from nndecomp.decompositions.groups import SparseDictionary

# With the second encoder, one activation function of each family, on what reads one site, several, and shares encoders.
GLU_GRID = [
    (architecture, activation, GLU)
    for architecture in ("centred_sae", "skip_cross_layer_transcoder", "decoupled_crosscoder")
    for activation in ("gated", "abs_topk", "jumprelu")
]


@pytest.fixture(
    params=[*((*pair, {}) for pair in GRID), *GLU_GRID],
    ids=lambda case: "-".join([*case[:2], *(["glu"] if case[2] else [])]),
)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    architecture, activation, encoder = request.param
    return ARCHITECTURES[architecture] | (ACTIVATIONS | PURSUIT)[activation] | encoder


def test_reconstructions_and_codes_have_the_shapes_of_their_sites(settings):
    made = settled(**settings)
    y_hat, codes = made(inputs(made, 40))
    assert y_hat.shape == (40, made.write_layout.width)
    assert codes.counts().shape == (40, len(made.costs))
    assert [len(each) for each in codes.firings()] == [cost.n_components for cost in made.costs]


def test_encode_then_decode_is_forward_and_equals_loops_over_dense_matrices(settings):
    for training in (False, True):
        made = settled(**settings).train(training)
        x = inputs(made)
        y_hat, codes = made(x)
        assert torch.equal(made.decode(made.encode(x), x), y_hat)
        torch.testing.assert_close(y_hat, slow_forward(made, x))
        assert int(codes.counts().sum()) == sum(int((group.dense() != 0).sum()) for group in codes)


@pytest.mark.parametrize("encoder", [{}, GLU], ids=["linear", "glu"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_centre_learns_the_same_from_rows_that_want_no_gradient(activation, encoder, monkeypatch):
    """Where rows are given its gradient is one product, -(sum over tokens of dL/dz) W_enc, of no row alone."""
    monkeypatch.setattr(encoding, "_DENSE", 1.0)  # entries are listed however many they are
    made = settled(**ARCHITECTURES["centred_sae"], **ACTIVATIONS[activation], **encoder).train()
    x = inputs(made, 300)
    weights = torch.randn(300, made.write_layout.width, dtype=torch.float64)
    learnt = []
    for wanted in (False, True):
        made.zero_grad()
        y_hat, codes = made(x.clone().requires_grad_(wanted))
        assert all(isinstance(own, SparseCodes) for own in codes)
        (y_hat.square() * weights).sum().backward()
        learnt.append({name: own.grad for name, own in made.named_parameters()})
    given, followed = learnt
    assert given["b_dec"].norm() > 0
    for name, gradient in followed.items():
        torch.testing.assert_close(given[name], gradient)


def test_gradients_equal_those_of_dense_matrices(settings):
    made = settled(**settings).train()
    if made.spec.activation.kind is Activation.jumprelu:
        pytest.skip("the estimated gradient of jumprelu is not the derivative of the function; it has its own tests")
    slow = copy.deepcopy(made)
    x = inputs(made)
    x_slow, x = x.clone().requires_grad_(), x.requires_grad_()
    weights = torch.randn(40, made.write_layout.width, dtype=torch.float64)
    (made(x)[0].square() * weights).sum().backward()
    (slow_forward(slow, x_slow).square() * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_slow.grad)
    for (name, own), (_, other) in zip(made.named_parameters(), slow.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_every_parameter_gets_a_gradient(settings):
    made = objective(**settings)
    loss, _ = made.loss(planted(made.layout, 200), 0.5)
    loss.backward()
    without = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_a_pass_site_by_site_equals_forward(settings):
    made = settled(**settings)
    joint = made.spec.activation.kind is Activation.matching_pursuit and len(made.together) < len(made.groups)
    of_all = (Architecture.crosscoder, Architecture.dedicated_feature_crosscoder)
    if settings["architecture"] in of_all or joint:
        assert "which runs after" in str(made.live_obstacle())
        return
    assert made.live_obstacle() is None
    x = inputs(made)
    y_hat, codes = made(x)
    run = made.live_run()
    for site in sorted({*made.reads, *made.writes}):
        if site in made.reads:
            run.read(site, x[:, made.read_layout.spans[site]])
        if site in made.writes:
            torch.testing.assert_close(run.write(site), y_hat[:, made.write_layout.spans[site]])
    assert torch.equal(run.active().counts(), codes.counts())


def test_saving_and_loading_keeps_every_bit(settings, tmp_path):
    made = settled(**settings)
    made.save_pretrained(tmp_path / "made")
    loaded = SparseDictionary.from_pretrained(tmp_path / "made")
    assert loaded.spec == made.spec and not loaded.training
    assert loaded.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in made.state_dict().items())
    assert torch.equal(loaded(inputs(made))[0], made(inputs(made))[0])


def test_evaluation_treats_each_token_on_its_own(settings):
    made = settled(**settings)
    x = inputs(made)
    y_hat, codes = made(x)
    order = torch.randperm(len(x))
    y_shuffled, codes_shuffled = made(x[order])
    torch.testing.assert_close(y_shuffled, y_hat[order])
    assert torch.equal(codes_shuffled.counts(), codes.counts()[order])
    one_by_one = [made(row) for row in x.split(1)]
    torch.testing.assert_close(torch.cat([y for y, _ in one_by_one]), y_hat)
    assert torch.equal(torch.cat([c.counts() for _, c in one_by_one]), codes.counts())


def test_folding_the_scales_in_changes_units_and_nothing_else(settings):
    made = settled(**settings)
    folded = copy.deepcopy(made)
    raw = inputs(made)
    widths = {site: made.spec.widths[site] for site in row_layout(made).sites}
    s = {site: 0.25 * 3.0**i * (1 + torch.arange(width) / width) for i, (site, width) in enumerate(widths.items())}
    m = {site: torch.linspace(-1, 2, width) + i for i, (site, width) in enumerate(widths.items())}
    of = lambda each, layout: torch.cat([each[site] for site in layout.sites]).double()  # noqa: E731
    s_read, s_write = of(s, made.read_layout), of(s, made.write_layout)
    m_read, m_write = of(m, made.read_layout), of(m, made.write_layout)
    folded.fold(s_read, s_write, m_read, m_write)
    y_hat, codes = made((raw - m_read) / s_read)
    y_raw, codes_raw = folded(raw)
    torch.testing.assert_close(y_raw, y_hat * s_write + m_write)
    for group, group_raw in zip(codes, codes_raw, strict=True):
        torch.testing.assert_close(group_raw.dense(), group.dense())


def test_a_finished_dictionary_equals_the_one_in_training_on_raw_rows(settings):
    sites = row_layout(dictionary(**settings)).sites
    scaled = objective(scales={site: 0.25 * 3.0**i for i, site in enumerate(sites)}, **settings)
    train(scaled, 5)
    rows = planted(scaled.layout, 100, seed=7)
    finished = scaled.finished()
    x = torch.cat([rows[:, scaled.layout.spans[site]] for site in finished.read_layout.sites], 1)
    y = torch.cat([rows[:, scaled.layout.spans[site]] for site in finished.write_layout.sites], 1)
    scaled.eval()
    _, metrics = scaled.loss(rows, 1.0)
    y_hat, codes = finished(x)
    spread = (y - y.mean(0)).square()
    each = [
        ((y - y_hat)[:, span].square().sum() / spread[:, span].sum()) for span in finished.write_layout.spans.values()
    ]
    torch.testing.assert_close(torch.stack(each).mean(), metrics["fvu"], rtol=1e-4, atol=1e-6)
    l0 = codes.counts().float().sum() / len(codes) / len(x)
    torch.testing.assert_close(l0, metrics["l0"], rtol=0.02, atol=0.02)


def test_evaluation_changes_no_state(settings):
    made = objective(**settings)
    train(made, 2)
    made.eval()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.loss(planted(made.layout, 50, seed=3), 0.9)
    made.finished()(inputs(made.dictionary))
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


def test_the_loss_halves_in_100_steps_on_planted_data(settings):
    made = objective(**settings)
    losses = train(made, 100)
    assert sum(losses[-5:]) / 5 < losses[0] / 2, losses[:: len(losses) // 10]


def test_selecting_activations_give_sparse_codes_and_others_dense_ones(settings):
    made = settled(**settings)
    selects = made.spec.activation.k != ()
    assert all(isinstance(group, SparseCodes if selects else DenseCodes) for group in made.encode(inputs(made)))


@pytest.mark.parametrize("architecture", ["per_layer_transcoder", "cross_layer_transcoder"])
def test_groups_that_compete_share_their_k(architecture):
    batch = ARCHITECTURES[architecture] | ACTIVATIONS["batchtopk"] | {"scope": Scope.all}
    made = settled(**batch).train()
    codes = made.encode(inputs(made))
    assert int(codes.counts().sum()) == 40 * 3 * len(codes)
    assert len({int(n) for n in codes.counts().sum(0)}) > 1, "groups that compete take different shares"
    row = ARCHITECTURES[architecture] | ACTIVATIONS["topk"] | {"scope": Scope.all}
    made = settled(**row)
    assert (made.encode(inputs(made)).counts().sum(1) <= 3 * len(made.costs)).all()
    assert "compete" in str(made.live_obstacle())


def test_all_groups_competing_can_be_run_live_once_the_threshold_is_known():
    made = settled(**(ARCHITECTURES["cross_layer_transcoder"] | ACTIVATIONS["batchtopk"] | {"scope": Scope.all}))
    assert made.live_obstacle() is None and made.activation.threshold.shape == (1,)
    x = inputs(made)
    run = made.live_run()
    for site in made.reads:
        run.read(site, x[:, made.read_layout.spans[site]])
    torch.testing.assert_close(run.write(made.writes[-1]), made(x)[0][:, made.write_layout.spans[made.writes[-1]]])


def test_rows_of_another_width_are_refused_with_both_numbers():
    made = settled(**ARCHITECTURES["per_layer_transcoder"])
    with pytest.raises(AssertionError, match=f"rows of 3 numbers, but .* have {made.read_layout.width} side by side"):
        made.encode(inputs(made)[:, :3])
