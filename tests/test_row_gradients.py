"""Updates a row at a time are Adam's, with every gradient written down."""

from dataclasses import replace

import pytest
import torch
from decomposition_parts import ACTIVATIONS, ARCHITECTURES, objective, planted
from torch import Tensor
from training_parts import training

from nndecomp.config.schema import BackendKind, CodeNormalisation, Decoder, Optimizer, Penalty
from nndecomp.decompositions import backends
from nndecomp.decompositions.backends import compiled, native_rows
from nndecomp.training.loop import Trainee
from nndecomp.training.row_adam import by_rows

pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))

TRAINED = {
    "sae": ARCHITECTURES["sae"],
    "sae with free decoder": ARCHITECTURES["sae"] | {"decoder": Decoder.free},
    "batchtopk clt": ARCHITECTURES["skip_cross_layer_transcoder"] | ACTIVATIONS["batchtopk"],
    "dead": ARCHITECTURES["per_layer_transcoder"] | {"aux_k": 4, "dead_after_tokens": 600},
    "matryoshka": ARCHITECTURES["sae"] | {"matryoshka": [0.25, 0.75]},
    "jumprelu": ARCHITECTURES["sae"] | ACTIVATIONS["jumprelu"] | {"penalty": Penalty.l0, "penalty_coefficient": 0.01},
    "decoder in the penalty": ARCHITECTURES["transcoder"]
    | ACTIVATIONS["relu"]
    | {"penalty": Penalty.l1, "penalty_coefficient": 0.01, "penalty_normalisation": CodeNormalisation.sae},
}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many slots a feature has."""
    monkeypatch.setattr(native_rows.NativeRows, "few", 10**9)


def trained(backend: BackendKind, n_steps: int, settings: dict, **changes) -> tuple[Trainee, dict[str, Tensor], list]:
    with backends.using(backend):
        made = objective(**settings)
        trainee = Trainee("it", made, replace(training(n_steps), **changes))
        made.train()
        losses = []
        for step in range(n_steps):
            trainee.step(planted(made.layout, 300, seed=step), step)
            losses.append(trainee.window.read(step)[-1])
        return trainee, {name: p.detach().clone() for name, p in made.named_parameters()}, losses


@pytest.mark.parametrize("optimizer", [Optimizer.adam, Optimizer.adamw], ids=lambda o: o.value)
@pytest.mark.parametrize("settings", TRAINED.values(), ids=TRAINED)
def test_ten_steps_end_at_the_weights_that_written_gradients_lead_to(settings, optimizer):
    changes = {
        "optimizer": optimizer,
        "lr": 1e-2,
        "clip_norm": 0.5,
        "weight_decay": 0.1 if optimizer is Optimizer.adamw else 0.0,
    }
    _, expected, slow = trained(BackendKind.torch, 10, settings, **changes)
    trainee, weights, fast = trained(BackendKind.native, 10, settings, **changes)
    assert by_rows(trainee.optimiser, trainee.parameters), "nothing would be tested"
    for own, others in zip(fast, slow, strict=True):  # the loss, its terms, and norms of gradients
        torch.testing.assert_close(torch.tensor(own), torch.tensor(others), rtol=1e-3, atol=1e-4)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_no_gradient_as_large_as_the_weights_is_kept():
    trainee, _, _ = trained(BackendKind.native, 1, ARCHITECTURES["cross_layer_transcoder"], lr=1e-2)
    large = [name for name, p in trainee.parameters.items() if p.ndim == 2]
    assert large and all(trainee.parameters[name].grad is None for name in large)
    state = trainee.optimiser.state_dict()["state"]
    assert all({"step", "exp_avg", "exp_avg_sq"} <= own.keys() and float(own["step"]) == 1 for own in state.values())


def test_weight_decay_that_adds_to_gradients_has_them_written():
    trainee, _, _ = trained(BackendKind.native, 1, ARCHITECTURES["sae"], weight_decay=0.1)
    assert by_rows(trainee.optimiser, trainee.parameters) == []
    assert trainee.parameters["dictionary.groups.0.W_dec"].grad is not None
