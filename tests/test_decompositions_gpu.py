"""On a CUDA device every architecture and activation function computes what it computes on the CPU."""

import copy

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, inputs, objective, planted, settled

pytestmark = pytest.mark.gpu
GRID = [(architecture, activation) for architecture in ARCHITECTURES for activation in ACTIVATIONS]


@pytest.mark.parametrize(("architecture", "activation"), GRID)
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_equal_those_on_the_cpu(architecture, activation, training):
    made = settled(**(ARCHITECTURES[architecture] | ACTIVATIONS[activation])).train(training)
    there, x = copy.deepcopy(made).cuda(), inputs(made)
    y_hat, codes = made(x)
    y_there, codes_there = there(x.cuda())
    torch.testing.assert_close(y_there.cpu(), y_hat)
    assert torch.equal(codes_there.counts().cpu(), codes.counts())
    y_hat.square().sum().backward()
    y_there.square().sum().backward()
    for (name, here), (_, other) in zip(made.named_parameters(), there.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad.cpu(), here.grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_steps_run_in_bf16(activation):
    made = objective(**ARCHITECTURES["cross_layer_transcoder"], **ACTIVATIONS[activation], dead_after_tokens=100).cuda()
    for step in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = made.loss(planted(made.layout, 100, seed=step).cuda(), 0.5)
        loss.backward()
        made.before_step()
        made.after_step()
        assert loss.isfinite() and loss.dtype == torch.float32
