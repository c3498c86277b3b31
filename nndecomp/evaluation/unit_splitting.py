"""What becomes of a unit in a larger decomposition: kept, split in several, absorbed, or lost.

A unit's children are chosen greedily among the units of the larger decomposition: as long as one raises F1, by more than
0.03, of the union of the children's tokens as a guess of the tokens P on which the unit, the parent, is active:

    recall = |union & P| / |P|      precision = |union & P| / |union|      F1 = 2 |union & P| / (|union| + |P|)

(0.03 is the rise by which SAEBench's k-sparse probes count split features; Chanin et al. 2024, arXiv 2409.14507.)
A parent with F1 of COVERED or more is kept (one child) or split (more); the others are lost.

Absorption is `absorption.absorbed`, with the parent's write direction w as the probe, what the parent writes along it as
what is to be found there (p = its value * |w|), and as main latent the one unit of the larger decomposition nearest to it:
where that one is silent or writes too little, others that write along w have taken it over.
"""

from dataclasses import dataclass

import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.evaluation.absorption import F1_GAIN, absorbed
from nndecomp.evaluation.matching import cosines
from nndecomp.evaluation.units import Activity, Units

MAX_CHILDREN = 10
COVERED = 0.5
MAX_TOKENS = 512  # of a parent, evenly spread over the text, on which absorption is measured


@dataclass(frozen=True)
class Cover:
    """Of each parent: its children, and how well they are active where it is."""

    n_children: Int[Tensor, " unit"]
    recall: Float[Tensor, " unit"]
    precision: Float[Tensor, " unit"]

    @property
    def f1(self) -> Float[Tensor, " unit"]:
        total = self.recall + self.precision
        return torch.where(total > 0, 2 * self.recall * self.precision / total.clamp(min=1e-30), 0.0)

    @property
    def parts(self) -> Int[Tensor, " unit"]:
        """Children of those that are covered; 0: lost."""
        return torch.where(self.f1 >= COVERED, self.n_children, 0)

    @staticmethod
    def joined(covers: "list[Cover]") -> "Cover":
        columns = zip(*((each.n_children, each.recall, each.precision) for each in covers), strict=True)
        return Cover(*(torch.cat(column) for column in columns))


def cover(parents: Activity, children: Activity) -> Cover:
    """Every parent by as many children as help, MAX_CHILDREN at most."""
    assert parents.n_tokens == children.n_tokens, (
        f"activity on {parents.n_tokens} and on {children.n_tokens} tokens cannot be compared"
    )
    if parents.is_dense and children.is_dense:
        return cover_at_once(parents, children)
    candidates, own = _Candidates(children), parents.amounts.tocsc()
    found = [_cover(own.indices[own.indptr[i] : own.indptr[i + 1]], candidates) for i in range(parents.n_units)]
    n, recall, precision = torch.tensor(found, dtype=torch.float64).reshape(-1, 3).T
    return Cover(n.long(), recall, precision)


def cover_at_once(parents: Activity, children: Activity) -> Cover:
    """The same for all parents together, a child each at a time, by products of dense matrices: where activity is no longer
    sparse, counting entry by entry takes tens of times as long. Counts are exact in float32, up to 2^24 tokens."""
    assert parents.n_tokens < 2**24, f"{parents.n_tokens} tokens cannot be counted in float32"
    is_parents, is_childs = ((each.amounts.toarray() > 0).T for each in (parents, children))
    active = is_childs.T.astype(numpy.float32)
    n_tokens = is_parents.sum(1)
    is_covered = numpy.zeros_like(is_parents)
    right = is_parents.astype(numpy.float32) @ active
    wrong = children.firings.numpy() - right
    n_right, n_wrong, n_chosen = numpy.zeros((3, len(is_parents)), dtype=numpy.int64)
    f1, going = numpy.zeros(len(is_parents)), numpy.flatnonzero(n_tokens > 0)
    for _ in range(MAX_CHILDREN):
        right_then = n_right[going, None] + right[going].astype(numpy.float64)
        union_then = right_then + n_wrong[going, None] + wrong[going]
        would_be = 2 * right_then / (n_tokens[going, None] + union_then)
        best = would_be.argmax(1)
        reached = would_be[numpy.arange(len(going)), best]
        helps = reached > f1[going] + F1_GAIN
        going, best = going[helps], best[helps]
        if not len(going):
            break
        f1[going], n_chosen[going] = reached[helps], n_chosen[going] + 1
        added = is_childs[best] & ~is_covered[going]
        is_covered[going] |= added
        inside = added & is_parents[going]
        outside = added & ~is_parents[going]
        n_right[going] += inside.sum(1)
        n_wrong[going] += outside.sum(1)
        right[going] -= inside.astype(numpy.float32) @ active
        wrong[going] -= outside.astype(numpy.float32) @ active
    recall, precision = n_right / n_tokens.clip(1), n_right / (n_right + n_wrong).clip(1)
    return Cover(*(torch.from_numpy(each) for each in (n_chosen, recall, precision)))


