"""SparseDictionary: banks of features, each reading one span of x and writing one span of y.

    pre_g = encoder_g(x[:, reads_g])
    f     = activation(pre), compared with each other and with thresholds as pre * c
    y_hat = b_dec + sum over g of (f_g @ W_dec_g, and x[:, reads_g] @ W_skip_g if asked for) placed at writes_g

Every architecture of `nndecomp.decompositions.architectures` is this module with other spans. Weights that an
architecture forbids do not exist.
"""

# A live run is of the dictionary that makes it.
# pyright: reportImportCycles=false

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nndecomp.activations.sequences import RowsOrSequences, Sequences, rows_of
from nndecomp.config.schema import CodeNormalisation
from nndecomp.decompositions.activation import make_activation
from nndecomp.decompositions.activation_base import Selecting
from nndecomp.decompositions.activation_pointwise import JumpRelu
from nndecomp.decompositions.attention import AttentionGroup
from nndecomp.decompositions.base import Decomposition, GroupCost
from nndecomp.decompositions.codes import Codes, Encoding, GroupCodes, SparseCodes, like
from nndecomp.decompositions.encoding import encode
from nndecomp.decompositions.group import Group
from nndecomp.decompositions.kernels import Written, decode_groups
from nndecomp.decompositions.live import DictionaryRun
from nndecomp.decompositions.molt import TransformGroup
from nndecomp.decompositions.pretrained import Pretrained
from nndecomp.decompositions.pursuit import MatchingPursuit
from nndecomp.decompositions.spec import DictionarySpec, GroupSpec


