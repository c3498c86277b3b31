"""Which units of one decomposition another has too, by weights and by activity, and what chance would find.

    best        of a unit: the largest similarity with any unit of the other; many may claim the same one
    matched     with its own partner, where units are assigned one to one so that the sum is largest (`matching.match`); 0
                for those without one

Chance is measured by the same rule on `unit_similarity`'s two kinds of it, and p of a unit is the share of units as often
active (in strata), in all draws, that chance lets come as near: (1 + those at or above) / (1 + all).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nndecomp.evaluation.matching import match
from nndecomp.evaluation.unit_similarity import Turning, activity_similarity, weight_similarity
from nndecomp.evaluation.units import Units

# p cannot be smaller than 1 / (1 + draws): so many draws at least are in every stratum.
PER_STRATUM = 1000

# Of each group.
Similarities = Sequence[Float[Tensor, "_ _"]]


@dataclass(frozen=True)
class Sought:
    """Units of one decomposition looked for in another, groups side by side, and what chance finds of them."""

    similarity: Float[Tensor, " unit"]
    null: Float[Tensor, "draw unit"]
    stratum: Int[Tensor, " unit"]

    def p(self) -> Float[Tensor, " unit"]:
        """Share of units of the stratum that come as near by chance, the unit itself counted as one."""
        found = torch.ones_like(self.similarity)
        for own, null in self._strata():
            ordered = null.sort().values
            above = len(ordered) - torch.searchsorted(ordered, self.similarity[own].contiguous())
            found[own] = (1 + above).double() / (1 + len(ordered))
        return found

    def threshold(self, p: float) -> Float[Tensor, " unit"]:
        """What chance exceeds in a share p of the units of each one's stratum."""
        found = torch.zeros_like(self.similarity)
        for own, null in self._strata():
            found[own] = null.quantile(1 - p)
        return found

    def _strata(self) -> Iterator[tuple[Tensor, Float[Tensor, " drawn"]]]:
        for stratum in self.stratum.unique():
            own = self.stratum == stratum
            yield own, self.null[:, own].flatten()

    def share_above(self, cutoff: float) -> float:
        return (self.similarity > cutoff).double().mean().item()

    def share_of_null_above(self, cutoff: float) -> float:
        return (self.null > cutoff).double().mean().item()


def strata(firings: Int[Tensor, " unit"], n_draws: int) -> Int[Tensor, " unit"]:
    """As many equally large sets of units about as often active as have PER_STRATUM draws each, 10 at most."""
    n = min(10, len(firings) // -(-PER_STRATUM // n_draws))
    assert n > 0, f"{n_draws} draws of {len(firings)} units are fewer than {PER_STRATUM} chances"
    rank = firings.argsort(stable=True).argsort()
    return rank * n // len(firings)


@dataclass(frozen=True)
class Compared:
    """Two decompositions compared by weights or by activity: units of each looked for in the other."""

    best: Sought
    matched: Sought
    best_back: Sought  # units of the second, looked for in the first
    pairs: Similarities

    def nearest(self) -> Int[Tensor, " unit"]:
        """The unit of the second that is nearest to each of the first, counted within its group."""
        return torch.cat([each.argmax(1) for each in self.pairs])


def groups_of(a: Sequence[Units], b: Sequence[Units]) -> list[tuple[Units, Units]]:
    """Groups of the same layer that both have any unit in."""
    found = [(own, other) for own in a for other in b if own.layer == other.layer and own.n and other.n]
    names = [own.name for own, _ in found]
    assert found, "there is no layer in which both have a unit that is active"
    assert len(set(names)) == len(names), f"groups are compared one with one, but {names} stand more than once"
    return found


def by_weights(a: Sequence[Units], b: Sequence[Units], n_null: int, seed: int) -> Compared | None:
    """None where no space is common. n_null: chances drawn at least, over all units of either."""
    groups = groups_of(a, b)
    found = [weight_similarity(own, other) for own, other in groups]
    pairs = [each for each in found if each is not None]
    if not pairs:
        return None
    assert len(pairs) == len(found), "groups of some layers have spaces in common, and of others none"
    draw, turning = torch.Generator().manual_seed(seed), [Turning(own) for own, _ in groups]

    def chance() -> Similarities:
        drawn = [weight_similarity(own.drawn(draw), other) for own, (_, other) in zip(turning, groups, strict=True)]
        return [each for each in drawn if each is not None]

    return _compared(groups, pairs, chance, n_null)


def by_activity(a: Sequence[Units], b: Sequence[Units], n_null: int, seed: int, min_shift: int) -> Compared:
    """min_shift: tokens by which chance shifts the text at least, either way."""
    groups = groups_of(a, b)
    n_tokens = groups[0][0].activity.n_tokens
    assert 2 * min_shift < n_tokens, f"{n_tokens} tokens cannot be shifted by {min_shift} or more, either way"
    draw = torch.Generator().manual_seed(seed)

    def chance() -> Similarities:
        by = int(torch.randint(min_shift, n_tokens - min_shift + 1, (), generator=draw))
        return [activity_similarity(own.activity.shifted(by), other.activity) for own, other in groups]

    return _compared(
        groups, [activity_similarity(own.activity, other.activity) for own, other in groups], chance, n_null
    )


def _compared(
    groups: Sequence[tuple[Units, Units]],
    pairs: Similarities,
    chance: Callable[[], Similarities],
    n_null: int,
) -> Compared:
    first, second = (torch.cat([group[side].activity.firings for group in groups]) for side in (0, 1))
    n_draws = -(-max(n_null, PER_STRATUM) // min(len(first), len(second)))
    looks: list[Callable[[Similarities], Float[Tensor, " unit"]]] = [_best, _matched, _best_back]
    draws = [[look(drawn) for look in looks] for drawn in (chance() for _ in range(n_draws))]
    best, matched, back = (
        Sought(look(pairs), torch.stack([draw[i] for draw in draws]), strata(firings, n_draws))
        for i, (look, firings) in enumerate(zip(looks, (first, first, second), strict=True))
    )
    return Compared(best, matched, back, pairs)


def _best(pairs: Similarities) -> Float[Tensor, " unit"]:
    return torch.cat([each.amax(1) for each in pairs])


def _best_back(pairs: Similarities) -> Float[Tensor, " unit"]:
    return torch.cat([each.amax(0) for each in pairs])


def _matched(pairs: Similarities) -> Float[Tensor, " unit"]:
    whole = []
    for each in pairs:
        matching = match(each)
        whole.append(torch.zeros(len(each), dtype=torch.float64).index_copy(0, matching.first, matching.cosine))
    return torch.cat(whole)
