"""A decomposition of any method as a list of units that can be compared: what each reads and writes, and when.

    reads, writes   a unit's directions by the space they live in; spaces of one name are one space, whoever names it
    activity        on which tokens of a text it is active, and by how much: what it writes is value * write direction

A unit is a feature of a dictionary, a neuron, or a rank-one component of one of the model's own matrices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nndecomp.activations.sequences import beside
from nndecomp.config.checks import require
from nndecomp.decompositions.base import Decomposition
from nndecomp.decompositions.codes import Codes, GroupCodes
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.molt import require_rows
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.replacing import Sequences
from nndecomp.errors import SettingError
from nndecomp.targets.base import Target
from nndecomp.tokens.batch import TokenBatch
from nndecomp.types import Layout, Point, Site

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

DENSE = 0.1  # share of tokens; sparse products take about ten times as long for each entry

# Directions by space: [unit, width of the space], as raw activations.
Directions = Mapping[str, Float[Tensor, "unit _"]]


@dataclass(frozen=True)
class Activity:
    """What is active: entry e says that `units[e]` is worth `values[e]`, not 0, on `tokens[e]`. Each pair stands once."""

    tokens: Int[Tensor, " entry"]
    units: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]
    n_tokens: int
    n_units: int

    @staticmethod
    def of_batches(batches: Sequence[GroupCodes]) -> "Activity":
        """Codes of one group on one batch of tokens after the other."""
        found = [each.entries() for each in batches]
        ends = torch.tensor([0, *(each.n_tokens for each in batches)]).cumsum(0).tolist()
        tokens = torch.cat([entries[0].cpu() + start for start, entries in zip(ends[:-1], found, strict=True)])
        units, values = (torch.cat([entries[i].cpu() for entries in found]) for i in (1, 2))
        return Activity(tokens, units, values.float(), ends[-1], batches[0].n_features)

    @cached_property
    def firings(self) -> Int[Tensor, " unit"]:
        """Tokens on which each unit is active."""
        return self.units.bincount(minlength=self.n_units)

    def of(self, chosen: Int[Tensor, " chosen"]) -> "Activity":
        """That of some units, in the order in which they are named."""
        place = torch.full((self.n_units,), -1)
        place[chosen] = torch.arange(len(chosen))
        kept = place[self.units] >= 0
        return Activity(self.tokens[kept], place[self.units[kept]], self.values[kept], self.n_tokens, len(chosen))

    def shifted(self, by: int) -> "Activity":
        """The same activity at other places of the text, which is taken as a circle: how often and in what runs a unit
        is active, and with which others, stays; with what the text says there it has nothing to do."""
        return replace(self, tokens=(self.tokens + by) % self.n_tokens)

    @cached_property
    def amounts(self) -> "csr_matrix":
        """|value| [token, unit]: how much each unit is active, whatever the sign of its direction."""
        return self._matrix(self.values.abs())

    @cached_property
    def is_dense(self) -> bool:
        """Whether its units are active on so many tokens that products with all zeros written out are the faster ones."""
        return len(self.values) > DENSE * self.n_tokens * self.n_units

    @cached_property
    def codes(self) -> "csr_matrix":
        """Values [token, unit]."""
        return self._matrix(self.values)

    def _matrix(self, values: Tensor) -> Any:
        from scipy.sparse import coo_matrix  # late: slow to import

        entries = values.double().numpy(), (self.tokens.numpy(), self.units.numpy())
        return coo_matrix(entries, shape=(self.n_tokens, self.n_units)).tocsr()


@dataclass(frozen=True)
class Units:
    """The units of one group. Units of two decompositions are compared where they belong to the same layer."""

    name: str  # of the group
    part: str  # of a method that has several kinds of unit in a layer, which kind: "c_fc"; else ""
    layer: int
    reads: Directions
    writes: Directions
    # Whether a read and a write direction each have a sign. Of a rank-one matrix only both together have.
    signed: bool
    activity: Activity

    def __post_init__(self) -> None:
        lengths = {len(rows) for rows in (*self.reads.values(), *self.writes.values())}
        assert lengths <= {self.n}, f"{self.name} has {self.n} units, but {lengths} directions"

    @property
    def n(self) -> int:
        return self.activity.n_units

    def of(self, chosen: Int[Tensor, " chosen"]) -> "Units":
        """Some of them."""
        reads, writes = ({space: rows[chosen] for space, rows in side.items()} for side in (self.reads, self.writes))
        return replace(self, reads=reads, writes=writes, activity=self.activity.of(chosen))

    def active_on(self, min_tokens: int) -> "Units":
        """Those that are active on as many tokens: of what is hardly ever seen, nobody can say when it is active."""
        return self.of((self.activity.firings >= min_tokens).nonzero()[:, 0])


@torch.no_grad()
def units_of(
    target: Target, decomposition: Decomposition, text: TokenBatch, keep: Bool[Tensor, "batch pos"], batch_seqs: int
) -> list[Units]:
    """All units of all groups, in the order of the groups, with their activity on the kept positions of the text."""
    described = _described(target, decomposition)
    codes = list(_codes(target, decomposition, text, keep, batch_seqs))
    return [
        replace(each, activity=Activity.of_batches([batch[g] for batch in codes])) for g, each in enumerate(described)
    ]


def _codes(
    target: Target, decomposition: Decomposition, text: TokenBatch, keep: Bool[Tensor, "batch pos"], batch_seqs: int
) -> Iterator[Codes]:
    """Of the undisturbed run, batch by batch."""
    for part, kept in zip(text.split(batch_seqs), keep.split(batch_seqs), strict=True):
        batch = Sequences(part.tokens.to(target.device), kept.flatten().nonzero()[:, 0].to(target.device))
        found = target.record(batch.tokens, sorted(decomposition.reads))
        taken = batch.whole if decomposition.needs_sequences else batch.rows
        _, active = decomposition(beside([taken(found[site]) for site in decomposition.read_layout.sites]))
        assert isinstance(active, Codes), f"{type(decomposition).__name__} says {type(active).__name__}, not codes"
        yield active


def _described(target: Target, decomposition: Decomposition) -> list[Units]:
    """The groups before anything was active."""
    match decomposition:
        case SparseDictionary():
            return _of_dictionary(decomposition)
        case NeuronBaseline():
            return _of_neurons(target, decomposition)
        case other:
            raise SettingError(
                f"decomposition: the parts of a {type(other).__name__} are not units with one direction each, so they "
                "cannot be matched with others; leave it out"
            )


def _of_dictionary(dictionary: SparseDictionary) -> list[Units]:
    require_rows(dictionary.banks, "they cannot be matched with other units")
    require(
        not dictionary.needs_sequences,
        "decomposition.architecture=lorsa has heads, which read several positions, for features, so they cannot be "
        "matched with other units; leave it out",
    )
    described = []
    for spec, bank in zip(dictionary.spec.groups, dictionary.banks, strict=True):
        reads = _by_site(bank.W_enc, dictionary.read_layout, spec.reads, bank.reads.start)
        writes = _by_site(bank.W_dec, dictionary.write_layout, spec.writes, bank.writes.start)
        first = min(site.layer for site in spec.reads)
        described.append(Units(spec.name, "", first, reads, writes, True, nothing(bank.n_features)))
    return described


def _of_neurons(target: Target, neurons: NeuronBaseline) -> list[Units]:
    described = []
    for layer, site in zip(neurons.layers, neurons.writes, strict=True):
        read = Site(layer, Point.mlp_in)
        own = target.neurons_of(read)
        reads, writes = {str(read): own.read.float().cpu()}, {str(site): own.write.float().cpu()}
        described.append(Units(f"L{layer}", "", layer, reads, writes, True, nothing(len(own.read))))
    return described


def _by_site(rows: Float[Tensor, "unit _"], layout: Layout, sites: Sequence[Site], start: int) -> Directions:
    """Rows over a span of the layout, site by site."""
    whole = rows.detach().float().cpu()
    spans = {str(site): layout.spans[site] for site in sites}
    return {name: whole[:, span.start - start : span.stop - start] for name, span in spans.items()}


def nothing(n_units: int) -> Activity:
    none = torch.zeros(0, dtype=torch.int64)
    return Activity(none, none, torch.zeros(0), 0, n_units)
