"""Activation functions: what they keep, thresholds and what these learn from, and gradients through a jump."""

import copy

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, PURSUIT, dictionary, inputs, settled
from torch import Tensor

from nndecomp.config.schema import Architecture, CodeNormalisation, JumpReluGradient, Scope
from nndecomp.decompositions.activation_pointwise import Gated, JumpRelu
from nndecomp.decompositions.activation_selecting import AbsTopK, BatchTopK, TopK
from nndecomp.decompositions.backends.interface import Affine
from nndecomp.decompositions.codes import Codes, DenseCodes

SAE = ARCHITECTURES["sae"]


def after_step(activation, codes: Codes, *scales: Tensor) -> None:
    activation.after_step(codes, scales or [None for _ in codes])


def codes_of(*rows: list[float]) -> Codes:
    return Codes(tuple(DenseCodes(torch.tensor([row])) for row in rows))


def jumped(activation: JumpRelu, z: Tensor, c: Tensor | None = None) -> Tensor:
    return activation(z, 0, c, torch.zeros(z.shape[1]))


def learned(activation: JumpRelu) -> Tensor:
    (parameter,) = activation.parameters()
    return parameter


def test_the_inference_threshold_starts_at_the_first_smallest_value_and_moves_from_there():
    activation = BatchTopK([2], Scope.group, threshold_rate=0.1)
    after_step(activation, codes_of([0.0, 3.0, 5.0]))
    assert activation.threshold.tolist() == [3.0]
    after_step(activation, codes_of([0.0, 4.0, 6.0]))
    assert activation.threshold.tolist() == pytest.approx([3.1])


def test_a_batch_without_positive_values_leaves_the_threshold_alone():
    activation = BatchTopK([2, 2], Scope.group, threshold_rate=0.1)
    after_step(activation, codes_of([0.0, 0.0], [1.0, 0.0]))
    assert activation.threshold.isnan().tolist() == [True, False]
    after_step(activation, codes_of([2.0, 0.0], [0.0, 0.0]))
    assert activation.threshold.tolist() == [2.0, 1.0]


def test_a_token_without_positive_codes_does_not_move_the_threshold():
    """A peer takes the mean over tokens of each one's smallest positive code, infinite where a token has none."""
    activation = BatchTopK([2], Scope.group, threshold_rate=0.5)
    after_step(activation, Codes((DenseCodes(torch.tensor([[0.0, 0.0], [3.0, 5.0]])),)))
    assert activation.threshold.tolist() == [3.0]


def test_groups_that_compete_have_one_threshold():
    activation = BatchTopK([2, 2], Scope.all, threshold_rate=0.1)
    after_step(activation, codes_of([0.0, 7.0], [4.0, 9.0]))
    assert activation.threshold.tolist() == [4.0]


def test_thresholds_are_in_units_of_codes_times_c():
    """Codes 3 and 5 with c of 4 and 1 count 12 and 5."""
    activation = BatchTopK([2], Scope.group, threshold_rate=0.1)
    after_step(activation, codes_of([3.0, 5.0]), torch.tensor([4.0, 1.0]))
    assert activation.threshold.tolist() == [5.0]


def test_evaluating_before_a_threshold_is_known_is_an_error():
    """A peer starts its threshold at -1, and so silently evaluates another function, relu."""
    made = dictionary(**ACTIVATIONS["batchtopk"]).eval()
    with pytest.raises(ValueError, match="no inference threshold yet"):
        made(inputs(made))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_stay_in_fp32_whatever_the_module_is_cast_to(activation, log):
    settings = ACTIVATIONS[activation] | ({"jumprelu_log_threshold": True} if log and activation == "jumprelu" else {})
    made = dictionary(**settings)
    after_step(made.activation, codes_of([0.1234567], [0.1234567], [0.1234567]))
    before = [t.clone() for t in made.activation.state_dict().values()]
    made.to(torch.bfloat16)
    assert made.b_dec.dtype == torch.bfloat16
    after = list(made.activation.state_dict().values())
    assert all(t.dtype == torch.float32 and torch.equal(t, b) for t, b in zip(after, before, strict=True))


