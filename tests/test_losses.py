"""Every reconstruction loss, penalty and pre-activation loss against its formula, written out in NumPy and float64."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from decomposition_parts import ARCHITECTURES, F, K, inputs, objective, planted, settled, train
from torch import Tensor

from nndecomp.config.schema import (
    Activation,
    Architecture,
    CodeNormalisation,
    Penalty,
    PreActivationLoss,
    Reconstruction,
)
from nndecomp.decompositions import losses, penalties
from nndecomp.decompositions.codes import Codes, DenseCodes
from nndecomp.errors import SettingError
from nndecomp.types import Layout, Point, Site

ONE = {"architecture": Architecture.transcoder, "layers": [1]}
TWO_SITES = Layout.of({Site(0, Point.mlp_out): 2, Site(1, Point.mlp_out): 1})
RELU = {"activation": Activation.relu, "k": None}
JUMP = {"activation": Activation.jumprelu, "k": None, "jumprelu_threshold": 0.5, "jumprelu_bandwidth": 1.0}
CODES = {"dense": RELU, "sparse": {"activation": Activation.topk, "k": K}}


def test_reconstruction_losses_are_what_their_names_say():
    y = torch.tensor([[1.0, 0.0, 10.0], [-1.0, 0.0, -10.0]])  # spread 2 at the first site, 200 at the second
    residual = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 20.0]])
    by = lambda kind: float(losses.reconstruction(residual, y, kind, TWO_SITES))  # noqa: E731
    assert by(Reconstruction.sum_of_squares) == pytest.approx(425 / 2)
    assert by(Reconstruction.mean_of_squares) == pytest.approx(425 / 6)
    assert by(Reconstruction.norm) == pytest.approx((5 + 0 + 0 + 20) / 4), "not squared, and each site on its own"
    assert by(Reconstruction.normalised) == pytest.approx((25 / 2 + 400 / 200) / 2)


@pytest.mark.parametrize("kind", Reconstruction)
def test_reconstruction_losses_in_numpy(kind: Reconstruction):
    draw = np.random.default_rng(0)
    y, residual = draw.normal(size=(2, 40, 3)) + 2
    sites = [slice(0, 2), slice(2, 3)]
    error = lambda part: (residual[:, part] ** 2).sum()  # noqa: E731
    spread = lambda part: ((y[:, part] - y[:, part].mean(0)) ** 2).sum()  # noqa: E731
    slow = {
        Reconstruction.sum_of_squares: np.mean([np.dot(row, row) for row in residual]),
        Reconstruction.mean_of_squares: np.mean(residual**2),
        Reconstruction.norm: np.mean([np.linalg.norm(row[part]) for row in residual for part in sites]),
        Reconstruction.normalised: np.mean([error(part) / spread(part) for part in sites]),
    }
    fast = losses.reconstruction(torch.from_numpy(residual), torch.from_numpy(y), kind, TWO_SITES)
    np.testing.assert_allclose(float(fast), slow[kind], rtol=1e-12)


@pytest.mark.parametrize("kind", Reconstruction)
def test_reconstruction_losses_have_the_gradient_of_finite_differences(kind: Reconstruction):
    y = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y_hat = torch.zeros_like(y).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.reconstruction(y - z, y, kind, TWO_SITES), y_hat)


def slow_penalty(kind: Penalty, f: list[np.ndarray], c: list[np.ndarray]) -> float:
    """f: [token, feature] of each group. Feature by feature and token by token."""
    total = 0.0
    for codes, weights in zip(f, c, strict=True):
        n_tokens = len(codes)
        for i, weight in enumerate(weights):
            v = [abs(code) * weight for code in codes[:, i]]
            match kind:
                case Penalty.l1:
                    total += sum(v) / n_tokens
                case Penalty.tanh:
                    total += sum(np.tanh(4 * value) for value in v) / n_tokens
                case Penalty.tanh_quadratic:
                    q = sum(np.tanh(4 * value) for value in v) / n_tokens
                    total += q * (1 + q / 0.01)
                case Penalty.lp:
                    total += sum(value**0.3 for value in v if value > 0) / n_tokens
    return total


def fast_penalty(kind: Penalty, codes: Codes, c: list[Tensor]) -> Tensor:
    match kind:
        case Penalty.l1:
            return penalties.l1(codes, c)
        case Penalty.tanh:
            return penalties.tanh(codes, c, 4.0)
        case Penalty.tanh_quadratic:
            return penalties.tanh_quadratic(codes, c, 4.0, 0.01)
        case other:
            assert other is Penalty.lp
            return penalties.lp(codes, c, 0.3)


OF_CODES = [Penalty.l1, Penalty.tanh, Penalty.tanh_quadratic, Penalty.lp]


@pytest.mark.parametrize(("kind", "codes"), list(itertools.product(OF_CODES, CODES)))
def test_penalties_are_sums_over_features_and_means_over_tokens(kind: Penalty, codes: str):
    made = settled(**CODES[codes])
    encoded = made.encode(inputs(made))
    c = [bank.W_dec.norm(dim=1) for bank in made.banks]
    slow = slow_penalty(kind, [g.dense().detach().numpy() for g in encoded], [w.detach().numpy() for w in c])
    fast = fast_penalty(kind, encoded, c)
    np.testing.assert_allclose(float(fast.detach()), slow, rtol=1e-10)
    # The decoder learns from c, and nothing is infinite where codes are 0.
    fast.backward()
    gradients = [p.grad for bank in made.banks for p in (bank.W_dec, bank.W_enc)]
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("kind", OF_CODES)
def test_penalties_have_the_gradient_of_finite_differences(kind: Penalty):
    draw = torch.Generator().manual_seed(0)
    f = torch.rand(4, 3, dtype=torch.float64, generator=draw).add(0.1).requires_grad_()
    c = torch.rand(3, dtype=torch.float64, generator=draw).add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, c: fast_penalty(kind, Codes((DenseCodes(f),)), [c]), (f, c))


def test_the_frequency_penalty_is_of_each_feature_and_not_of_tokens():
    """Two active codes cost less on two features than on one: 2 * 0.5 (1 + 5) against 1 (1 + 10)."""
    apart, together = torch.tensor([[99.0, 0.0], [0.0, 99.0]]), torch.tensor([[99.0, 0.0], [99.0, 0.0]])
    cost = lambda f: float(penalties.tanh_quadratic(Codes((DenseCodes(f),)), [None], 1.0, 0.1))  # noqa: E731
    assert cost(apart) == pytest.approx(6) and cost(together) == pytest.approx(11)


def test_signed_codes_are_penalised_by_their_size():
    f = torch.tensor([[-2.0, 0.5]])
    codes = Codes((DenseCodes(f),))
    assert float(penalties.l1(codes, [None])) == 2.5
    assert float(penalties.lp(codes, [None], 0.5)) == pytest.approx(2**0.5 + 0.5**0.5)


def test_an_l0_target_is_of_each_group():
    active = [DenseCodes(torch.tensor([[1.0, 1.0, 1.0]])), DenseCodes(torch.tensor([[1.0, 0.0, 0.0]]))]
    assert float(penalties.l0_target(active, 2.0)) == pytest.approx((3 / 2 - 1) ** 2 + (1 / 2 - 1) ** 2)


def test_the_l0_target_moves_thresholds_towards_it_from_both_sides():
    """With the window of the step function around pre-activations, not around codes (dictionary_learning, issue 55: half
    of the window, and every inactive code within it, was lost)."""
    for target, sign in ((1.0, -1), (20.0, 1)):  # too many active: thresholds rise, their gradient is negative
        made = objective(**ONE, **JUMP, penalty=Penalty.l0_target, penalty_target=target, penalty_coefficient=1.0)
        made.cfg.local_coefficient = 0.0
        made.cfg.penalty_warmup = 0.0
        rows = planted(made.layout, 200)
        loss, metrics = made.loss(rows, 0.5)
        l0 = float(metrics["l0"])
        assert float(metrics["loss/penalty"]) == pytest.approx((l0 / target - 1) ** 2)
        loss.backward()
        (theta,) = made.dictionary.activation.threshold
        pre = made.dictionary.banks[0].pre_activations(rows[:, : made.dictionary.read_layout.width])
        window = ((pre - theta).abs() < 0.5).float().mean(0)  # on both sides of theta; its width is 1
        torch.testing.assert_close(theta.grad, -window * 2 * (l0 / target - 1) / target)
        assert (theta.grad * sign).min() >= 0 and (theta.grad != 0).any()


def test_p_falls_in_equal_steps_and_the_last_is_reached_before_the_end():
    """In dictionary_learning the last p comes with the step after the last: five steps stop at 0.25 on the way to 0."""
    p = [penalties.p_at(step / 1000, 1.0, 0.2, (0.5, 1.0), 4) for step in range(1000)]
    changes = {step: p[step] for step in range(1, 1000) if p[step] != p[step - 1]}
    assert list(changes) == [500, 625, 750, 875]
    assert list(changes.values()) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert p[0] == 1.0 and p[-1] == pytest.approx(0.2)
    assert penalties.p_at(0.5, 1.0, 0.2, (0.5, 0.5), 4) == pytest.approx(0.2), "at once"


def test_p_must_stay_above_0():
    """The 0th root of the default p_end = 0 stops both of dictionary_learning's trainers."""
    with pytest.raises(SettingError, match=r"p_end=0.0 must be positive"):
        objective(**ONE, **RELU, penalty=Penalty.lp, penalty_coefficient=1.0, p_end=0.0)


