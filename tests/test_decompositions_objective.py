"""What training does around the loss: schedules, liveness, dead features, decoder norms."""

import pytest
import torch
from decomposition_parts import ACTIVATIONS, D, F, dictionary, inputs, objective, planted, train

from nndecomp.config.schema import Activation, Architecture, CodeNormalisation, Decoder, Penalty
from nndecomp.decompositions import losses
from nndecomp.types import Layout, Point, Site

ONE = {"architecture": Architecture.transcoder, "layers": [1]}
TWO_SITES = Layout.of({Site(0, Point.mlp_out): 2, Site(1, Point.mlp_out): 1})


def test_fvu_is_1_for_the_mean_and_unchanged_by_scale_and_shift():
    y = torch.randn(50, 3) + 5
    assert float(losses.fvu(y - y.mean(0), y, TWO_SITES)) == pytest.approx(1)
    residual = torch.randn(50, 3)
    base = losses.fvu(residual, y, TWO_SITES)
    torch.testing.assert_close(losses.fvu(7 * residual, 7 * y + 3, TWO_SITES), base)


def test_the_penalty_warms_up_and_then_stays():
    made = objective(
        activation=Activation.relu,
        k=None,
        penalty=Penalty.l1,
        penalty_coefficient=0.5,
        penalty_normalisation=CodeNormalisation.sae,
    )
    rows = planted(made.layout, 100)
    made.loss(rows, 0.0)
    at = {p: float(made.loss(rows, p)[1]["loss/penalty"]) for p in (0.0, 0.05, 0.1, 0.9)}
    assert at[0.0] == 0 and at[0.05] == pytest.approx(at[0.1] / 2) and at[0.1] == at[0.9] > 0


def test_the_l0_penalty_is_the_number_of_active_features_and_raises_thresholds_near_activations():
    made = objective(**ONE, **ACTIVATIONS["jumprelu"], penalty=Penalty.l0, penalty_coefficient=2.0, penalty_warmup=0.0)
    loss, metrics = made.loss(planted(made.layout, 200), 0.5)
    assert float(metrics["loss/penalty"]) == pytest.approx(2 * float(metrics["l0"]))
    loss.backward()
    assert made.dictionary.activation.threshold[0].grad is not None


def test_k_moves_in_a_straight_line_from_k_start_to_k_and_stays():
    made = objective(**ONE, activation=Activation.topk, k=4, k_start=20, k_anneal=0.5)
    rows, seen = planted(made.layout, 100), {}
    for progress in (0.0, 0.25, 0.5, 0.9):
        made.loss(rows, progress)
        seen[progress] = made.dictionary.activation.k
    assert seen == {0.0: [20], 0.25: [12], 0.5: [4], 0.9: [4]}
    assert made.finished().spec.activation.k == (4,)


def test_the_decoder_bias_starts_at_the_mean_of_the_first_batch():
    made = objective(**ONE, scales={Site(1, Point.mlp_in): 1.0, Site(1, Point.mlp_out): 2.0})
    rows = planted(made.layout, 100) + 5
    made.loss(rows, 0.0)
    torch.testing.assert_close(made.dictionary.b_dec.detach(), rows[:, D:].mean(0) / 2)
    before = made.dictionary.b_dec.detach().clone()
    made.after_step()
    made.loss(rows - 5, 0.0)
    assert torch.equal(made.dictionary.b_dec, before)


def test_liveness_counts_tokens_since_each_feature_fired():
    made = objective(**ONE)
    with torch.no_grad():
        made.dictionary.banks[0].b_enc[:4] = -1e6  # never fire
    for _ in range(3):
        made.loss(planted(made.layout, 100), 0.5)
        made.after_step()
    since = made.tokens_since_fired
    assert since.dtype == torch.int64 and since[:4].tolist() == [300] * 4
    assert int(since[4:].min()) == 0


