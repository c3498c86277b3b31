"""The neuron baseline on real models: all neurons are the model, fewer are the largest."""

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model, tiny_tokens

from nndecomp.config.target import TargetConfig, TargetKind
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.targets.base import Target
from nndecomp.targets.load import load_target
from nndecomp.targets.modules import ModuleTarget
from nndecomp.types import Point, Site

LAYERS = [0, 2]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gemma2"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    directory: Path = save_tiny_model(request.param, tmp_path_factory.mktemp("targets") / request.param)
    return load_target(TargetConfig(kind=TargetKind.huggingface, path=str(directory)), torch.device("cpu"))


def rows_of(target: Target, point: Point) -> torch.Tensor:
    sites = [Site(layer, point) for layer in LAYERS]
    recorded = target.record(tiny_tokens(), sites)
    return torch.cat([recorded[site].flatten(0, 1) for site in sites], 1)


def test_all_neurons_are_the_model(target):
    baseline = NeuronBaseline(target, LAYERS, [target.shape.d_mlp] * 2)
    y_hat, codes = baseline(rows_of(target, Point.mlp_hidden))
    torch.testing.assert_close(y_hat, rows_of(target, Point.mlp_out))
    assert (codes.counts() <= target.shape.d_mlp).all()


def test_the_k_largest_in_size_are_kept_with_their_sign(target):
    hidden = rows_of(target, Point.mlp_hidden)
    _, codes = NeuronBaseline(target, LAYERS, [1, 5])(hidden)
    assert codes.counts().unique(dim=0).tolist() == [[1, 5]]
    first = hidden[:, : target.shape.d_mlp]
    largest = first.abs().argmax(1)
    assert torch.equal(codes[0].indices, largest)
    assert torch.equal(codes[0].values, first[torch.arange(len(first)), largest])


def test_more_neurons_never_reconstruct_hidden_activations_worse(target):
    hidden = rows_of(target, Point.mlp_hidden)[:, : target.shape.d_mlp]
    errors = []
    for k in (1, 4, 16, target.shape.d_mlp):
        baseline = NeuronBaseline(target, [0], [k])
        errors.append(float((baseline(hidden)[1][0].dense() - hidden).square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_a_pass_site_by_site_equals_forward(target):
    baseline = NeuronBaseline(target, LAYERS, [3, 3])
    hidden = rows_of(target, Point.mlp_hidden)
    y_hat, codes = baseline(hidden)
    assert baseline.live_obstacle() is None
    run = baseline.live_run()
    for read, write in zip(baseline.reads, baseline.writes, strict=True):
        run.read(read, hidden[:, baseline.read_layout.spans[read]])
        assert torch.equal(run.write(write), y_hat[:, baseline.write_layout.spans[write]])
    assert torch.equal(run.active().counts(), codes.counts())


def test_all_neurons_together_cost_the_matrices_of_their_mlp(target):
    assert isinstance(target, ModuleTarget)
    cost = NeuronBaseline(target, [1], [3]).costs[0]
    d_model, d_mlp = target.shape.d_model, target.shape.d_mlp
    mlp = target.model.get_submodule(f"{target.wiring.blocks}.1.mlp")
    n_weights = sum(parameter.numel() for parameter in mlp.parameters() if parameter.ndim == 2)
    assert (cost.name, cost.n_components, cost.n_writes) == ("L1", d_mlp, 1)
    assert cost.n_components * cost.parameters == n_weights
    assert cost.gate_parameters == n_weights - d_mlp * d_model, "all but the matrix that writes"