LP: dict[str, Any] = {
    **ONE,
    **RELU,
    "penalty": Penalty.lp,
    "penalty_coefficient": 0.5,
    "penalty_warmup": 0.0,
    "penalty_normalisation": CodeNormalisation.sae,
    "p_end": 0.25,
    "p_steps": 3,
}


def test_coefficient_times_penalty_is_continuous_where_p_moves():
    made = objective(**LP)
    rows = planted(made.layout, 100)
    seen = []
    for progress in (0.49, 0.5, 0.6, 0.7, 0.9, 0.99):
        metrics = made.loss(rows, progress)[1]
        made.after_step()
        seen.append((float(metrics["p"]), float(metrics["loss/penalty"])))
    assert [p for p, _ in seen] == pytest.approx([1.0, 0.75, 0.75, 0.5, 0.25, 0.25])
    assert [value for _, value in seen] == pytest.approx([seen[0][1]] * 6, rel=1e-5), "same rows, same weights"
    codes = made.dictionary.encode(rows[:, : made.dictionary.read_layout.width])
    norms = [made.dictionary.banks[0].W_dec.norm(dim=1)]
    alone = float(penalties.lp(codes, norms, 0.25).detach())
    assert float(made.sparsity.ratio) == pytest.approx(seen[0][1] / (0.5 * alone), rel=1e-5)


