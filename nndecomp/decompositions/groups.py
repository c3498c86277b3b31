"""SparseDictionary: banks of features, each reading one span of x and writing one span of y.

    pre_g = x[:, reads_g] @ W_enc_g.T + b_enc_g
    f     = activation(pre)
    y_hat = b_dec + sum over g of (f_g @ W_dec_g, and x[:, reads_g] @ W_skip_g if asked for) placed at writes_g

Every architecture of `nndecomp.decompositions.architectures` is this module with other spans. Weights that an
architecture forbids do not exist.
"""

# A live run is of the dictionary that makes it.
# pyright: reportImportCycles=false

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.decompositions.activation import make_activation
from nndecomp.decompositions.activation_base import Pointwise, Selecting
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.codes import Codes, DenseCodes, Encoding, SparseCodes
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.live import DictionaryRun
from nndecomp.decompositions.pretrained import Pretrained
from nndecomp.decompositions.spec import DictionarySpec
from nndecomp.types import Layout, Site


class SparseDictionary(Pretrained, Decomposition):
    """A list of groups. Weights are zero until `initialise` or loading fills them."""

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__(spec)
        self.read_layout, self.write_layout = spec.read_layout, spec.write_layout
        self.reads = tuple(sorted(self.read_layout.sites))
        self.writes = tuple(sorted(self.write_layout.sites))
        made: dict[str, Group] = {}
        for group in spec.groups:
            of = None if group.encoder is None else made[group.encoder]
            made[group.name] = Group(group, self.read_layout, self.write_layout, spec.skip, of)
        self.groups = nn.ModuleList(made.values())
        self.b_dec = nn.Parameter(torch.zeros(self.write_layout.width))
        self.activation = make_activation(spec.activation, [group.n_features for group in spec.groups])
        assert not spec.centre_input or self.read_layout == self.write_layout, "only an SAE can centre its input"
        self.costs = tuple(bank.cost(group_spec) for bank, group_spec in zip(self.banks, spec.groups, strict=True))

    @property
    def banks(self) -> list[Group]:
        """The groups, typed."""
        return [group for group in self.groups if isinstance(group, Group)]

    @property
    def spec(self) -> DictionarySpec:
        """What this dictionary is now: annealing may have moved k."""
        k = tuple(self.activation.k) if isinstance(self.activation, Selecting) else ()
        return replace(self._spec, activation=replace(self._spec.activation, k=k))

    def read(self, x: Float[Tensor, "token d_reads"], group: int) -> Float[Tensor, "token d_read"]:
        """What one group's encoder sees of x."""
        return self.centred(x[:, self.banks[group].reads], group)

    def centred(self, x: Float[Tensor, "token d_read"], group: int) -> Float[Tensor, "token d_read"]:
        return x - self.b_dec[self.banks[group].reads] if self._spec.centre_input else x

    def encode(self, x: Float[Tensor, "token d_reads"]) -> Codes:
        return self.encoding(x).codes

    def encoding(self, x: Float[Tensor, "token d_reads"]) -> Encoding:
        """Codes, with what losses want to know beside them."""
        groups = range(len(self.groups))
        return self.encode_groups([self.read(x, g) for g in groups], groups)

    def encode_groups(self, inputs: Sequence[Float[Tensor, "token _"]], groups: Sequence[int]) -> Encoding:
        """Some groups, from what each of them reads, centred where that is asked for."""
        banks = [self.banks[g] for g in groups]
        scales = [None for _ in groups]
        if isinstance(self.activation, Pointwise):
            pres = tuple(bank.pre_activations(x) for bank, x in zip(banks, inputs, strict=True))
            values = [self.activation(pre, g) for pre, g in zip(pres, groups, strict=True)]
            return Encoding(Codes(tuple(map(DenseCodes, values))), scales, pres)
        with torch.no_grad():
            dense = [bank.pre_activations(x) for bank, x in zip(banks, inputs, strict=True)]
            supports = self.activation.supports(dense, groups)
        # A negative pre-activation among the k largest becomes 0, which is not active.
        codes = [
            SparseCodes(bank.active_pre(x, pre, support).relu(), support)
            for x, bank, pre, support in zip(inputs, banks, dense, supports, strict=True)
        ]
        return Encoding(Codes(tuple(codes)), scales, None)

    def active(self, encoding: Encoding) -> list[Float[Tensor, "token _"]]:
        """Of jumprelu: 1 where a feature is active, with the straight-through gradient of its threshold."""
        assert isinstance(self.activation, JumpRelu) and encoding.pres is not None, "only jumprelu learns by counting"
        return [self.activation.active(pre, g) for g, pre in enumerate(encoding.pres)]

    def decode(self, codes: Codes, x: Float[Tensor, "token d_reads"]) -> Float[Tensor, "token d_writes"]:
        """x is read only by the linear skip."""
        y_hat = self.b_dec.repeat(codes.n_tokens, 1)
        for bank, group_codes in zip(self.banks, codes, strict=True):
            y_hat[:, bank.writes] += bank.contribution(x[:, bank.reads], group_codes)
        return y_hat

    def forward(self, x: Float[Tensor, "token d_reads"]) -> tuple[Float[Tensor, "token d_writes"], Codes]:
        codes = self.encode(x)
        return self.decode(codes, x), codes

    def live_obstacle(self) -> str | None:
        for group in self._spec.groups:
            if max(group.reads) > min(group.writes):
                return f"group {group.name} reads {max(group.reads)}, which runs after {min(group.writes)}, which it writes"
        return self.activation.live_obstacle()

    def live_run(self) -> "DictionaryRun":
        obstacle = self.live_obstacle()
        assert obstacle is None, f"this dictionary cannot answer site by site: {obstacle}"
        return DictionaryRun(self)

    @torch.no_grad()
    def initialise(self, seed: int, decoder_norm: float) -> None:
        """Random directions: unit encoder rows, decoder rows of `decoder_norm` at every site they write.

        With inputs scaled to E|x|^2 = width, unit encoder rows give pre-activations of unit variance. A group that
        writes what it reads starts tied. Directions depend on the seed and the sites alone, not on the other groups:
        a layer starts the same in a stack as by itself, and the same in a transcoder as in a cross-layer one.
        """
        for spec, bank in zip(self._spec.groups, self.banks, strict=True):
            reads = " ".join(map(str, spec.reads))
            bank.W_enc.copy_(_directions(f"{seed} W_enc {reads}", *bank.W_enc.shape))
            if spec.reads == spec.writes:
                bank.W_dec.copy_(decoder_norm * bank.W_enc)
                continue
            columns = [
                _directions(f"{seed} W_dec {reads} {site}", spec.n_features, self.write_layout.widths[i])
                for i, site in enumerate(self.write_layout.sites)
                if site in spec.writes
            ]
            bank.W_dec.copy_(decoder_norm * torch.cat(columns, 1))

    @torch.no_grad()
    def fold(self, s_read: Float[Tensor, "d_reads"], s_write: Float[Tensor, "d_writes"]) -> None:
        """From activations divided by these scales, one for each column, to raw ones. Codes stay what they were.

            W_enc / s_read    W_dec * s_write    b_dec * s_write    W_skip * s_write / s_read    b_enc unchanged

        Exact for every activation function, since pre-activations do not change.
        """
        s_read, s_write = s_read.to(self.b_dec), s_write.to(self.b_dec)
        self.b_dec.mul_(s_write)
        for bank in self.banks:
            bank.fold(s_read[bank.reads], s_write[bank.writes])


def columns_of(scales: dict[Site, float], layout: Layout) -> Float[Tensor, "width"]:
    """Each site's scale at each of its columns."""
    return torch.cat([torch.full((w,), scales[s]) for s, w in zip(layout.sites, layout.widths, strict=True)])


def _directions(label: str, n: int, d: int) -> Float[Tensor, "n d"]:
    """n random unit vectors, the same for the same label."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)