class _Candidates:
    """Units by token and tokens by unit, as compressed rows and columns."""

    def __init__(self, activity: Activity) -> None:
        rows, columns = activity.amounts, activity.amounts.tocsc()
        self.n_tokens, self.n_units = activity.n_tokens, activity.n_units
        self.firings = activity.firings.numpy()
        self._units, self._starts, self._lengths = rows.indices, rows.indptr[:-1], numpy.diff(rows.indptr)
        self._tokens, self._columns = columns.indices, columns.indptr

    def tokens_of(self, unit: int) -> numpy.ndarray:
        return self._tokens[self._columns[unit] : self._columns[unit + 1]]

    def active_on(self, tokens: numpy.ndarray) -> numpy.ndarray:
        """Of each unit: on how many of these tokens it is active."""
        lengths = self._lengths[tokens]
        ends = lengths.cumsum()
        slots = numpy.repeat(self._starts[tokens] - ends + lengths, lengths) + numpy.arange(
            ends[-1] if len(ends) else 0
        )
        return numpy.bincount(self._units[slots], minlength=self.n_units)


def _cover(tokens: numpy.ndarray, candidates: _Candidates) -> tuple[int, float, float]:
    """Children, recall and precision of one parent that is active on `tokens`."""
    is_parents, is_covered = numpy.zeros((2, candidates.n_tokens), dtype=bool)
    is_parents[tokens] = True
    # What each child would add to the union: tokens of the parent, and others.
    right = candidates.active_on(tokens)
    wrong = candidates.firings - right
    n_right = n_wrong = n_chosen = 0
    f1 = 0.0
    while n_chosen < MAX_CHILDREN and len(tokens):
        would_be = 2 * (n_right + right) / (len(tokens) + n_right + n_wrong + right + wrong)
        best = int(would_be.argmax())
        if would_be[best] <= f1 + F1_GAIN:
            break
        f1, n_chosen = float(would_be[best]), n_chosen + 1
        added = candidates.tokens_of(best)
        added = added[~is_covered[added]]
        is_covered[added] = True
        inside, outside = added[is_parents[added]], added[~is_parents[added]]
        n_right, n_wrong = n_right + len(inside), n_wrong + len(outside)
        right = right - candidates.active_on(inside)
        wrong = wrong - candidates.active_on(outside)
    return n_chosen, n_right / max(1, len(tokens)), n_right / max(1, n_right + n_wrong)


@dataclass(frozen=True)
class Absorbed:
    """Of each parent that has a main unit in the larger decomposition."""

    fraction: Float[Tensor, " unit"]
    full: Float[Tensor, " unit"]

    @staticmethod
    def joined(parts: "list[Absorbed]") -> "Absorbed":
        return Absorbed(torch.cat([each.fraction for each in parts]), torch.cat([each.full for each in parts]))


def absorption_across(small: Units, large: Units, cutoff: float) -> Absorbed:
    """Of parents whose write direction some unit of `large` has to a cosine above `cutoff`, in the spaces both write.

    Each unit is asked as what it writes when it is active: those with a negative value are of the opposite direction.
    """
    common = [space for space in small.writes if space in large.writes]
    assert common, f"{small.name} writes {', '.join(small.writes)}, and nothing of it is written by {large.name}"
    own, other = (torch.cat([each.writes[space] for space in common], 1).double() for each in (small, large))
    cosine, nearest = cosines(own, other).max(1)
    codes, by_parent = large.activity.codes, small.activity.codes.tocsc()
    found = []
    for i in (cosine > cutoff).nonzero()[:, 0].tolist():
        entries = slice(by_parent.indptr[i], by_parent.indptr[i + 1])
        tokens, values = by_parent.indices[entries], by_parent.data[entries]
        tokens, values = tokens[values > 0], values[values > 0]
        if len(tokens):
            some = numpy.linspace(0, len(tokens) - 1, min(MAX_TOKENS, len(tokens))).round().astype(int)
            z = torch.from_numpy(codes[tokens[some]].toarray())
            length = own[i].norm()
            p = torch.from_numpy(values[some]) * length
            found.append(absorbed(z, other, own[i] / length, p, nearest[i : i + 1]))
    fraction, full = torch.tensor(found, dtype=torch.float64).reshape(-1, 2).T
    return Absorbed(fraction, full)