def test_bf16_values_are_compared_with_the_threshold_itself_not_with_its_nearest_bf16():
    activation = BatchTopK([1], Scope.group, threshold_rate=0.1).eval()
    activation.threshold.fill_(0.999)  # the nearest bf16 is 1
    competition = activation.competition(1, 2, [0])
    competition.add(0, torch.tensor([[1.0, 0.99]], dtype=torch.bfloat16), ())
    assert competition.found().support.indices.tolist() == [0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_a_dictionary_in_bf16_computes_in_bf16(activation, training):
    made = settled(**(ARCHITECTURES["cross_layer_transcoder"] | ACTIVATIONS[activation]))
    x = inputs(made)
    exact, _ = made.train(training)(x)
    y_hat, _ = made.to(torch.bfloat16)(x.bfloat16())
    assert y_hat.dtype == torch.bfloat16
    y_hat.float().sum().backward()
    assert float((y_hat.detach().double() - exact.detach()).square().mean() / exact.detach().var()) < 0.05


def test_sequences_that_were_not_flattened_are_refused():
    """Peers take the first axis of [batch, pos, width] for tokens, and keep k a sequence instead of k a token."""
    made = settled(**(SAE | ACTIVATIONS["batchtopk"]))
    with pytest.raises(Exception, match="Type-check"):
        made(inputs(made).view(4, 10, -1))


def test_abs_topk_keeps_the_largest_in_absolute_value_with_their_signs():
    z = torch.tensor([[1.0, -5.0, 0.5, 2.0]])
    competition = AbsTopK([2], Scope.group).competition(1, 4, [0])
    competition.add(0, z, ())
    assert sorted(competition.found().support.indices.tolist()) == [1, 3]
    made = settled(**(SAE | ACTIVATIONS["abs_topk"]))
    codes = made.encode(inputs(made))
    assert (codes.counts() == 3).all() and (codes[0].values < 0).any()


def test_competition_over_all_groups_is_one_ranking():
    """The two largest of both groups' features, wherever they are."""
    scores = [torch.tensor([[5.0, 4.0]]), torch.tensor([[1.0, 3.0]])]
    of = [Affine(torch.ones(1, 1), score.T, torch.zeros(2), None) for score in scores]
    taken, apart = (
        [each.support.indices.tolist() for each in TopK([1, 1], scope).select(of, [0, 1]) or []]
        for scope in (Scope.all, Scope.group)
    )
    assert [sorted(each) for each in taken] == [[0, 1], []]
    assert apart == [[0], [1]]


def test_a_gate_decides_and_a_second_branch_says_how_much():
    """f = 1[pi > 0] max(0, e^r (pi - b_enc) + b_mag): with r = log 2 and biases 1 and 3,
    pi = 4 gives 2 (4 - 1) + 3 = 9, pi = -1 nothing, and pi = 0.5 gives 2 (0.5 - 1) + 3 = 2."""
    activation = Gated([1])
    with torch.no_grad():
        activation.r[0].fill_(torch.tensor(2.0).log())
        activation.b_mag[0].fill_(3.0)
    pi = torch.tensor([[4.0], [-1.0], [0.5]])
    values = activation(pi, 0, None, torch.tensor([1.0]))
    torch.testing.assert_close(values, torch.tensor([[9.0], [0.0], [2.0]]))
    assert activation.gate(pi).tolist() == [[4.0], [0.0], [0.5]]


def test_an_encoding_carries_the_gates_that_losses_learn_from():
    made = settled(**(SAE | ACTIVATIONS["gated"]))
    encoding = made.encoding(inputs(made))
    assert encoding.gates is not None and encoding.pres is not None
    assert torch.equal(encoding.gates[0].values, encoding.pres[0].values.relu())
    assert torch.equal(encoding.codes[0].dense() > 0, (encoding.gates[0].values > 0) & (encoding.codes[0].dense() > 0))
    encoding.gates[0].values.sum().backward()
    assert made.banks[0].b_enc.grad is not None and made.banks[0].b_enc.grad.abs().sum() > 0


@pytest.mark.parametrize("activation", ["gated", "relu", "topk", "jumprelu"])
def test_reported_codes_are_multiplied_by_c_once(activation):
    """A peer multiplies by the decoder's norm in encoding and again when it reports: f c^2."""
    settings = SAE | ACTIVATIONS[activation] | {"code_normalisation": CodeNormalisation.sae}
    made = settled(**settings)
    codes = made.encode(inputs(made))
    expected = codes[0].dense() * made.banks[0].W_dec.norm(dim=1)
    torch.testing.assert_close(made.reported(codes)[0].dense(), expected)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_selection_sees_pre_activations_times_c_and_codes_are_not_scaled(activation):
    """z = (2, 1.5, 1) and decoder norms (1, 2, 4) count (2, 3, 4): the last wins, with code 1."""
    made = dictionary(**SAE, **ACTIVATIONS[activation], n_features=3, code_normalisation=CodeNormalisation.sae)
    bank = made.banks[0]
    with torch.no_grad():
        bank.W_enc.zero_()
        bank.b_enc.copy_(torch.tensor([2.0, 1.5, 1.0]))
        bank.W_dec.copy_(torch.tensor([1.0, 2.0, 4.0])[:, None] * torch.eye(6)[:3])
        made.b_dec.zero_()
    if isinstance(made.activation, JumpRelu):
        made.activation.set_theta(0, torch.full((3,), 3.5))
    else:
        made.activation.k = [1]
    y_hat, codes = made(torch.zeros(1, 6))
    assert codes[0].dense().tolist() == [[0.0, 0.0, 1.0]]
    assert y_hat.tolist() == [[0, 0, 4, 0, 0, 0]]
    after_step(made.activation, codes, bank.W_dec.detach().norm(dim=1))
    assert not isinstance(made.activation, BatchTopK) or made.activation.threshold.tolist() == [4.0]


@pytest.mark.parametrize("kind", [CodeNormalisation.none, CodeNormalisation.mixed])
def test_the_inference_threshold_selects_what_training_selected(kind):
    """Learned from one batch, in units of z c, it keeps that batch's active entries but for the smallest."""
    made = settled(**ARCHITECTURES["crosscoder"], **ACTIVATIONS["batchtopk"], code_normalisation=kind).train()
    x = inputs(made, 200)
    encoding = made.encoding(x)
    made.activation.threshold.fill_(torch.nan)
    made.activation.after_step(encoding.codes, encoding.scales)
    kept, again = encoding.codes[0].dense() != 0, made.eval().encode(x)[0].dense() != 0
    assert int((kept ^ again).sum()) <= 1 and int(kept.sum()) == 600


def test_decoupled_features_may_be_active_at_one_site_and_not_at_another():
    """One feature, z = 1, decoder norms 2 at the first site and 0.5 at the second, thresholds 1: active at the first."""
    made = dictionary(
        architecture=Architecture.crosscoder,
        **{"reads": ["L0.mlp_out", "L1.mlp_out"], "writes": ["L0.mlp_out", "L1.mlp_out"]},
        **(ACTIVATIONS["jumprelu"] | {"jumprelu_threshold": 1.0}),
        code_normalisation=CodeNormalisation.decoupled,
        n_features=1,
    )
    first, second = made.banks
    with torch.no_grad():
        first.W_enc.zero_()
        first.b_enc.fill_(1.0)
        first.W_dec.copy_(2.0 * torch.eye(6)[:1])
        second.W_dec.copy_(0.5 * torch.eye(6)[:1])
    codes = made.encode(torch.zeros(1, 12))
    assert [group.dense().tolist() for group in codes] == [[[1.0]], [[0.0]]]
    assert [float(group.dense().detach()) for group in made.reported(codes)] == [2.0, 0.0]


def test_decoupled_groups_compute_their_pre_activations_once():
    made = settled(**ARCHITECTURES["decoupled_crosscoder"], **ACTIVATIONS["relu"])
    encoding = made.encoding(inputs(made))
    assert encoding.pres is not None and all(pre.values is encoding.pres[0].values for pre in encoding.pres)
    assert len([name for name, _ in made.named_parameters() if "W_enc" in name]) == 1


def test_encoding_what_is_encoded_at_several_sites_does_not_centre_it_twice():
    """A peer's decoupled crosscoder normalises its input, and then calls an encoder that does so again."""
    settings = ARCHITECTURES["decoupled_crosscoder"] | ACTIVATIONS["topk"]
    made = settled(**settings)
    x = inputs(made)
    raw = copy_folded(made, torch.full((18,), 4.0), torch.full((18,), 2.0))
    for codes, again in zip(made.encode((x - 2) / 4), raw.encode(x), strict=True):
        torch.testing.assert_close(codes.dense(), again.dense())


def copy_folded(made, s: Tensor, m: Tensor):
    folded = copy.deepcopy(made)
    folded.fold(s, s, m, m)
    return folded


def test_jumprelu_keeps_what_exceeds_its_threshold_unchanged():
    activation = JumpRelu([3], initial_threshold=1.0, bandwidth=0.1)
    z = torch.tensor([[0.5, 1.5, -2.0]])
    assert jumped(activation, z).tolist() == [[0, 1.5, 0]]
    assert activation.active(z, 0, None).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # theta = 1, window 0.5 to 1.5, theta / eps = 1: 0.25 is outside, 0.75 and 1.25 inside, 3 above, -2 negative.
        (JumpReluGradient.exact, [0, 0, 1, 1, 0]),
        (JumpReluGradient.rectangle, [0, 1, 2, 1, 0]),
        (JumpReluGradient.positive, [1, 1, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("c", [None, 4.0])
def test_what_reaches_pre_activations_is_what_the_gradient_is_named_after(kind, expected, c):
    """With c = 4, all is as before at a quarter of the pre-activations: theta / eps in units of z c stays what it was."""
    activation = JumpRelu([1], initial_threshold=1.0, bandwidth=1.0, gradient=kind)
    z = torch.tensor([[0.25], [0.75], [1.25], [3.0], [-2.0]]) / (c or 1)
    z.requires_grad_()
    incoming = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0]])
    jumped(activation, z, None if c is None else torch.tensor([c])).backward(incoming)
    assert z.grad is not None and (z.grad / incoming).flatten().tolist() == expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_pass_gradcheck_where_a_dictionary_is_smooth(activation):
    """With respect to its input and to every weight but the thresholds, which jump; no pre-activation is near a jump."""
    check_gradients(settled(**(ARCHITECTURES["skip_cross_layer_transcoder"] | ACTIVATIONS[activation])))