def test_a_look_in_evaluation_mode_leaves_p_and_its_coefficient_alone():
    made = objective(**LP)
    rows = planted(made.layout, 100)
    made.loss(rows, 0.1)
    made.after_step()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.eval()
    made.loss(rows, 0.9)
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


def test_penalties_weigh_codes_as_penalty_normalisation_says():
    settings: dict[str, Any] = {"architecture": Architecture.cross_layer_transcoder, **RELU, "penalty_warmup": 0.0}
    for kind in (CodeNormalisation.sae, CodeNormalisation.crosscoder, CodeNormalisation.mixed):
        made = objective(**settings, penalty=Penalty.l1, penalty_coefficient=1.0, penalty_normalisation=kind)
        rows = planted(made.layout, 50)
        _, metrics = made.loss(rows, 0.5)
        expected = 0.0
        for bank, group in zip(made.dictionary.banks, made._step.encoding.codes, strict=True):
            sites = bank.W_dec.detach().split(list(bank.write_widths), 1)
            sae = bank.W_dec.detach().norm(dim=1)
            crosscoder = sum(part.norm(dim=1) for part in sites)
            of = {CodeNormalisation.sae: sae, CodeNormalisation.crosscoder: crosscoder}
            expected += float((group.values.detach() * of.get(kind, sae + 0.1 * crosscoder)).sum()) / 50
        assert float(metrics["loss/penalty"]) == pytest.approx(expected, rel=1e-5)


def test_the_pre_activation_loss_draws_pre_activations_up_to_their_threshold():
    made = objective(
        **ONE,
        **JUMP,
        pre_activation_loss=PreActivationLoss.threshold,
        pre_activation_coefficient=0.1,
        penalty_normalisation=CodeNormalisation.sae,
    )
    rows = planted(made.layout, 50)
    _, metrics = made.loss(rows, 0.5)
    (pre,), (bank,) = made._step.encoding.pres, made.dictionary.banks
    pre = pre.values.detach()
    slow = 0.0
    for token, feature in itertools.product(range(50), range(F)):
        slow += max(0.0, 0.5 - float(pre[token, feature])) * float(bank.W_dec[feature].detach().norm())
    assert float(metrics["loss/pre_activation"]) == pytest.approx(0.1 * slow / 50, rel=1e-5)


def test_thresholds_are_compared_in_the_units_they_have():
    """theta gates z c, so it is z c that has to reach it; Language-Model-SAEs compare theta with z."""
    pre = torch.tensor([[1.0, 1.0]])
    c = torch.tensor([2.0, 0.5])
    loss = penalties.pre_activation([pre], [torch.tensor([1.5, 1.5])], [c], [None])
    assert float(loss) == pytest.approx(max(0, 1.5 - 2.0) + (1.5 - 0.5))


