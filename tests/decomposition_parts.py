"""Small dictionaries of every architecture and activation function, and data they can learn."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nndecomp.config.schema import Activation, Architecture, CodeNormalisation, DecompositionConfig, Encoder
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.activation_selecting import BatchTopK
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.targets.base import Shape, TargetShape
from nndecomp.targets.pair import PairedShape
from nndecomp.types import Layout, Point, Site

N_LAYERS, D, F, K = 3, 6, 24, 3
SHAPE = TargetShape(N_LAYERS, D, 10, 2, 3, 50, 32, frozenset(Point) - {Point.resid_mid}, gated=False)
# The second model is narrower and shallower.
PAIR = PairedShape(SHAPE, TargetShape(2, 4, 8, 2, 2, 50, 32, SHAPE.points, gated=False))
CPU = torch.device("cpu")
MLP_OUT = {"reads": ["mlp_out"], "writes": ["mlp_out"]}
BOTH_MODELS = {"reads": ["A:mlp_out", "B:mlp_out"], "writes": ["A:mlp_out", "B:mlp_out"]}


def one_site(site: str) -> dict[str, Any]:
    return {"architecture": Architecture.sae, "reads": [site], "writes": [site]}


# Every architecture that trains, by the settings that differ.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sae": one_site("L1.mlp_out"),
    "centred_sae": one_site("L1.mlp_out") | {"centre_input": True},
    "attention_sae": one_site("L1.attn_out"),
    "head_sae": one_site("L0.z.h1"),
    "heads_sae": {"architecture": Architecture.per_layer_sae, "reads": ["z.h*"], "writes": ["z.h*"], "layers": [0, 2]},
    "per_layer_sae": {"architecture": Architecture.per_layer_sae, **MLP_OUT},
    "transcoder": {"architecture": Architecture.transcoder, "layers": [1]},
    "skip_transcoder": {"architecture": Architecture.transcoder, "layers": [1], "skip": True},
    "per_layer_transcoder": {"architecture": Architecture.per_layer_transcoder},
    "cross_layer_transcoder": {"architecture": Architecture.cross_layer_transcoder},
    "skip_cross_layer_transcoder": {"architecture": Architecture.cross_layer_transcoder, "skip": True},
    "crosscoder": {"architecture": Architecture.crosscoder, **MLP_OUT},
    "decoupled_crosscoder": {
        "architecture": Architecture.crosscoder,
        "code_normalisation": CodeNormalisation.decoupled,
        **MLP_OUT,
    },
    "causal_crosscoder": {"architecture": Architecture.causal_crosscoder, **MLP_OUT},
    "molt": {"architecture": Architecture.molt, "ranks": [[1, 4], [2, 2]]},
    "skip_molt": {
        "architecture": Architecture.molt,
        "ranks": [[1, 2], [3, 1]],
        "layers": [1],
        "skip": True,
        "code_normalisation": CodeNormalisation.sae,
    },
    "dedicated_feature_crosscoder": {
        "architecture": Architecture.dedicated_feature_crosscoder,
        "n_exclusive": [F, F],
        **BOTH_MODELS,
    },
}
# Every activation function that any architecture takes.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {"activation": Activation.relu, "k": None},
    "gated": {"activation": Activation.gated, "k": None},
    "topk": {"activation": Activation.topk, "k": K},
    "abs_topk": {"activation": Activation.abs_topk, "k": K},
    "batchtopk": {"activation": Activation.batchtopk, "k": K},
    "jumprelu": {"activation": Activation.jumprelu, "k": None, "jumprelu_threshold": 0.5, "jumprelu_bandwidth": 1.0},
}
# Of what writes what it reads.
PURSUIT: dict[str, dict[str, Any]] = {"matching_pursuit": {"activation": Activation.matching_pursuit, "k": K}}
GLU = {"encoder": Encoder.glu}


def fits(architecture: str, activation: str) -> bool:
    """Whether a combination makes sense: pursuit explains what it reads, by features that are all of one dictionary; the
    gate of a gated dictionary reconstructs by decoder rows."""
    wiring = ARCHITECTURES[architecture]
    if wiring["architecture"] is Architecture.molt and activation == "gated":
        return False
    explains = wiring.get("reads", []) == wiring.get("writes") and "code_normalisation" not in wiring
    return activation != "matching_pursuit" or (explains and "centre_input" not in wiring)


GRID = [
    (architecture, activation)
    for architecture in ARCHITECTURES
    for activation in ACTIVATIONS | PURSUIT
    if fits(architecture, activation)
]


def shape_of(settings: Mapping[str, Any]) -> Shape:
    return PAIR if settings.get("reads") == BOTH_MODELS["reads"] else SHAPE


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
    return build_dictionary(config(**settings), shape_of(settings), seed, CPU, target="toy")


@torch.no_grad()
def settled(seed: int = 0, **settings: Any) -> SparseDictionary:
    """In double precision, with biases, skips, norms and thresholds that are not what they start at, in eval mode."""
    made = dictionary(seed, **settings).double()
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if any(part in name for part in ("b_enc", "b_glu", "b_dec", "W_skip", "activation.r.", "b_mag")):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        if "W_dec" in name or name.endswith(".U"):
            parameter.mul_(3 * (0.5 + torch.rand(len(parameter), 1, generator=draw)))
    match made.activation:
        case BatchTopK(threshold=threshold):
            threshold.copy_(0.5 + 0.1 * torch.arange(len(threshold)))
        case JumpRelu():
            for g, bank in enumerate(made.banks):
                made.activation.set_theta(g, 0.2 + 0.6 * torch.rand(bank.n_features, generator=draw))
        case _:
            pass
    return made.eval()


def inputs(made: SparseDictionary, n_tokens: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(n_tokens, made.read_layout.width, generator=torch.Generator().manual_seed(seed)).to(made.b_dec)


def row_layout(made: SparseDictionary) -> Layout:
    widths = made.spec.widths
    return Layout.of({site: widths[site] for site in {*made.reads, *made.writes}})


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
