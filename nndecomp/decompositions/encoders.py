"""From what a group reads to its pre-activations.

    linear   z = x @ W_enc.T + b_enc
    glu      z = (x @ W_enc.T + b_enc) * sigmoid(x @ W_glu.T + b_glu)     Shazeer 2020, arXiv 2002.05202, section 2

Weights are feature-major: one row a feature.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.config.schema import Encoder
from nndecomp.decompositions import kernels
from nndecomp.decompositions.selection import Found
from nndecomp.decompositions.support import Selected


class LinearEncoder(nn.Module):
    def __init__(self, d_read: int, n_features: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(n_features, d_read))
        self.b_enc = nn.Parameter(torch.zeros(n_features))

    @property
    def maps(self) -> tuple[tuple[Float[Tensor, "feature d_read"], Float[Tensor, "feature"]], ...]:
        """Weight and bias of every affine map that pre-activations are made of."""
        return ((self.W_enc, self.b_enc),)

    def combine(self, *maps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Pre-activations from the outputs of `maps`."""
        (pre,) = maps
        return pre

    def affine(
        self, x: Float[Tensor, "token d_read"], features: Int[Tensor, "chosen"] | slice | None = None
    ) -> tuple[Float[Tensor, "token _"], ...]:
        """Outputs of `maps`, of all features or those chosen."""
        return tuple(
            nn.functional.linear(x, *((W, b) if features is None else (W[features], b[features]))) for W, b in self.maps
        )

    def forward(
        self, x: Float[Tensor, "token d_read"], features: Int[Tensor, "chosen"] | None = None
    ) -> Float[Tensor, "token _"]:
        return self.combine(*self.affine(x, features))

    def at(
        self, x: Float[Tensor, "token d_read"], found: Found, centre: Float[Tensor, "d_read"] | None
    ) -> Float[Tensor, "slot"]:
        """Pre-activations of active entries alone; gradients reach no others. `found` has the outputs of `maps`, which carry none.
        `centre`: see `kernels.active_pre`."""
        parts = zip(self.maps, found.values, strict=True)
        return self.combine(
            *(kernels.active_pre(x, W, b, Selected(found.support, own), centre) for (W, b), own in parts)
        )

    @torch.no_grad()
    def fold(self, s: Float[Tensor, "d_read"], m: Float[Tensor, "d_read"]) -> Float[Tensor, "feature"]:
        """From (x - m) / s to x; returns by how much b_enc fell."""
        fell = torch.zeros_like(self.b_enc)
        for i, (W, b) in enumerate(self.maps):
            W.div_(s)
            shift = W @ m
            b.sub_(shift)
            fell = shift if i == 0 else fell
        return fell


class GluEncoder(LinearEncoder):
    def __init__(self, d_read: int, n_features: int) -> None:
        super().__init__(d_read, n_features)
        self.W_glu = nn.Parameter(torch.zeros(n_features, d_read))
        self.b_glu = nn.Parameter(torch.zeros(n_features))

    @property
    def maps(self) -> tuple[tuple[Float[Tensor, "feature d_read"], Float[Tensor, "feature"]], ...]:
        return ((self.W_enc, self.b_enc), (self.W_glu, self.b_glu))

    def combine(self, *maps: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        linear, gate = maps
        return linear * gate.sigmoid()


def make_encoder(kind: Encoder, d_read: int, n_features: int) -> LinearEncoder:
    match kind:
        case Encoder.linear:
            return LinearEncoder(d_read, n_features)
        case Encoder.glu:
            return GluEncoder(d_read, n_features)
