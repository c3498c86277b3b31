"""A dictionary inside one forward pass of the model, site by site."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from nndecomp.activations.sequences import RowsOrSequences, beside
from nndecomp.decompositions.codes import Codes, GroupCodes
from nndecomp.types import Site

if TYPE_CHECKING:
    from nndecomp.decompositions.groups import SparseDictionary


class DictionaryRun:
    """A pass in which groups are encoded once what they write is asked for, or which features are active; they add to what they
    write in the order in which the last site they read arrived."""

    def __init__(self, dictionary: "SparseDictionary") -> None:
        self._dictionary = dictionary
        self._values: dict[Site, RowsOrSequences] = {}
        self._waiting: list[tuple[int, ...]] = []  # groups that have read all their sites, and are not encoded
        self._codes: dict[int, GroupCodes] = {}
        self._y_hat: Tensor | None = None

    def read(self, site: Site, value: RowsOrSequences) -> None:
        dictionary = self._dictionary
        assert site in dictionary.read_layout.spans, f"{site} is not read"
        assert site not in self._values, f"{site} was read before in this pass"
        self._values[site] = value
        if self._y_hat is None:
            self._y_hat = dictionary.b_dec.repeat(len(value), 1)
        for groups in dictionary.together:
            needed = {read for g in groups for read in dictionary.spec.groups[g].reads}
            if site in needed and needed <= self._values.keys():
                self._waiting.append(groups)

    def _encode_writers(self, site: Site) -> None:
        """Those that wait and write the site, and those that write what these write: the order of sums stays as it is."""
        reached, due = {site}, set[tuple[int, ...]]()
        writes = {
            groups: {to for g in groups for to in self._dictionary.spec.groups[g].writes} for groups in self._waiting
        }
        while more := {groups for groups, own in writes.items() if own & reached} - due:
            due |= more
            reached |= {to for groups in more for to in writes[groups]}
        self._encode_all([groups for groups in self._waiting if groups in due])

    def _encode_all(self, due: list[tuple[int, ...]]) -> None:
        assert self._y_hat is not None, "nothing was read"
        self._waiting = [groups for groups in self._waiting if groups not in due]
        for groups in due:
            self._encode(groups, self._y_hat)

    def _encode(self, groups: tuple[int, ...], y_hat: Float[Tensor, "token d_writes"]) -> None:
        dictionary = self._dictionary
        reads = [[self._values[read] for read in dictionary.spec.groups[g].reads] for g in groups]
        inputs = [beside(values) if len(values) > 1 else values[0] for values in reads]
        encoded = dictionary.encode_groups(inputs, groups).codes
        for g, x, codes in zip(groups, inputs, encoded, strict=True):
            bank = dictionary.banks[g]
            self._codes[g] = codes
            y_hat[:, bank.writes] += bank.contribution(x, codes)

    def write(self, site: Site) -> Float[Tensor, "token width"]:
        assert self._y_hat is not None, f"{site} is written, but nothing was read"
        self._encode_writers(site)
        missing = [
            spec.name
            for g, spec in enumerate(self._dictionary.spec.groups)
            if site in spec.writes and g not in self._codes
        ]
        assert not missing, f"{site} is written before groups {missing} have read all their sites"
        # A copy: autograd refuses what shares memory with columns that later groups add to.
        return self._y_hat[:, self._dictionary.write_layout.spans[site]].clone()

    def active(self) -> Codes:
        self._encode_all(self._waiting)
        n_groups = len(self._dictionary.groups)
        assert len(self._codes) == n_groups, f"{len(self._codes)} of {n_groups} groups have been encoded"
        return self._dictionary.counted(Codes(tuple(self._codes[g] for g in range(n_groups))))