def test_the_pre_activation_loss_of_dead_features_is_of_no_other():
    settings = {**ONE, **RELU, "pre_activation_coefficient": 1.0, "dead_after_tokens": 100}
    made = objective(**settings, pre_activation_loss=PreActivationLoss.dead)
    made.cfg.local_coefficient = made.cfg.aux_coefficient = 0.0
    bank = made.dictionary.banks[0]
    with torch.no_grad():
        bank.b_enc[:5] = -50
    loss, _ = made.loss(planted(made.layout, 100), 0.5)
    assert float(loss.detach()) == 0
    made.after_step()
    loss, _ = made.loss(planted(made.layout, 100, seed=1), 0.5)
    loss.backward()
    dead = made.tokens_since_fired >= 100
    assert dead[:5].all() and not dead.all()
    torch.testing.assert_close(bank.b_enc.grad[:5], torch.full((5,), -1.0))
    assert (bank.b_enc.grad[~dead] == 0).all()
    assert bank.W_dec.grad is None or not bank.W_dec.grad.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({**RELU, "penalty": Penalty.lp, "penalty_coefficient": 1.0}, "penalty=lp with a free decoder is won by small"),
        ({**RELU, "penalty": Penalty.tanh, "penalty_coefficient": 1.0}, "write penalty_normalisation=sae"),
        ({"pre_activation_loss": PreActivationLoss.dead, "pre_activation_coefficient": 1.0}, "topk has none"),
        (
            {**JUMP, "penalty": Penalty.l0, "penalty_coefficient": 1.0, "penalty_normalisation": CodeNormalisation.sae},
            "penalty_normalisation=sae has no effect without",
        ),
        ({**JUMP, "penalty": Penalty.l0_target, "penalty_coefficient": 1.0}, "penalty_target=None does not go with"),
        ({**RELU, "penalty": Penalty.l0, "penalty_coefficient": 1.0}, "needs decomposition.activation=jumprelu"),
        ({**RELU, "p_end": 0.5}, "p_end=0.5 has no effect without"),
        ({"mixed_weights": [1.0, 1.0]}, "has no effect without decomposition.code_normalisation=mixed"),
        (
            {"code_normalisation": CodeNormalisation.mixed, "mixed_weights": [1.0]},
            "must be two numbers, of sae and of crosscoder",
        ),
        ({"matryoshka": [0.5, 0.4]}, "must be positive shares that add to 1"),
        ({"matryoshka_weights": [1.0]}, "has no effect without decomposition.matryoshka"),
    ],
)
def test_losses_that_make_no_sense_are_refused_in_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(SettingError, match=sentence) as refused:
        objective(**ONE, **settings)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_annealing_p_leaves_fewer_active_features_and_a_better_fit_than_l1():
    """What p-annealing is for: l1 shrinks large codes, v^p with small p hardly does."""
    after = {}
    for settings in ({"penalty": Penalty.l1}, {"penalty": Penalty.lp}):
        made = objective(
            **(ARCHITECTURES["sae"] | RELU | settings),
            penalty_normalisation=CodeNormalisation.sae,
            penalty_coefficient=0.05,
        )
        train(made, 400, lr=3e-3)
        _, metrics = made.loss(planted(made.layout, 1000, seed=999), 1.0)
        after[settings["penalty"]] = float(metrics["l0"]), float(metrics["fvu"])
    (l1_l0, l1_fvu), (lp_l0, lp_fvu) = after[Penalty.l1], after[Penalty.lp]
    assert lp_l0 < l1_l0 and lp_fvu < 0.8 * l1_fvu, after


GATED = {"activation": Activation.gated, "k": None}


def test_the_gate_reconstructs_alone_through_a_decoder_that_does_not_learn_from_it():
    made = objective(**ONE, **GATED, gate_coefficient=0.5, reconstruction=Reconstruction.sum_of_squares, skip=True)
    made.cfg.local_coefficient = 0.0
    rows = planted(made.layout, 50)
    loss, metrics = made.loss(rows, 0.5)
    x, y = (rows[:, span] for span in made.layout.spans.values())
    (bank,), b_dec = made.dictionary.banks, made.dictionary.b_dec
    y_hat = (x @ bank.W_enc.T + bank.b_enc).relu() @ bank.W_dec + b_dec + x @ bank.W_skip
    expected = 0.5 * (y - y_hat).square().sum(1).mean()
    torch.testing.assert_close(metrics["loss/gate"], expected.detach())
    loss.backward()
    assert not any(p.grad.any() for p in (bank.W_dec, b_dec, bank.W_skip))
    assert bank.W_enc.grad.any() and bank.b_enc.grad.any()


