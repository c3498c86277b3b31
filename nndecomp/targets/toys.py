"""Toy models whose mechanisms are known, made of `nn.Linear`.

    TMS        out = relu(W^T I .. I W x + b)                   W [d_model, n_features], d_model < n_features
    ResidMLP   r = x E,  r <- r + relu(r W_in^T) W_out^T,  out = r E^T     E [n_features, d_model], rows of norm 1

TMS: Elhage et al. 2022, Toy Models of Superposition; W is tied, identity layers I are linear maps of their own.
ResidMLP: Braun et al. 2025, Attribution-based Parameter Decomposition (arXiv 2501.14926), section 3.2; E is random and
fixed, the embedding and (transposed) the unembedding. Both as in Bushnaq et al. 2025 (arXiv 2506.20790), section 3.
"""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.toys import ToyConfig, ToyKind


class TMS(nn.Module):
    """Sparse features in [0, 1], squeezed and put out again; linear2.weight is linear1.weight^T, always."""

    def __init__(self, cfg: ToyConfig, draw: torch.Generator) -> None:
        super().__init__()
        self.linear1 = nn.Linear(cfg.n_features, cfg.d_model, bias=False)
        self.hidden_layers = nn.ModuleList(nn.Linear(cfg.d_model, cfg.d_model, bias=False) for _ in range(cfg.n_layers))
        self.linear2 = nn.Linear(cfg.d_model, cfg.n_features)
        with torch.no_grad():
            # Xavier, as in the notebook that comes with Elhage et al. 2022.
            std = (2 / (cfg.n_features + cfg.d_model)) ** 0.5
            self.linear1.weight.normal_(std=std, generator=draw)
            self.tie()
            self.linear2.bias.zero_()
            for layer in self.hidden_layers:
                assert isinstance(layer, nn.Linear)
                layer.weight.copy_(torch.eye(cfg.d_model)).requires_grad_(False)

    def forward(self, x: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        hidden = self.linear1(x)
        for layer in self.hidden_layers:
            hidden = layer(hidden)
        return F.relu(self.linear2(hidden))

    def wanted(self, x: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        return x

    def features_read(self, name: str) -> Float[Tensor, "feature d_in"] | None:
        """Each feature as it arrives at a map; None where features are not single directions."""
        return torch.eye(self.linear1.in_features) if name == "linear1" else None

    def features_written(self, name: str) -> Float[Tensor, "feature d_out"] | None:
        """Each feature as it leaves a map; None where features are not single directions."""
        return torch.eye(self.linear2.out_features) if name == "linear2" else None

    @torch.no_grad()
    def tie_gradients(self) -> None:
        """Gives each use of W the gradients of both."""
        first, second = self.linear1.weight.grad, self.linear2.weight.grad
        assert first is not None and second is not None, "tied gradients are asked for before any backward pass"
        first += second.T
        second.copy_(first.T)

    @torch.no_grad()
    def tie(self) -> None:
        """Equal steps of equal weights still differ in their last bits, where an optimiser takes many at a time."""
        self.linear2.weight.copy_(self.linear1.weight.T)


class MLP(nn.Module):
    def __init__(self, d_model: int, d_mlp: int, draw: torch.Generator) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(d_model, d_mlp, bias=False)
        self.mlp_out = nn.Linear(d_mlp, d_model, bias=False)
        for layer, gain in ((self.mlp_in, 2.0), (self.mlp_out, 1.0)):
            nn.init.normal_(layer.weight, std=(gain / layer.in_features) ** 0.5, generator=draw)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.mlp_out(F.relu(self.mlp_in(x)))


class ResidMLP(nn.Module):
    """Sparse features in [-1, 1]; each is to come out as x + relu(x)."""

    W_E: Tensor  # a buffer: neither trained nor decomposed

    def __init__(self, cfg: ToyConfig, draw: torch.Generator) -> None:
        super().__init__()
        assert cfg.d_mlp is not None
        self.register_buffer("W_E", F.normalize(torch.randn(cfg.n_features, cfg.d_model, generator=draw), dim=1))
        self.layers = nn.ModuleList(MLP(cfg.d_model, cfg.d_mlp, draw) for _ in range(cfg.n_layers))

    def forward(self, x: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        stream = x @ self.W_E
        for layer in self.layers:
            stream = stream + layer(stream)
        return stream @ self.W_E.T

    @torch.no_grad()
    def compact(self) -> "ResidMLP":
        """The same function in the coordinates that the stream ever uses: those of an orthonormal basis Q of all that is written to it,
        turned at random, so that no feature is an axis.

        E Q,    W_in Q,    Q^T W_out        Q [d_model, rank], r Q Q^T = r for every r that there can be
        """
        written = torch.cat([self.W_E, *(layer.mlp_out.weight.T for layer in self.mlps)]).double().cpu()
        basis = torch.linalg.qr(written.T).Q
        draw = torch.Generator().manual_seed(0)
        turn = torch.linalg.qr(torch.randn(basis.shape[1], basis.shape[1], generator=draw, dtype=basis.dtype)).Q
        Q = (basis @ turn).to(self.W_E)
        made = copy.deepcopy(self)
        made.W_E = self.W_E @ Q
        for layer in made.mlps:
            d_mlp = layer.mlp_in.out_features
            W_in, W_out = layer.mlp_in.weight @ Q, Q.T @ layer.mlp_out.weight
            layer.mlp_in, layer.mlp_out = (
                nn.Linear(Q.shape[1], d_mlp, bias=False),
                nn.Linear(d_mlp, Q.shape[1], bias=False),
            )
            layer.mlp_in.weight, layer.mlp_out.weight = nn.Parameter(W_in), nn.Parameter(W_out)
        return made

    @property
    def mlps(self) -> list[MLP]:
        """The layers, typed."""
        return [layer for layer in self.layers if isinstance(layer, MLP)]

    def wanted(self, x: Float[Tensor, "... feature"]) -> Float[Tensor, "... feature"]:
        return x + F.relu(x)

    def features_read(self, name: str) -> Float[Tensor, "feature d_in"] | None:
        return self.W_E if name.endswith("mlp_in") else None

    def features_written(self, name: str) -> Float[Tensor, "feature d_out"] | None:
        return None  # neurons write many features each


Toy = TMS | ResidMLP


def build_toy(cfg: ToyConfig, seed: int) -> Toy:
    """Untrained; the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    match cfg.kind:
        case ToyKind.tms:
            return TMS(cfg, draw)
        case ToyKind.resid_mlp:
            return ResidMLP(cfg, draw)