def test_aux_k_reaches_dead_encoders_and_no_living_feature():
    made = objective(**ONE, dead_after_tokens=100, aux_coefficient=1.0, aux_k=5)
    bank = made.dictionary.banks[0]
    with torch.no_grad():
        bank.b_enc[:6] = -1e6
    made.loss(planted(made.layout, 100), 0.5)
    made.after_step()
    with torch.no_grad():
        bank.b_enc[:6] = 0.0  # selectable again, but the others are still ahead
        bank.W_enc[:6] *= 0.01
    loss, metrics = made.loss(planted(made.layout, 100, seed=1), 0.5)
    assert 0 < float(metrics["loss/aux"]) < 2
    codes = made.dictionary.encode(planted(made.layout, 100, seed=1)[:, :D])
    dead = made.tokens_since_fired >= 100
    assert dead[:6].all() and not dead.all()
    assert not codes[0].firings()[:6].any()
    loss.backward()
    assert (bank.W_enc.grad[:6].abs().sum(1) > 0).all() and (bank.W_dec.grad[:6].abs().sum(1) > 0).all()


def test_nothing_dead_costs_nothing():
    made = objective(**ONE, dead_after_tokens=10**9)
    assert "loss/aux" not in made.loss(planted(made.layout, 100), 0.5)[1]


def test_unit_norm_decoders_stay_so_and_get_gradients_along_the_sphere():
    made = objective(**ONE, decoder=Decoder.unit_norm)
    bank = made.dictionary.banks[0]
    loss, _ = made.loss(planted(made.layout, 100), 0.5)
    loss.backward()
    made.before_step()
    along = (bank.W_dec.grad * bank.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(F), atol=1e-6, rtol=0)
    made.after_step()
    train(made, 3)
    torch.testing.assert_close(bank.W_dec.norm(dim=1), torch.ones(F))


def test_rows_that_hold_other_sites_as_well_train_alike():
    made = objective(**ONE)
    rows = planted(made.layout, 100)
    others = Layout.of({Site(layer, point): D for layer in range(3) for point in (Point.mlp_in, Point.mlp_out)})
    wide = torch.randn(100, others.width)
    for site, span in made.layout.spans.items():
        wide[:, others.spans[site]] = rows[:, span]
    among = type(made)(dictionary(**ONE), made.cfg, others, dict.fromkeys(others.sites, 1.0))
    torch.testing.assert_close(among.loss(wide, 0.5)[0], made.loss(rows, 0.5)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saved_state_continues_bit_for_bit(activation):
    settings = ONE | ACTIVATIONS[activation] | {"dead_after_tokens": 300, "decoder": Decoder.unit_norm}
    first = objective(**settings)
    train(first, 3)
    second = objective(seed=5, **settings)
    second.load_state_dict(first.state_dict())
    rows = planted(first.layout, 128, seed=50)
    for made in (first, second):
        made.zero_grad()
        made.loss(rows, 0.5)[0].backward()
        made.after_step()
    assert torch.equal(first.dictionary.banks[0].W_enc.grad, second.dictionary.banks[0].W_enc.grad)
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_saved_is_finished_as_it_was_with_its_own_scales_and_k():
    settings = ONE | {"activation": Activation.topk, "k": 4, "k_start": 20, "k_anneal": 1.0}
    sites = [Site(1, Point.mlp_in), Site(1, Point.mlp_out)]
    first = objective(scales=dict(zip(sites, (2.0, 3.0), strict=True)), **settings)
    train(first, 3)
    second = objective(scales=dict.fromkeys(sites, 1.0), **settings)
    second.load_state_dict(first.state_dict())
    ours, theirs = first.finished(), second.finished()
    assert ours.spec.activation.k == theirs.spec.activation.k == (9,)
    x = inputs(ours)
    assert torch.equal(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_bf16_autocast_losses_and_gradients_stay_fp32(activation):
    made = objective(**ACTIVATIONS[activation], dead_after_tokens=100)
    for step in range(2):  # the second has dead features
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = made.loss(planted(made.layout, 100, seed=step), 0.5)
        loss.backward()
        made.after_step()
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in made.parameters())


def test_metrics_carry_no_graph():
    made = objective()
    _, metrics = made.loss(planted(made.layout, 100), 0.5)
    assert not any(value.requires_grad for value in metrics.values())
    assert {"loss", "loss/reconstruction", "fvu", "l0", "dead", "l0/L0", "l0/L1", "l0/L2"} <= metrics.keys()


def test_the_learned_threshold_keeps_k_features_on_new_rows():
    made = objective(**ONE, activation=Activation.batchtopk, k=4)
    train(made, 150, lr=3e-3)
    finished = made.finished()
    rows = planted(made.layout, 4000, seed=1234)
    assert float(finished(rows[:, :D])[1].counts().float().mean()) == pytest.approx(4, abs=0.3)
