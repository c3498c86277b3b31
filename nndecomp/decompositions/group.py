"""One bank of features: what it reads, its encoder, its decoder, and what it writes.

pre = x @ W_enc.T + b_enc                   [token, feature]
y   = f @ W_dec, and x @ W_skip if asked for  [token, d_write]
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.config.schema import CodeNormalisation
from nndecomp.decompositions import kernels
from nndecomp.decompositions.base import GroupCost
from nndecomp.decompositions.codes import GroupCodes
from nndecomp.decompositions.kernels import Support
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
        self.n_features = spec.n_features
        self.d_read = self.reads.stop - self.reads.start
        self.d_write = self.writes.stop - self.writes.start
        if of is None:
            self.encoder = self.make_encoder(spec)
        else:
            # Borrowed: its weights are the other group's, and stand in the state_dict once.
            self.__dict__["encoder"] = of.encoder
        self.make_decoder(spec)
        self.W_skip = nn.Parameter(torch.zeros(self.d_read, self.d_write)) if skip else None

    def make_encoder(self, spec: GroupSpec) -> LinearEncoder:
        return LinearEncoder(self.d_read, spec.n_features)

    def make_decoder(self, spec: GroupSpec) -> None:
        self.W_dec = nn.Parameter(torch.zeros(spec.n_features, self.d_write))

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

    def active_pre(
        self, x: Float[Tensor, "token d_read"], pre: Float[Tensor, "token feature"], support: Support
    ) -> Float[Tensor, "slot"]:
        """The pre-activations at the support, differentiable; `pre` carries no gradient."""
        return kernels.active_pre(x, self.W_enc, self.b_enc, pre, support)

    def contribution(self, x: Float[Tensor, "token d_read"], codes: GroupCodes) -> Float[Tensor, "token d_write"]:
        """What the group adds to its write span; x is what it reads, not centred."""
        features = codes.decode(self.W_dec)
        return features if self.W_skip is None else features + x @ self.W_skip

    def cost(self, spec: GroupSpec) -> GroupCost:
        return GroupCost(
            name=self.name,
            n_components=self.n_features,
            parameters=self.d_read + self.d_write,
            n_writes=len(spec.writes),
            gate_parameters=self.W_enc.numel() if spec.encoder is None else 0,
            linear_parameters=0 if self.W_skip is None else self.W_skip.numel(),
        )

    def fold(self, s_read: Float[Tensor, "d_read"], s_write: Float[Tensor, "d_write"]) -> None:
        """From activations divided by these scales to raw ones; pre-activations stay what they were."""
        if self.has_own_encoder:
            self.W_enc.div_(s_read)
        self.W_dec.mul_(s_write)
        if self.W_skip is not None:
            self.W_skip.mul_(s_write / s_read[:, None])
