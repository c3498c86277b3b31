"""Selection among pre-activations that are seen a block of features at a time.

    a token's   the k entries with the largest key                  TokenBest
    a batch's   the n_slots entries with the largest positive key   BatchBest
    above       every entry whose key exceeds a threshold           Above

The key is z c (see `nndecomp.decompositions.normalisation`). Of entries with equal keys the first are selected: of a token those of the
first features, of a batch those of the first tokens. So what is selected does not depend on the blocks, of which none has more than
BLOCK entries: a [token, feature] matrix of all features is never held.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.decompositions.support import Support, split_slots

# 128 MiB in float32: where larger matrices gained nothing any more.
BLOCK = 1 << 25
# A batch's threshold is estimated from every 17th entry: a prime, so that all features are sampled.
_STRIDE = 17


def blocks(n_tokens: int, n_features: int) -> Iterator[slice]:
    """Features, about equally many at a time; multiples of 256, by which products and maxima divide well."""
    most = max(256, BLOCK // max(n_tokens, 1) // 256 * 256)
    n_blocks = -(-n_features // most)
    width = n_features if n_blocks == 1 else -(-n_features // (256 * n_blocks)) * 256
    for start in range(0, n_features, width):
        yield slice(start, min(start + width, n_features))


# A number at each entry of a block, and at each slot: several where pre-activations are made of several products.
Maps = Sequence[Float[Tensor, "token some_features"]]
Values = tuple[Float[Tensor, "slot"], ...]


@dataclass(frozen=True)
class Found:
    support: Support
    values: Values


@runtime_checkable
class Competition(Protocol):
    """Entries compete. Blocks may come in any order; none twice."""

    def add(self, first: int, keys: Float[Tensor, "token some_features"], maps: Maps) -> None:
        """Those of the features from number `first` on."""
        ...

    def found(self) -> Found: ...


class TokenBest:
    """The k entries of every token with the largest key; exactly k, also where fewer are positive. What is not a number goes first.

    signed: by the size of keys, whatever their sign.
    """

    def __init__(self, n_features: int, k: int, *, signed: bool = False) -> None:
        assert 0 < k <= n_features, f"k={k} of {n_features} features"
        self.n_features, self.k, self.signed = n_features, k, signed
        self._parts: list[tuple[Tensor, Tensor, Maps]] = []

    def add(self, first: int, keys: Float[Tensor, "token some_features"], maps: Maps) -> None:
        keys = keys.abs() if self.signed else keys
        best = largest(keys, min(self.k, keys.shape[1]))
        self.offer(best + first, keys.gather(1, best), tuple(each.gather(1, best) for each in maps))

    def offer(self, features: Int[Tensor, "token some"], keys: Float[Tensor, "token some"], maps: Maps) -> None:
        """The best of some features."""
        self._parts.append((features, keys, maps))

    def found(self) -> Found:
        features, keys, maps = self._parts[0]
        if len(self._parts) > 1:
            all_features, all_keys, all_maps = zip(*self._parts, strict=True)
            features, keys = torch.cat(all_features, 1), torch.cat(all_keys, 1)
            maps = [torch.cat(each, 1) for each in zip(*all_maps, strict=True)]
            features, order = features.sort(1)
            best = largest(keys.gather(1, order), self.k)
            features, order = features.gather(1, best), order.gather(1, best)
            maps = tuple(each.gather(1, order) for each in maps)
        n_tokens, k = features.shape
        assert k == self.k, f"{k} of {self.k} entries a token"
        offsets = torch.arange(n_tokens + 1, device=features.device) * k
        return Found(Support(features.flatten(), offsets, self.n_features), tuple(each.flatten() for each in maps))


def largest(keys: Float[Tensor, "token feature"], k: int) -> Int[Tensor, "token k"]:
    """The features of the k largest of every row, in no order; of equal ones the first."""
    # Again of maxima and of candidates; on a GPU launches would cost more than they save.
    best = _best(keys, k, levels=2 if keys.device.type == "cpu" else 1)
    smallest = best.values.amin(1, keepdim=True)
    # More than k that are as large: the smallest of them has equals.
    tied = torch.stack([(each >= smallest).sum(1) for each in best.looked_at]).amax(0) > k
    rows = tied.nonzero().squeeze(1)
    if len(rows):
        best.indices[rows] = _first_of_equals(keys[rows], smallest[rows], k)
    return best.indices


@dataclass(frozen=True)
class _Best:
    """The k largest of every row; which of equal ones is left open. None other is as large if of no matrix in `looked_at` more than k
    entries of the row are."""

    indices: Int[Tensor, "token k"]
    values: Float[Tensor, "token k"]
    looked_at: Sequence[Float[Tensor, "token _"]]


def _best(keys: Float[Tensor, "token feature"], k: int, levels: int) -> _Best:
    """Exact in two levels, or more: the k largest entries lie within the k groups that have the largest maxima."""
    n_groups = _groups(keys.shape[1], k)
    if levels == 0 or n_groups == keys.shape[1]:
        values, indices = keys.topk(k, sorted=False)
        return _Best(indices, values, [keys])
    groups = keys.unflatten(1, (-1, n_groups))  # feature f is in group f mod n_groups: maxima of whole vectors
    maxima = groups.amax(1)
    best = _best(maxima, k, levels - 1).indices
    candidates = groups.gather(2, best[:, None, :].expand(-1, groups.shape[1], -1)).flatten(1)
    found = _best(candidates, k, levels - 1)
    indices = found.indices // k * n_groups + best.gather(1, found.indices % k)
    return _Best(indices, found.values, [maxima, candidates])


def _groups(n_features: int, k: int) -> int:
    """Groups of which the k best are searched: a divisor of n_features near sqrt(n_features * k), where both levels of
    selection cost the same; n_features itself where two levels save nothing."""
    size = 1
    while n_features % (2 * size) == 0 and 2 * size * k <= n_features // max(size, 2):
        size *= 2
    return n_features // size


def _first_of_equals(
    keys: Float[Tensor, "token feature"], smallest: Float[Tensor, "token 1"], k: int
) -> Int[Tensor, "token k"]:
    """All that are larger than the smallest of the k largest, and the first of those that equal it."""
    larger, equal = keys > smallest, keys == smallest
    room = k - larger.sum(1, keepdim=True)
    return (larger | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))).nonzero()[:, 1].view(-1, k)


class _Entries:
    """Entries by their places: token * n_features + feature."""

    def __init__(self, n_tokens: int, n_features: int) -> None:
        self.n_tokens, self.n_features = n_tokens, n_features
        self._in_order = True
        self._held: tuple[Tensor, Tensor, Values] | None = None  # places, keys, and the values of each map

    def _hold(self, first: int, keys: Tensor, maps: Maps, within: Int[Tensor, "slot"]) -> None:
        """Those at some places of a block, counted within it."""
        width = keys.shape[1]
        places = within if width == self.n_features else within // width * self.n_features + within % width + first
        new, *values = (each.flatten().index_select(0, within) for each in (keys, *maps))
        if self._held is not None:
            self._in_order = False
            places, new = torch.cat([self._held[0], places]), torch.cat([self._held[1], new])
            values = [torch.cat(both) for both in zip(self._held[2], values, strict=True)]
        self._held = places, new, tuple(values)

    def found(self) -> Found:
        assert self._held is not None, "no block has been looked at"
        places, _, values = self._held
        if not self._in_order:
            places, order = places.sort()
            values = tuple(each[order] for each in values)
        tokens, features = places // self.n_features, places % self.n_features
        return Found(Support.of(tokens, features, self.n_tokens, self.n_features), values)


class BatchBest(_Entries):
    """The n_slots entries of a batch with the largest strictly positive key; all positive ones where there are fewer."""

    def __init__(self, n_tokens: int, n_features: int, n_slots: int) -> None:
        super().__init__(n_tokens, n_features)
        self.n_slots = min(n_slots, n_tokens * n_features)
        self._floor = 0.0  # once there are enough: what another one must reach

    def add(self, first: int, keys: Float[Tensor, "token some_features"], maps: Maps) -> None:
        flat = keys.flatten()
        n = min(self.n_slots, len(flat))
        within = _candidates(flat, n, self._floor)
        if len(within) > n:
            within = within[_first_largest(flat[within], within, n)]
        self._hold(first, keys, maps, within)
        assert self._held is not None
        places, held, values = self._held
        if len(places) > self.n_slots:
            best = _first_largest(held, places, self.n_slots)
            self._held = places, held, values = places[best], held[best], tuple(each[best] for each in values)
        if len(places) == self.n_slots:
            self._floor = float(held.amin())


def _candidates(flat: Float[Tensor, "entry"], n: int, floor: float) -> Int[Tensor, "_"]:
    """At least the n largest positive entries that reach the floor, in their order; all of them where there are fewer.

    A threshold guessed from a sample narrows them down and is checked against their number.
    """
    sample = flat[::_STRIDE]
    rank = min(int(1.2 * n / _STRIDE) + 16, len(sample))
    guess = float(sample.topk(rank, sorted=False).values.amin())
    if guess > floor:
        some = (flat > guess).nonzero().squeeze(1)
        if len(some) >= n:
            return some
    return ((flat >= floor) if floor > 0 else (flat > 0)).nonzero().squeeze(1)


def _first_largest(keys: Float[Tensor, "entry"], places: Int[Tensor, "entry"], n: int) -> Int[Tensor, "n"]:
    """Which are the n largest of more, in their order; of equal ones those of the first places."""
    smallest = keys.topk(n, sorted=False).values.amin()
    chosen, equal = keys > smallest, (keys == smallest).nonzero().squeeze(1)
    room = n - int(chosen.sum())
    chosen[equal if len(equal) == room else equal[places[equal].argsort()[:room]]] = True
    return chosen.nonzero().squeeze(1)


class Above(_Entries):
    """Every entry strictly above the threshold of its feature, compared in the wider of the two types."""

    def __init__(self, n_tokens: int, threshold: Float[Tensor, "feature"]) -> None:
        super().__init__(n_tokens, len(threshold))
        self.threshold = threshold

    def add(self, first: int, keys: Float[Tensor, "token some_features"], maps: Maps) -> None:
        above = keys > self.threshold[first : first + keys.shape[1]]
        self._hold(first, keys, maps, above.flatten().nonzero().squeeze(1))


def topk_support(keys: Float[Tensor, "token feature"], k: int) -> Support:
    """The k largest of every row, of a matrix that is there."""
    best = TokenBest(keys.shape[1], k)
    best.add(0, keys, ())
    return best.found().support


def split(found: Found, widths: Sequence[int]) -> list[Found]:
    """Of groups whose features stand side by side."""
    if len(widths) == 1:
        return [found]
    support = found.support
    parts = zip(split_slots(support.indices, widths), widths, strict=True)
    return [
        Found(
            Support.of(support.tokens[own], indices, support.n_tokens, width), tuple(each[own] for each in found.values)
        )
        for (own, indices), width in parts
    ]
