"""One bank of features: what it reads, its encoder, its decoder, and what it writes.

pre = x @ W_enc.T + b_enc                   [token, feature]
y   = f @ W_dec, and x @ W_skip if asked for  [token, d_write]
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.schema import CodeNormalisation
from nndecomp.decompositions.codes import GroupCodes
from nndecomp.decompositions.normalisation import decoder_scale
from nndecomp.decompositions.spec import GroupSpec
from nndecomp.types import Layout, Site


def _span(layout: Layout, sites: Sequence[Site], group: str) -> slice:
    span = layout.span(sites)
    assert span is not None, f"the sites of group {group} are not adjacent: {', '.join(map(str, sites))}"
    return span


class LinearEncoder(nn.Module):
    """Pre-activations of one or more groups."""

    def __init__(self, d_read: int, n_features: int) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.zeros(n_features, d_read))
        self.b_enc = nn.Parameter(torch.zeros(n_features))

    def forward(self, x: Float[Tensor, "token d_read"]) -> Float[Tensor, "token feature"]:
        return nn.functional.linear(x, self.W_enc, self.b_enc)


class Group(nn.Module):
    """One bank of features. Both weight matrices are feature-major: one row a feature."""

    def __init__(
        self, spec: GroupSpec, read_layout: Layout, write_layout: Layout, skip: bool, of: "Group | None"
    ) -> None:
        super().__init__()
        self.name = spec.name
        self.reads = _span(read_layout, spec.reads, spec.name)
        self.writes = _span(write_layout, spec.writes, spec.name)
        self.write_widths = tuple(write_layout.width_of(site) for site in spec.writes)
        d_read = self.reads.stop - self.reads.start
        d_write = self.writes.stop - self.writes.start
        if of is None:
            self.encoder = LinearEncoder(d_read, spec.n_features)
        else:
            # Borrowed: its weights are the other group's, and stand in the state_dict once.
            self.__dict__["encoder"] = of.encoder
        self.W_dec = nn.Parameter(torch.zeros(spec.n_features, d_write))
        self.W_skip = nn.Parameter(torch.zeros(d_read, d_write)) if skip else None

    @property
    def n_features(self) -> int:
        return self.W_dec.shape[0]

    @property
    def has_own_encoder(self) -> bool:
        return "encoder" in self._modules

    @property
    def W_enc(self) -> Float[Tensor, "feature d_read"]:
        return self.encoder.W_enc

    @property
    def b_enc(self) -> Float[Tensor, "feature"]:
        return self.encoder.b_enc

    def scale(self, kind: CodeNormalisation, mixed_weights: tuple[float, float]) -> Float[Tensor, "feature"]:
        """c of each feature; gradients flow into the decoder."""
        return decoder_scale(self.W_dec, self.write_widths, kind, mixed_weights)

    def pre_activations(self, x: Float[Tensor, "token d_read"]) -> Float[Tensor, "token feature"]:
        return self.encoder(x)

    def contribution(self, x: Float[Tensor, "token d_read"], codes: GroupCodes) -> Float[Tensor, "token d_write"]:
        """What the group adds to its write span; x is what it reads, not centred."""
        features = codes.decode(self.W_dec)
        return features if self.W_skip is None else features + x @ self.W_skip
