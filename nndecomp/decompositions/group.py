"""One bank of features: what it reads, its encoder, its decoder, and what it writes.

pre = encoder(x)                              [token, feature]    see `nndecomp.decompositions.encoders`
y   = f @ W_dec, and x @ W_skip if asked for  [token, d_write]
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences, rows_of
from nndecomp.config.schema import Activation, CodeNormalisation
from nndecomp.decompositions.base import GroupCost
from nndecomp.decompositions.codes import GroupCodes
from nndecomp.decompositions.encoders import LinearEncoder, make_encoder
from nndecomp.decompositions.normalisation import decoder_scale
from nndecomp.decompositions.spec import DictionarySpec, GroupSpec
from nndecomp.types import Layout, Site


def _span(layout: Layout, sites: Sequence[Site], group: str) -> slice:
    span = layout.span(sites)
    assert span is not None, f"the sites of group {group} are not adjacent: {', '.join(map(str, sites))}"
    return span


class Group(nn.Module):
    """`of`: the group whose encoder it uses. A group of a dictionary that pursues has none: its decoder encodes."""

    sums_rows = True  # what it writes, but for a linear skip, is its codes' sum of decoder rows

    def __init__(self, spec: GroupSpec, whole: DictionarySpec, of: "Group | None") -> None:
        super().__init__()
        self.encoder: LinearEncoder | None
        self.name, self.n_features = spec.name, spec.n_features
        self.reads = _span(whole.read_layout, spec.reads, spec.name)
        self.writes = _span(whole.write_layout, spec.writes, spec.name)
        self.write_widths = tuple(whole.write_layout.width_of(site) for site in spec.writes)
        self.d_read = self.reads.stop - self.reads.start
        self.d_write = self.writes.stop - self.writes.start
        if of is not None:
            # Borrowed: its weights are the other group's, and stand in the state_dict once.
            self.__dict__["encoder"] = of.encoder
        elif whole.activation.kind is Activation.matching_pursuit:
            self.encoder = None
        else:
            self.encoder = self.make_encoder(spec, whole)
        self.make_decoder(spec, whole)
        self.W_skip = nn.Parameter(torch.zeros(self.d_read, self.d_write)) if whole.skip else None
        self.code_scale: Tensor | None
        self.register_buffer("code_scale", torch.ones(spec.n_features) if whole.frozen_scales else None)

    def make_encoder(self, spec: GroupSpec, whole: DictionarySpec) -> LinearEncoder:
        return make_encoder(whole.encoder, self.d_read, spec.n_features)

    def make_decoder(self, spec: GroupSpec, whole: DictionarySpec) -> None:
        self.W_dec = nn.Parameter(torch.zeros(spec.n_features, self.d_write))

    @property
    def own_encoder(self) -> LinearEncoder | None:
        """Null for one that is borrowed, and where there is none."""
        return None if "encoder" in self.__dict__ else self.encoder

    @property
    def linear_encoder(self) -> LinearEncoder:
        assert self.encoder is not None, f"group {self.name} has no encoder: it pursues"
        return self.encoder

    @property
    def W_enc(self) -> Float[Tensor, "feature d_read"]:
        """Of a group that pursues: its decoder rows, scaled to norm 1, at what it reads; not a parameter."""
        if self.encoder is not None:
            return self.encoder.W_enc
        start = self.reads.start - self.writes.start
        rows = self.W_dec / self.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.W_dec.dtype).tiny)
        return rows[:, start : start + self.reads.stop - self.reads.start]

    @property
    def b_enc(self) -> Float[Tensor, "feature"]:
        return self.W_dec.new_zeros(self.n_features) if self.encoder is None else self.encoder.b_enc

    def scale(self, kind: CodeNormalisation, mixed_weights: tuple[float, float]) -> Float[Tensor, "feature"]:
        """c of each feature; gradients flow into the decoder."""
        return decoder_scale(self.W_dec, self.write_widths, kind, mixed_weights)

    def divide_decoder(self, by: Float[Tensor, "feature"]) -> None:
        """What each feature writes, divided by a number."""
        self.W_dec.div_(by[:, None])

    def pre_activations(
        self, x: Float[Tensor, "token d_read"], features: Int[Tensor, "chosen"] | None = None
    ) -> Float[Tensor, "token _"]:
        """Of all features, or of those chosen."""
        if self.encoder is None:
            return x @ (self.W_enc if features is None else self.W_enc[features]).T
        return self.encoder(x, features)

    def seen(self, x: RowsOrSequences) -> Float[Tensor, "token _"]:
        """What the encoder sees of what the group reads."""
        assert isinstance(x, Tensor), f"group {self.name} takes tokens one by one"
        return x

    def contribution(self, x: RowsOrSequences, codes: GroupCodes) -> Float[Tensor, "token d_write"]:
        """What the group adds to its write span; x is what it reads, not centred."""
        features = codes.decode(self.W_dec)
        return features if self.W_skip is None else features + rows_of(x) @ self.W_skip

    def answers(
        self, x: RowsOrSequences, codes: Float[Tensor, "token chosen"], chosen: Int[Tensor, "chosen"]
    ) -> Float[Tensor, "token d_write"]:
        """What some features alone make of their codes."""
        return codes @ self.W_dec[chosen]

    @property
    def parts(self) -> tuple[int, ...]:
        """Sizes of the runs of features that `costs` has one entry for."""
        return (self.n_features,)

    def costs(self, spec: GroupSpec) -> tuple[GroupCost, ...]:
        maps = () if self.encoder is None else self.encoder.maps
        return (
            GroupCost(
                name=self.name,
                n_components=self.n_features,
                # Features of a group that pursues are read with the rows that they write.
                parameters=sum(W.shape[1] for W, _ in maps) + self.d_write,
                n_writes=len(spec.writes),
                gate_parameters=sum(W.numel() for W, _ in maps) if spec.encoder is None else 0,
                linear_parameters=0 if self.W_skip is None else self.W_skip.numel(),
            ),
        )

    def fold(
        self, s_read: Float[Tensor, "d_read"], s_write: Float[Tensor, "d_write"], m_read: Float[Tensor, "d_read"]
    ) -> Float[Tensor, "d_write"]:
        """What is written, from (x - m_read) / s_read to x and from y / s_write to y, codes as they are; the encoder folds
        by itself. Returns the constant that this takes out of y, to go into the bias."""
        self.W_dec.mul_(s_write)
        if self.W_skip is None:
            return torch.zeros_like(s_write)
        self.W_skip.mul_(s_write / s_read[:, None])
        return -m_read @ self.W_skip
