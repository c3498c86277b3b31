"""Small dictionaries of every architecture and activation function, and data they can learn."""

from typing import Any

import torch
from torch import Tensor

from nndecomp.config.schema import Activation, Architecture, DecompositionConfig
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.targets.base import TargetShape
from nndecomp.types import Layout, Point, Site

N_LAYERS, D, F, K = 3, 6, 24, 3
SHAPE = TargetShape(N_LAYERS, D, 10, 2, 3, 50, 32, frozenset(Point) - {Point.resid_mid}, gated=False)
CPU = torch.device("cpu")

# Every architecture that trains, by the settings that differ.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sae": {"architecture": Architecture.sae, "reads": ["L1.mlp_out"], "writes": ["L1.mlp_out"]},
    "centred_sae": {
        "architecture": Architecture.sae,
        "reads": ["L1.mlp_out"],
        "writes": ["L1.mlp_out"],
        "centre_input": True,
    },
    "per_layer_sae": {"architecture": Architecture.per_layer_sae, "reads": ["mlp_out"], "writes": ["mlp_out"]},
    "transcoder": {"architecture": Architecture.transcoder, "layers": [1]},
    "skip_transcoder": {"architecture": Architecture.transcoder, "layers": [1], "skip": True},
    "per_layer_transcoder": {"architecture": Architecture.per_layer_transcoder},
    "cross_layer_transcoder": {"architecture": Architecture.cross_layer_transcoder},
    "skip_cross_layer_transcoder": {"architecture": Architecture.cross_layer_transcoder, "skip": True},
    "crosscoder": {"architecture": Architecture.crosscoder, "reads": ["mlp_out"], "writes": ["mlp_out"]},
    "causal_crosscoder": {"architecture": Architecture.causal_crosscoder, "reads": ["mlp_out"], "writes": ["mlp_out"]},
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"activation": Activation.relu, "k": None},
    "topk": {"activation": Activation.topk, "k": K},
    "batchtopk": {"activation": Activation.batchtopk, "k": K},
    "jumprelu": {"activation": Activation.jumprelu, "k": None, "jumprelu_threshold": 0.5, "jumprelu_bandwidth": 1.0},
}


def config(**settings: Any) -> DecompositionConfig:
    defaults = {
        "architecture": Architecture.per_layer_transcoder,
        "reads": ["mlp_in"],
        "writes": ["mlp_out"],
        "n_features": F,
        "activation": Activation.topk,
        "k": K,
    }
    return DecompositionConfig(**(defaults | settings))


def dictionary(seed: int = 0, **settings: Any) -> SparseDictionary:
    return build_dictionary(config(**settings), SHAPE, seed, CPU, target="toy")


def settled(seed: int = 0, **settings: Any) -> SparseDictionary:
    """In double precision, with biases, skips and thresholds that are not what they start at, in eval mode."""
    made = dictionary(seed, **settings).double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if any(part in name for part in ("b_enc", "b_dec", "W_skip")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
            if "W_dec" in name:
                parameter.mul_(3)
    if made.spec.activation.kind is Activation.batchtopk:
        made.activation.threshold.copy_(0.5 + 0.1 * torch.arange(len(made.activation.threshold)))
    return made.eval()


def inputs(made: SparseDictionary, n_tokens: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(n_tokens, made.read_layout.width, generator=torch.Generator().manual_seed(seed)).to(made.b_dec)


def row_layout(made: SparseDictionary) -> Layout:
    return Layout.of({site: made.spec.widths[site] for site in {*made.reads, *made.writes}})


def objective(seed: int = 0, scales: dict[Site, float] | None = None, **settings: Any) -> DictionaryObjective:
    made = dictionary(seed, **settings)
    layout = row_layout(made)
    return DictionaryObjective(made, config(**settings), layout, scales or dict.fromkeys(layout.sites, 1.0))


def planted(layout: Layout, n_tokens: int, seed: int = 0) -> Tensor:
    """Rows in which every site is a sparse mixture of the same few latent features, written at it by a fixed map."""
    draw = torch.Generator().manual_seed(99)
    directions = torch.randn(12, layout.width, generator=draw)
    draw = torch.Generator().manual_seed(seed)
    active = torch.rand(n_tokens, 12, generator=draw) < 0.15
    return (active * (1 + torch.rand(n_tokens, 12, generator=draw))) @ directions


def train(objective: DictionaryObjective, n_steps: int, batch: int = 256, lr: float = 1e-2) -> list[float]:
    """The order of the training loop: loss, backward, before_step, optimiser, after_step."""
    optimiser = torch.optim.Adam(objective.parameters(), lr=lr)
    losses = []
    for step in range(n_steps):
        loss, _ = objective.loss(planted(objective.layout, batch, seed=step), step / n_steps)
        optimiser.zero_grad()
        loss.backward()
        objective.before_step()
        optimiser.step()
        objective.after_step()
        losses.append(float(loss.detach()))
    return losses