def test_pursued_codes_pass_gradcheck():
    """Where the choice of features does not change, codes are a smooth function of the input and the decoder."""
    check_gradients(settled(**ARCHITECTURES["per_layer_sae"], **PURSUIT["matching_pursuit"]))


def check_gradients(made) -> None:
    made.train()
    x = inputs(made, n_tokens=5).requires_grad_()
    weights = {name: p for name, p in made.named_parameters() if "threshold" not in name}

    def y_hat(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(made, named, (x,))[0]

    assert torch.autograd.gradcheck(y_hat, (x, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("c", [None, 2.0])
def test_jumprelu_estimates_the_threshold_gradient_of_an_expectation(c):
    """For z uniform on [0, 2] the density is 1/2, so d/dtheta E[z 1[z c > theta]] = -theta/(2 c^2) and
    d/dtheta E[1[z c > theta]] = -1/(2 c); both compared with central differences of the exact expectations too.

    A peer estimates the latter from codes instead of pre-activations: half the window is 0, and the gradient half."""
    theta, step, scale = 0.7, 1e-3, c or 1.0
    z = ((torch.arange(200_000, dtype=torch.float64) + 0.5) / 100_000)[:, None]
    activation, by = JumpRelu([1], initial_threshold=theta, bandwidth=0.2), None if c is None else torch.tensor([c])
    (of_value,) = torch.autograd.grad(jumped(activation, z, by).mean(), [learned(activation)])
    (of_count,) = torch.autograd.grad(activation.active(z, 0, by).mean(), [learned(activation)])

    def expectation(t: float) -> float:
        return (4 - (t / scale) ** 2) / 4  # integral of z/2 from t/c to 2

    numeric = (expectation(theta + step) - expectation(theta - step)) / (2 * step)
    assert numeric == pytest.approx(-theta / 2 / scale**2)
    assert float(of_value) == pytest.approx(numeric, rel=1e-3)
    assert float(of_count) == pytest.approx(-0.5 / scale, rel=1e-3)


def test_inactive_entries_far_from_a_small_threshold_do_not_hold_it_up():
    """A peer's window around theta < eps/2 takes in every code that is 0, which pushes thresholds up to eps/2."""
    activation = JumpRelu([1], initial_threshold=0.01, bandwidth=0.1)
    activation.active(torch.full((50, 1), -3.0), 0, None).sum().backward()
    assert float(learned(activation).grad) == 0


def test_jumprelu_weighs_each_token_by_the_gradient_that_arrives_at_it():
    """Three entries in the window of width 0.4 around 1, one outside: -(theta / eps) sum over the window of g."""
    activation = JumpRelu([1], initial_threshold=1.0, bandwidth=0.4)
    z = torch.tensor([[0.9], [1.1], [1.15], [2.0]])
    jumped(activation, z).backward(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
    assert float(learned(activation).grad) == pytest.approx(-(1 / 0.4) * 111)


def test_a_feature_without_decoder_has_no_threshold_gradient_and_no_nan():
    activation = JumpRelu([1], initial_threshold=0.01, bandwidth=0.1)
    jumped(activation, torch.ones(3, 1), torch.zeros(1)).sum().backward()
    assert float(learned(activation).grad) == 0


def test_jumprelu_thresholds_never_become_negative():
    activation = JumpRelu([2], initial_threshold=0.1, bandwidth=0.1)
    activation.set_theta(0, torch.tensor([-0.5, 0.3]))
    after_step(activation, codes_of([0.0, 0.0]))
    assert activation.theta(0).tolist() == pytest.approx([0.0, 0.3])


def test_learned_logarithms_of_thresholds_move_by_theta_times_the_gradient():
    plain = JumpRelu([1], initial_threshold=0.5, bandwidth=0.4)
    by_log = JumpRelu([1], initial_threshold=0.5, bandwidth=0.4, log_threshold=True)
    assert float(by_log.theta(0).detach()) == pytest.approx(0.5)
    z = torch.tensor([[0.4], [0.6], [2.0]])
    for activation in (plain, by_log):
        jumped(activation, z).sum().backward()
    assert float(learned(by_log).grad) == pytest.approx(0.5 * float(learned(plain).grad))