class SparseDictionary(Pretrained, Decomposition):
    """A list of groups. Weights are zero until `nndecomp.decompositions.initial` or loading fills them."""

    def __init__(self, spec: DictionarySpec) -> None:
        super().__init__(spec)
        self.read_layout, self.write_layout = spec.read_layout, spec.write_layout
        self.reads = tuple(sorted(self.read_layout.sites))
        self.writes = tuple(sorted(self.write_layout.sites))
        made: dict[str, Group] = {}
        for group in spec.groups:
            of = None if group.encoder is None else made[group.encoder]
            made[group.name] = _kind(group)(group, spec, of)
        self.groups = nn.ModuleList(made.values())
        self.b_dec = nn.Parameter(torch.zeros(self.write_layout.width))
        self.activation = make_activation(spec)
        # What explains its own input is measured from the bias: an encoder may see x - b_dec, a pursuit always does.
        self.centres = spec.centre_input or isinstance(self.activation, MatchingPursuit)
        assert not self.centres or self.read_layout == self.write_layout, "only what writes all it reads can centre it"
        self.together = self._together()
        self.costs = tuple(chain(*(self._costs(g) for g in range(len(spec.groups)))))

    @property
    def banks(self) -> list[Group]:
        """The groups, typed."""
        return [group for group in self.groups if isinstance(group, Group)]

    @property
    def spec(self) -> DictionarySpec:
        """What this dictionary is now: annealing may have moved k."""
        k = tuple(self.activation.k) if isinstance(self.activation, Selecting) else ()
        return replace(self._spec, activation=replace(self._spec.activation, k=k))

    def _together(self) -> list[tuple[int, ...]]:
        """Groups that are encoded at once: those with one encoder, and those that pursue a common site."""
        pursues = isinstance(self.activation, MatchingPursuit)
        sets: list[tuple[int, ...]] = []
        for g, group in enumerate(self._spec.groups):
            mates = {
                i
                for i, other in enumerate(self._spec.groups[:g])
                if (group.encoder is not None and group.encoder in (other.name, other.encoder))
                or (pursues and set(group.writes) & set(other.writes))
            }
            joined = [each for each in sets if mates & set(each)]
            sets = [each for each in sets if each not in joined]
            sets.append((*sorted(i for each in joined for i in each), g))
        return sorted(sets)

    def _costs(self, group: int) -> tuple[GroupCost, ...]:
        """A pursuit looks through its decoder once for every feature that it takes."""
        bank, activation = self.banks[group], self.activation
        costs = bank.costs(self._spec.groups[group])
        if not isinstance(activation, MatchingPursuit):
            return costs
        k = sum(activation.k[g] for joint in self.together if group in joint for g in joint)
        return tuple(replace(cost, gate_parameters=k * bank.W_dec.numel()) for cost in costs)

    def scale(self, group: int) -> Float[Tensor, "feature"] | None:
        """c of a group's features, without gradient, as selection and thresholds see it; null: 1."""
        bank, spec = self.banks[group], self._spec.activation
        if bank.code_scale is not None or spec.code_normalisation is CodeNormalisation.none:
            return bank.code_scale
        with torch.no_grad():
            return bank.scale(spec.code_normalisation, spec.mixed_weights)

    def reported(self, codes: Codes) -> Codes:
        """f c: codes as they are compared between features."""
        groups = [(group, self.scale(g)) for g, group in enumerate(codes)]
        return Codes(tuple(replace(group, values=group.weighted(c)) for group, c in groups))

    @property
    def needs_sequences(self) -> bool:
        return any(isinstance(bank, AttentionGroup) for bank in self.banks)

    def read(self, x: RowsOrSequences, group: int) -> Float[Tensor, "token _"]:
        """What one group's encoder sees of x."""
        return self._seen(x[:, self.banks[group].reads], group)

    def _seen(self, read: RowsOrSequences, group: int) -> Float[Tensor, "token _"]:
        """The same, of what the group reads."""
        bank = self.banks[group]
        return bank.seen(read - self.b_dec[bank.reads] if self.centres else read)

    def encode(self, x: RowsOrSequences) -> Codes:
        return self.encoding(x).codes

    def encoding(self, x: RowsOrSequences, whole: bool = False) -> Encoding:
        """Codes, with what losses want to know beside them. `whole`: pre-activations of all entries, where there are any."""
        if self.needs_sequences:
            assert isinstance(x, Sequences), "attention needs whole sequences, not tokens one by one"
        else:
            assert isinstance(x, Tensor) and x.ndim == 2, "rows are [token, d_reads]: flatten sequences first"
            width, sites = self.read_layout.width, ", ".join(map(str, self.read_layout.sites))
            assert x.shape[1] == width, f"rows of {x.shape[1]} numbers, but {sites} have {width} side by side"
        groups = range(len(self.groups))
        return self.encode_groups([x[:, self.banks[g].reads] for g in groups], groups, whole)

    def encode_groups(self, reads: Sequence[RowsOrSequences], groups: Sequence[int], whole: bool = False) -> Encoding:
        """Some groups, from what each of them reads."""
        each, banks = list(zip(reads, groups, strict=True)), [self.banks[g] for g in groups]
        inputs, centres = [self._seen(*own) for own in each], [self._centre(*own) for own in each]
        scales = [self.scale(g) for g in groups]
        joint = [each for each in self.together if set(each) <= set(groups)]
        return encode(self.activation, banks, inputs, groups, scales, joint, whole, centres)

    def _centre(self, read: RowsOrSequences, group: int) -> Float[Tensor, "d_read"] | None:
        """What is taken away from rows that want no gradient."""
        rows_are_given = isinstance(read, Tensor) and not read.requires_grad
        return self.b_dec[self.banks[group].reads] if self.centres and rows_are_given else None

    def active(self, encoding: Encoding) -> list[GroupCodes]:
        """Of jumprelu: 1 where a feature is active, with the straight-through gradient of its threshold."""
        assert isinstance(self.activation, JumpRelu) and encoding.pres is not None, "only jumprelu learns by counting"
        counted = self.activation.active
        each = enumerate(zip(encoding.pres, encoding.scales, strict=True))
        return [like(pre, lambda z, at, g=g, c=c: counted(z, g, c, at)) for g, (pre, c) in each]

    def decode(self, codes: Codes, x: RowsOrSequences) -> Float[Tensor, "token d_writes"]:
        """x is read only by the linear skip."""
        sparse = [each for each in codes if isinstance(each, SparseCodes)]
        if len(sparse) == len(self.banks) and all(bank.sums_rows for bank in self.banks):
            return self._decode_together(sparse, x)
        y_hat = self.b_dec.repeat(codes.n_tokens, 1)
        for bank, group_codes in zip(self.banks, codes, strict=True):
            y_hat[:, bank.writes] += bank.contribution(x[:, bank.reads], group_codes)
        return y_hat

    def _decode_together(self, codes: Sequence[SparseCodes], x: RowsOrSequences) -> Float[Tensor, "token d_writes"]:
        """All groups in one operation: what they write is added in place, and its gradient is read where it stands."""
        written = [Written(bank.writes, own.support) for bank, own in zip(self.banks, codes, strict=True)]
        W_decs = [bank.W_dec for bank in self.banks]
        y_hat = decode_groups(self.b_dec, written, [own.values for own in codes], W_decs)
        for bank in self.banks:
            if bank.W_skip is not None:
                y_hat[:, bank.writes] += rows_of(x[:, bank.reads]) @ bank.W_skip
        return y_hat

    def forward(self, x: RowsOrSequences) -> tuple[Float[Tensor, "token d_writes"], Codes]:
        codes = self.encode(x)
        return self.decode(codes, x), self.counted(codes)

    def counted(self, codes: Codes) -> Codes:
        """The same codes, counted as `costs` has it."""
        parts = tuple(bank.parts for bank in self.banks)
        return codes if all(len(sizes) == 1 for sizes in parts) else replace(codes, parts=parts)

    def live_obstacle(self) -> str | None:
        for joint in self.together:
            groups = [self._spec.groups[g] for g in joint]
            last = max(site for group in groups for site in group.reads)
            first = min(site for group in groups for site in group.writes)
            if last > first:
                several = f"groups {', '.join(group.name for group in groups)} together read"
                reads = several if len(groups) > 1 else f"group {groups[0].name} reads"
                return f"{reads} {last}, which runs after {first}, which {'they write' if len(groups) > 1 else 'it writes'}"
        return self.activation.live_obstacle()

    def live_run(self) -> "DictionaryRun":
        obstacle = self.live_obstacle()
        assert obstacle is None, f"this dictionary cannot answer site by site: {obstacle}"
        return DictionaryRun(self)

    @torch.no_grad()
    def fold(
        self,
        s_read: Float[Tensor, "d_reads"],
        s_write: Float[Tensor, "d_writes"],
        m_read: Float[Tensor, "d_reads"],
        m_write: Float[Tensor, "d_writes"],
    ) -> None:
        """From activations (x - m) / s, with a scale and a shift for each column, to raw ones. Codes stay what they were.

            W_enc / s_read    b_enc - W_enc m_read / s_read    W_dec * s_write    b_dec * s_write + m_write
            W_skip * s_write / s_read, whose constant part goes into b_dec

        Exact for every activation function: pre-activations do not change, and c, which depended on the decoder's norms,
        is kept as it was.
        """
        s_read, s_write = s_read.to(self.b_dec), s_write.to(self.b_dec)
        m_read, m_write = m_read.to(self.b_dec), m_write.to(self.b_dec)
        if self.centres:
            same = torch.equal(s_read, s_write) and torch.equal(m_read, m_write)
            assert same, "what is centred by its own bias is read and written in the same units"
        if self._spec.activation.code_normalisation is not CodeNormalisation.none:
            self.freeze_scales()
        fell = {}
        for bank in self.banks:
            if bank.own_encoder is not None:
                # x - b_dec stays what it was: the shift is in b_dec.
                m = torch.zeros_like(m_read[bank.reads]) if self.centres else m_read[bank.reads]
                fell[id(bank.encoder)] = bank.own_encoder.fold(s_read[bank.reads], m)
        for g, bank in enumerate(self.banks):
            if bank.encoder is not None:
                self.activation.fold_bias(g, fell[id(bank.encoder)])
        self.b_dec.mul_(s_write).add_(m_write)
        for bank in self.banks:
            self.b_dec[bank.writes] += bank.fold(s_read[bank.reads], s_write[bank.writes], m_read[bank.reads])
        if isinstance(self.activation, MatchingPursuit):
            self.activation.units = self.activation.units / s_write

    @torch.no_grad()
    def freeze_scales(self) -> None:
        """From here on c is what it is now, whatever happens to the decoder."""
        for g, bank in enumerate(self.banks):
            c = self.scale(g)
            bank.code_scale = torch.ones_like(bank.b_enc) if c is None else c.clone()
        self._spec = replace(self._spec, frozen_scales=True)


def _kind(group: GroupSpec) -> type[Group]:
    if group.attention is not None:
        return AttentionGroup
    return TransformGroup if group.ranks else Group
