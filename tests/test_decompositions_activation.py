"""Activation functions: thresholds, what they learn from, and gradients through a jump."""

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, dictionary, inputs, settled

from nndecomp.config.schema import Scope
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.activation_selecting import BatchTopK
from nndecomp.decompositions.codes import Codes, DenseCodes


def after_step(activation, codes: Codes) -> None:
    activation.after_step(codes, [None for _ in codes])


def codes_of(*rows: list[float]) -> Codes:
    return Codes(tuple(DenseCodes(torch.tensor([row])) for row in rows))


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


def test_groups_that_compete_have_one_threshold():
    activation = BatchTopK([2, 2], Scope.all, threshold_rate=0.1)
    after_step(activation, codes_of([0.0, 7.0], [4.0, 9.0]))
    assert activation.threshold.tolist() == [4.0]


def test_evaluating_before_a_threshold_is_known_is_an_error():
    made = dictionary(**ACTIVATIONS["batchtopk"]).eval()
    with pytest.raises(ValueError, match="no inference threshold yet"):
        made(inputs(made))


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_stay_in_fp32_whatever_the_module_is_cast_to(activation):
    made = dictionary(**ACTIVATIONS[activation])
    after_step(made.activation, codes_of([0.1234567], [0.1234567], [0.1234567]))
    before = [t.clone() for t in made.activation.state_dict().values()]
    made.to(torch.bfloat16)
    assert made.b_dec.dtype == torch.bfloat16
    after = list(made.activation.state_dict().values())
    assert all(t.dtype == torch.float32 and torch.equal(t, b) for t, b in zip(after, before, strict=True))


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


def test_jumprelu_keeps_what_exceeds_its_threshold_unchanged():
    activation = JumpRelu([3], initial_threshold=1.0, bandwidth=0.1)
    z = torch.tensor([[0.5, 1.5, -2.0]])
    assert activation(z, 0).tolist() == [[0, 1.5, 0]]
    assert activation.active(z, 0).tolist() == [[0, 1, 0]]


def test_jumprelu_passes_the_gradient_of_active_entries_to_its_input_and_no_other():
    activation = JumpRelu([3], initial_threshold=1.0, bandwidth=10.0)
    z = torch.tensor([[0.5, 1.5, -2.0]], requires_grad=True)
    activation(z, 0).backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert z.grad is not None and z.grad.tolist() == [[0, 10, 0]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_pass_gradcheck_where_a_dictionary_is_smooth(activation):
    """With respect to its input and to every weight but the thresholds, which jump; no pre-activation is near a jump."""
    made = settled(**(ARCHITECTURES["skip_cross_layer_transcoder"] | ACTIVATIONS[activation])).train()
    x = inputs(made, n_tokens=5).requires_grad_()
    weights = {name: p for name, p in made.named_parameters() if "threshold" not in name}

    def y_hat(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(weights, values, strict=True))
        return torch.func.functional_call(made, named, (x,))[0]

    assert torch.autograd.gradcheck(y_hat, (x, *weights.values()), fast_mode=True)


def test_jumprelu_estimates_the_threshold_gradient_of_an_expectation():
    """For z uniform on [0, 2] the density is 1/2, so d/dtheta E[z 1[z > theta]] = -theta/2 and
    d/dtheta E[1[z > theta]] = -1/2; both compared with central differences of the exact expectations too."""
    theta, step = 0.7, 1e-3
    z = ((torch.arange(200_000, dtype=torch.float64) + 0.5) / 100_000)[:, None]
    activation = JumpRelu([1], initial_threshold=theta, bandwidth=0.2)
    value = activation(z, 0).mean()
    (of_value,) = torch.autograd.grad(value, list(activation.threshold))
    (of_count,) = torch.autograd.grad(activation.active(z, 0).mean(), list(activation.threshold))

    def expectation(t: float) -> float:
        return (4 - t**2) / 4  # integral of z/2 from t to 2

    numeric = (expectation(theta + step) - expectation(theta - step)) / (2 * step)
    assert numeric == pytest.approx(-theta / 2)
    assert float(of_value) == pytest.approx(numeric, rel=1e-3)
    assert float(of_count) == pytest.approx(-0.5, rel=1e-3)


def test_jumprelu_weighs_each_token_by_the_gradient_that_arrives_at_it():
    """Three entries in the window of width 0.4 around 1, one outside: -(theta / eps) sum over the window of g."""
    activation = JumpRelu([1], initial_threshold=1.0, bandwidth=0.4)
    z = torch.tensor([[0.9], [1.1], [1.15], [2.0]])
    activation(z, 0).backward(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
    grad = activation.threshold[0].grad
    assert grad is not None and float(grad) == pytest.approx(-(1 / 0.4) * 111)


def test_jumprelu_thresholds_never_become_negative():
    activation = JumpRelu([2], initial_threshold=0.1, bandwidth=0.1)
    with torch.no_grad():
        activation.threshold[0].copy_(torch.tensor([-0.5, 0.3]))
    after_step(activation, codes_of([0.0, 0.0]))
    assert activation.threshold[0].tolist() == pytest.approx([0.0, 0.3])
