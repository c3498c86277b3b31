"""Small sparse attentions, sequences for them, and loops that say in plain words what they compute."""

from dataclasses import replace
from typing import Any

import torch
from decomposition_parts import ACTIVATIONS, CPU, SHAPE, D, F, config
from torch import Tensor

from nndecomp.activations.sequences import Sequences
from nndecomp.config.schema import Architecture, AttentionStart, CodeNormalisation
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.activation_selecting import BatchTopK
from nndecomp.decompositions.architectures import build_dictionary
from nndecomp.decompositions.attention import AttentionGroup
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.objective import DictionaryObjective
from nndecomp.types import Layout

N_SEQS, N_POS, N_PATTERNS = 5, 7, 4
# Heads of three coordinates, the first two of which turn by nearly a radian a position.
TURNING = replace(SHAPE, rotary=((0.9,),) * SHAPE.n_layers)
LORSA: dict[str, Any] = {
    "architecture": Architecture.lorsa,
    "reads": ["attn_in"],
    "writes": ["attn_out"],
    "n_qk_heads": N_PATTERNS,
    "attention_start": AttentionStart.random,
}
# Every activation function that Lorsa takes, with and without the norms of what heads write.
CASES: dict[str, dict[str, Any]] = {
    **{name: LORSA | settings for name, settings in ACTIVATIONS.items() if name != "gated"},
    **{
        f"{name}_by_norm": LORSA | ACTIVATIONS[name] | {"code_normalisation": CodeNormalisation.sae}
        for name in ("topk", "batchtopk", "jumprelu")
    },
    "topk_without_turning": LORSA | ACTIVATIONS["topk"] | {"rotary": False, "layers": [1], "d_qk": 2},
}


def lorsa(seed: int = 0, **settings: Any) -> SparseDictionary:
    return build_dictionary(config(**settings), TURNING, seed, CPU, target="toy")


@torch.no_grad()
def settled(**settings: Any) -> SparseDictionary:
    """In double precision, with biases, norms and thresholds that are not what they start at, in eval mode."""
    made = lorsa(**settings).double()
    draw = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        if name.split(".")[-1].startswith("b_"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        if "W_dec" in name:
            parameter.mul_(3 * (0.5 + torch.rand(len(parameter), 1, generator=draw)))
    match made.activation:
        case BatchTopK(threshold=threshold):
            threshold.copy_(0.3 + 0.1 * torch.arange(len(threshold)))
        case JumpRelu():
            for g, bank in enumerate(made.banks):
                made.activation.set_theta(g, 0.1 + 0.3 * torch.rand(bank.n_features, generator=draw))
        case _:
            pass
    return made.eval()


def banks(made: SparseDictionary) -> list[AttentionGroup]:
    return [bank for bank in made.banks if isinstance(bank, AttentionGroup)]


def kept_positions(n_seqs: int = N_SEQS, n_pos: int = N_POS) -> Tensor:
    """Not the first of a sequence, and of the second sequence not the last two, which are padding."""
    keep = torch.ones(n_seqs, n_pos, dtype=torch.bool)
    keep[:, 0] = False
    keep[1, -2:] = False
    return keep.flatten().nonzero()[:, 0]


def inputs(made: SparseDictionary, seed: int = 1) -> Sequences:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(N_SEQS, N_POS, made.read_layout.width, generator=draw).to(made.b_dec)
    return Sequences(values, kept_positions())


def row_layout(made: SparseDictionary) -> Layout:
    return Layout.of({site: made.spec.widths[site] for site in {*made.reads, *made.writes}})


def objective(scales: Any = None, **settings: Any) -> DictionaryObjective:
    made = lorsa(**settings)
    layout = row_layout(made)
    return DictionaryObjective(made, config(**settings), layout, scales or dict.fromkeys(layout.sites, 1.0))


def planted(layout: Layout, n_seqs: int = 32, seed: int = 0) -> Sequences:
    """Sparse mixtures of a few directions are read; what is written is their mean over the last two
    positions, in other directions."""
    draw = torch.Generator().manual_seed(99)
    width = layout.width // 2
    read, write = torch.randn(2, 8, width, generator=draw).unbind(0)
    draw = torch.Generator().manual_seed(seed)
    active = (torch.rand(n_seqs, N_POS, 8, generator=draw) < 0.2) * (1 + torch.rand(n_seqs, N_POS, 8, generator=draw))
    past = torch.stack([active[:, max(0, t - 1) : t + 1].mean(1) for t in range(N_POS)], 1)
    return Sequences(torch.cat([active @ read, past @ write], -1), kept_positions(n_seqs))


def train(made: DictionaryObjective, n_steps: int, lr: float = 1e-2) -> list[float]:
    """The order of the training loop."""
    optimiser = torch.optim.Adam(made.parameters(), lr=lr)
    losses = []
    for step in range(n_steps):
        loss, _ = made.loss(planted(made.layout, seed=step), step / n_steps)
        optimiser.zero_grad()
        loss.backward()
        made.before_step()
        optimiser.step()
        made.after_step()
        losses.append(float(loss.detach()))
    return losses


def slow_z(bank: AttentionGroup, x: Tensor, turns: tuple[float, ...]) -> Tensor:
    """Pre-activations [batch, pos, feature] of one layer, position by position and head by head."""
    n_own = F // bank.n_patterns
    turned = lambda v, t: torch.cat(_turned(v, t, turns))  # noqa: E731
    rows = []
    for sequence in x:
        for t in range(len(sequence)):
            z = []
            for i in range(F):
                h = i // n_own
                q = turned(bank.W_Q[h] @ sequence[t] + bank.b_Q[h], t)
                keys = [turned(bank.W_K[h] @ sequence[u] + bank.b_K[h], u) for u in range(t + 1)]
                share = torch.stack([q @ k for k in keys]).div(len(q) ** 0.5).softmax(0)
                v = [sequence[u] @ bank.W_enc[i] + bank.b_enc[i] for u in range(t + 1)]
                z.append((share * torch.stack(v)).sum())
            rows.append(torch.stack(z))
    return torch.stack(rows).view(*x.shape[:2], F)


def _turned(v: Tensor, t: int, turns: tuple[float, ...]) -> list[Tensor]:
    half = len(turns)
    angle = torch.tensor(turns, dtype=v.dtype) * t
    a, b = v[:half], v[half : 2 * half]
    return [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), v[2 * half :]]


assert D == 6 and F == 24, "sizes that the loops and laws are written for"