def test_a_gate_that_trains_the_decoder_reconstructs_as_codes_do():
    """SAELens trains a free decoder so, by the gate's reconstruction and by its penalty."""
    settings = ONE | GATED | {"reconstruction": Reconstruction.sum_of_squares, "skip": True}
    made = objective(**settings, gate_trains_decoder=True)
    made.cfg.local_coefficient = 0.0
    rows = planted(made.layout, 50)
    made.loss(rows, 0.5)[0].backward()
    x, y = (rows[:, span] for span in made.layout.spans.values())
    (bank,), b_dec = made.dictionary.banks, made.dictionary.b_dec
    y_hat = (x @ bank.W_enc.T + bank.b_enc).relu() @ bank.W_dec + b_dec + x @ bank.W_skip
    of_decoder = (bank.W_dec, b_dec, bank.W_skip)
    expected = torch.autograd.grad((y - y_hat).square().sum(1).mean(), of_decoder)
    for parameter, slope in zip(of_decoder, expected, strict=True):
        torch.testing.assert_close(parameter.grad, slope)


@pytest.mark.parametrize("trains", [False, True])
def test_the_gates_penalty_moves_decoder_norms_only_where_the_gates_reconstruction_does(trains: bool):
    """With a frozen decoder in the one and not in the other, decoder rows shrink, magnitudes grow, and everything fires."""
    made = objective(
        **(ONE | GATED | {"penalty": Penalty.l1, "penalty_coefficient": 2.0, "penalty_warmup": 0.0}),
        penalty_normalisation=CodeNormalisation.sae,
        gate_trains_decoder=trains,
        gate_coefficient=0.0,
    )
    made.cfg.local_coefficient = 0.0
    made.loss(planted(made.layout, 50), 0.5)[0].backward()
    (bank,) = made.dictionary.banks
    assert bool(bank.W_dec.grad is not None and bank.W_dec.grad.any()) is trains
    assert bank.W_enc.grad.any()


@pytest.mark.parametrize("penalty", [{"penalty": Penalty.l1}, {"penalty": Penalty.lp, "p_start": 0.5}])
def test_the_penalty_of_gated_dictionaries_is_on_the_gate(penalty: dict[str, Any]):
    """Gated, and gated annealing: the codes' size is free, so nothing shrinks."""
    made = objective(
        **(ONE | GATED | penalty),
        penalty_coefficient=2.0,
        penalty_normalisation=CodeNormalisation.sae,
        penalty_warmup=0.0,
    )
    with torch.no_grad():
        made.dictionary.activation.r[0].fill_(1.0)
    rows = planted(made.layout, 50)
    _, metrics = made.loss(rows, 0.1)
    (bank,) = made.dictionary.banks
    x = rows[:, : made.dictionary.read_layout.width]
    v = (x @ bank.W_enc.T + bank.b_enc).relu() * bank.W_dec.norm(dim=1)
    expected = 2 * (v ** penalty.get("p_start", 1.0)).sum() / 50
    torch.testing.assert_close(metrics["loss/penalty"], expected.detach())


def test_thresholds_of_a_normalised_code_are_met_by_z_c():
    """The pre-activation loss compares theta with what the activation function compares it with."""
    made = objective(
        **ONE,
        **JUMP,
        code_normalisation=CodeNormalisation.sae,
        pre_activation_loss=PreActivationLoss.threshold,
        pre_activation_coefficient=1.0,
    )
    rows = planted(made.layout, 50)
    _, metrics = made.loss(rows, 0.5)
    (pre,), (bank,) = made._step.encoding.pres, made.dictionary.banks
    pre = pre.values
    short = (0.5 - pre * bank.W_dec.norm(dim=1)).relu().sum() / 50
    torch.testing.assert_close(metrics["loss/pre_activation"], short.detach())
    codes = made._step.encoding.codes[0].dense()
    assert ((codes > 0) == (pre * bank.W_dec.norm(dim=1) > 0.5)).all()


def test_annealing_k_starts_at_k_start_and_ends_at_k():
    """With the first step at k_start: dictionary_learning trains its first step at k, and is one late ever after."""
    made = objective(**ONE, activation=Activation.topk, k=2, k_start=8, k_anneal=0.6)
    rows, seen = planted(made.layout, 20), []
    for step in range(10):
        _, metrics = made.loss(rows, step / 10)
        seen.append(float(metrics["k"]))
        assert float(metrics["l0"]) <= seen[-1]
        made.after_step()
    assert seen == [8, 7, 6, 5, 4, 3, 2, 2, 2, 2]
    made.eval()
    made.loss(rows, 0.0)
    assert made.dictionary.activation.k == [2], "a look changes nothing"
